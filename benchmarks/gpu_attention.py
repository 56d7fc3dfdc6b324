"""Attention on the GPU: decode steps by the keys and values read, prompts and training by the pairs that the mask lets
through, each beside torch's own attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_case import Case, Set, implementations
from benchmarks.gpu_timing import device, random
from benchmarks.prefill import visible_pairs

if TYPE_CHECKING:
    from benchmarks.gpu_ops import Sizes


def attentions(s: Sizes) -> Iterator[Case]:
    """Yield decode steps, then prompts forward and backward, then the rate of torch's flash attention."""
    for slots, window in ((s.of(1153, 20), s.of(1024, 8)), (s.of(8320, 40), None)):
        for rows in (1, 8, 32, 128) if not s.toy else (1, 2):
            yield _decode(s, rows, slots, window)
    for rows, steps in ((s.of(8, 1), s.of(2048, 24)), (s.of(2, 1), s.of(8192, 40))):
        for window in (s.of(1024, 8), None):
            for backward in (False, True):
                yield _prompt(s, rows, steps, window, backward)
        yield _flash(s, rows, steps, False)
        yield _flash(s, rows, steps, True)


def _heads(s: Sizes, rows: int, queries: int, keys: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    c = s.config
    return (
        random(rows, queries, c.num_attention_heads, c.head_dim, grad=grad),
        random(rows, keys, c.num_key_value_heads, c.head_dim, grad=grad),
        random(rows, keys, c.num_key_value_heads, c.v_head_dim, grad=grad),
    )


def _where(s: Sizes, rows: int, queries: int, keys: int, window: int | None) -> dict[str, Any]:
    places = torch.arange(keys, device=device()).expand(rows, -1)
    meta = s.config.num_meta_tokens
    return {
        "query_positions": places[:, keys - queries :],
        "key_positions": places,
        "window": window,
        "num_meta": meta,
        "query_documents": None,
        "key_documents": None,
    }


def _attend(f: Callable[..., Any], one: Set) -> Tensor:
    return f(*one["heads"], **one["where"])


def _decode(s: Sizes, rows: int, slots: int, window: int | None) -> Case:
    c = s.config

    def make() -> Set:
        return {"heads": _heads(s, rows, 1, slots), "where": _where(s, rows, 1, slots, window)}

    kind = "global" if window is None else "sliding"
    return Case(
        "attention",
        f"decode, {rows} rows, {slots} slots, {kind}",
        implementations("attention"),
        make,
        _attend,
        2 * rows * (slots * c.num_key_value_heads + c.num_attention_heads) * (c.head_dim + c.v_head_dim),
        2 * rows * slots * c.num_attention_heads * (c.head_dim + c.v_head_dim),
        peers={"sdpa": lambda: _sdpa, "flash-attn": _flash_attn},
    )


def _sdpa(one: Set) -> Tensor:
    """Torch's attention over all keys: keys as wide as values, for its fast kernels want them equal."""
    q, k, v = (x.transpose(1, 2) for x in one["heads"])
    extra = v.shape[-1] - k.shape[-1]
    if "padded" not in one:
        one["padded"] = (F.pad(q, (0, extra)), F.pad(k, (0, extra)), v)  # type: ignore[index]
    q, k, v = one["padded"]
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _flash_attn() -> Callable[[Set], Any]:
    from flash_attn import flash_attn_with_kvcache  # type: ignore[import-not-found]

    def run(one: Set) -> Any:
        q, k, v = (x.transpose(1, 2) for x in one["padded"])
        return flash_attn_with_kvcache(q, k, v)

    return run


def _prompt(s: Sizes, rows: int, steps: int, window: int | None, backward: bool) -> Case:
    c, meta = s.config, s.config.num_meta_tokens

    def make() -> Set:
        heads = _heads(s, rows, steps, meta + steps, grad=backward)
        dy = random(rows, steps, c.num_attention_heads, c.v_head_dim)
        return {"heads": heads, "where": _where(s, rows, steps, meta + steps, window), "dy": dy}

    flops = 2 * rows * visible_pairs(steps, meta, window) * c.num_attention_heads * (c.head_dim + c.v_head_dim)
    kind = "global" if window is None else "sliding"
    width = (c.num_attention_heads + c.num_key_value_heads) * (c.head_dim + c.v_head_dim)
    return Case(
        "attention",
        f"{rows}×{steps} tokens, {kind}, {'backward' if backward else 'forward'}",
        implementations("attention"),
        make,
        _attend,
        2 * rows * steps * width,
        flops * 5 // 2 if backward else flops,  # the backward pass multiplies the pairs five times, not twice
        prepare=_backward if backward else None,
    )


def _backward(f: Callable[..., Any], one: Set) -> Callable[[], Any]:
    y = _attend(f, one)
    return lambda: torch.autograd.grad(y, one["heads"], one["dy"], retain_graph=True)


def _flash(s: Sizes, rows: int, steps: int, backward: bool) -> Case:
    """Torch's causal attention of as many heads, keys as wide as values: what its kernels do in a second."""
    c = s.config

    def make() -> Set:
        width = c.v_head_dim
        q, k, v = (random(rows, c.num_attention_heads, steps, width, grad=backward) for _ in range(3))
        return {"heads": (q, k, v), "dy": random(rows, c.num_attention_heads, steps, width)}

    def run(f: Callable[..., Any], one: Set) -> Any:
        q, k, v = one["heads"]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def prepare(f: Callable[..., Any], one: Set) -> Callable[[], Any]:
        y = run(f, one)
        return lambda: torch.autograd.grad(y, one["heads"], one["dy"], retain_graph=True)

    flops = 2 * rows * visible_pairs(steps, 0, None) * c.num_attention_heads * 2 * c.v_head_dim
    return Case(
        "attention of torch",
        f"{rows}×{steps} tokens, causal, {'backward' if backward else 'forward'}",
        {"cpu": run},
        make,
        run,
        2 * rows * steps * c.num_attention_heads * 4 * c.v_head_dim,
        flops * 5 // 2 if backward else flops,
        prepare=prepare if backward else None,
    )
