"""The arguments of :meth:`hymba.model.Hymba.forward`, checked.

Shapes and dtypes are checked on every device. Values are checked on CPU tensors only: to read them from a GPU would
make Python wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hymba.errors import HymbaError
from hymba.model.cache import Cache, Prefix
from hymba.model.config import HymbaConfig
from hymba.ops.recording import is_recorded

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Placement:
    """Where the tokens (B, T) of a call belong.

    lengths: (B,) int64 real tokens per row, or None. padding: (B, T) bool, True after them; None where all are real.
    documents, positions: (B, T) or None, as in :meth:`hymba.model.Hymba.forward`.
    """

    lengths: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None
    padding: Tensor | None = None

    @classmethod
    def checked(
        cls, size: torch.Size, lengths: Tensor | None, documents: Tensor | None, positions: Tensor | None
    ) -> Placement:
        """Check the arguments that come with inputs of `size` (B, T).

        Raises:
            HymbaError: one has the wrong shape or dtype, a length is not in 0 … T, or a real token's position is
                negative.
        """
        rows, steps = size
        padding = None
        if lengths is not None:
            _check_integers("lengths", lengths, (rows,))
            _check_range("lengths", lengths, 0, steps)
            lengths = lengths.to(torch.int64)
            padding = torch.arange(steps, device=lengths.device) >= lengths[:, None]
        if documents is not None:
            _check_integers("documents", documents, (rows, steps))
        if positions is not None:
            _check_integers("positions", positions, (rows, steps))
            real = positions if padding is None else positions.masked_fill(padding, 0)
            _check_range("positions", real, 0, torch.iinfo(torch.int64).max)
        return cls(lengths, documents, positions, padding)


def check_inputs(config: HymbaConfig, tokens: Tensor | None, embeddings: Tensor | None) -> torch.Size:
    """Return (B, T) of whichever input is given.

    Raises:
        HymbaError: none or both are given, or the shape or dtype is wrong.
    """
    if (tokens is None) == (embeddings is None):
        raise HymbaError("give either tokens or embeddings")
    if not isinstance(tokens if embeddings is None else embeddings, Tensor):
        kind = type(tokens if embeddings is None else embeddings).__name__
        raise HymbaError(f"tokens and embeddings must be tensors, not {kind}")
    if tokens is not None:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise HymbaError(f"tokens must be (batch, time) int64, not {tuple(tokens.shape)} {tokens.dtype}")
        return tokens.shape
    assert embeddings is not None
    if embeddings.dim() != 3 or embeddings.shape[2] != config.hidden_size or not embeddings.is_floating_point():
        wanted, given = f"(batch, time, {config.hidden_size})", f"{tuple(embeddings.shape)} {embeddings.dtype}"
        raise HymbaError(f"embeddings must be {wanted} of a floating dtype, not {given}")
    return embeddings.shape[:2]


def check_tokens(tokens: Tensor, vocabulary: int) -> None:
    """Raise HymbaError if an id (B, T) is outside the vocabulary."""
    _check_range("tokens", tokens, 0, vocabulary - 1)


def check_memory(cache: Cache | None, prefix: Prefix | None, documents: Tensor | None, rows: int) -> None:
    """Raise HymbaError where what a call of `rows` rows is to continue contradicts its other arguments."""
    if cache is None:
        return
    if prefix is not None:
        raise HymbaError("a cache holds the meta tokens' state already: give either a cache or a prefix")
    if documents is not None:
        raise HymbaError("packed documents and a cache exclude each other: run the documents as rows")
    if rows != cache.rows:
        raise HymbaError(f"the cache holds {cache.rows} rows, the input has {rows}: select() the rows first")


def _check_integers(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor) or x.shape != shape or x.dtype not in _INTEGERS:
        given = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise HymbaError(f"{name} must be a tensor {shape} of integers, not {given}")


def _check_range(name: str, x: Tensor, least: int, most: int) -> None:
    """Check values that Python may read here, and at little cost."""
    if not x.is_cpu or type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or is_recorded():
        return
    if x.numel():
        low, high = (int(value) for value in x.aminmax())
        if low < least or high > most:
            limits = f"{least} or more" if most == torch.iinfo(torch.int64).max else f"{least} to {most}"
            raise HymbaError(f"{name} holds {low if low < least else high}, but must be {limits}")
