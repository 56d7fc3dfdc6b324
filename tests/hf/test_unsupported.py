"""What transformers cannot do with a recurrent state is refused at once, in one line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager

from hymba.errors import HymbaError
from hymba.hf import HymbaConfig, HymbaForCausalLM

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.mark.parametrize(
    "attempt",
    [
        lambda model: model.generate_batch([[3, 4, 5]]),
        lambda model: model.init_continuous_batching(),
        lambda model: model.continuous_batching_context_manager(),
        lambda model: model.generate(IDS, cache_implementation="paged"),
        lambda model: model.set_attn_implementation("paged|eager"),
        lambda model: model.set_attn_implementation("paged|sdpa"),
    ],
)
def test_continuous_batching(model: HymbaForCausalLM, attempt: Callable[[HymbaForCausalLM], object]) -> None:
    with pytest.raises(HymbaError, match="has no place for Hymba's convolution and SSM states") as refusal:
        attempt(model)
    assert "\n" not in str(refusal.value)
    assert not hasattr(model, "init_continuous_batching")  # for transformers' server, which then runs row by row


def test_a_manager_made_directly(model: HymbaForCausalLM) -> None:
    with pytest.raises(ValueError, match="hybrid"):
        ContinuousBatchingManager(model, GenerationConfig(eos_token_id=2), ContinuousBatchingConfig())


@pytest.mark.parametrize("auto_class", [HymbaForCausalLM, AutoModel])
def test_paged_attention_as_an_argument(model: HymbaForCausalLM, auto_class: type, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for implementation in ("paged|eager", "paged|sdpa"):
        with pytest.raises(HymbaError, match="is not for Hymba"):
            auto_class.from_pretrained(tmp_path, attn_implementation=implementation)


def test_drafts_of_another_model(model: HymbaForCausalLM) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=61, **shape)).eval()
    for options in ({"assistant_model": other}, {"use_mtp": True}, {"assistant_early_exit": 1}):
        with pytest.raises(ValueError, match="stateful"):
            model.generate(IDS, max_new_tokens=4, **options)
    with pytest.raises(HymbaError, match="cannot be an assistant_model"):
        other.generate(IDS, max_new_tokens=4, assistant_model=model)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches(model: HymbaForCausalLM, kind: str) -> None:
    with pytest.raises(HymbaError, match="cannot be offloaded"):
        model.generate(IDS, max_new_tokens=4, cache_implementation=kind)


def test_layer_types_are_an_attribute_and_not_in_the_file(model: HymbaForCausalLM) -> None:
    config = model.config
    assert config.layer_types == ["hybrid"] * config.num_hidden_layers
    assert "layer_types" not in config.to_dict()
    assert "layer_types" not in config.to_diff_dict()
    assert HymbaConfig.from_dict(config.to_dict()).layer_types == config.layer_types
    wanted = model.generate(IDS, max_new_tokens=4)
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=16)):
        assert not cache.is_croppable
        assert torch.equal(model.generate(IDS, max_new_tokens=4, past_key_values=cache), wanted)
