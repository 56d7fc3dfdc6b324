"""Decoding and prompts of Hymba on the GPU: steps by the bytes that they read, prompts by what they multiply.

Caches are filled with random numbers at the stated length: a step's time does not depend on what they hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.command import Weights
from benchmarks.gpu_timing import Part, device, kernel_times, release
from benchmarks.models import all_weight_bytes, kv_bytes, random_model, random_tokens, state_bytes, weight_bytes
from benchmarks.prefill import prompt_flops
from hymba.inference import SamplingParams, generate
from hymba.inference.prefill import prefill_chunk
from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba
from hymba.model.cache import parts_of

WARM_UP = 4  # steps that do not count
TOKENS = 48  # steps that do
LOOKED_AT = 4  # steps whose kernels are timed one by one
# Rows and tokens held, the most telling ones first.
POINTS = ((1, 1024), (128, 8192), (1, 8192), (8, 8192), (32, 8192), (128, 1024), (1, 16384), (8, 1024), (128, 16384))
TOY_POINTS = ((1, 20), (2, 40))


class Steps:
    """Greedy decoding behind a filled cache, a step a call, the device left to run ahead."""

    def __init__(self, model: Hymba, cache: Cache) -> None:
        self.model, self.cache, self._run = model, cache, DecodeStep(model, cache)
        self.tokens = torch.full((cache.rows,), 5, device=model.device)

    def __call__(self) -> None:
        """Run one token of each row and choose the next."""
        self.tokens = self._run(self.tokens).argmax(dim=-1)


def measure_decode(part: Part, size: str, toy: bool) -> None:
    """Measure steps at all points in bfloat16, then one row in int8 and int4, then `generate` as a user calls it."""
    models = _Models(size)

    def items() -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
        for rows, held in TOY_POINTS if toy else POINTS:
            yield f"{size} bf16, {rows} rows, {held} held", lambda r=rows, h=held: steps(models.get(), r, h, part)  # type: ignore[misc]
        yield f"{size} bf16, generate", lambda: generation(models.get(), toy)
        for kind in (Weights.int8, Weights.int4):
            for rows in (1,) if toy else (1, 8):
                held = 20 if toy else 1024
                yield (
                    f"{size} {kind}, {rows} rows, {held} held",
                    lambda k=kind, r=rows, h=held: steps(models.get(k), r, h, part),  # type: ignore[misc]
                )
        for rows, held in TOY_POINTS if toy else POINTS[:2]:
            yield f"{size} bf16, {rows} rows, kernels", lambda r=rows, h=held: step_kernels(models.get(), r, h)  # type: ignore[misc]

    part.measure(items(), least=6)


def measure_prompts(part: Part, size: str, toy: bool) -> None:
    """Measure prompts in one piece and in the chunks of `generate`."""
    models = _Models(size)

    def items() -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
        for length in (24,) if toy else (8192, 2048, 512, 16384):
            for whole in (True, False):
                how = "whole" if whole else "in chunks"
                yield (
                    f"{size} bf16, prompt of {length} {how}",
                    lambda n=length, w=whole: prompt(models.get(), n, w, part),  # type: ignore[misc]
                )
        looked_at = 24 if toy else 8192
        yield f"{size} bf16, prompt of {looked_at}, kernels", lambda: prompt_kernels(models.get(), looked_at)

    part.measure(items(), least=5)


class _Models:
    """One model at a time on the device."""

    def __init__(self, size: str) -> None:
        self.size = size
        self.held: tuple[Weights, Hymba] | None = None

    def get(self, weights: Weights = Weights.bf16) -> Hymba:
        if self.held is None or self.held[0] is not weights:
            self.held = None
            release()
            self.held = weights, random_model(self.size, weights, device())
        return self.held[1]


def filled_cache(model: Hymba, rows: int, held: int, room: int, bits: int | None = None) -> Cache:
    """Return a cache of `rows` rows in which `held` tokens of random numbers lie and `room` more fit."""
    cache = model.allocate_cache(rows, held + room, bits)
    for heads in (*cache.keys.values(), *cache.values.values()):
        for x in parts_of(heads):
            if x.is_floating_point():
                x.normal_()
    cache.conv_state.normal_()
    cache.ssm_state.normal_()
    cache.lengths.fill_(held)
    cache.longest = held
    return cache


@torch.no_grad()
def time_steps(model: Hymba, rows: int, held: int, tokens: int) -> tuple[float, Steps]:
    """Return the seconds of a decode step, mean of `tokens` in a row, and what takes a few steps more."""
    cache = filled_cache(model, rows, held, WARM_UP + tokens + LOOKED_AT)
    step = Steps(model, cache)
    return mean_seconds(step, tokens), step


def mean_seconds(step: Callable[[], Any], tokens: int) -> float:
    """Return the seconds of a call, mean of `tokens` calls behind a few that do not count, by the clock of the host."""
    for _ in range(WARM_UP):
        step()
    synchronize()
    begun = time.perf_counter()
    for _ in range(tokens):
        step()
    synchronize()
    return (time.perf_counter() - begun) / tokens


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def steps(model: Hymba, rows: int, held: int, part: Part) -> dict[str, Any]:
    """Time decode steps; return their speed and share of the bandwidth."""
    tokens = min(TOKENS, held)
    seconds, step = time_steps(model, rows, held, tokens)
    cache = step.cache
    read = weight_bytes(model) + state_bytes(cache) + kv_bytes(cache, held + WARM_UP + tokens / 2)
    return {
        "rows": rows,
        "held": held,
        "tokens_per_second": round(rows / seconds, 1),
        "step_ms": round(seconds * 1e3, 4),
        "bytes_per_step": round(read),
        "weight_bytes": all_weight_bytes(model),
        "share_of_copy": round(read / seconds / 1e9 / part.ceilings["copy_gb_s"], 3),
    }


def step_kernels(model: Hymba, rows: int, held: int) -> dict[str, Any]:
    """Look at the kernels of decode steps. Last of all: after the profiler, other times may be longer."""
    _, step = time_steps(model, rows, held, 4)
    return {"kernels": kernel_times(step, LOOKED_AT)}


def generation(model: Hymba, toy: bool) -> dict[str, Any]:
    """Time `generate` as a user calls it, token after token in Python, greedy and sampled."""
    prompt_length, count = (8, 6) if toy else (512, 96)
    prompt = random_tokens(model, 1, prompt_length)[0].tolist()
    found: dict[str, Any] = {"prompt": prompt_length, "tokens": count}
    for name, params in (
        ("greedy", SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)),
        ("sampled", SamplingParams(max_new_tokens=count, top_k=50, top_p=0.95, seed=1, ignore_eos=True)),
    ):
        for _ in range(2):  # the first compiles
            times = [time.perf_counter() for _ in generate(model, prompt, params)]
        warm = len(times) // 4  # the step is recorded meanwhile
        found[name] = {"tokens_per_second": round((len(times) - 1 - warm) / (times[-1] - times[warm]), 1)}
    return found


@torch.no_grad()
def prompt(model: Hymba, length: int, whole: bool, part: Part) -> dict[str, Any]:
    """Time the prefill of one row; return its speed and its share of the matrix peak."""
    tokens = random_tokens(model, 1, length).to(model.device)
    chunk = length if whole else prefill_chunk(model)
    times = []
    for _ in range(4):
        cache = model.allocate_cache(1, length)
        synchronize()
        begun = time.perf_counter()
        read_prompt(model, tokens, chunk, cache)
        synchronize()
        times.append(time.perf_counter() - begun)
    seconds = sorted(times[1:])[1]
    flops = prompt_flops(model.config, length)
    return {
        "tokens": length,
        "chunk": chunk,
        "tokens_per_second": round(length / seconds, 1),
        "prompt_ms": round(seconds * 1e3, 3),
        "share_of_matrix": round(flops / seconds / 1e12 / part.ceilings["matrix_tflops"], 3),
    }


def read_prompt(model: Hymba, tokens: torch.Tensor, chunk: int, cache: Cache) -> None:
    """Run a prompt (1, T) in chunks, and the head on its last token."""
    for piece in tokens.split(chunk, dim=1):
        hidden = model(piece, cache=cache).hidden
    model.logits(hidden[:, -1])


@torch.no_grad()
def prompt_kernels(model: Hymba, length: int) -> dict[str, Any]:
    """Look at the kernels of a prompt in one piece."""
    tokens, caches = random_tokens(model, 1, length).to(model.device), [model.allocate_cache(1, length) for _ in "ab"]
    read_prompt(model, tokens, length, caches.pop())  # compiles
    return {"kernels": kernel_times(lambda: read_prompt(model, tokens, length, caches.pop()), 1)}
