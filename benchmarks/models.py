"""Models with random weights, and the bytes that a decode step of them reads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.command import Weights
from hymba.model import Cache, Hymba, HymbaConfig, init_weights, skeleton
from hymba.model.quantize import quantize
from hymba.ops.attention import Heads, QuantizedHeads

SEED = 0


def random_model(size: str, weights: Weights = Weights.bf16, device: torch.device | str = "cpu") -> Hymba:
    """Return a named size with random weights, the same in every run."""
    config = HymbaConfig.named(size)
    model = skeleton(config).to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    init_weights(model, SEED)
    return model if weights is Weights.bf16 else quantize(model, int(weights.removeprefix("int")))


def random_tokens(model: Hymba, rows: int, tokens: int) -> Tensor:
    """Return (rows, tokens) token ids, the same in every run."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator)


def weight_bytes(model: Hymba) -> int:
    """Return the bytes of the weights that every decode step reads: all but meta tokens and embedding rows.

    A head tied to the embedding is read as the head, once.
    """
    unread = ("meta_tokens",) if model.lm_head is None else ("meta_tokens", "embed_tokens.")
    return sum(x.nbytes for name, x in _weights(model) if not name.startswith(unread))


def all_weight_bytes(model: Hymba) -> int:
    """Return the bytes of all weights, read at each step or not."""
    return sum(x.nbytes for _, x in _weights(model))


def _weights(model: Hymba) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight by name: parameters, and the values and scales of quantised matrices, which are buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def state_bytes(cache: Cache) -> int:
    """Return the bytes of recurrent state that one decode step reads and writes, of all rows."""
    return 2 * (cache.conv_state.nbytes + cache.ssm_state.nbytes)


def kv_bytes(cache: Cache, tokens: float) -> float:
    """Return the bytes of keys and values that all layers read in one step with `tokens` text tokens held a row.

    Layers that share them count each: between two of them the weights of a layer have passed through the caches.
    """
    config, total = cache.config, 0.0
    for layer, owner in enumerate(config.owners):
        ring = cache.keys[owner].shape[1] - config.num_meta_tokens
        used = config.num_meta_tokens + min(ring, tokens)
        window = config.window(layer)
        assert window is None or ring == window + 1
        for held in (cache.keys[owner], cache.values[owner]):
            total += used * sum(x[:, 0].nbytes for x in _parts(held))
    return total


def _parts(heads: Heads) -> tuple[Tensor, ...]:
    return (heads.values, heads.scales) if isinstance(heads, QuantizedHeads) else (heads,)
