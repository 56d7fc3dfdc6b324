"""Attention of many queries on the GPU by FlexAttention (arXiv 2412.05496), forward and backward.

FlexAttention compiles a kernel for a mask written in Python and skips the blocks in which nothing is seen. Which blocks
those are is worked out here, on the device, from positions alone: once for all layers of a call, and once for all calls
where sizes alone decide it.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.ops import gpu
from hymba.ops.attention import cpu
from hymba.ops.attention.heads import Heads, QuantizedHeads
from hymba.ops.attention.reference import Mask
from hymba.ops.graph import is_captured

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Queries and keys of a block that is seen whole, in part or not at all. Texts are padded to whole blocks: kernels then
# need no care for the ends, and one kernel serves more lengths.
BLOCK = 128
_NEVER = torch.iinfo(torch.int32).max

# Sizes that are trained with get a kernel of their own, which takes tens of seconds to compile; from this many on, one
# kernel serves all sizes. Inference, whose prompts have any length, has that one from the beginning.
_OWN_KERNELS = 4
# Kernels that torch keeps for one function: with and without documents, gradients, autocast, one row or several, ….
_MOST_KERNELS = 64
# Masks that sizes alone decide, kept from call to call.
_KEPT_MASKS = 16

_trained: set[Hashable] = set()
_kept_masks: OrderedDict[Hashable, BlockMask] = OrderedDict()
_broken = False


def attention(q: Tensor, k: Heads, v: Heads, **mask: Unpack[Mask]) -> Tensor:
    """FlexAttention for :func:`hymba.ops.attention.attention`, same signature; torch's other kernels where it fails."""
    global _broken
    if _broken or why_unfit(q, k, v):
        return cpu.attention(q, k, v, **mask)
    keys, values = (x.dequantize(q.dtype) if isinstance(x, QuantizedHeads) else x for x in (k, v))
    try:
        return attend(q, keys, values, mask, _kernel(q, keys, values))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler, Triton and the driver each have errors of their own
        _broken = True
        told = "FlexAttention does not work here, torch's slower kernels serve: %s"
        logging.getLogger(__name__).warning(told, gpu.first_line(error))
        return cpu.attention(q, k, v, **mask)


def why_unfit(q: Tensor, k: Heads, v: Heads) -> str:
    """Return in one line why FlexAttention cannot serve these, or "" if it can."""
    if not q.is_cuda or q.dtype not in gpu.DTYPES:
        return f"no compiled FlexAttention for {q.dtype} on {q.device}"
    if any(isinstance(x, Tensor) and x.dtype != q.dtype for x in (k, v)):
        return "queries, keys and values differ in dtype"
    if min(q.shape[3], v.shape[3]) < 16 or not q.numel() or not k.shape[1]:
        return "heads are narrower than 16, or there are none"
    return ""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, kernel: Callable[..., Tensor]) -> Tensor:
    """Attention by `kernel`, a function with the signature of torch's `flex_attention`."""
    steps = q.shape[1]
    block_mask = planned(mask)
    q, k, v = (_padded(x, dim=1).transpose(1, 2) for x in (q, k, v))
    out = kernel(
        q,
        k,
        v,
        block_mask=block_mask,
        scale=q.shape[3] ** -0.5,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=_options(q, v),
    )
    return out.transpose(1, 2)[:, :steps]


def _options(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Return how the forward kernel is cut where torch would choose by the keys' width, and values are wider.

    Its choice for 64-wide keys on Hopper, 128 × 128 and 4 warps, would need 256 registers a thread for the scores and
    the sums of 128-wide values alone. These are its numbers for 128.
    """
    if not q.is_cuda or q.dtype == torch.float32 or v.shape[3] <= q.shape[3] or v.shape[3] > 128:
        return {}
    return {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3}


def _kernel(q: Tensor, k: Tensor, v: Tensor) -> Callable[..., Tensor]:
    """Return the compiled kernel for these sizes: their own in training, unless there are many; else one for all."""
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    sizes = q.shape[0], -(-q.shape[1] // BLOCK), -(-k.shape[1] // BLOCK), q.shape[2:], v.shape[2:], q.dtype
    if trains and (sizes in _trained or len(_trained) < _OWN_KERNELS):
        _trained.add(sizes)
        return _compiled(False)
    return _compiled(True)


@functools.cache
def _compiled(dynamic: bool, backend: str | Callable = "inductor") -> Callable[..., Tensor]:
    """Return flex_attention compiled, for one set of sizes at a time or for all, by one of torch.compile's backends.

    The backward pass is compiled with the forward one, so that a failure shows while torch's kernels can still serve;
    and one graph or an error, never the uncompiled function, which holds all scores in memory.
    """
    import torch._dynamo.config
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    def call(*arguments: Any, **keywords: Any) -> Tensor:
        return flex_attention(*arguments, **keywords)

    compiled = torch.compile(call, dynamic=dynamic, fullgraph=True, backend=backend)
    eager_backward = hasattr(torch._functorch.config, "force_non_lazy_backward_lowering")

    def run(*arguments: Any, **keywords: Any) -> Tensor:
        with ExitStack() as settings:
            settings.enter_context(torch._dynamo.config.patch(recompile_limit=_MOST_KERNELS))
            if eager_backward:
                settings.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
            return compiled(*arguments, **keywords)

    return run


class _Seen(NamedTuple):
    """What a query sees, in two comparisons: keys at most at `newest` whose reach is at least `oldest`.

    newest, oldest: (B, T) int32. places, reaches: (B, S) int32; empty slots are placed after everything, and the reach
    of a meta token is without end. documents: those of queries and keys, (B, T) and (B, S), or None.
    """

    newest: Tensor
    oldest: Tensor
    places: Tensor
    reaches: Tensor
    documents: tuple[Tensor, Tensor] | None


def planned(mask: Mask) -> BlockMask:
    """Return the blocks of a mask, from its plan or from an earlier call if they are there."""
    plan = mask.get("plan")
    if plan is not None and "flex" in plan.kept:
        return plan.kept["flex"]
    queries = mask["query_positions"]
    pattern = None
    if plan is not None and plan.pattern is not None and not is_captured(queries):
        pattern = plan.pattern, mask["window"], mask["num_meta"], queries.device
    found = None if pattern is None else _kept_masks.get(pattern)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():
            found = blocks(mask, 1 if pattern is not None else queries.shape[0])
    if pattern is not None:
        _kept_masks[pattern] = found
        _kept_masks.move_to_end(pattern)
        if len(_kept_masks) > _KEPT_MASKS:
            _kept_masks.popitem(last=False)
    if plan is not None:
        plan.kept["flex"] = found
    return found


def blocks(mask: Mask, rows: int) -> BlockMask:
    """Return the blocks of a mask, of its first row if all `rows` are alike, without asking the device."""
    from torch.nn.attention.flex_attention import BlockMask

    seen = _seen(mask, rows)
    some, all_ = _touched(seen), _filled(seen)
    kinds = [_ordered(kind) for kind in (some & ~all_, all_)]
    sizes = seen.newest.shape[1], seen.places.shape[1]
    return BlockMask.from_kv_blocks(*kinds[0], *kinds[1], BLOCK_SIZE=BLOCK, mask_mod=_rule(seen), seq_lengths=sizes)


def _seen(mask: Mask, rows: int) -> _Seen:
    queries, keys = mask["query_positions"][:rows].clamp(max=_NEVER), mask["key_positions"][:rows].clamp(max=_NEVER)
    newest, places = _padded(queries, dim=1, value=-1).int(), _padded(keys, dim=1, value=-1).int()
    window, is_meta = mask["window"], places < mask["num_meta"]
    oldest = torch.zeros_like(newest) if window is None else newest - min(window, _NEVER)
    of_queries, of_keys = mask.get("query_documents"), mask.get("key_documents")
    documents = None
    if of_queries is not None and of_keys is not None:
        documents = _padded(of_queries[:rows], dim=1), _padded(of_keys[:rows], dim=1)
    return _Seen(
        newest.contiguous(),
        oldest.contiguous(),
        torch.where(places < 0, _NEVER, places),
        torch.where(is_meta, _NEVER, places),
        documents,
    )


def _rule(seen: _Seen) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the mask as a function of a row, head, query and key, as FlexAttention has it."""
    newest, oldest, places, reaches, documents = seen
    if documents is None and len(newest) == 1:
        newest, oldest, places, reaches = (x[0] for x in seen[:4])

        def for_all_rows(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (places[j] <= newest[i]) & (reaches[j] >= oldest[i])

        return for_all_rows

    def by_row(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (places[b, j] <= newest[b, i]) & (reaches[b, j] >= oldest[b, i])

    if documents is None:
        return by_row
    of_queries, of_keys = documents

    def by_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = (of_queries[b, i] == of_keys[b, j]) | (reaches[b, j] == _NEVER)
        return by_row(b, h, i, j) & same

    return by_document


def _touched(seen: _Seen) -> Tensor:
    """Return (B, ⌈T⌉, ⌈S⌉) bool: blocks of which something may be seen.

    Queries count by their outermost: a block too many costs time, and the mask within it is right all the same.
    """
    newest, oldest = (x.unflatten(1, (-1, BLOCK)) for x in (seen.newest, seen.oldest))
    last = newest.amax(2)[:, :, None]
    first = torch.where(newest < 0, _NEVER, oldest).amin(2)[:, :, None]
    near = (seen.places[:, None] <= last) & (seen.reaches[:, None] >= first)
    if seen.documents is not None:
        queries, keys = seen.documents[0].unflatten(1, (-1, BLOCK)), seen.documents[1][:, None]
        same = (keys >= queries.amin(2)[:, :, None]) & (keys <= queries.amax(2)[:, :, None])
        near &= same | (seen.reaches[:, None] == _NEVER)
    return near.unflatten(2, (-1, BLOCK)).any(3)


def _filled(seen: _Seen) -> Tensor:
    """Return (B, ⌈T⌉, ⌈S⌉) bool: blocks that are seen whole."""
    newest, oldest = (x.unflatten(1, (-1, BLOCK)) for x in (seen.newest, seen.oldest))
    places, reaches = (x.unflatten(1, (-1, BLOCK)) for x in (seen.places, seen.reaches))
    filled = (places.amax(2)[:, None] <= newest.amin(2)[:, :, None]) & (
        reaches.amin(2)[:, None] >= oldest.amax(2)[:, :, None]
    )
    if seen.documents is not None:
        queries, keys = seen.documents[0].unflatten(1, (-1, BLOCK)), seen.documents[1][:, None]
        one = (queries.amin(2) == queries.amax(2))[:, :, None]
        same = (keys == queries.amin(2)[:, :, None]) | (seen.reaches[:, None] == _NEVER)
        filled &= one & same.unflatten(2, (-1, BLOCK)).all(3)
    return filled


def _ordered(kind: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries has, and their numbers, those first."""
    order = kind.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return kind.sum(2, dtype=torch.int32)[:, None], order.int()[:, None].contiguous()


def _padded(x: Tensor, dim: int, value: int = 0) -> Tensor:
    """Return (B, T, …) with T filled up to whole blocks."""
    missing = -x.shape[dim] % BLOCK
    if not missing:
        return x
    return F.pad(x, (*[0, 0] * (x.ndim - 1 - dim), 0, missing), value=value)
