"""A checkpoint that is not whole is passed over, in one line."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hymba.errors import HymbaError
from hymba.files import replace_directory, replacing
from hymba.training import Recipe, pretrain
from hymba.training.checkpoint import MANIFEST, find_problem, find_whole_checkpoint, list_checkpoints, remove_old

FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
)


@pytest.fixture
def run(recipe: Recipe, books: Path, tmp_path: Path) -> Path:
    """The directory of a run with checkpoints of steps 4 and 8, whose model is still to be written."""
    out = tmp_path / "run"
    pretrain(recipe, [books], out)
    (out / "report.json").unlink()
    shutil.rmtree(out / "model")
    return out


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the last checkpoint, as copies: a mapped file must not be changed."""
    stored = load_file(run / "checkpoint-8" / "model.safetensors")
    return {name: value.clone() for name, value in stored.items()}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "short": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a bit": flip,
}


@pytest.mark.slow
def test_every_damage_of_every_file_is_found_with_and_without_a_manifest(run: Path, tmp_path: Path) -> None:
    """Without one, as in older checkpoints, a changed bit may go unseen, and so may a file that still loads."""
    whole = run / "checkpoint-8"
    assert {file.name for file in whole.iterdir()} >= {*FILES, MANIFEST}
    assert find_problem(whole) is None
    for manifest in (True, False):
        for name in FILES:
            for kind, damage in DAMAGES.items():
                copy = Path(shutil.copytree(whole, tmp_path / "copy" / "checkpoint-8"))
                if not manifest:
                    (copy / MANIFEST).unlink()
                    assert find_problem(copy) is None
                damage(copy / name)
                problem = find_problem(copy)
                if manifest or kind != "a bit":
                    assert problem is not None, (name, kind)
                    assert name in problem
                    assert "\n" not in problem
                shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_the_checkpoint_before_a_damaged_one_is_resumed_from(
    recipe: Recipe, books: Path, run: Path, capsys: Any, name: str
) -> None:
    expected = read_weights(run)
    (run / "checkpoint-8" / name).write_bytes(b"cut")
    pretrain(recipe, [books], run)
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"checkpoint-8: {name} " in warnings[0]
    assert warnings[0].endswith("resuming from checkpoint-4")
    found = read_weights(run)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert find_problem(run / "checkpoint-8") is None


def test_a_checkpoint_with_numbers_that_are_not_finite_is_passed_over(
    recipe: Recipe, books: Path, run: Path, capsys: Any
) -> None:
    weights = read_weights(run)
    next(iter(weights.values())).view(-1)[0] = torch.nan
    save_file(weights, run / "checkpoint-8" / "model.safetensors", {"format": "pt"})
    assert find_problem(run / "checkpoint-8") == "model.safetensors holds numbers that are not finite"
    state = torch.load(run / "checkpoint-4" / "optimizer.pt", weights_only=True)
    state["pair"][1]["state"][0]["exp_avg"].fill_(torch.inf)
    torch.save(state, run / "checkpoint-4" / "optimizer.pt")
    assert find_problem(run / "checkpoint-4") == "optimizer.pt holds numbers that are not finite"
    with pytest.raises(HymbaError, match=r"no checkpoint can be resumed from .*: delete them to start over") as error:
        pretrain(recipe, [books], run)
    assert "\n" not in str(error.value)
    assert "warning" not in capsys.readouterr().err
    for checkpoint in list_checkpoints(run):
        shutil.rmtree(checkpoint)
    assert pretrain(recipe, [books], run)["steps"] == 8


def test_no_code_in_a_checkpoint_is_run(run: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        copy = Path(shutil.copytree(run / "checkpoint-8", tmp_path / name / "checkpoint-8"))
        (copy / MANIFEST).unlink()
        torch.save(Harmful(), copy / name, pickle_module=pickle)
        assert str(find_problem(copy)).startswith(f"{name} cannot be read")
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_under_the_number_of_another_is_passed_over(run: Path) -> None:
    (run / "checkpoint-8").rename(run / "checkpoint-9")
    assert find_problem(run / "checkpoint-9") == "trainer_state.json is of step 8"
    seen: list[str] = []
    assert find_whole_checkpoint(run, seen.append) == run / "checkpoint-4"
    assert len(seen) == 1


def test_old_checkpoints_are_removed_and_so_are_those_of_a_given_up_attempt(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-4.mine").mkdir()
    remove_old(tmp_path, 6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-4.mine", "checkpoint-6"]


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record(kind: str, original: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            named = os.readlink(f"/proc/self/fd/{arguments[0]}") if kind == "sync" else str(arguments[0])
            events.append(f"{kind} {Path(named).name}")
            return original(*arguments, **options)

        return wrapper

    monkeypatch.setattr(os, "fsync", record("sync", fsync))
    monkeypatch.setattr(os, "rename", record("rename", rename))
    monkeypatch.setattr(os, "replace", record("rename", replace))
    (tmp_path / "partial" / "deep").mkdir(parents=True)
    (tmp_path / "partial" / "a").write_text("x")
    (tmp_path / "partial" / "deep" / "b").write_text("x")
    replace_directory(tmp_path / "partial", tmp_path / "whole")
    position = events.index("rename partial")
    assert set(events[:position]) == {"sync a", "sync b", "sync deep", "sync partial"}
    assert events[position + 1 :] == [f"sync {tmp_path.name}"]
    events.clear()
    with replacing(tmp_path / "c") as file:
        file.write_text("x")
    assert [event.split()[0] for event in events][:2] == ["sync", "rename"]


def test_the_manifest_names_every_file(run: Path) -> None:
    manifest = json.loads((run / "checkpoint-8" / MANIFEST).read_text())
    assert {*manifest, MANIFEST} == {file.name for file in (run / "checkpoint-8").iterdir()}
