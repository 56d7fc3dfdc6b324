"""NVIDIA's ``config.json`` as a transformers config: same keys, same values, in and out."""

from __future__ import annotations

import os
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from hymba.hf.remote_code import write_remote_code
from hymba.model import HymbaConfig as CoreConfig

# Keys that stay in the file and are no attributes. By `output_router_logits` and its kin others take a model for a
# mixture of experts; `rope_scaling`, `head_dim` and `layer_types` are read-only here.
_FILE_ONLY = (
    *("num_experts", "num_experts_per_tok", "num_local_experts", "output_router_logits", "router_aux_loss_coef"),
    *("router_jitter_noise", "rope_scaling", "head_dim", "layer_types"),
)


class HymbaConfig(PreTrainedConfig):
    """A Hymba's shape under the names of the released ``config.json``.

    The fields below decide something; every other key of the file is kept and written back, most as attributes.
    What is left out follows from the rest: `global_attn_idx` is the first, middle and last layer, and
    `kv_reuse_group` pairs the sliding layers between them. :meth:`core` translates for
    :class:`hymba.model.Hymba`.

    Raises:
        HymbaError: the numbers contradict one another, or a key asks for what Hymba does not do.
    """

    model_type = "hymba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32001
    hidden_size: int = 1600
    intermediate_size: int = 5504
    num_hidden_layers: int = 32
    num_attention_heads: int = 25
    num_key_value_heads: int = 5
    kq_head_dim: int = -1  # -1: hidden_size // num_attention_heads
    v_head_dim: int | None = None  # None: mamba_expand * hidden_size // num_attention_heads
    mamba_expand: float = 2
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_dt_rank: int | str = "auto"  # "auto": ceil(hidden_size / 16)
    num_memory_tokens: int = 128
    sliding_window: int = 1024
    global_attn_idx: list[int] | None = None
    kv_reuse_group: list[list[int]] | None = None
    max_position_embeddings: int = 8192
    orig_max_position_embeddings: int | None = None  # None: 2048, or max_position_embeddings if that is less
    rope_theta: float = 10000.0
    rope_type: str | None = "ntk"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive what was left out, and keep every other released key."""
        if self.v_head_dim is None:
            self.v_head_dim = int(self.mamba_expand * self.hidden_size) // self.num_attention_heads
        if self.mamba_dt_rank == "auto":
            self.mamba_dt_rank = ceil(self.hidden_size / 16)
        if self.orig_max_position_embeddings is None:
            self.orig_max_position_embeddings = min(2048, self.max_position_embeddings)
        if self.global_attn_idx is None:
            self.global_attn_idx = sorted({0, (self.num_hidden_layers - 1) // 2, self.num_hidden_layers - 1})
        if self.kv_reuse_group is None:
            self.kv_reuse_group = _paired(self.num_hidden_layers, self.global_attn_idx)
        if kwargs.get("attn_implementation") == "flex":  # the released key, not transformers' argument
            del kwargs["attn_implementation"]
        self._file_only = {key: kwargs.pop(key) for key in _FILE_ONLY if key in kwargs}
        super().__post_init__(**kwargs)
        if not hasattr(self, "auto_map"):
            self.auto_map: dict[str, str] = {}  # TRL reads it of every class that transformers does not contain
        for key, value in self.core().to_released().items():
            if key in _FILE_ONLY:
                self._file_only.setdefault(key, value)
            elif not hasattr(self, key):
                setattr(self, key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a ``config.json``; see `PreTrainedConfig.from_dict`.

        Raises:
            HymbaError: a key that decides something is missing: a file is never completed by defaults.
        """
        if config_dict.get("model_type") == cls.model_type:
            CoreConfig.from_released(config_dict)
        released = {key: value for key, value in config_dict.items() if key != "attn_implementation"}
        released |= {key: kwargs.pop(key) for key in _FILE_ONLY if key in kwargs}
        loaded = super().from_dict(released, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.core()  # what the caller has changed must be supported too
        config.attn_implementation = config_dict.get("attn_implementation", config.attn_implementation)
        return loaded

    def to_dict(self) -> dict[str, Any]:
        """Return every key of the file."""
        written = super().to_dict()
        written = written.pop("_file_only", {}) | written
        if not written.get("auto_map"):
            written.pop("auto_map", None)
        return written

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``config.json``, and the files that its `auto_map` names; see :mod:`hymba.hf.remote_code`."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_remote_code(directory, type(self), getattr(self, "auto_map", None) or {})
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Do nothing: saving is not to copy the sources of an installed package."""

    @property
    def head_dim(self) -> int:
        """K, the width of a query or key head."""
        return self.hidden_size // self.num_attention_heads if self.kq_head_dim == -1 else self.kq_head_dim

    @property
    def layer_types(self) -> list[str]:
        """What transformers is to allocate or page for each layer: states beside keys and values. Not in the file."""
        return ["hybrid"] * self.num_hidden_layers

    def core(self) -> CoreConfig:
        """Return the same shape as :class:`hymba.model.HymbaConfig`."""
        released = self.to_dict()
        if 2 * self.max_position_embeddings <= released["orig_max_position_embeddings"]:
            # The NTK formula stretches; for a context cut to half or less it has no real value.
            released["orig_max_position_embeddings"] = self.max_position_embeddings
        return CoreConfig.from_released(released)


def _paired(layers: int, global_layers: list[int]) -> list[list[int]]:
    """Group each run of sliding layers in twos, an odd run beginning with three, as in the released 1.5B."""
    groups = []
    for is_global, run in groupby(range(layers), lambda layer: layer in global_layers):
        members = list(run)
        if is_global or len(members) < 2:
            continue
        first = 2 + len(members) % 2
        groups += [members[:first], *(members[i : i + 2] for i in range(first, len(members), 2))]
    return groups
