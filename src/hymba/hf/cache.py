"""transformers' view of :class:`hymba.model.Cache`.

A transformers `Cache` is a list of layers that passes every call on to each of them. Hymba's state lives in one
object, which all entries of the list share. An empty `DynamicCache` or `StaticCache` becomes a Hymba cache in place.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache

from hymba.errors import HymbaError
from hymba.hf.offload import is_hooked
from hymba.inference.step import DecodeStep
from hymba.model import Cache as CoreCache
from hymba.model import Hymba, HymbaOutput

# A cache of unstated size is allocated for this many tokens more than it must hold, and doubled when full.
MARGIN = 64


class HymbaMemory:
    """What all layers of a cache share.

    capacity: tokens to allocate at once; the cache grows past it.
    repeats: whether single tokens are run by a recorded step (:class:`hymba.inference.step.DecodeStep`), as with
        transformers' "static" cache; the weights must then keep their memory.
    core: the core cache, None until the first tokens come.
    width: columns of the caller's input seen so far, padding included: what `generate` calls the past length.
    """

    def __init__(self, capacity: int = 0, repeats: bool = False) -> None:
        self.capacity, self.repeats = capacity, repeats
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.width = 0
        self.core: CoreCache | None = None
        self._step: DecodeStep | None = None
        self._step_room = 0

    def run(self, model: Hymba, steps: tuple[int, int], call: dict[str, Any]) -> HymbaOutput:
        """Run a `call`, the model's arguments, of (B, T) = `steps` after what is held, and hold its tokens too."""
        rows, columns = steps
        if self.core is None:
            room = max(self.capacity, columns + MARGIN)
            self.core = CoreCache.start(model.config, model.prefix(), rows, room)
        if self.width + columns > self.core.max_length:
            self.core.grow(2 * (self.width + columns))
        self.width += columns
        compiles = torch.compiler.is_compiling()
        if self.repeats and compiles:
            self.core.whole = True  # one graph for all steps
        repeats = self.repeats and not compiles and not is_hooked(model.final_norm)
        if repeats and columns == 1 and not torch.is_grad_enabled() and _is_plain(call):
            return HymbaOutput(self._repeat(model, call["tokens"][:, 0]))
        return model(**call, cache=self.core)

    def _repeat(self, model: Hymba, tokens: Tensor) -> Tensor:
        """Run a token a row, as the step before; return the hidden states (B, 1, D)."""
        assert self.core is not None
        room = self.core.max_length
        if self._step is None or self._step.cache is not self.core or self._step_room != room:  # other memory
            self._step, self._step_room = DecodeStep(model, self.core, head=False), room
        return self._step(tokens)[:, None].clone()

    def select(self, rows: Tensor) -> None:
        """Keep the rows named by the index `rows`, in that order; repeats are copied."""
        if self.core is not None:
            self.core = self.core.select(rows.to(self.core.lengths.device))


def _is_plain(call: dict[str, Any]) -> bool:
    """Return whether a call of the model says nothing but which tokens come next."""
    others = (x for name, x in call.items() if name != "tokens")
    return call["tokens"] is not None and all(x is None or x is False for x in others)


class HymbaCacheLayer(CacheLayerMixin):
    """Layer `index` as transformers sees it. What changes the shared memory is done once, by the first layer."""

    def __init__(self, memory: HymbaMemory, index: int) -> None:
        self.memory = memory
        self.index = index

    @property
    def keys(self) -> Tensor | None:
        """The text tokens' keys still held (B, G, S, K), rotated; shared ones are those of the layer that made them.

        Each row ends in the last column and begins, where it holds less, with zeros. None before the first tokens.
        """
        core = self.memory.core
        return None if core is None else self._text(core, core.keys)

    @property
    def values(self) -> Tensor | None:
        """The text tokens' values still held (B, G, S, V), arranged as the keys."""
        core = self.memory.core
        return None if core is None else self._text(core, core.values)

    @property
    def is_initialized(self) -> bool:
        """Whether any tokens have come."""
        return self.memory.width > 0

    @property
    def batch_size(self) -> int:
        """Rows held, −1 before the first tokens."""
        core = self.memory.core
        return -1 if core is None else core.rows

    def get_seq_length(self) -> int:
        """Return the caller's tokens held, its padding counted and the meta tokens not."""
        return self.memory.width

    def get_max_length(self) -> int:
        """Return −1: the cache grows without bound."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the width of a full mask and its offset."""
        return self.memory.width + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.memory.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i a copy of row `beam_idx[i]`."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; repeats are copied."""
        if self.index == 0:
            self.memory.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Copy each row `repeats` times, side by side."""
        if self.index == 0:
            self.memory.select(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens: a recurrent state keeps no history."""
        if tokens_to_remove:
            raise HymbaError("a Hymba cache cannot be cropped, its SSM state keeps no history: copy it beforehand")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first forward pass allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse foreign keys and values."""
        raise HymbaError("a Hymba cache is filled by Hymba's forward pass only")

    def _text(self, core: CoreCache, buffers: dict[int, Any]) -> Tensor:
        owner, meta = core.config.owners[self.index], core.config.num_meta_tokens
        buffer, no_queries = buffers[owner], core.lengths.new_zeros(core.rows, 0)
        positions = core.key_positions(core.config.window(owner), no_queries)
        held = min(self.memory.width, buffer.shape[1] - meta)
        columns = positions - meta - core.lengths[:, None] + held
        columns = torch.where(positions >= meta, columns, held)  # the rest go to a column that is cut off
        text = buffer.new_zeros(core.rows, held + 1, *buffer.shape[2:])
        text[torch.arange(core.rows)[:, None], columns] = buffer[:, : positions.shape[1]]
        return text[:, :held].transpose(1, 2)


class HymbaCache(Cache):
    """The cache that `HymbaForCausalLM` makes, returns and takes: K/V by sharing group, conv and SSM states.

    Its layers appear with the first tokens.

    Args:
        capacity: text tokens a row to allocate at once; 0 allocates by need. It grows either way.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__(layers=[])
        self.capacity = capacity


def hymba_memory(cache: Cache | None, num_layers: int) -> HymbaMemory | None:
    """Return the memory behind `cache`, if there is one; an empty cache of any kind becomes a Hymba cache in place.

    Raises:
        HymbaError: `cache` holds something else already, or is of a kind that moves its tensors about.
    """
    if cache is None:
        return None
    layers = getattr(cache, "layers", None)
    if layers and isinstance(layers[0], HymbaCacheLayer):
        return layers[0].memory
    if getattr(cache, "offloading", False):
        raise HymbaError(
            "a Hymba cache cannot be offloaded layer by layer: leave cache_implementation out, or 'static'"
        )
    if layers is None or int(cache.get_seq_length()) > 0:
        kind = type(cache).__name__
        raise HymbaError(f"past_key_values is a used or unsupported {kind}: pass an empty hymba.hf.HymbaCache")
    capacity = max(cache.get_max_length(), 0) if layers else getattr(cache, "capacity", 0)
    memory = HymbaMemory(capacity, repeats=isinstance(cache, StaticCache))
    cache.layers = [HymbaCacheLayer(memory, index) for index in range(num_layers)]
    cache.layer_class_to_replicate = None
    return memory
