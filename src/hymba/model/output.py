"""What a forward pass returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hymba.model.cache import Cache
from hymba.model.config import HymbaConfig
from hymba.ops.precision import accumulate_dtype


class HymbaOutput(NamedTuple):
    """What a forward pass returns.

    hidden: (B, T, D) after the final norm.
    hidden_states: None, or L + 1 tensors (B, T, D): the input of each layer, then `hidden`.
    attentions: None, or L tensors (B, H, T, S) in at least float32, the meta tokens first, then what the layer keeps.
    """

    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def cleared(self, padding: Tensor) -> HymbaOutput:
        """Return the same with zeros at padding (B, T); attention matrices have them already."""
        padding, states = padding[..., None], self.hidden_states
        if states is not None:
            states = tuple(x.masked_fill(padding, 0) for x in states)
        return self._replace(hidden=self.hidden.masked_fill(padding, 0), hidden_states=states)


def empty_output(
    config: HymbaConfig, x: Tensor, cache: Cache | None, output_hidden_states: bool, output_attentions: bool
) -> HymbaOutput:
    """Return the outputs of no tokens: `x` is (0, T, D) or (B, 0, D)."""
    rows, steps = x.shape[:2]
    layers, weights = config.num_hidden_layers, []
    for layer in range(layers if output_attentions else 0):
        slots = config.num_meta_tokens + steps
        if cache is not None:
            slots = cache.key_positions(config.window(layer), cache.lengths.new_zeros(rows, 0)).shape[1]
        shape = rows, config.num_attention_heads, steps, slots
        weights.append(x.new_zeros(shape, dtype=accumulate_dtype(x)))
    states = (x,) * (layers + 1) if output_hidden_states else None
    return HymbaOutput(x, states, tuple(weights) if output_attentions else None)
