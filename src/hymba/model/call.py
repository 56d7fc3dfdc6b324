"""Where the tokens of one call stand and what they may see, worked out once for all layers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.model.cache import Cache, Prefix, Slots
from hymba.model.config import HymbaConfig
from hymba.ops.attention import Mask, Plan
from hymba.ops.rotary import rotary_tables


@dataclass(frozen=True)
class Call:
    """Positions count the meta tokens; −1 is padding or an empty slot.

    query_positions: (B, T). key_positions: by window, (B, S). slots: by window, where the call's keys are kept.
    rotary: cos and sin, (B, T, K/2).
    lengths: (B,) or None. documents, document_offsets: (B, T) or None, as :func:`split_documents` returns them.
    pattern: a name for what is seen where sizes alone decide it, else None.
    """

    query_positions: Tensor
    key_positions: dict[int | None, Tensor]
    slots: dict[int | None, Slots | None]
    rotary: tuple[Tensor, Tensor]
    lengths: Tensor | None
    documents: Tensor | None
    document_offsets: Tensor | None
    output_attentions: bool
    pattern: Hashable | None = None
    _masks: dict[int | None, Mask] = field(default_factory=dict)

    @classmethod
    def place(
        cls,
        config: HymbaConfig,
        x: Tensor,
        memory: Cache | Prefix,
        base: float | Tensor,
        *,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Call:
        """Place the inputs `x` (B, T, D) after what `memory` holds.

        Args:
            base: rotary base of all rows, or (B,) of each.
            lengths, documents, positions, output_attentions: as in :meth:`hymba.model.Hymba.forward`.
        """
        rows, steps = x.shape[:2]
        columns = torch.arange(steps, device=x.device)
        offsets = columns.expand(rows, -1)
        if documents is not None:
            documents, offsets = split_documents(documents)
        natural = memory.next_positions(rows)[:, None] + offsets
        rotary_positions = natural if positions is None else positions + config.num_meta_tokens
        queries = natural if lengths is None else torch.where(columns < lengths[:, None], natural, -1)
        windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
        key_positions = {window: memory.key_positions(window, queries) for window in windows}
        return cls(
            query_positions=queries,
            key_positions=key_positions,
            slots={window: memory.slots(window, lengths, steps) for window in windows},
            rotary=rotary_tables(rotary_positions, config.head_dim, base, x.dtype),
            lengths=lengths,
            documents=documents,
            document_offsets=None if documents is None else offsets,
            output_attentions=output_attentions,
            pattern=_pattern(memory, lengths, documents, steps, next(iter(key_positions.values())).shape[1]),
        )

    def mask(self, window: int | None, num_meta: int) -> Mask:
        """Return the keyword arguments that tell the attention op what may be seen, the same for each layer."""
        if torch.compiler.is_compiling():  # a checkpointed layer may change nothing outside itself
            return self._mask(window, num_meta)
        if window not in self._masks:
            self._masks[window] = self._mask(window, num_meta)
        return self._masks[window]

    def _mask(self, window: int | None, num_meta: int) -> Mask:
        keys, key_documents = self.key_positions[window], self.documents
        if key_documents is not None:  # the meta tokens before them belong to no document
            key_documents = F.pad(key_documents, (keys.shape[1] - key_documents.shape[1], 0), value=-1)
        return {
            "query_positions": self.query_positions,
            "key_positions": keys,
            "window": window,
            "num_meta": num_meta,
            "query_documents": self.documents,
            "key_documents": key_documents,
            "plan": Plan(self.pattern),
        }


def split_documents(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Return which document of its row each token belongs to, counted from 0, and the token's offset in it. (B, T) each

    A document is a run of equal numbers: one that comes again later in the row starts another document.
    """
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    columns = torch.arange(documents.shape[1], device=documents.device).expand(documents.shape[0], -1)
    return starts.cumsum(1) - 1, columns - torch.where(starts, columns, 0).cummax(dim=1).values


def _pattern(memory: Cache | Prefix, lengths: Tensor | None, documents: Tensor | None, *sizes: int) -> Hashable | None:
    """Return a name for masks of (T, S) in which all rows are full texts behind the meta tokens, or None."""
    if not isinstance(memory, Prefix) or lengths is not None or documents is not None:
        return None
    return "in order", *sizes
