"""Where a prompt is cut into the pieces that are run at once."""

from __future__ import annotations

import torch

from hymba.model import Hymba, scheme_of
from hymba.ops import native
from hymba.ops.backend import selected
from hymba.ops.linear import IMPLEMENTATIONS

PREFILL_CHUNK = 512  # tokens of a prompt run at once: bounds the memory that a long prompt takes
GPU_CHUNK = 8192  # the same on a GPU, which fewer would not fill
FIXED_CHUNK = 256  # the same where prompts are cut at fixed places, which others have to wait for


def is_batch_invariant(model: Hymba) -> bool:
    """Return whether what the model computes for a token is the same bit for bit however many come with it.

    If so, a prompt may be cut anywhere, and decode gives what prefill would have given. In float64 the last bits may
    differ, but decide no token.
    """
    if model.dtype == torch.float64:
        return True
    on_cpu, quantized = model.device.type == "cpu", scheme_of(model) is not None
    return on_cpu and selected(IMPLEMENTATIONS, "cpu") == "native" and native.is_batch_invariant(model.dtype, quantized)


def prefill_block(model: Hymba) -> int:
    """Return the length at whose multiples, counted from the start of a text, a prompt may be cut.

    It is 1 where the arithmetic is batch-invariant. Elsewhere the last bits of a result depend on how many tokens are
    run together, so prompts are always cut at the same places, and a text does not depend on the load. It is 1 on a
    GPU, too, where decode depends on the batch in any case.
    """
    return FIXED_CHUNK if model.device.type == "cpu" and not is_batch_invariant(model) else 1


def prefill_chunk(model: Hymba) -> int:
    """Return how many tokens of a prompt `generate` runs at once."""
    if model.device.type == "cuda":
        return GPU_CHUNK
    return PREFILL_CHUNK if prefill_block(model) == 1 else FIXED_CHUNK


def prefill_cuts(model: Hymba, held: int, tokens: int) -> list[int]:
    """Return the lengths of the pieces in which a prompt of `tokens` tokens is run after `held` others."""
    chunk, end = prefill_chunk(model), held + tokens
    first = held + chunk if prefill_block(model) == 1 else (held // chunk + 1) * chunk
    cuts = [*range(first, end, chunk), end]
    return [cut - start for start, cut in zip([held, *cuts], cuts, strict=False)]
