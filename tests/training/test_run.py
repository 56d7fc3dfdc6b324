"""What may change when a run is resumed, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from hymba.errors import HymbaError
from hymba.text import train_tokenizer
from hymba.training import Recipe, pretrain
from hymba.training.journal import read_log


@pytest.fixture
def started(recipe: Recipe, books: Path, tmp_path: Path) -> Path:
    """A run that has come to its first checkpoint."""
    out = tmp_path / "out"
    pretrain(recipe, [books], out)
    reopen(out)
    return out


def reopen(out: Path) -> None:
    """Take a finished run back to its first checkpoint."""
    (out / "report.json").unlink()
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoint-8")


def refused(recipe: Recipe, data: list[Path], out: Path, reason: str) -> None:
    with pytest.raises(HymbaError, match=f"was started with (a )?different {reason}: choose another --out") as error:
        pretrain(recipe, data, out)
    assert "\n" not in str(error.value)


def test_another_recipe_or_other_data_is_refused(recipe: Recipe, books: Path, started: Path) -> None:
    (books / "cats.txt").write_text("Changed.")
    refused(replace(recipe, peak_lr=2e-2, save_every=3), [books], started, "data, peak_lr")


def test_other_data_of_the_same_size_name_and_time_is_refused(recipe: Recipe, books: Path, started: Path) -> None:
    for name, reason in (("cats.txt", "data"), ("dogs.txt", "held_out")):
        path = books / name
        text, times = path.read_text(encoding="utf-8"), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
        path.write_text(text[::-1], encoding="utf-8")
        os.utime(path, ns=times)
        refused(recipe, [books], started, reason)
        path.write_text(text, encoding="utf-8")
    assert pretrain(recipe, [books], started)["steps"] == 8


def test_the_same_data_elsewhere_is_the_same_data(
    micro: dict[str, Any], recipe: Recipe, books: Path, tmp_path: Path
) -> None:
    (books / "mice.txt").write_text("A mouse ran over the mat.\n" * 40)
    pretrain(recipe, [books], tmp_path / "out")
    expected = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    reopen(tmp_path / "out")
    moved = books.rename(tmp_path / "moved")
    (moved / "mice.txt").rename(moved / "a.txt")
    (moved / "dogs.txt").rename(moved / "wolves.txt")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    pretrain(Recipe(**micro | {"held_out": ["wolves.txt"]}), sorted(moved.iterdir()), tmp_path / "out")
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == expected


def test_a_run_without_its_description_is_refused(recipe: Recipe, books: Path, started: Path) -> None:
    for content in (b"", b"{", b"[]", b"\xff"):
        (started / "run.json").write_bytes(content)
        with pytest.raises(HymbaError, match=r"run.json is missing or damaged: choose another --out, or delete"):
            pretrain(recipe, [books], started)


def test_a_finished_run_is_no_other_run(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pretrain(recipe, [books], out)
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    refused(replace(recipe, seed=1), [books], out, "seed")
    (out / "report.json").write_bytes(b"{")
    assert pretrain(recipe, [books], out)["steps"] == 8


def other_merges(directory: Path, books: Path) -> None:
    state = json.loads((directory / "tokenizer.json").read_text())
    half = len(state["model"]["merges"]) // 2
    state["model"]["merges"] = state["model"]["merges"][half:] + state["model"]["merges"][:half]
    (directory / "tokenizer.json").write_text(json.dumps(state))


def other_vocabulary(directory: Path, books: Path) -> None:
    train_tokenizer([books / "dogs.txt"], 300, directory)


def other_normalizer(directory: Path, books: Path) -> None:
    state = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(state | {"normalizer": {"type": "Lowercase"}}))


@pytest.mark.parametrize("change", [other_merges, other_vocabulary, other_normalizer])
@pytest.mark.parametrize("finished", [False, True])
def test_another_tokenizer_is_refused(
    recipe: Recipe, books: Path, tmp_path: Path, tokenizer: Any, change: Callable[[Path, Path], None], finished: bool
) -> None:
    """`tokenizer` is the fixture that writes the directory."""
    recipe, out = replace(recipe, tokenizer=str(tmp_path / "tokenizer")), tmp_path / "out"
    pretrain(recipe, [books], out)
    if not finished:
        reopen(out)
    change(tmp_path / "tokenizer", books)
    refused(recipe, [books], out, "tokenizer")


def test_the_same_tokenizer_elsewhere_is_the_same_tokenizer(
    recipe: Recipe, books: Path, tmp_path: Path, tokenizer: Any
) -> None:
    out = tmp_path / "out"
    pretrain(replace(recipe, tokenizer=str(tmp_path / "tokenizer")), [books], out)
    reopen(out)
    file = (tmp_path / "tokenizer").rename(tmp_path / "moved") / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    pretrain(replace(recipe, tokenizer=str(tmp_path / "moved")), [books], out)


def test_a_checkpoint_of_another_run_is_refused(
    recipe: Recipe, micro: dict[str, Any], books: Path, started: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    pretrain(Recipe(**micro | {"model": micro["model"] | {"d_state": 8}}), [books], other)
    shutil.copytree(other / "checkpoint-8", started / "checkpoint-8")
    with pytest.raises(HymbaError, match=r"checkpoint-8 is of a different model: its d_state is 8, not 4"):
        pretrain(recipe, [books], started)


def test_a_new_tokenizer_is_trained_when_data_changed_before_any_checkpoint(
    recipe: Recipe, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size and name: the vocabulary would otherwise stay that of the old text."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("hymba.training.pretraining._train", lambda *_: {})
        pretrain(recipe, [books], out)
        before = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")).get_vocab()
        text = (books / "cats.txt").read_text(encoding="utf-8")
        (books / "cats.txt").write_text(text.replace("mat", "xyz"), encoding="utf-8")
        pretrain(recipe, [books], out)
    after = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json")).get_vocab()
    assert after != before


@pytest.mark.parametrize("content", [b"\xff\xfe", b"null\n3\n", b'{"step": 1}\n'])
def test_a_damaged_log_is_started_anew(recipe: Recipe, books: Path, started: Path, content: bytes) -> None:
    (started / "log.jsonl").write_bytes(content)
    pretrain(recipe, [books], started)
    assert [line["step"] for line in read_log(started / "log.jsonl")] == [8, 8]


def test_a_run_without_digests_is_resumed(recipe: Recipe, books: Path, started: Path) -> None:
    run = json.loads((started / "run.json").read_text())
    del run["digests"]
    (started / "run.json").write_text(json.dumps(run))
    pretrain(recipe, [books], started)
