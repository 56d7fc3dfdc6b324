"""Rows of a cache by themselves: seen as a smaller cache, cleared, copied, saved, put back.

A recurrent state cannot be cropped, so all of a row's memory is kept or none of it: a :class:`Snapshot` is keys and
values in use, convolution and SSM state together, as large as its text needs and no larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hymba.model.cache import Cache, Prefix, each_part, parts_of
from hymba.ops.attention import QuantizedHeads, round_heads


def view_rows(cache: Cache, first: int, count: int, longest: int) -> Cache:
    """Return rows `first` … `first + count − 1` as a cache that shares their memory; `longest` bounds their lengths."""
    keys, values = (
        {owner: each_part(lambda x: x[first : first + count], heads) for owner, heads in held.items()}
        for held in (cache.keys, cache.values)
    )
    return replace(
        cache,
        keys=keys,
        values=values,
        conv_state=cache.conv_state[:, first : first + count],
        ssm_state=cache.ssm_state[:, first : first + count],
        lengths=cache.lengths[first : first + count],
        longest=longest,
    )


def place_prefix(cache: Cache, rows: Tensor, prefix: Prefix) -> None:
    """Replace the meta tokens' state in the rows named by the index `rows` (n,), which hold no text yet.

    Args:
        prefix: of one row, or of n rows.
    """
    meta = cache.config.num_meta_tokens
    for owner in cache.keys:
        for held, new in zip(cache.stored(owner), prefix.stored(owner), strict=True):
            own = round_heads(new.detach()) if isinstance(held, QuantizedHeads) else new
            for part, x in zip(parts_of(held), parts_of(own), strict=True):
                part[rows, :meta] = x.to(part.dtype)
    for layer, (conv_state, ssm_state) in enumerate(zip(prefix.conv_state, prefix.ssm_state, strict=True)):
        cache.conv_state[layer, rows] = conv_state
        cache.ssm_state[layer, rows] = ssm_state


def clear_row(cache: Cache, row: int, prefix: Prefix) -> None:
    """Let a row hold the meta tokens alone; slots of text that remain are not seen."""
    cache.lengths[row] = 0
    if cache.config.dynamic_rope:  # the text before may have had meta tokens of its own rotary base
        place_prefix(cache, torch.tensor([row], device=cache.lengths.device), prefix)
        return
    for layer, (conv_state, ssm_state) in enumerate(zip(prefix.conv_state, prefix.ssm_state, strict=True)):
        cache.conv_state[layer, row] = conv_state[0]
        cache.ssm_state[layer, row] = ssm_state[0]


@dataclass(frozen=True)
class Snapshot:
    """What a row held after a text.

    tokens: in the text. heads: of each part of each buffer, the slots in use. conv_state: (L, E, d_conv − 1).
    ssm_state: (L, E, N). logits: (vocab,) of the text's next token, if they were kept.
    """

    tokens: int
    heads: tuple[Tensor, ...]
    conv_state: Tensor
    ssm_state: Tensor
    logits: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of every tensor held."""
        held = (*self.heads, self.conv_state, self.ssm_state)
        return sum(x.nbytes for x in held) + (0 if self.logits is None else self.logits.nbytes)


def save_row(cache: Cache, row: int, tokens: int, logits: Tensor | None = None) -> Snapshot:
    """Return a copy of what a row holds after `tokens` tokens."""
    return Snapshot(
        tokens,
        tuple(slots.clone() for slots in _slots_in_use(cache, row, tokens)),
        cache.conv_state[:, row].clone(),
        cache.ssm_state[:, row].clone(),
        logits,
    )


def restore_row(cache: Cache, row: int, snapshot: Snapshot) -> None:
    """Let a row hold what a snapshot of the same kind of cache says."""
    for slots, saved in zip(_slots_in_use(cache, row, snapshot.tokens), snapshot.heads, strict=True):
        slots.copy_(saved)
    cache.conv_state[:, row] = snapshot.conv_state
    cache.ssm_state[:, row] = snapshot.ssm_state
    cache.lengths[row] = snapshot.tokens


def copy_row(cache: Cache, source: int, target: int, tokens: int) -> None:
    """Let row `target` hold what row `source` holds, `tokens` tokens."""
    pairs = zip(_slots_in_use(cache, source, tokens), _slots_in_use(cache, target, tokens), strict=True)
    for saved, slots in pairs:
        slots.copy_(saved)
    for held in (cache.conv_state, cache.ssm_state):
        held[:, target] = held[:, source]
    cache.lengths[target] = tokens


class Undo:
    """Takes back what is run into a row from now on: at most `steps` tokens behind the `tokens` that it holds."""

    def __init__(self, cache: Cache, row: int, tokens: int, steps: int) -> None:
        self.cache, self.row, self.tokens = cache, row, tokens
        self._states = cache.conv_state[:, row].clone(), cache.ssm_state[:, row].clone()
        # In a ring a new token takes the place of one that an earlier token still sees; elsewhere the place is empty.
        meta, device = cache.config.num_meta_tokens, cache.lengths.device
        newest = torch.arange(tokens, tokens + steps, device=device)
        self._overwritten: list[tuple[Tensor, Tensor, Tensor]] = []
        for part, window in _parts(cache, row):
            if window is not None and tokens + steps > window + 1:
                slots = meta + newest % (window + 1)
                self._overwritten.append((part, slots, part[slots]))

    def __call__(self) -> None:
        """Bring the row back to what it held."""
        self.cache.conv_state[:, self.row], self.cache.ssm_state[:, self.row] = self._states
        for part, slots, saved in self._overwritten:
            part[slots] = saved
        self.cache.lengths[self.row] = self.tokens


def _slots_in_use(cache: Cache, row: int, tokens: int) -> Iterator[Tensor]:
    """Yield the slots (S, …) of a row that differ from an empty row's after `tokens` tokens, for each part of each
    buffer: those of the text, and with a dynamic rotary base those of the meta tokens too."""
    meta = cache.config.num_meta_tokens
    first = 0 if cache.config.dynamic_rope else meta
    for part, window in _parts(cache, row):
        ring = cache.max_length if window is None else window + 1
        yield part[first : meta + min(tokens, ring)]


def _parts(cache: Cache, row: int) -> Iterator[tuple[Tensor, int | None]]:
    """Yield a row's part of every tensor of keys or values, and its layer's window."""
    for held in (cache.keys, cache.values):
        for owner, heads in held.items():
            for x in parts_of(heads):
                yield x[row], cache.config.window(owner)
