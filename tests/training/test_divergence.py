"""A run whose numbers are no longer finite stops, and the advice it gives works."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hymba.errors import HymbaError
from hymba.training import Recipe, pretrain
from hymba.training.checkpoint import find_problem, list_checkpoints
from hymba.training.journal import read_log
from hymba.training.trainer import PretrainingTrainer


def names(out: Path) -> list[str]:
    return [checkpoint.name for checkpoint in list_checkpoints(out)]


def stopped(recipe: Recipe, books: Path, out: Path) -> str:
    with pytest.raises(HymbaError) as error:
        pretrain(recipe, [books], out)
    message = str(error.value)
    assert message.startswith("training diverged: ")
    assert "\n" not in message
    assert not (out / "model").exists()
    assert all(find_problem(checkpoint) is None for checkpoint in list_checkpoints(out))
    for line in read_log(out / "log.jsonl"):
        assert all(value - value == 0 for value in line.values())
    return message


@pytest.mark.parametrize("save_every", [1, 2])
def test_far_too_high_a_rate(recipe: Recipe, books: Path, tmp_path: Path, save_every: int) -> None:
    recipe = replace(recipe, optimizer="adamw", peak_lr=1e30, grad_clip=0.0, save_every=save_every, warmup=0.0)
    message = stopped(recipe, books, tmp_path / "out")
    assert message.endswith("lower peak_lr (1e+30) and run again with the same --out to start over")
    assert names(tmp_path / "out") == []
    assert pretrain(replace(recipe, peak_lr=1e-3), [books], tmp_path / "out")["steps"] == 8


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Any, Any], Any]], None]:
    """Have something done to the loss of a step, given with the trainer."""

    def arrange(step: int, change: Callable[[Any, Any], Any]) -> None:
        original = PretrainingTrainer.compute_loss

        def compute_loss(self: Any, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
            loss = original(self, model, inputs, *rest, **options)
            return change(self, loss) if torch.is_grad_enabled() and self.state.global_step + 1 == step else loss

        monkeypatch.setattr(PretrainingTrainer, "compute_loss", compute_loss)

    return arrange


def below(rate: float, change: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Change the loss unless the learning rate is lower than `rate`."""
    return lambda trainer, loss: change(loss) if trainer.optimizer.param_groups[0]["lr"] >= rate else loss


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("kind", [torch.nan, torch.inf])
def test_a_lower_rate_goes_on_from_the_last_checkpoint(
    recipe: Recipe, books: Path, tmp_path: Path, spoil: Any, capsys: Any, optimizer: str, kind: float
) -> None:
    recipe, out = replace(recipe, optimizer=optimizer, decay=0.0, matrix_lr=2e-2), tmp_path / "out"
    spoil(6, below(1e-2, lambda loss: loss * kind))
    message = stopped(recipe, books, out)
    assert "the loss is not finite at step 6" in message
    assert "lower peak_lr (0.01) and matrix_lr (0.02) and run again with the same --out" in message
    assert message.endswith("to go on from checkpoint-4")
    with pytest.raises(HymbaError, match="was started with different seed"):
        pretrain(replace(recipe, seed=1), [books], out)
    lower = replace(recipe, peak_lr=1e-3, matrix_lr=2e-3, min_lr=1e-5, grad_clip=0.5)
    assert pretrain(lower, [books], out)["steps"] == 8
    assert f"resuming from {out / 'checkpoint-4'}" in capsys.readouterr().err
    last = [line for line in read_log(out / "log.jsonl") if "loss" in line][-1]
    assert last["learning_rate"] == pytest.approx(2e-3)


@pytest.mark.slow
def test_the_rate_that_a_run_goes_on_with_is_the_recipes(
    recipe: Recipe, books: Path, tmp_path: Path, spoil: Any
) -> None:
    """As if it had been lower from the checkpoint on: warm-up, decay and floor too."""
    recipe, out, rates = replace(recipe, optimizer="adamw", decay=0.5, min_lr=1e-3), tmp_path / "out", {}

    def note(trainer: Any, loss: Any) -> Any:
        rates[trainer.state.global_step] = trainer.optimizer.param_groups[0]["lr"]
        return loss

    spoil(6, below(1e-3, lambda loss: loss * torch.nan))
    stopped(replace(recipe, peak_lr=1e-2), books, out)
    for step in range(5, 9):
        spoil(step, note)
    lower = replace(recipe, peak_lr=1e-4, min_lr=1e-5)
    pretrain(lower, [books], out)
    resumed = [rates[step] for step in sorted(rates)]
    rates.clear()
    pretrain(lower, [books], tmp_path / "other")
    assert resumed == [rates[step] for step in sorted(rates)]
    assert resumed[-1] == pytest.approx(1e-5)


def test_a_gradient_that_is_not_finite(recipe: Recipe, books: Path, tmp_path: Path, spoil: Any) -> None:
    """The loss is finite, its derivative is not: the weights are spoiled by the step."""
    spoil(8, below(0, lambda loss: loss + (loss - loss.detach()).sqrt()))
    message = stopped(recipe, books, tmp_path / "out")
    assert "not finite at step 8" in message
    assert names(tmp_path / "out") == ["checkpoint-4"]


def test_a_checkpoint_that_leads_to_no_finite_loss(
    recipe: Recipe, books: Path, tmp_path: Path, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = replace(recipe, save_every=2), tmp_path / "out"
    spoil(5, below(0, lambda loss: loss * torch.nan))
    message = stopped(recipe, books, out)
    found = re.search(r"delete (\S+), lower peak_lr", message)
    assert found is not None
    assert Path(found[1]) == out / "checkpoint-4"
    monkeypatch.undo()
    shutil.rmtree(found[1])
    assert pretrain(replace(recipe, peak_lr=1e-3), [books], out)["steps"] == 8


def test_weights_that_overflow_at_the_last_step(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    original = PretrainingTrainer._save_checkpoint

    def spoil_and_save(self: Any, *arguments: Any) -> None:
        if self.state.global_step == 8:
            next(self.model.parameters()).data[0] = torch.inf
        original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainingTrainer, "_save_checkpoint", spoil_and_save)
        assert "the weights or the optimizer's state are not finite at step 8" in stopped(recipe, books, out)
    assert names(out) == ["checkpoint-4"]
    assert pretrain(recipe, [books], out)["steps"] == 8


def test_held_out_text_without_a_finite_loss(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    original = PretrainingTrainer.bits_per_byte

    def bits_per_byte(self: Any, rows: Any, chosen: Any = None) -> float:
        weight = next(self.model.parameters())
        kept = weight.detach().clone()
        weight.data.fill_(torch.nan)
        try:
            return original(self, rows, chosen)
        finally:
            weight.data.copy_(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PretrainingTrainer, "bits_per_byte", bits_per_byte)
        message = stopped(recipe, books, tmp_path / "out")
    assert "the loss on the held-out files is not finite at step 4" in message


def test_a_model_too_large_for_its_dtype(recipe: Recipe, books: Path, tmp_path: Path) -> None:
    """The largest float32 is infinite in bfloat16; `save_dtype` may change."""
    out = tmp_path / "out"
    pretrain(recipe, [books], out)
    from hymba.training import pretraining

    original = pretraining._save_model

    def grow(trainer: Any, *rest: Any) -> None:
        next(trainer.model.parameters()).data[0, 0] = torch.finfo(torch.float32).max
        original(trainer, *rest)

    (out / "report.json").unlink()
    shutil.rmtree(out / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretraining, "_save_model", grow)
        with pytest.raises(HymbaError, match="too large for bfloat16: set save_dtype to float32 and run again"):
            pretrain(replace(recipe, save_dtype="bfloat16"), [books], out)
        pretrain(replace(recipe, save_dtype="float32"), [books], out)
    assert all(value.isfinite().all() for value in load_file(out / "model" / "model.safetensors").values())
