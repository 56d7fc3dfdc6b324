"""Keys of a ``config.json`` that other models give a meaning to: Hymba has one meaning for each, and refuses others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hymba.errors import HymbaError

# Every released checkpoint has these, with these values; they are written into every new file.
REQUIRED: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_hidden_act": "silu",
    "kq_norm": "none",
    "kv_weight_reuse": False,
    "kv_reuse_every_i_layer": -1,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "num_mamba": 1,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_inner_layernorms": True,
    "memory_tokens_interspersed_every": 0,
    "rope": True,
}
# transformers' names for what other models do. A file may have them, with these values or null.
_NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(
        (
            *("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop"),
            *("dropout", "hidden_dropout", "hidden_dropout_prob", "residual_dropout", "embedding_dropout"),
            *("activation_dropout", "mlp_dropout", "ffn_dropout", "layerdrop", "classifier_dropout"),
        ),
        0.0,
    ),
    **dict.fromkeys(("attention_bias", "qkv_bias", "mlp_bias", "use_bias", "bias", "lm_head_bias"), False),
    **dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm", "use_mrope", "rope_interleaved", "use_alibi"), False),
    **dict.fromkeys(("parallel_residual", "use_parallel_residual", "use_bidirectional_attention"), False),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), False),
    **dict.fromkeys(("is_causal", "use_sliding_window", "scale_attn_weights"), True),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_factor"), 1.0),
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), 1.0),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier", "mrope_section")),
    **dict.fromkeys(("no_rope_layers", "time_step_limit")),
    "num_local_experts": 1,
}
_ROPE_KEYS = ("rope_scaling", "rope_parameters")
# transformers' kinds of layers, by whether the layer is global; each layer has Mamba heads too.
_LAYER_TYPES = {True: ("full_attention", "hybrid"), False: ("sliding_attention", "hybrid")}


def check_supported(released: Mapping[str, Any]) -> None:
    """Refuse a ``config.json`` that asks for what Hymba does not do.

    Raises:
        HymbaError: a key has a value that would change the function; the message names the supported one.
    """
    for key, value in REQUIRED.items():
        if released.get(key, value) != value:
            raise _unsupported(released, key, value)
    for key, value in _NEUTRAL.items():
        if released.get(key) not in (None, value):
            raise _unsupported(released, key, value)
    for key in _ROPE_KEYS:
        _check_rope(key, released)
    _check_layers(released)


def _check_rope(key: str, released: Mapping[str, Any]) -> None:
    """Accept what says no more than `rope_type` and `rope_theta` do, in the form that transformers gives it."""
    wanted = released.get(key)
    if not wanted:
        return
    theta, kinds = released.get("rope_theta"), (None, "default", released.get("rope_type"))
    same = {"rope_theta": theta, "partial_rotary_factor": 1.0}
    others = (
        {k: v for k, v in wanted.items() if k not in ("rope_type", "type")} if isinstance(wanted, Mapping) else None
    )
    if (
        others is None
        or wanted.get("rope_type", wanted.get("type")) not in kinds
        or any(value not in (None, same.get(name)) for name, value in others.items())
    ):
        raise HymbaError(
            f"config key {key} is {wanted!r}: only null is supported, with rope_type and rope_theta beside it"
        )


def _check_layers(released: Mapping[str, Any]) -> None:
    kinds: Iterable[Any] = released.get("layer_type") or ()
    if set(kinds) - {"h"}:
        raise _unsupported(released, "layer_type", ["h"])
    types = released.get("layer_types")
    if types is not None:
        layers, indices = int(released.get("num_hidden_layers", len(types))), released.get("global_attn_idx") or ()
        if len(types) != layers or any(kind not in _LAYER_TYPES[i in indices] for i, kind in enumerate(types)):
            raise HymbaError(f"config key layer_types contradicts global_attn_idx {list(indices)}: leave it out")


def _unsupported(released: Mapping[str, Any], key: str, value: Any) -> HymbaError:
    return HymbaError(f"config key {key} is {released[key]!r}: only {value!r} is supported")
