"""`rope_type` "dynamic_ntk": each sequence has a rotary base of its own, from its own length.

The length is the largest position of the sequence's real tokens, plus one, meta tokens counted; padding and the other
rows or documents of a call do not count. The base applies to the whole call, meta tokens included. With a cache, the
first tokens of a row decide the base of its meta tokens, and later calls that make it longer use a larger base for
their own tokens only: keys that are in the cache stay rotated as they were. So past `orig_max_position_embeddings`, a
text that is cut into several calls differs from the same text in one call, as it does in the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hymba.model.arguments import Placement
from hymba.model.cache import Cache, Prefix
from hymba.model.call import split_documents
from hymba.model.config import HymbaConfig
from hymba.model.output import HymbaOutput
from hymba.model.rows import place_prefix


def rope_bases(config: HymbaConfig, x: Tensor, cache: Cache | None, where: Placement) -> list[float]:
    """Return the rotary base of each row of inputs `x` (B, T, D) after what `cache` holds; of a row of packed
    documents, that of its longest."""
    rows, steps = x.shape[:2]
    positions = torch.arange(steps, device=x.device).expand(rows, -1)
    if where.positions is not None:
        positions = where.positions
    elif where.documents is not None:
        positions = split_documents(where.documents)[1]
    elif cache is not None:
        positions = positions + cache.lengths[:, None]
    if where.padding is not None:
        positions = positions.masked_fill(where.padding, -1)
    lengths: list[int] = (positions.amax(1) + 1).tolist()
    return [config.rope_base(config.num_meta_tokens + length) for length in lengths]


def as_tensor(bases: Sequence[float]) -> Tensor:
    """Return bases (B,) as float64, on the CPU."""
    return torch.tensor(bases, dtype=torch.float64)


def prefix_of_rows(bases: Sequence[float], run: Callable[[Tensor], Prefix]) -> Prefix:
    """Return the meta tokens' state for the rotary base of each row; `run` computes it for bases (n,)."""
    distinct = sorted(set(bases))
    prefix = run(as_tensor(distinct))
    if len(distinct) == 1:
        return prefix
    return prefix.select(torch.tensor([distinct.index(base) for base in bases], device=prefix.conv_state[0].device))


def restart_rows(cache: Cache, bases: Sequence[float], run: Callable[[Tensor], Prefix]) -> None:
    """Let rows of a cache that hold no text start from meta tokens of their own rotary base; arguments as above."""
    usual, held = cache.config.rope_base(cache.config.num_meta_tokens), cache.lengths.tolist()
    rows = [row for row, base in enumerate(bases) if held[row] == 0 and base != usual]
    if rows:
        prefix = prefix_of_rows([bases[row] for row in rows], run)
        place_prefix(cache, torch.tensor(rows, device=cache.lengths.device), prefix)


def run_as_rows(
    forward: Callable[..., HymbaOutput], x: Tensor, where: Placement, num_meta: int, **outputs: bool
) -> HymbaOutput:
    """Run packed documents as rows: the meta tokens before one row cannot have several bases.

    Args:
        forward: :meth:`hymba.model.Hymba.forward`.
        x: (B, T, D) inputs of the first layer.
        num_meta: M.
        outputs: which outputs are wanted, as `forward` takes it.
    """
    rows = DocumentRows.split(where)
    positions = None if where.positions is None else rows.take(where.positions)
    output = forward(embeddings=rows.take(x), lengths=rows.lengths, positions=positions, **outputs)
    return rows.restore(output, num_meta)


@dataclass(frozen=True)
class DocumentRows:
    """Packed documents as rows of their own.

    tokens: (n,) index of the real tokens among the B · T of the call. rows, columns: (n,) where each goes.
    lengths: (documents,) tokens of each. size: (B, T).
    """

    tokens: Tensor
    rows: Tensor
    columns: Tensor
    lengths: Tensor
    size: torch.Size

    @classmethod
    def split(cls, where: Placement) -> DocumentRows:
        """Give each document a row; padding goes nowhere."""
        documents, padding = where.documents, where.padding
        assert documents is not None
        number, offsets = split_documents(documents)
        counts = number[:, -1] + 1
        number = (number + (counts.cumsum(0) - counts)[:, None]).flatten()
        tokens = torch.arange(documents.numel(), device=documents.device)
        if padding is not None:
            tokens = tokens[~padding.flatten()]
        rows = number[tokens]
        lengths = torch.bincount(rows, minlength=int(counts.sum()))
        return cls(tokens, rows, offsets.flatten()[tokens], lengths, documents.shape)

    def take(self, x: Tensor) -> Tensor:
        """Return what belongs to the documents of `x` (B, T, …), (documents, longest, …), zero at padding."""
        out = x.new_zeros(len(self.lengths), max(1, int(self.lengths.max())), *x.shape[2:])
        return out.index_put((self.rows, self.columns), x.flatten(0, 1)[self.tokens])

    def restore(self, output: HymbaOutput, num_meta: int) -> HymbaOutput:
        """Return an output of the rows as that of the call, zero at padding; `num_meta` is M."""
        states, weights = output.hidden_states, output.attentions
        return HymbaOutput(
            self._restore(output.hidden),
            None if states is None else tuple(map(self._restore, states)),
            None if weights is None else tuple(self._restore_attention(x, num_meta) for x in weights),
        )

    def _restore(self, x: Tensor) -> Tensor:
        """Return `x` (documents, longest, …) as the call has it, (B, T, …), zero at padding."""
        out = x.new_zeros(self.size.numel(), *x.shape[2:])
        return out.index_put((self.tokens,), x[self.rows, self.columns]).unflatten(0, self.size)

    def _restore_attention(self, weights: Tensor, num_meta: int) -> Tensor:
        """Return attention matrices (documents, H, longest, M + longest) as the call has them, (B, H, T, M + T)."""
        steps = self.size[1]
        kept = weights[self.rows, :, self.columns]  # (n, H, M + longest)
        first = (self.tokens % steps - self.columns)[:, None]  # the document's first column in its row
        columns = first + torch.arange(kept.shape[2] - num_meta, device=kept.device)
        columns = torch.where(columns < steps, columns, steps)  # what lies past the row's end is zero, and cut off
        text = kept.new_zeros(*kept.shape[:2], steps + 1)
        text = text.scatter(2, columns[:, None].expand(-1, kept.shape[1], -1), kept[..., num_meta:])[..., :steps]
        kept = torch.cat((kept[..., :num_meta], text), dim=2)
        out = kept.new_zeros(self.size.numel(), *kept.shape[1:])
        return out.index_put((self.tokens,), kept).unflatten(0, self.size).transpose(1, 2)
