"""transformers' config and the core's say the same."""

import pytest

from hymba.errors import HymbaError
from hymba.hf import HymbaConfig
from hymba.model import HymbaConfig as CoreConfig


def test_the_defaults_are_the_released_model() -> None:
    assert HymbaConfig().core() == CoreConfig.named("1.5b")


@pytest.mark.parametrize("size", ["tiny", "125m", "350m", "1.5b"])
def test_core_there_and_back(size: str) -> None:
    core = CoreConfig.named(size)
    assert HymbaConfig(**core.to_released()).core() == core
    assert HymbaConfig.from_dict(core.to_released()).core() == core


def test_every_released_key_is_written() -> None:
    written = HymbaConfig(num_hidden_layers=2).to_diff_dict()
    assert CoreConfig.named("tiny").to_released().keys() <= written.keys() | {"architectures"}
    assert written["attn_implementation"] == "flex"
    assert written["conv_dim"] == {"0": 3200, "1": 3200}


def test_the_attention_argument_is_not_the_released_key() -> None:
    released = CoreConfig.named("tiny").to_released()
    assert HymbaConfig.from_dict(released)._attn_implementation is None
    asked = HymbaConfig.from_dict(released, attn_implementation="eager")
    assert asked._attn_implementation == "eager"
    assert asked.to_diff_dict()["attn_implementation"] == "flex"


def test_what_no_release_has_is_refused() -> None:
    with pytest.raises(HymbaError, match="hidden_act"):
        HymbaConfig(hidden_act="gelu")
    with pytest.raises(HymbaError, match="multiple"):
        HymbaConfig(num_key_value_heads=3)


def test_a_shortened_context_leaves_the_rotary_base_real() -> None:
    config = HymbaConfig(num_hidden_layers=2)
    config.max_position_embeddings = 500
    assert config.core().rope_base(500) == config.rope_theta
