"""A small Hymba with every part in it: global and sliding layers, KV groups, meta tokens."""

from collections.abc import Callable

import pytest
import torch

from hymba.hf import HymbaConfig, HymbaForCausalLM

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "mamba_d_state": 4,
    "num_memory_tokens": 3,
    "sliding_window": 5,
    "global_attn_idx": [0, 4],
    "kv_reuse_group": [[1, 2], [3]],
    "max_position_embeddings": 256,
    "orig_max_position_embeddings": 64,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def build() -> Callable[..., HymbaForCausalLM]:
    """Make a fresh model, `changes` applied to the small shape."""

    def build(**changes: object) -> HymbaForCausalLM:
        torch.manual_seed(0)
        return HymbaForCausalLM(HymbaConfig(**(SHAPE | changes)))

    return build


@pytest.fixture(scope="session")
def model(build: Callable[..., HymbaForCausalLM]) -> HymbaForCausalLM:
    """One model in eval mode, shared by tests that do not change it."""
    return build().eval()
