"""transformers' config and the core's say the same."""

import copy
import json
from pathlib import Path

import pytest

from hymba.errors import HymbaError
from hymba.hf import HymbaConfig, HymbaForCausalLM
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


ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.25, "num_experts": 1, "num_experts_per_tok": 1}


def test_router_keys_stay_in_the_file_and_are_no_attributes(tmp_path: Path) -> None:
    released = CoreConfig.named("tiny").to_released() | ROUTER | {"rope_scaling": None, "head_dim": 64}
    first = HymbaConfig.from_dict(released)
    for config in (first, HymbaConfig(**released), copy.deepcopy(first), HymbaConfig.from_dict(first.to_dict())):
        assert not any(hasattr(config, key) for key in ROUTER)
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert {key: written[key] for key in released} == released
        assert "_file_only" not in written
        assert "auto_map" not in written
    assert HymbaConfig.from_pretrained(tmp_path, num_experts_per_tok=1).to_dict()["output_router_logits"] is True
    assert HymbaConfig().to_dict()["router_aux_loss_coef"] == 0.001


def test_an_auto_map_is_there_and_written_if_given() -> None:
    one, other = HymbaConfig(), HymbaConfig(auto_map={"AutoConfig": "a.B"})
    assert one.auto_map == {}
    assert "auto_map" not in one.to_dict()
    assert other.to_dict()["auto_map"] == {"AutoConfig": "a.B"}
    one.auto_map["AutoModel"] = "a.C"
    assert HymbaConfig().auto_map == {}


def test_an_unsupported_key_is_refused_wherever_it_is_set() -> None:
    released = CoreConfig.named("tiny").to_released()
    with pytest.raises(HymbaError, match=r"attention_dropout is 0\.1: only 0\.0 is supported"):
        HymbaConfig(attention_dropout=0.1)
    with pytest.raises(HymbaError, match="attention_dropout"):
        HymbaConfig.from_dict(released, attention_dropout=0.1)
    with pytest.raises(HymbaError, match="rope_scaling"):
        HymbaConfig.from_dict(released | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    with pytest.raises(HymbaError, match="num_experts is 4"):
        HymbaConfig(num_experts=4)
    with pytest.raises(HymbaError, match="head_dim is 32"):
        HymbaConfig(head_dim=32)
    config = HymbaConfig.from_dict(released)
    config.rope_scaling = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(HymbaError, match="rope_parameters"):
        HymbaForCausalLM(config)
