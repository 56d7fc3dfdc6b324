"""A training step of the small model as its recipe does it: `python -m benchmarks.training --help`.

Forward, loss, backward, gradient clipping and the optimiser, in bfloat16 autocast over packed rows, with the C++
kernels and with the torch path in their place, on one thread and on all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.command import ROOT, Json, Out, bar, finish, main
from benchmarks.machine import ReadBandwidth
from benchmarks.models import SEED
from benchmarks.timing import forget_peak, milliseconds, peak_rss, seconds
from hymba.ops import native
from hymba.ops.backend import use_backend
from hymba.training import Recipe
from hymba.training.optimizer import build_optimizer
from hymba.training.pretraining import build_model

RECIPE = ROOT / "recipes" / "tiny.yaml"


def training(
    recipe: Annotated[Path, typer.Option(help="The recipe whose step is taken.")] = RECIPE,
    rows: Annotated[int | None, typer.Option(min=1, help="Rows a step in place of the recipe's.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens a row in place of the recipe's.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Steps timed of each kind; the median counts.")] = 5,
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas between.")] = "1,2",
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time training steps on random tokens: kernels and torch path in turn, for each number of threads."""
    from benchmarks.prefill import parse_lengths

    changes = [f"batch_rows={rows}"] * (rows is not None) + [f"seq_length={length}"] * (length is not None)
    loaded = Recipe.load(recipe, changes)
    bandwidth = ReadBandwidth(loaded.size)
    bandwidth.measure()
    forget_peak()
    step = Step(loaded)
    variants = {
        f"{kind}, {count} threads": _variant(step, kind, count)
        for count in parse_lengths(threads)
        for kind in ("native", "torch")
        if kind == "torch" or native.library() is not None
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    with bar("training steps", (repeat + 1) * len(variants)) as advance:
        for turn in range(repeat + 1):
            for name, run in variants.items():
                spent = seconds(run)
                advance()
                if turn:  # the first does not count
                    times[name].append(spent)
    tokens = loaded.batch_rows * loaded.seq_length
    found = {name: milliseconds(spent) for name, spent in times.items()}
    best = min(found.values(), key=lambda ms: ms["median"])
    result = {
        "tokens_per_second": round(tokens / best["median"] * 1e3),
        "step_ms": found,
        "speedup": _speedups(found),
        "peak_rss": peak_rss(),
        **bandwidth.to_record(),
    }
    settings = {
        "recipe": recipe.stem,
        "rows": loaded.batch_rows,
        "length": loaded.seq_length,
        "optimizer": loaded.optimizer,
    }
    finish(f"training-{recipe.stem}", settings, result, _lines(result, settings), as_json, out)


class Step:
    """A model, its optimiser, and one batch of random tokens packed as two documents a row."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = build_model(recipe, _Vocabulary(recipe)).train()
        self.optimizer = build_optimizer(self.model, recipe)
        self.batch = _batch(recipe)

    def __call__(self) -> None:
        """Take one step of the optimiser, in as many micro-batches as the recipe says."""
        parts = self.recipe.batch_rows // self.recipe.rows_at_once
        for part in range(parts):
            chosen = slice(part * self.recipe.rows_at_once, (part + 1) * self.recipe.rows_at_once)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16):
                loss = self.model(**{name: x[chosen] for name, x in self.batch.items()}, skip_logits=True).loss
            (loss / parts).backward()
        if self.recipe.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Vocabulary:
    """As much of a tokenizer as a model's config wants to know."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, recipe: Recipe) -> None:
        self.size = recipe.tokenizer if isinstance(recipe.tokenizer, int) else 4096

    def __len__(self) -> int:
        return self.size


def _batch(recipe: Recipe) -> dict[str, Tensor]:
    length, generator = recipe.seq_length, torch.Generator().manual_seed(SEED)
    tokens = torch.randint(3, len(_Vocabulary(recipe)), (recipe.batch_rows, length), generator=generator)
    positions = torch.arange(length)
    positions[length // 2 :] -= length // 2
    return {"input_ids": tokens, "position_ids": positions.repeat(recipe.batch_rows, 1), "labels": tokens.clone()}


def _variant(step: Step, kind: str, threads: int) -> Callable[[], None]:
    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with use_backend("cpu") if kind == "torch" else nullcontext():
                step()
        finally:
            torch.set_num_threads(before)

    return run


def _speedups(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return how many times the kernels are faster than the torch path, by threads."""
    return {
        name.removeprefix("native, "): round(found[name.replace("native", "torch")]["median"] / ms["median"], 2)
        for name, ms in found.items()
        if name.startswith("native")
    }


def _lines(result: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    shape = f"{settings['rows']} rows of {settings['length']} tokens, {settings['optimizer']}"
    lines = [f"a training step of {settings['recipe']}: {shape}"]
    for name, ms in result["step_ms"].items():
        lines.append(f"  {name:20s} {ms['median']:9.1f} ms, {ms['best']:9.1f} at best")
    faster = ", ".join(f"{ratio}× with {threads}" for threads, ratio in result["speedup"].items())
    return [*lines, f"  kernels against the torch path: {faster or 'no kernels'}"]


if __name__ == "__main__":
    main(training)
