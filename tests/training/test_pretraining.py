import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hymba.errors import HymbaError
from hymba.hf import HymbaForCausalLM
from hymba.ops.selective_scan import selective_scan
from hymba.text import load_tokenizer
from hymba.training import Recipe, pretrain
from hymba.training.checkpoint import last_checkpoint
from hymba.training.data import Corpus
from hymba.training.journal import Journal, read_log
from hymba.training.packing import IGNORED, PackedRows
from hymba.training.pretraining import build_config, build_model


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Have something happen at the end of a step, once."""

    def arrange(step: int, happening: Callable[[], None]) -> None:
        original = Journal.on_step_end
        pending = [happening]

        def on_step_end(self: Journal, args: Any, state: Any, control: Any, **rest: Any) -> None:
            original(self, args, state, control, **rest)
            if state.global_step == step and pending:
                pending.pop()()

        monkeypatch.setattr(Journal, "on_step_end", on_step_end)

    return arrange


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_writes_model_report_log_and_curve(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = replace(recipe, steps=20, save_dtype="bfloat16")
    report = pretrain(recipe, [books], out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["steps"] == 20
    assert report["tokens"] == 20 * 4 * 24
    assert report["held_out_bytes"] == (books / "dogs.txt").stat().st_size
    assert 0 < report["held_out_bits_per_byte"] < 8
    log = read_log(out / "log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [10, 20]
    assert [line["step"] for line in log if "held_out_bits_per_byte" in line] == [4, 8, 12, 16, 20]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[1] < losses[0]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    model = HymbaForCausalLM.from_pretrained(out / "model")
    assert model.dtype == torch.bfloat16
    assert len(load_tokenizer(out / "model")) == model.config.vocab_size
    assert len({file.stat().st_mode for file in (out / "model").iterdir()}) == 1
    card = (out / "model" / "README.md").read_text()
    assert f"{report['parameters']:,} parameters" in card
    assert card.index("Held out") < card.index("dogs.txt") < card.index("## Training")
    assert str(report["held_out_bits_per_byte"]) in card
    assert not list(out.glob("*.partial"))
    assert not list(out.rglob("training_args.bin"))
    assert pretrain(recipe, [books], out) == report


def test_bits_per_byte_is_that_of_the_saved_model(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    report = pretrain(recipe, [books], tmp_path / "out")
    model = HymbaForCausalLM.from_pretrained(tmp_path / "out" / "model")
    text = (books / "dogs.txt").read_text(encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "out" / "model")
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    bits = 0.0
    for start in range(0, len(ids), 23):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 23]]])
        with torch.no_grad():
            scores = model(row).logits[0, :-1].log_softmax(-1)
        bits -= scores.gather(1, row[0, 1:, None]).sum().item() / torch.tensor(2.0).log().item()
    assert bits / len(text.encode()) == pytest.approx(report["held_out_bits_per_byte"], abs=1e-3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    recipe: Recipe, books: Path, tmp_path: Path, at_step: Any, capsys: Any, optimizer: str
) -> None:
    recipe = replace(recipe, optimizer=optimizer)
    pretrain(recipe, [books], tmp_path / "whole")
    at_step(3, interrupt)
    with pytest.raises(SystemExit) as stop:
        pretrain(recipe, [books], tmp_path / "parted")
    assert stop.value.code == 130
    assert "saved at step 3: run the same command again to go on" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "parted") == tmp_path / "parted" / "checkpoint-3"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    report = pretrain(recipe, [books], tmp_path / "parted")
    assert_same_weights(tmp_path / "whole", tmp_path / "parted")
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "parted")]
    held_out = [[line["held_out_bits_per_byte"] for line in log if "loss" not in line] for log in logs]
    assert held_out[0] == held_out[1]
    assert report["steps"] == 8


def test_a_crash_costs_only_the_steps_since_the_last_whole_checkpoint(
    recipe: Recipe, books: Path, tmp_path: Path, at_step: Any
) -> None:
    pretrain(recipe, [books], tmp_path / "whole")

    def crash() -> None:
        raise RuntimeError("the power went out")

    out = tmp_path / "crashed"
    at_step(6, crash)
    with pytest.raises(RuntimeError, match="power"):
        pretrain(recipe, [books], out)
    # What a crash amid saving leaves: files under the name of no checkpoint.
    (out / "checkpoint.partial" / "checkpoint-6").mkdir(parents=True)
    (out / "checkpoint.partial" / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "tok')
    assert last_checkpoint(out) == out / "checkpoint-4"
    pretrain(recipe, [books], out)
    assert_same_weights(tmp_path / "whole", out)
    assert all("tokens" in line for line in read_log(out / "log.jsonl"))
    assert not (out / "checkpoint.partial").exists()


def test_ctrl_c_while_tokenizing_ends_with_130(
    recipe: Recipe, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def read(file: Path) -> Any:
        interrupt()
        yield iter(["never"])

    monkeypatch.setattr("hymba.training.data.stream_documents", read)
    with pytest.raises(SystemExit) as stop:
        pretrain(recipe, [books], tmp_path / "out")
    assert stop.value.code == 130
    assert "interrupted: run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    pretrain(replace(recipe, steps=1), [books], tmp_path / "out")


def test_a_packed_batch_costs_what_its_pieces_cost_alone(recipe: Recipe, tokenizer: Any) -> None:
    lengths = [7, 3, 30, 1]
    tokens = torch.randint(3, len(tokenizer), (sum(lengths),), generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, *lengths]).cumsum(0).numpy()
    rows = PackedRows(Corpus(tokens.numpy(), offsets, sum(lengths), ""), 16, bos=1, pad=2)
    batch = torch.utils.data.default_collate([rows[i] for i in range(len(rows))])
    model = build_model(recipe, tokenizer).eval()
    nats = 0.0
    for ids, positions, labels in zip(*batch.values(), strict=True):
        starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
        for start, stop in pairwise(starts):
            if targets := (labels[start:stop] != IGNORED).sum().item():
                alone = model(ids[None, start:stop], labels=labels[None, start:stop])
                nats += alone.loss.item() * targets
    assert model(**batch).loss.item() * sum(lengths) == pytest.approx(nats, rel=1e-5)


def test_micro_batches_give_the_same_gradients(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    (books / "short.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(300)))
    ends = []
    for micro_rows in (4, 2, 1):
        out = tmp_path / str(micro_rows)
        pretrain(replace(recipe, micro_rows=micro_rows, steps=1), [books], out)
        ends.append(next(line for line in read_log(out / "log.jsonl") if "loss" in line))
    for end in ends[1:]:
        assert end["loss"] == pytest.approx(ends[0]["loss"], rel=1e-5)
        assert end["grad_norm"] == pytest.approx(ends[0]["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        out = tmp_path / str(checkpointing)
        pretrain(replace(recipe, gradient_checkpointing=checkpointing, steps=1), [books], out)
        ends.append(next(line for line in read_log(out / "log.jsonl") if "loss" in line))
    assert ends[1]["loss"] == pytest.approx(ends[0]["loss"], rel=1e-6)
    assert ends[1]["grad_norm"] == pytest.approx(ends[0]["grad_norm"], rel=1e-5)


def test_mixed_precision_keeps_the_ssm_in_float32(
    recipe: Recipe, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, ...]] = []

    def scan(u: torch.Tensor, dt: torch.Tensor, A_log: torch.Tensor, *rest: Any, **named: Any) -> Any:
        y, state = selective_scan(u, dt, A_log, *rest, **named)
        weights = (A_log, rest[2], named["dt_bias"], named["initial_state"])
        seen.append((u.dtype, *(x.dtype for x in weights), state.dtype))
        return y, state

    monkeypatch.setattr("hymba.model.hymba.selective_scan", scan)
    model = build_model(recipe, tokenizer)
    tokens = torch.randint(3, len(tokenizer), (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, labels=tokens).loss.backward()
    assert set(seen) == {(torch.bfloat16, *5 * (torch.float32,))}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_minutes_cut_the_stable_phase_and_keep_the_decay(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    recipe = replace(recipe, steps=100_000, max_minutes=0.01, eval_every=10**6)
    report = pretrain(recipe, [books], tmp_path / "out")
    assert 1 <= report["steps"] < 1000
    last = [line for line in read_log(tmp_path / "out" / "log.jsonl") if "loss" in line][-1]
    assert last["step"] == report["steps"]
    assert last["learning_rate"] < recipe.peak_lr
    # Gone on with when already at its end, the run adds no step.
    expected = weights(tmp_path / "out")
    (tmp_path / "out" / "report.json").unlink()
    shutil.rmtree(tmp_path / "out" / "model")
    assert pretrain(recipe, [books], tmp_path / "out")["steps"] == report["steps"]
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "out").items())


def test_bf16_and_jsonl(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    texts = (books / "cats.txt").read_text(encoding="utf-8").splitlines()
    (books / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = pretrain(replace(recipe, bf16=True, steps=None, epochs=0.1), [books], tmp_path / "out")
    assert report["epochs"] == pytest.approx(0.1, abs=0.05)
    assert not (tmp_path / "out" / "plain_text.partial").exists()


def test_a_run_that_never_came_to_a_checkpoint_leaves_no_claim(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    (books / "broken.txt").write_bytes(b"text and \xff")
    with pytest.raises(HymbaError, match=r"broken\.txt"):
        pretrain(recipe, [books], tmp_path / "out")
    (books / "broken.txt").write_text("text and more text")
    pretrain(replace(recipe, tokenizer=280, steps=1), [books], tmp_path / "out")
    assert len(load_tokenizer(tmp_path / "out" / "model")) == 280


def test_an_out_that_cannot_be_written_is_told(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HymbaError, match=r"cannot write .*file.*; make room or choose another --out"):
        pretrain(recipe, [books], tmp_path / "file" / "out")


def test_a_full_disk_leaves_earlier_checkpoints_whole(
    recipe: Recipe, books: Path, tmp_path: Path, at_step: Any
) -> None:
    """A limit on the size of files stands in for the disk: writing fails midway in the same calls."""
    pretrain(recipe, [books], tmp_path / "whole")
    out, limits = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    at_step(6, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        with pytest.raises(HymbaError, match=r"cannot write .*checkpoint-8: .*earlier checkpoints are whole"):
            pretrain(recipe, [books], out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-4"]
    pretrain(recipe, [books], out)
    assert_same_weights(tmp_path / "whole", out)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hiden_size": 8}, "unknown key 'hiden_size' in model: did you mean 'hidden_size'?"),
        ({"hidden_size": "wide"}, "model.hidden_size must be a whole number, not 'wide'"),
        ({"global_layers": [9]}, "impossible config"),
        ({"size": "3b"}, "unknown size '3b'"),
    ],
)
def test_a_bad_model_is_told(micro: dict[str, Any], tokenizer: Any, changes: dict[str, Any], complaint: str) -> None:
    micro["model"] |= changes
    with pytest.raises(HymbaError) as error:
        build_config(Recipe(**micro), tokenizer)
    assert complaint in str(error.value)


def test_the_shape_is_the_recipes(micro: dict[str, Any], tokenizer: Any) -> None:
    micro["model"] |= {"rope_theta": "1e5", "global_layers": [0, 2], "kv_groups": [[1]]}
    config = build_config(Recipe(**micro), tokenizer)
    assert (config.rope_theta, config.global_layers, config.kv_groups) == (1e5, (0, 2), ((1,),))
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (len(tokenizer), 1, 2)


def test_progress_is_drawn_on_a_terminal(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        pretrain(recipe, [books], tmp_path / "out", Console(file=screen, force_terminal=True, width=120))
    shown = (tmp_path / "screen").read_text()
    assert "tokenizing" in shown
    assert "step 8 of 8" in shown
    assert "held out" in shown
