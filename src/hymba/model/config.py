"""The shape of a Hymba, and its translation from and to the released ``config.json``.

The dimension key, used in every shape comment of the project:

====  ==============================  ====  ==============================
B     sequences in the batch          K     width of a query or key head
T     tokens of this call             V     width of a value head
S     stored positions                E     inner width, of both branches
L     layers                          N     SSM state per channel
D     model width                     R     rank of the step size δ
H     query heads                     M     meta tokens
G     KV heads                        F     MLP width
====  ==============================  ====  ==============================

Layout is always (B, T, heads, width).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hymba.errors import HymbaError
from hymba.model.supported import REQUIRED, check_supported
from hymba.ops.rotary import ntk_base

CONFIG_FILE = "config.json"
ROPE_TYPES = ("ntk", "dynamic_ntk", "default", None)

# Our field ← the released key, where the two differ.
_RELEASED_KEYS = {
    "d_state": "mamba_d_state",
    "d_conv": "mamba_d_conv",
    "dt_rank": "mamba_dt_rank",
    "num_meta_tokens": "num_memory_tokens",
    "global_layers": "global_attn_idx",
    "kv_groups": "kv_reuse_group",
}
_LAYER_LISTS = ("global_attn_idx", "kv_reuse_group")
# Computed from other released keys, or absent there.
_DERIVED = ("head_dim", "d_inner")
# Written into a new config.json so that the released code can read it too; without meaning here.
_BYSTANDERS: dict[str, Any] = {
    "architectures": ["HymbaForCausalLM"],
    "attention_dropout": 0.0,
    "attn_hidden_size": -1,
    "attn_implementation": "flex",
    "attn_implementation_new": "flex",
    "calc_logits_for_entire_prompt": False,
    "model_type": "hymba",
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "use_cache": True,
    "use_mamba_kernels": True,
}


@dataclass(frozen=True)
class HymbaConfig:
    """Everything that decides the shapes and the arithmetic of a Hymba.

    Raises:
        HymbaError: the numbers contradict one another; the message says which.
    """

    vocab_size: int
    hidden_size: int  # D
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # K
    v_head_dim: int  # V
    intermediate_size: int  # F
    d_inner: int  # E = H·V
    d_state: int  # N
    d_conv: int
    dt_rank: int  # R
    num_meta_tokens: int  # M
    sliding_window: int  # W; a token sees itself and W before it
    global_layers: tuple[int, ...]
    kv_groups: tuple[tuple[int, ...], ...]  # the first layer of a group owns K/V; layers in no group own theirs
    max_position_embeddings: int
    orig_max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_type: str | None = "ntk"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for problem, holds in (
            (
                "num_attention_heads is not a multiple of num_key_value_heads",
                self.num_attention_heads % self.num_key_value_heads == 0,
            ),
            (
                "d_inner is not num_attention_heads x v_head_dim",
                self.d_inner == self.num_attention_heads * self.v_head_dim,
            ),
            ("head_dim is odd", self.head_dim % 2 == 0),
            (f"rope_theta is {self.rope_theta!r}, not a positive number", self.rope_theta > 0),
            (f"rms_norm_eps is {self.rms_norm_eps!r}, not a positive number", self.rms_norm_eps > 0),
            (f"rope_type is {self.rope_type!r}, not one of {ROPE_TYPES}", self.rope_type in ROPE_TYPES),
            (
                f"sliding_window is {self.sliding_window!r}, not a number of tokens",
                len(set(self.global_layers)) == self.num_hidden_layers or _is_positive(self.sliding_window),
            ),
            (
                "global_layers names a layer that is not there",
                all(0 <= i < self.num_hidden_layers for i in self.global_layers),
            ),
        ):
            if not holds:
                raise HymbaError(f"impossible config: {problem}")
        self._check_groups()

    def _check_groups(self) -> None:
        members = [i for group in self.kv_groups for i in group]
        if len(set(members)) != len(members) or not all(0 <= i < self.num_hidden_layers for i in members):
            raise HymbaError("impossible config: kv_groups repeats a layer or names one that is not there")
        for group in self.kv_groups:
            if list(group) != sorted(group) or len({i in self.global_layers for i in group}) > 1:
                raise HymbaError(
                    f"impossible config: KV group {list(group)} is unsorted or mixes global and sliding layers"
                )

    @property
    def owners(self) -> tuple[int, ...]:
        """For each layer, the layer whose K/V it reads: itself when it owns them. (L,)"""
        owner = list(range(self.num_hidden_layers))
        for group in self.kv_groups:
            for layer in group:
                owner[layer] = group[0]
        return tuple(owner)

    def window(self, layer: int) -> int | None:
        """Return W for a sliding layer and None for a global one."""
        return None if layer in self.global_layers else self.sliding_window

    @property
    def dynamic_rope(self) -> bool:
        """Whether the rotary base depends on the length of a sequence."""
        return self.rope_type == "dynamic_ntk"

    def rope_base(self, length: int) -> float:
        """Return the rotary base of a sequence of `length` positions, meta tokens counted.

        Only "dynamic_ntk" looks at the length: past `orig_max_position_embeddings` the base grows with it.
        """
        trained = self.orig_max_position_embeddings
        if self.rope_type == "ntk":
            return ntk_base(self.rope_theta, self.max_position_embeddings, trained, self.head_dim)
        if self.rope_type == "dynamic_ntk" and length > trained:
            return ntk_base(self.rope_theta, length, trained, self.head_dim)
        return self.rope_theta

    @classmethod
    def named(cls, name: str, **changes: Any) -> HymbaConfig:
        """Return a named size ("tiny", "125m", "350m" or "1.5b"), with fields replaced by `changes`.

        Source: arXiv 2411.13676, table of the family; "tiny" is this project's bundled model.
        """
        if name not in SIZES:
            raise HymbaError(f"unknown size {name!r}: use one of {', '.join(SIZES)}")
        return replace(SIZES[name], **changes)

    @classmethod
    def from_directory(cls, directory: str | Path) -> HymbaConfig:
        """Read ``config.json`` in `directory`.

        Raises:
            HymbaError: there is none, it is not JSON, or it describes something other than a Hymba.
        """
        return cls.from_released(read_config(directory))

    @classmethod
    def from_released(cls, released: Mapping[str, Any]) -> HymbaConfig:
        """Translate the released layout of ``config.json``.

        Raises:
            HymbaError: a key is missing, or a switch stands in a position no released checkpoint uses.
        """
        if released.get("model_type") != "hymba":
            raise HymbaError(f"this is a {released.get('model_type')!r} config, not a 'hymba' one")
        check_supported(released)
        values: dict[str, Any] = {}
        for field in (f for f in fields(cls) if f.name not in _DERIVED):
            key = _RELEASED_KEYS.get(field.name, field.name)
            if key in released:
                # The released code takes null for "no such layers".
                values[field.name] = _freeze(released[key] or [] if key in _LAYER_LISTS else released[key])
            elif field.default is MISSING:
                raise HymbaError(f"config key {key} is missing: a Hymba config carries every key")
        attention_width = _or(released.get("attn_hidden_size"), values["hidden_size"])
        values["head_dim"] = _or(released.get("kq_head_dim"), attention_width // values["num_attention_heads"])
        if released.get("head_dim") not in (None, values["head_dim"]):
            raise HymbaError(f"config key head_dim is {released['head_dim']}: kq_head_dim says {values['head_dim']}")
        values["d_inner"] = int(released.get("mamba_expand", 2) * values["hidden_size"])
        return cls(**values)

    def to_released(self) -> dict[str, Any]:
        """Return the released layout of ``config.json``, every key present."""
        names = {f.name: _RELEASED_KEYS.get(f.name, f.name) for f in fields(self) if f.name not in _DERIVED}
        released = {key: _thaw(getattr(self, name)) for name, key in names.items()}
        plain_width = self.head_dim * self.num_attention_heads == self.hidden_size
        released |= REQUIRED | _BYSTANDERS
        released |= {
            "conv_dim": {str(i): self.d_inner for i in range(self.num_hidden_layers)},
            "kq_head_dim": -1 if plain_width else self.head_dim,
            "layer_type": ["h"] * self.num_hidden_layers,
            "mamba_expand": _ratio(self.d_inner, self.hidden_size),
            "seq_length": self.max_position_embeddings,
        }
        return dict(sorted(released.items()))


def read_config(directory: str | Path) -> dict[str, Any]:
    """Return what ``config.json`` in `directory` holds.

    Raises:
        HymbaError: there is none, or it is no JSON object.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise HymbaError(f"no {CONFIG_FILE} in {directory}: point to a directory that holds a Hymba checkpoint")
    try:
        released = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HymbaError(f"cannot read {path}: {error}") from error
    if not isinstance(released, dict):
        raise HymbaError(f"cannot read {path}: it holds no JSON object")
    return released


def _or(value: int | None, otherwise: int) -> int:
    """Return `value`, or `otherwise` where the released config says None or −1."""
    return otherwise if value in (None, -1) else int(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    return [_thaw(item) for item in value] if isinstance(value, tuple) else value


def _ratio(inner: int, outer: int) -> float | int:
    return inner // outer if inner % outer == 0 else inner / outer


def _pairs(layers: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """Group consecutive layers in twos; a last odd one joins the group before it."""
    run = list(layers)
    groups = [tuple(run[i : i + 2]) for i in range(0, len(run) - 1, 2)]
    if len(run) % 2 and groups:
        groups[-1] += (run[-1],)
    return tuple(groups)


def _family(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> HymbaConfig:
    middle = (layers - 1) // 2
    first_half, second_half = range(1, middle), range(middle + 1, layers - 1)
    groups = _pairs(first_half) + (_pairs(second_half) if len(second_half) % 2 == 0 else _odd_first(second_half))
    return HymbaConfig(
        vocab_size=32001,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        v_head_dim=2 * width // heads,
        intermediate_size=mlp,
        d_inner=2 * width,
        d_state=16,
        d_conv=4,
        dt_rank=width // 16,
        num_meta_tokens=128,
        sliding_window=1024,
        global_layers=(0, middle, layers - 1),
        kv_groups=groups,
        max_position_embeddings=8192,
        orig_max_position_embeddings=2048,
    )


def _odd_first(layers: range) -> tuple[tuple[int, ...], ...]:
    """Group in twos after a first group of three, as the released 1.5B does behind its middle layer."""
    return (tuple(layers[:3]), *_pairs(layers[3:]))


SIZES = {
    "tiny": HymbaConfig(
        vocab_size=3072,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        v_head_dim=128,
        intermediate_size=384,
        d_inner=384,
        d_state=8,
        d_conv=4,
        dt_rank=12,
        num_meta_tokens=16,
        sliding_window=128,
        global_layers=(0, 3, 5),
        kv_groups=((1, 2), (4,)),
        max_position_embeddings=2048,
        orig_max_position_embeddings=512,
        rope_type="default",
    ),
    "125m": _family(24, 512, 8, 4, 1664),
    "350m": _family(32, 768, 12, 4, 2432),
    "1.5b": _family(32, 1600, 25, 5, 5504),
}
