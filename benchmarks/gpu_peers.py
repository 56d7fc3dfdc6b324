"""The paper's table on this GPU: generation behind 8K tokens, as large a batch as fits, beside models of transformers.

All models have random weights in bfloat16 and caches filled with random numbers at the stated length; what is timed is
new tokens, chosen greedily, a batch at a time; reading the prompt is not. The batch begins at 128 and is halved while
memory does not suffice. transformers' models run in three ways, and the fastest counts:

- "static": their own forward, static cache, as `generate` does it with cache_implementation="static";
- "graph": the same without a mask, since every slot is taken, which lets torch take its flash kernels with grouped
  queries, and recorded as a CUDA graph, which leaves Python out: the best that their code can give without a compiler;
- "compiled": "static" under torch.compile, where there is time for it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_decode import TOKENS, filled_cache, mean_seconds, time_steps
from benchmarks.gpu_timing import Part, device, record_graph, release
from benchmarks.models import random_model

HELD, TOY_HELD = 8000, 24  # "8K" is 8000 tokens in the paper
ROWS, TOY_ROWS = 128, 2
OURS = "hymba-1.5b"
PEERS = ("llama-3.2-3b", "llama-3.2-1b", "qwen2.5-1.5b", "smollm2-1.7b", "falcon-h1-1.5b")
WAYS = ("graph", "static")

Found = Mapping[str, Any]


def measure_paper(part: Part, only: str | None, toy: bool, compiling: bool) -> None:
    """Measure our model, then each peer in each way, the paper's own comparison first, what is compiled last."""
    rows = TOY_ROWS if toy else ROWS

    def items() -> Iterator[tuple[str, Callable[[], Found]]]:
        yield OURS, lambda: halving(rows, lambda b: _ours(b, toy))
        for peer in PEERS:
            for way in WAYS:
                yield f"{peer}, {way}", lambda p=peer, w=way: halving(rows, lambda b: _theirs(p, w, b, toy))  # type: ignore[misc]
        for rows_of_ours in (64, 32):  # beside a peer whose batch was halved
            yield f"{OURS}, {rows_of_ours} rows", lambda b=rows_of_ours: _ours(min(b, rows), toy)  # type: ignore[misc]
        for peer in PEERS if compiling else ():
            yield f"{peer}, compiled", lambda p=peer: halving(rows, lambda b: _theirs(p, "compiled", b, toy))  # type: ignore[misc]

    part.measure(((name, run) for name, run in items() if only is None or only in name), least=8)
    part.record["ratios"] = ratios(part.record["items"])
    part.write()


def halving(rows: int, run: Callable[[int], Found]) -> Found:
    """Run with `rows` rows, or with half as many, and so on, while memory does not suffice."""
    while True:
        try:
            return run(rows)
        except torch.cuda.OutOfMemoryError:
            if rows == 1:
                raise
            rows //= 2
        release()


def _ours(rows: int, toy: bool) -> Found:
    model = random_model("tiny" if toy else "1.5b", device=device())
    held, tokens = (TOY_HELD, 4) if toy else (HELD, TOKENS)
    seconds, step = time_steps(model, rows, held, tokens)
    exact = filled_cache(model, 1, held, 1)
    return _found(rows, held, tokens, seconds, step.cache.nbytes() / rows, exact.nbytes())


def _found(rows: int, held: int, tokens: int, seconds: float, nbytes: float, exact: float) -> dict[str, Any]:
    return {
        "rows": rows,
        "held": held,
        "new_tokens": tokens,
        "tokens_per_second": round(rows / seconds, 1),
        "step_ms": round(seconds * 1e3, 3),
        "cache_mb_a_row": round(exact / 1e6, 2),
        "allocated_mb_a_row": round(nbytes / 1e6, 2),
    }


@torch.no_grad()
def _theirs(name: str, way: str, rows: int, toy: bool) -> Found:
    """Time one of transformers' models. A step writes the last slot of the cache and reads all of it."""
    from benchmarks.peers_transformers import build

    begun = time.monotonic()
    model = build(name, toy, device())
    held, tokens = (TOY_HELD, 3) if toy else (HELD, TOKENS // 2)
    room = 1 if way == "graph" else tokens + 8
    cache = static_cache(model, rows, held, room)
    step = PeerStep(model, cache, rows, held)
    took = None
    if way == "graph":
        with without_mask(model):
            step.keeps_place = True
            seconds = mean_seconds(_graphed(step), tokens)
    else:
        if way == "compiled":
            if not torch.cuda.is_available():
                return {"not_measured": "nothing is compiled on a CPU"}
            compile_step(model, cache)
            step()
            took = round(time.monotonic() - begun, 1)
        seconds = mean_seconds(step, tokens)
        if way == "compiled":
            torch._dynamo.reset()  # what is compiled holds the model
    nbytes = cache_bytes(cache) / rows
    exact = nbytes - _key_bytes(cache) / rows * (1 - held / (held + room))
    found = _found(rows, held, tokens, seconds, nbytes, exact) | {"way": way}
    return found | ({"compiled_in_s": took} if took else {})


def compile_step(model: Any, cache: Any) -> None:
    """Compile a model's forward as `generate` does with a static cache."""
    for layer in cache.layers:
        for x in _tensors(list(vars(layer).values())):
            torch._dynamo.mark_static_address(x)
    model.forward = torch.compile(model.forward, mode="reduce-overhead")


class PeerStep:
    """A greedy decode step of transformers' model, from static inputs."""

    def __init__(self, model: Any, cache: Any, rows: int, held: int) -> None:
        self.model, self.cache, self.held = model, cache, held
        self.tokens = torch.full((rows, 1), 5, device=device())
        self.keeps_place = False  # whether each step writes the slot behind those held anew

    def __call__(self) -> None:
        """Run one token of each row and choose the next."""
        if self.keeps_place:
            set_held(self.cache, self.held)
        out = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True)
        self.tokens.copy_(out.logits[:, -1:].argmax(dim=-1))


@contextmanager
def without_mask(model: Any) -> Iterator[None]:
    """Leave the attention mask out of the model's forward: every slot is taken."""
    module = vars(sys.modules[type(model).__module__])
    before, module["create_causal_mask"] = module["create_causal_mask"], lambda *arguments, **keywords: None
    try:
        yield
    finally:
        module["create_causal_mask"] = before


def _graphed(step: Callable[[], None]) -> Callable[[], Any]:
    if not torch.cuda.is_available():
        return step
    for _ in range(2):
        step()
    return record_graph([step]).replay


def static_cache(model: Any, rows: int, held: int, room: int) -> Any:
    """Return a static cache of `rows` rows with `held` tokens of random numbers in it.

    One token of one row makes every tensor of it; then each is made anew with all rows.
    """
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=held + room)
    model(input_ids=torch.full((1, 1), 5, device=device()), past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        for key, value in vars(layer).items():
            setattr(layer, key, _widened(value, rows))
        if hasattr(layer, "max_batch_size") or hasattr(layer, "batch_size"):
            layer.batch_size = layer.max_batch_size = rows
    set_held(cache, held)
    return cache


def _widened(value: Any, rows: int) -> Any:
    """Return a tensor (1, …) as a random one of `rows` rows, also inside of a list or a dictionary."""
    if isinstance(value, dict):
        return {key: _widened(x, rows) for key, x in value.items()}
    if isinstance(value, list):
        return [_widened(x, rows) for x in value]
    if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[0] == 1:
        made = torch.empty(rows, *value.shape[1:], dtype=value.dtype, device=value.device)
        return made.normal_().mul_(0.5)
    return value


def set_held(cache: Any, held: int) -> None:
    """Say that `held` tokens lie in a static cache."""
    for layer in cache.layers:
        length = getattr(layer, "cumulative_length", None)
        if isinstance(length, Tensor):
            length.fill_(held)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of every tensor of a cache."""
    return sum(x.nbytes for layer in cache.layers for x in _tensors(list(vars(layer).values())))


def _key_bytes(cache: Any) -> int:
    named = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.nbytes for x in named if isinstance(x, Tensor))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def ratios(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return our speed and cache against each peer's fastest way; the paper's batch rule, so batches may differ."""
    measured = {item["item"]: item for item in items if "tokens_per_second" in item}
    ours, found = measured.get(OURS), {}
    for peer in PEERS if ours else ():
        best = max((x for name, x in measured.items() if name.startswith(f"{peer},")), key=_speed, default=None)
        if best is None or ours is None:
            continue
        found[peer] = {
            "way": best["way"],
            "rows": best["rows"],
            "tokens_per_second": best["tokens_per_second"],
            "speed": round(ours["tokens_per_second"] / best["tokens_per_second"], 2),
            "cache": round(best["cache_mb_a_row"] / ours["cache_mb_a_row"], 2),
        }
    return found


def _speed(item: Found) -> float:
    return float(item["tokens_per_second"])
