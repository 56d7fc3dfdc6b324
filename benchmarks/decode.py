"""Decoding: one token a row and step behind a filled cache. `python -m benchmarks.decode --help`.

A step reads every weight once, whatever the batch, so memory bandwidth is its floor; `share_of_bandwidth` says how near
it comes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.command import (
    Context,
    Json,
    Out,
    Rows,
    Size,
    SizeOption,
    Threads,
    Weights,
    WeightsOption,
    bar,
    finish,
    main,
    use_threads,
)
from benchmarks.machine import ReadBandwidth
from benchmarks.models import all_weight_bytes, kv_bytes, random_model, random_tokens, state_bytes, weight_bytes
from benchmarks.timing import forget_peak, milliseconds, peak_rss, seconds, timed_kernels
from hymba.inference.prefill import prefill_chunk
from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba
from hymba.ops import native

WARM_UP = 3  # steps that do not count


def decode(
    config: SizeOption = Size["1.5b"],
    weights: WeightsOption = Weights.bf16,
    rows: Rows = 1,
    context: Context = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Decode steps that are timed.")] = 32,
    threads: Threads = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time decode steps of a random model behind `--context` tokens, against the bandwidth of the same minute."""
    use_threads(threads)
    bandwidth = ReadBandwidth(config)
    bandwidth.measure()
    model = random_model(config, weights)
    with bar(f"decode {config} {weights} × {rows}", tokens + tokens // 2) as step, torch.no_grad():
        result = measure(model, rows, context, tokens, step)
    bandwidth.measure()
    result |= bandwidth.to_record()
    floor = result["bytes_per_step"] / bandwidth.median
    result["share_of_bandwidth"] = round(floor * 1e3 / result["step_ms"]["median"], 3)
    settings = {"config": config, "weights": weights, "rows": rows, "context": context, "tokens": tokens}
    name = f"decode-{config}-{weights}" + (f"-{rows}rows" if rows > 1 else "")
    name += f"-{context}context" if context != 512 else ""
    finish(name, settings, result, _lines(result, settings), as_json, out)


def measure(model: Hymba, rows: int, context: int, tokens: int, step: Callable[[], None]) -> dict[str, Any]:
    """Prefill, time `tokens` steps, then look inside half as many; call `step` after each. Needs no gradients."""
    inside = max(1, tokens // 2)
    cache = model.allocate_cache(rows, context + WARM_UP + tokens + 1 + inside)
    forget_peak()
    last = prefill(model, random_tokens(model, rows, context), cache)
    decoder = Decoder(model, cache, last)
    for _ in range(WARM_UP):
        decoder.step()
    times = []
    for _ in range(tokens):
        times.append(seconds(decoder.step))
        step()
    held = context + WARM_UP + tokens / 2  # in the middle of the timed steps
    peak = peak_rss()
    read = weight_bytes(model) + state_bytes(cache) + kv_bytes(cache, held)
    median = statistics.median(times)
    return {
        "tokens_per_second": round(rows / median, 2),
        "step_ms": milliseconds(times),
        "bytes_per_step": round(read),
        "bytes_per_token": round(read / rows),
        "weight_bytes": all_weight_bytes(model),
        "peak_rss": peak,
        **_look_inside(decoder, inside, step),
    }


class Decoder:
    """Greedy decoding as `generate` does it: a step, then the likeliest token of each row."""

    def __init__(self, model: Hymba, cache: Cache, tokens: Tensor) -> None:
        self.tokens, self._run = tokens, DecodeStep(model, cache)

    def step(self) -> None:
        """Run one token of each row."""
        self.tokens = self._run(self.tokens).argmax(dim=-1)


def prefill(model: Hymba, tokens: Tensor, cache: Cache, chunk: int | None = None) -> Tensor:
    """Run a prompt (B, T) into `cache` in chunks, as `generate` does, and return the likeliest next tokens (B,)."""
    for part in tokens.split(chunk or prefill_chunk(model), dim=1):
        hidden = model(part, cache=cache).hidden
    return model.logits(hidden[:, -1]).argmax(dim=-1)


def _look_inside(decoder: Decoder, steps: int, step: Callable[[], None]) -> dict[str, Any]:
    """Run steps with a clock around every kernel: the share of each, and of all that is outside kernels.

    `overhead` is that rest: Python, and what torch computes itself. None without kernels.
    """
    if native.library() is None:
        return {"overhead": None, "kernel_shares": {}, "kernel_calls": 0}
    with timed_kernels() as spent:
        decoder.step()
        spent.seconds.clear()
        spent.calls.clear()
        total = 0.0
        for _ in range(steps):
            total += seconds(decoder.step)
            step()
    shares = spent.shares(total)
    return {
        "overhead": shares.pop("other"),
        "kernel_shares": shares,
        "kernel_calls": sum(spent.calls.values()) // steps,
    }


def _lines(result: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    times, shares = result["step_ms"], result["kernel_shares"]
    asked = f"{settings['config']} {settings['weights']}, rows: {settings['rows']}, held: {settings['context']} tokens"
    inside = ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) or "no kernels"
    outside = "" if result["overhead"] is None else f"; outside {result['overhead']:.1%}"
    return [
        f"decode, {asked}",
        f"  {result['tokens_per_second']} tokens/s: {times['median']} ms a step, {times['best']} at best",
        f"  {result['bytes_per_step'] / 1e6:.1f} MB a step at {result['bandwidth_gb_s']} GB/s (passes differ by "
        f"{result['bandwidth_spread']:.0%}): {result['share_of_bandwidth']:.1%} of the bandwidth",
        f"  {result['kernel_calls']} kernel calls a step: {inside}{outside}",
        f"  peak memory {result['peak_rss'] / 1e9:.2f} GB, of it weights {result['weight_bytes'] / 1e9:.2f} GB",
    ]


if __name__ == "__main__":
    main(decode)
