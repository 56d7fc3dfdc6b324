"""What a sequence leaves behind: K/V per sharing group, and the convolution and SSM state of every layer.

Two memories feed the same forward pass. :class:`Prefix` is what the meta tokens leave: immutable, differentiable, one
row, the start of every sequence. :class:`Cache` is what a batch of sequences leaves: allocated once, mutated in place.
Both answer `states`, `stored`, `slots`, `extend`, `key_positions`, `next_positions` and `write`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hymba.errors import HymbaError
from hymba.model.config import HymbaConfig
from hymba.ops.attention import Heads, QuantizedHeads, round_heads
from hymba.ops.ring import ring_positions, ring_slots, write_ring


class Slots(NamedTuple):
    """Where a call's newest tokens go in a ring.

    rows, slots: (B, 1) and (B, C) int64 indices into a buffer. tokens: (B, C) indices into the call's tokens, None if
    they are all of them in order. real: (B, C) bool, False where there is only padding; None if there is none.
    """

    rows: Tensor
    slots: Tensor
    tokens: Tensor | None
    real: Tensor | None


@dataclass(frozen=True)
class Prefix:
    """The state after the meta tokens. One row serves a batch of any size: it is expanded without a copy.

    It is valid as long as the weights, hooks, adapters and autocast are those it was computed with, and nothing checks
    that. With `rope_type` "dynamic_ntk" it may have a row per sequence, each for its own rotary base.

    keys, values: per owning layer, (1 or B, M, G, K) and (1 or B, M, G, V), keys rotated.
    conv_state, ssm_state: per layer, (1 or B, E, d_conv − 1) and (1 or B, E, N), the latter in at least float32.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    conv_state: Sequence[Tensor]
    ssm_state: Sequence[Tensor]
    in_place: ClassVar[bool] = False  # whether a layer may overwrite the states it is given

    @classmethod
    def blank(cls, config: HymbaConfig, dtype: torch.dtype, device: torch.device) -> Prefix:
        """Return the memory that the meta tokens themselves start from: no keys, zero states."""
        c, owners = config, sorted(set(config.owners))
        wide = torch.promote_types(dtype, torch.float32)
        conv = torch.zeros(1, c.d_inner, c.d_conv - 1, dtype=dtype, device=device)
        ssm = torch.zeros(1, c.d_inner, c.d_state, dtype=wide, device=device)
        keys = torch.zeros(1, 0, c.num_key_value_heads, c.head_dim, dtype=dtype, device=device)
        values = torch.zeros(1, 0, c.num_key_value_heads, c.v_head_dim, dtype=dtype, device=device)
        n = c.num_hidden_layers
        return cls(dict.fromkeys(owners, keys), dict.fromkeys(owners, values), [conv] * n, [ssm] * n)

    def select(self, rows: Tensor) -> Prefix:
        """Return the rows named by the index `rows`, repeats allowed, of a prefix that has several."""
        keys, values = ({i: x[rows] for i, x in held.items()} for held in (self.keys, self.values))
        return Prefix(keys, values, [x[rows] for x in self.conv_state], [x[rows] for x in self.ssm_state])

    def next_positions(self, rows: int) -> Tensor:
        """Return the position, meta tokens counted, of each row's next token. (B,)"""
        keys = next(iter(self.keys.values()))
        return torch.full((rows,), keys.shape[1], dtype=torch.int64, device=keys.device)

    def states(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return the layer's conv and SSM state, expanded to `rows`."""
        return self.conv_state[layer].expand(rows, -1, -1), self.ssm_state[layer].expand(rows, -1, -1)

    def stored(self, owner: int) -> tuple[Tensor, Tensor]:
        """Return the owner's stored keys and values."""
        return self.keys[owner], self.values[owner]

    def key_positions(self, window: int | None, query_positions: Tensor) -> Tensor:
        """Return the positions of the keys that :meth:`extend` gives back. (B, M + T)"""
        meta = next(iter(self.keys.values())).shape[1]
        positions = torch.arange(meta, device=query_positions.device).expand(query_positions.shape[0], -1)
        return torch.cat((positions, query_positions), dim=1)

    def slots(self, window: int | None, lengths: Tensor | None, steps: int) -> None:
        """Return nothing: a prefix never changes."""

    def extend(
        self, window: int | None, stored: tuple[Any, Any], k: Tensor, v: Tensor, slots: Slots | None
    ) -> tuple[Tensor, Tensor]:
        """Return `stored` followed by this call's `k` and `v`. (B, M + T, G, K or V)"""
        del window, slots  # nothing is overwritten, and padding keys carry position −1
        rows = k.shape[0]
        keys, values = (s.to(x.dtype).expand(rows, -1, -1, -1) for s, x in zip(stored, (k, v), strict=True))
        return torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)

    def write(self, layer: int, conv_state: Tensor, ssm_state: Tensor) -> None:
        """Keep nothing: a prefix never changes."""

    def reserve(self, lengths: Tensor | None, steps: int) -> None:
        """Check nothing: a prefix is never full."""

    def advance(self, lengths: Tensor | None, steps: int) -> None:
        """Keep nothing: a prefix never changes."""


@dataclass
class Cache:
    """The memory of B sequences. Rows in, rows out; every tensor is allocated once and mutated in place.

    A sliding layer's buffer is the M meta tokens and a ring of W + 1 slots, a global layer's the M meta tokens and
    `max_length` slots; text token p lies in slot M + p mod ring. Keys are stored rotated. A recurrent state cannot be
    cropped: to be able to roll back, keep a copy of the row (:meth:`select`).

    keys, values: per owning layer, (B, M + ring, G, K) and (B, M + ring, G, V), in the model's dtype or quantised.
    conv_state: (L, B, E, d_conv − 1). ssm_state: (L, B, E, N), at least float32.
    lengths: (B,) int64, the user's tokens held.

    Gradients flow within a call, the first one's through `prefix` too, and stop at the cache after it. Quantised keys
    and values carry none; they are rounded before they are attended to, so that however a text is cut into calls, the
    same is read.
    """

    config: HymbaConfig
    max_length: int
    keys: dict[int, Heads]
    values: dict[int, Heads]
    conv_state: Tensor
    ssm_state: Tensor
    lengths: Tensor
    longest: int = 0  # an upper bound of lengths, known without asking the device
    whole: bool = False  # attend to whole buffers, empty slots and all, so that shapes are the same at every step

    @classmethod
    def start(cls, config: HymbaConfig, prefix: Prefix, rows: int, max_length: int, bits: int | None = None) -> Cache:
        """Allocate `rows` rows for `max_length` text tokens each, and copy the meta tokens' state into them.

        If `prefix` carries gradients, those of the first call flow through it. `bits` is 8 to quantise keys and values.

        Raises:
            HymbaError: `rows` or `max_length` is not positive, or `bits` is neither 8 nor None.
        """
        if rows < 1 or max_length < 1:
            raise HymbaError(f"a cache needs at least one row and one token, not {rows} and {max_length}")
        if bits not in (None, 8):
            raise HymbaError(f"keys and values are kept in the model's dtype or in 8 bits, not in {bits}")
        buffers: tuple[dict[int, Heads], dict[int, Heads]] = ({}, {})
        for owner in sorted(set(config.owners)):
            slots = _ring(config, owner, max_length)
            for buffer, meta in zip(buffers, prefix.stored(owner), strict=True):
                held = meta if bits is None else round_heads(meta.detach())
                buffer[owner] = each_part(partial(_with_room, rows=rows, slots=slots), held)
        conv_state = torch.stack([s.expand(rows, -1, -1) for s in prefix.conv_state])
        ssm_state = torch.stack([s.expand(rows, -1, -1) for s in prefix.ssm_state])
        lengths = torch.zeros(rows, dtype=torch.int64, device=conv_state.device)
        return cls(config, max_length, *buffers, conv_state, ssm_state, lengths)

    @property
    def in_place(self) -> bool:
        """Whether a layer may overwrite the states it is given; a backward pass needs them as they were."""
        return not torch.is_grad_enabled()

    @property
    def rows(self) -> int:
        """The number of sequences held."""
        return self.lengths.shape[0]

    def next_positions(self, rows: int) -> Tensor:
        """Return the position, meta tokens counted, of each row's next token. (B,)"""
        if rows != self.rows:
            raise HymbaError(f"the cache holds {self.rows} rows, the input has {rows}: select() the rows first")
        return self.config.num_meta_tokens + self.lengths

    def states(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return the layer's conv and SSM state."""
        states = self.conv_state[layer], self.ssm_state[layer]
        return states if self.in_place else (states[0].clone(), states[1].clone())

    def stored(self, owner: int) -> tuple[Heads, Heads]:
        """Return the owner's buffers."""
        return self.keys[owner], self.values[owner]

    def reserve(self, lengths: Tensor | None, steps: int) -> None:
        """Check that a call of `steps` tokens, `lengths` (B,) of them real, still fits.

        Raises:
            HymbaError: a row would pass `max_length`.
        """
        if self.longest + steps > self.max_length:
            self.longest = int(self.lengths.max())
            if int((self.lengths + (steps if lengths is None else lengths)).max()) > self.max_length:
                raise HymbaError(
                    f"the cache holds {self.max_length} tokens a row and {self.longest} are taken: "
                    f"{steps} more do not fit; allocate it with a larger max_length"
                )

    def key_positions(self, window: int | None, query_positions: Tensor) -> Tensor:
        """Return the positions of the keys that :meth:`extend` gives back, −1 for empty slots. (B, S)"""
        meta, steps = self.config.num_meta_tokens, query_positions.shape[1]
        ring = self.max_length if window is None else window + 1
        written = _writes_first(window, steps)
        held = self.lengths + (query_positions >= 0).sum(1) if written else self.lengths
        positions = ring_positions(held, self._used(ring, steps if written else 0), ring, meta)
        return positions if written else torch.cat((positions, query_positions), dim=1)

    def extend(
        self, window: int | None, stored: tuple[Heads, Heads], k: Tensor, v: Tensor, slots: Slots | None
    ) -> tuple[Heads, Heads]:
        """Write this call's `k` and `v` into the buffers `stored`; return the keys and values to attend to.

        A chunk in a sliding layer still needs keys that it is about to overwrite, so it attends to the stored keys and
        its own side by side; elsewhere the buffer itself serves, without a copy.
        """
        assert slots is not None
        meta, steps = self.config.num_meta_tokens, k.shape[1]
        ring = stored[0].shape[1] - meta
        written = _writes_first(window, steps)
        end = meta + self._used(ring, steps if written else 0)
        if written:
            write_ring(*slots, (k, v), stored)
            keys, values = (each_part(lambda s: s[:, :end], held) for held in stored)
        else:
            own = _like(stored[0], k), _like(stored[1], v)
            pairs = zip(stored, own, strict=True)
            keys, values = (each_part(lambda s, x: torch.cat((s[:, :end], x), dim=1), *pair) for pair in pairs)
            write_ring(*slots, own, stored)
        return keys, values

    def _used(self, ring: int, steps: int) -> int:
        """Return how many slots of a ring can hold a token once `steps` more are written."""
        return ring if self.whole else min(ring, self.longest + steps)

    def slots(self, window: int | None, lengths: Tensor | None, steps: int) -> Slots:
        """Return where a call's tokens go in the rings of a window; `lengths` as in `Hymba.forward`."""
        ring = self.max_length if window is None else window + 1
        rows = torch.arange(self.rows, device=self.lengths.device)[:, None]
        return Slots(rows, *ring_slots(self.lengths, lengths, steps, ring, self.config.num_meta_tokens))

    def write(self, layer: int, conv_state: Tensor, ssm_state: Tensor) -> None:
        """Store the layer's state after this call, unless the layer has done so itself."""
        if not self.in_place:
            self.conv_state[layer].copy_(conv_state.detach())
            self.ssm_state[layer].copy_(ssm_state.detach())

    def advance(self, lengths: Tensor | None, steps: int) -> None:
        """Count this call's tokens as held; called once, after the last layer."""
        self.lengths += steps if lengths is None else lengths
        self.longest += steps
        if self.ssm_state.requires_grad:
            self._detach()

    def _detach(self) -> None:
        for held in (self.keys, self.values):
            held.update({owner: each_part(Tensor.detach, x) for owner, x in held.items()})
        self.conv_state, self.ssm_state = self.conv_state.detach(), self.ssm_state.detach()

    def select(self, rows: Tensor) -> Cache:
        """Return a copy that holds the rows named by the index `rows` (repeats allowed): beams, forks, snapshots."""
        keys, values = (
            {i: each_part(lambda x: x[rows], heads) for i, heads in held.items()} for held in (self.keys, self.values)
        )
        states = self.conv_state[:, rows], self.ssm_state[:, rows]
        return replace(
            self,
            keys=keys,
            values=values,
            conv_state=states[0],
            ssm_state=states[1],
            lengths=self.lengths[rows],
        )

    def grow(self, max_length: int) -> None:
        """Make room for `max_length` text tokens a row; only the global layers' buffers are copied."""
        extra = max_length - self.max_length
        if extra <= 0:
            return
        for held in (self.keys, self.values):
            for owner in held:
                if self.config.window(owner) is None:
                    held[owner] = each_part(partial(_with_room, rows=self.rows, slots=extra), held[owner])
        self.max_length = max_length

    def nbytes(self) -> int:
        """Return the bytes of every tensor held."""
        parts = [part for held in (self.keys, self.values) for heads in held.values() for part in parts_of(heads)]
        return sum(x.nbytes for x in (*parts, self.conv_state, self.ssm_state, self.lengths))


def parts_of(heads: Heads) -> tuple[Tensor, ...]:
    """Return the tensors (B, S, …) that keys or values consist of."""
    return (heads.values, heads.scales) if isinstance(heads, QuantizedHeads) else (heads,)


def each_part(function: Callable[..., Tensor], *heads: Heads) -> Heads:
    """Return what a function of tensors (B, S, …) makes of keys or values, of each of their parts if quantised."""
    made = [function(*parts) for parts in zip(*map(parts_of, heads), strict=True)]
    return made[0] if len(made) == 1 else QuantizedHeads(*made)


def _with_room(x: Tensor, rows: int, slots: int) -> Tensor:
    """Return (B or 1, S, …) in a new tensor (rows, S + slots, …)."""
    buffer = x.new_zeros(rows, x.shape[1] + slots, *x.shape[2:])
    buffer[:, : x.shape[1]] = x
    return buffer


def _like(stored: Heads, own: Tensor) -> Heads:
    """Return a call's own keys or values in the format of those stored."""
    if not isinstance(stored, QuantizedHeads):
        return own
    if own.requires_grad:
        raise HymbaError("a cache in 8 bits carries no gradients: run the model under torch.no_grad()")
    return round_heads(own)


def _writes_first(window: int | None, steps: int) -> bool:
    """Return whether a call may write its keys before attending: nothing it needs is overwritten by it.

    Gradients flow through a call's own keys and values, but not through what a buffer holds.
    """
    return (window is None or steps == 1) and not torch.is_grad_enabled()


def _ring(config: HymbaConfig, layer: int, max_length: int) -> int:
    """Return the text slots of a layer's buffer: W + 1 when it slides, `max_length` when it is global."""
    window = config.window(layer)
    return max_length if window is None else window + 1


def cache_nbytes(config: HymbaConfig, tokens: int, element_size: int = 2, bits: int | None = None) -> int:
    """Return the bytes that one row of a :class:`Cache` for `tokens` text tokens really holds; `bits` as there."""
    c = config
    width = c.head_dim + c.v_head_dim
    per_slot = c.num_key_value_heads * (width * element_size if bits is None else width + 2 * 2)  # 2 scales of 2 bytes
    slots = sum(c.num_meta_tokens + _ring(c, owner, tokens) for owner in set(c.owners))
    states = c.num_hidden_layers * c.d_inner * ((c.d_conv - 1) * element_size + c.d_state * 4)
    return slots * per_slot + states + 8


def paper_cache_nbytes(config: HymbaConfig, tokens: int) -> int:
    """Return the cache size by the arithmetic of arXiv 2411.13676: two bytes a value, and sliding layers in pairs.

    The paper counts the meta tokens in the global layers only, half of all sliding layers, and leaves out the
    convolution's state; "8K" there means 8000 tokens.
    """
    c = config
    per_slot = c.num_key_value_heads * (c.head_dim + c.v_head_dim) * 2
    sliding = c.num_hidden_layers - len(c.global_layers)
    slots = len(c.global_layers) * (tokens + c.num_meta_tokens) + sliding * min(tokens, c.sliding_window) / 2
    return int(slots * per_slot) + c.num_hidden_layers * c.d_inner * c.d_state * 2
