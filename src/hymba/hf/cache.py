"""transformers' view of :class:`hymba.model.Cache`.

A transformers `Cache` is a list of layers that passes every call on to them. Hymba's state lives in one
object for all layers, so the list has one entry. An empty `DynamicCache` or `StaticCache` of the caller
becomes a Hymba cache in place.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hymba.errors import HymbaError
from hymba.model import Cache as CoreCache
from hymba.model import Hymba

# A cache of unstated size is allocated for this many tokens more than it must hold, and doubled when full.
MARGIN = 64


class HymbaCacheLayer(CacheLayerMixin):
    """Holds the core cache, None until the first tokens come.

    capacity: tokens to allocate at once; the cache grows past it.
    width: columns of the caller's input seen so far, padding included: what `generate` calls the past length.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.core: CoreCache | None = None
        self.width = 0

    def make_room(self, model: Hymba, rows: int, steps: int) -> CoreCache:
        """Return the core cache with room for `steps` more tokens in each of `rows` rows."""
        needed = self.width + steps
        if self.core is None:
            self.core = model.allocate_cache(rows, max(self.capacity, needed + MARGIN))
            self.is_initialized = True
        elif needed > self.core.max_length:
            self.core.grow(2 * needed)
        return self.core

    @property
    def batch_size(self) -> int:
        """Rows held, −1 before the first tokens."""
        return -1 if self.core is None else self.core.rows

    def get_seq_length(self) -> int:
        """Return the caller's tokens held, its padding counted and the meta tokens not."""
        return self.width

    def get_max_length(self) -> int:
        """Return −1: the cache grows without bound."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of a full mask and its offset."""
        return self.width + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.core, self.width, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i a copy of row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; repeats are copied."""
        if self.core is not None:
            self.core = self.core.select(indices.to(self.core.lengths.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copy each row `repeats` times, side by side."""
        if self.core is not None:
            rows = torch.arange(self.core.rows, device=self.core.lengths.device)
            self.core = self.core.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens: a recurrent state keeps no history."""
        if tokens_to_remove:
            raise HymbaError("a Hymba cache cannot be cropped, its SSM state keeps no history: copy it beforehand")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first forward pass allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse foreign keys and values."""
        raise HymbaError("a Hymba cache is filled by Hymba's forward pass only")


class HymbaCache(Cache):
    """The cache that `HymbaForCausalLM` makes, returns and takes: K/V by sharing group, conv and SSM states.

    Args:
        capacity: text tokens a row to allocate at once; 0 allocates by need. It grows either way.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__(layers=[HymbaCacheLayer(capacity)])


def hymba_layer(cache: Cache) -> HymbaCacheLayer:
    """Return the Hymba layer of `cache`; an empty cache of another kind becomes a Hymba cache in place.

    Raises:
        HymbaError: `cache` holds something else already, or is of a kind that moves its tensors about.
    """
    layers = getattr(cache, "layers", None)
    if layers and isinstance(layers[0], HymbaCacheLayer):
        return layers[0]
    if layers is None or getattr(cache, "offloading", False) or int(cache.get_seq_length()) > 0:
        kind = type(cache).__name__
        raise HymbaError(f"past_key_values is a used or unsupported {kind}: pass an empty hymba.hf.HymbaCache")
    layer = HymbaCacheLayer(max(cache.get_max_length(), 0) if layers else 0)
    cache.layers, cache.layer_class_to_replicate = [layer], None
    return layer
