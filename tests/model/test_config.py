"""The configuration and its released layout."""

import json

import pytest
from micro import micro_config

from hymba.errors import HymbaError
from hymba.model import SIZES, HymbaConfig


@pytest.fixture
def released(tiny_a):
    return json.loads((tiny_a / "config.json").read_text())


@pytest.mark.parametrize("name", SIZES)
def test_released_layout_round_trips(name):
    config = HymbaConfig.named(name)
    assert HymbaConfig.from_released(json.loads(json.dumps(config.to_released()))) == config


def test_every_released_key_is_written(released):
    written = HymbaConfig.from_released(released).to_released()
    stamps = {"auto_map", "torch_dtype", "transformers_version", "use_cache", "seq_length"}
    assert {k: v for k, v in released.items() if k not in stamps} == {
        k: v for k, v in written.items() if k not in stamps
    }


def test_null_means_no_such_layers(released):
    config = HymbaConfig.from_released(released | {"kv_reuse_group": None, "global_attn_idx": None})
    assert config.owners == tuple(range(config.num_hidden_layers))
    assert config.global_layers == ()


def test_owners_and_windows():
    config = HymbaConfig.named("1.5b")
    assert len(set(config.owners)) == 17
    assert config.owners[16:19] == (16, 16, 16)
    assert [i for i in range(32) if config.window(i) is None] == [0, 15, 31]
    assert config.rope_base(1) == pytest.approx(74_534.83, abs=0.01)


def test_rope_types():
    assert micro_config(rope_type="default").rope_base(10**6) == 10000.0
    assert micro_config(rope_type=None).rope_base(10**6) == 10000.0
    dynamic = micro_config(rope_type="dynamic_ntk", orig_max_position_embeddings=64, head_dim=64, v_head_dim=16)
    assert dynamic.rope_base(64) == 10000.0
    assert dynamic.rope_base(128) == pytest.approx(10000.0 * 3 ** (64 / 62))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "multiple"),
        ({"d_inner": 50}, "d_inner"),
        ({"global_layers": (0, 9)}, "global_layers"),
        ({"kv_groups": ((1, 2), (2,))}, "repeats"),
        ({"kv_groups": ((2, 3),)}, "mixes"),
        ({"kv_groups": ((2, 1),)}, "unsorted"),
        ({"rope_type": "yarn"}, "rope_type"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(HymbaError, match=message):
        micro_config(**changes)


def test_broken_config_files(tmp_path, released):
    with pytest.raises(HymbaError, match="'llama' config"):
        HymbaConfig.from_released(released | {"model_type": "llama"})
    with pytest.raises(HymbaError, match="kq_norm"):
        HymbaConfig.from_released(released | {"kq_norm": "rms"})
    with pytest.raises(HymbaError, match="num_memory_tokens is missing"):
        HymbaConfig.from_released({k: v for k, v in released.items() if k != "num_memory_tokens"})
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(HymbaError, match="cannot read"):
        HymbaConfig.from_directory(tmp_path)
    with pytest.raises(HymbaError, match="unknown size"):
        HymbaConfig.named("7b")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_dropout": 0.1},
        {"hidden_dropout": 0.5},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"use_mrope": True},
        {"partial_rotary_factor": 0.5},
        {"is_causal": False},
        {"use_sliding_window": False},
        {"final_logit_softcapping": 30.0},
        {"logits_scaling": 8.0},
        {"num_local_experts": 8},
        {"num_experts": 8},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": "yarn"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"layer_type": ["h", "h", "a", "h", "h", "h"]},
        {"layer_types": ["full_attention"] * 6},
        {"layer_types": ["hybrid"]},
        {"sliding_window": None},
        {"sliding_window": 0},
        {"head_dim": 3},
    ],
    ids=str,
)
def test_what_would_change_the_function_is_refused_in_a_line(released, changes):
    with pytest.raises(HymbaError, match=next(iter(changes))) as error:
        HymbaConfig.from_released(released | changes)
    assert "\n" not in str(error.value)


def test_what_changes_nothing_is_accepted(released):
    config = HymbaConfig.from_released(released)
    kinds = ["full_attention" if config.window(i) is None else "sliding_attention" for i in range(len(config.owners))]
    theta = config.rope_theta
    for changes in (
        {"attention_dropout": 0, "hidden_dropout": None, "attention_bias": False, "is_causal": True},
        {"rope_scaling": None, "rope_parameters": None},
        {"rope_scaling": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": config.rope_type, "rope_theta": theta}},
        {"layer_types": kinds},
        {"layer_types": ["hybrid"] * len(kinds)},
        {"head_dim": config.head_dim},
    ):
        assert HymbaConfig.from_released(released | changes) == config


@pytest.mark.parametrize("change", [{"rope_theta": 0.0}, {"rope_theta": -1.0}, {"rms_norm_eps": -1e-6}])
def test_numbers_that_give_nan_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(HymbaError, match="not a positive number"):
        HymbaConfig.named("tiny", **change)
