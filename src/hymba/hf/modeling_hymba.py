"""Hymba behind transformers' door: arguments translated for :class:`hymba.model.Hymba`, no second forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging

from hymba.errors import HymbaError
from hymba.hf.attentions import AttentionColumns
from hymba.hf.cache import HymbaCache, hymba_memory
from hymba.hf.configuration_hymba import HymbaConfig
from hymba.hf.layout import Layout, last_columns, packed_documents, rotary_positions
from hymba.hf.names import translate_state_dict
from hymba.hf.offload import execution_device, is_hooked, loaded, prepare_dispatched
from hymba.hf.unsupported import UnpagedGeneration, check_attention
from hymba.model import Hymba, Scheme
from hymba.model.cache import Prefix
from hymba.model.hymba import HybridMixer, HymbaLayer, LayerOutput, Linear
from hymba.model.init import init_module
from hymba.model.projection import RMSNorm, are_bare
from hymba.ops.cross_entropy import linear_cross_entropy
from hymba.ops.precision import accumulate_dtype

logger = logging.get_logger(__name__)


class HymbaDecoderLayer(GradientCheckpointingLayer, HymbaLayer):
    """A core layer that transformers can checkpoint: K/V and states are arguments, so it may run twice."""

    def forward(self, x: Tensor, *inputs: Any) -> LayerOutput:
        """Run the layer; see :meth:`hymba.model.hymba.HymbaLayer.forward`. Offloaded weights are loaded first."""
        if not is_hooked(self.mixer.dt_norm):  # as good as any: accelerate hooks all modules that own weights
            return super().forward(x, *inputs)
        with loaded(*self.modules()):
            return super().forward(x, *inputs)


class HymbaCore(Hymba):
    """The core model, made of layers that transformers can checkpoint and accelerate can offload."""

    layer_class = HymbaDecoderLayer

    @property
    def device(self) -> torch.device:
        """Where the model runs; offloaded weights are elsewhere."""
        return execution_device(self.final_norm) or self.final_norm.weight.device

    def prefix(self, base: float | Tensor | None = None) -> Prefix:
        """Return the meta tokens' state; see :meth:`hymba.model.Hymba.prefix`."""
        if not is_hooked(self):
            return super().prefix(base)
        with loaded(self):
            return super().prefix(base)


# What `init_module` knows.
_CORE_MODULES = (Hymba, HybridMixer, RMSNorm, nn.Linear, nn.Embedding, nn.Conv1d)


class HymbaPreTrainedModel(PreTrainedModel):
    """What all models share: loading, initialization, and what transformers may assume."""

    config_class = HymbaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["HymbaDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True  # "eager" and "sdpa" are both accepted: the ops choose their own kernels
    _supports_attention_backend = True
    _is_stateful = True  # a recurrent state cannot be rolled back

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Do nothing: saving is not to copy the sources of an installed package."""

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """Refuse paged attention; leave the rest to transformers."""
        check_attention(attn_implementation)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize `module` as the core does, and what the core does not have as transformers does, sparing what a
        checkpoint has filled."""
        if not isinstance(module, _CORE_MODULES):
            super()._init_weights(module)
            return
        weights = module.parameters(recurse=isinstance(module, HybridMixer))
        loaded = [(p, p.clone()) for p in weights if getattr(p, "_is_hf_initialized", False)]
        init_module(module, self.config.initializer_range)
        for parameter, value in loaded:
            parameter.copy_(value)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take released names beside our own: `Trainer` and others read files with :meth:`load_state_dict`."""
        translate_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class HymbaModel(HymbaPreTrainedModel):
    """Hymba without its head. The meta tokens are not the caller's: no output but `attentions` shows them.

    :meth:`forward` runs T columns of B rows.

    Args:
        input_ids: (B, T) int64, or
        inputs_embeds: (B, T, D) in their place.
        attention_mask: (B, past + T), 0 at padding, which may stand anywhere; the last T columns are read.
        position_ids: (B, T). Where they restart at 0 a packed document begins; else rotary positions.
        past_key_values: a :class:`HymbaCache`, or an empty cache of transformers', which becomes one.
        use_cache: None takes the config's word, except in training mode.
        seq_idx: (B, T) document numbers of packed rows.
        cu_seq_lens_q: (documents + 1,) where the documents packed into a single row begin, and its end.

    Returns:
        last_hidden_state (B, T, D), past_key_values, hidden_states: L + 1 of (B, T, D), and attentions: L of
        (B, H, T, M + past + T), the meta tokens' columns first.

    Raises:
        HymbaError: the arguments contradict one another, or the checkpoint is quantised.
    """

    def __init__(self, config: HymbaConfig) -> None:
        if Scheme.from_released(config.to_dict()) is not None:
            raise HymbaError("the checkpoint is quantised, which transformers' classes are not: use hymba.load")
        super().__init__(config)
        self.core = HymbaCore(replace(config.core(), tie_word_embeddings=True))  # any head is outside
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.core.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.core.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Translate the arguments, run the core, translate its output."""
        if is_hooked(self.core.final_norm):
            prepare_dispatched(self)
        if torch.compiler.is_compiling() and self.config.rope_type == "dynamic_ntk":
            raise HymbaError(
                'rope_type "dynamic_ntk" depends on lengths, which a compiled graph does not see: use "ntk"'
            )
        steps = _steps(input_ids, inputs_embeds)
        layout = Layout.of_mask(last_columns(attention_mask, steps))
        # A graph is traced without values, so there the positions of a call with a cache are never those of documents.
        is_packable = not torch.compiler.is_compiling() or (past_key_values is None and not use_cache)
        documents = packed_documents(position_ids if is_packable else None, seq_idx, cu_seq_lens_q, layout, steps)
        if seq_idx is not None or cu_seq_lens_q is not None:
            position_ids = None  # the documents count their own
        past_key_values = self._cache(past_key_values, use_cache, packed=documents is not None)
        memory = hymba_memory(past_key_values, self.config.num_hidden_layers)
        columns = None
        if _or(output_attentions, self.config.output_attentions):
            columns = AttentionColumns.note(self.core, memory, layout, attention_mask, steps[1])
        held = None if memory is None else memory.core
        call = {
            "tokens": layout.compact(input_ids),
            "embeddings": layout.compact(inputs_embeds),
            "lengths": layout.lengths,
            "documents": documents,
            "positions": rotary_positions(position_ids, held, layout, steps, documents),
            "output_hidden_states": _or(output_hidden_states, self.config.output_hidden_states),
            "output_attentions": columns is not None,
        }
        output = self.core(**call) if memory is None else memory.run(self.core, steps, call)
        return BaseModelOutputWithPast(
            last_hidden_state=layout.restore(output.hidden),
            past_key_values=past_key_values,
            hidden_states=output.hidden_states and tuple(map(layout.restore, output.hidden_states)),
            attentions=columns and columns.arrange(output.attentions or ()),
        )

    def _cache(self, given: Cache | None, use_cache: bool | None, packed: bool) -> Cache | None:
        """Return the cache to use. Training or packed rows do with none unless the caller insists.

        Raises:
            HymbaError: torch.export traces, and the caller insists.
        """
        if torch.compiler.is_exporting():
            if given is not None or use_cache:
                raise HymbaError("an exported program takes and returns tensors only: export with use_cache=False")
            return None
        if self.gradient_checkpointing and self.training:
            if (given is not None or use_cache) and not torch.compiler.is_compiling():
                logger.warning_once("gradient checkpointing runs layers twice: no cache is used")
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not packed
        return HymbaCache() if given is None and use_cache else given


class HymbaForCausalLM(UnpagedGeneration, HymbaPreTrainedModel, GenerationMixin):
    """Hymba with its language-model head.

    Args:
        labels: (B, T) int64, the input's own tokens (shifted by one inside), −100 where there is no loss.
        shift_labels: (B, T) int64, in place of labels: what each column is to predict.
        num_items_in_batch: what the summed loss is divided by, in place of the number of targets.
        logits_to_keep: how many last columns, or which columns, to compute logits of; 0 is all.
        skip_logits: with labels, compute the loss alone, a block of rows at a time: the logits never exist as a whole.
        others: as :class:`HymbaModel`.

    Returns:
        logits (B, columns, vocab) in at least float32; loss, the mean cross-entropy in nats, given labels;
        and what :class:`HymbaModel` returns but last_hidden_state.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.core.embed_tokens.weight"}

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.model = HymbaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.generation_config.use_cache = True  # the released files say false, which nobody wants
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model and its head."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = output.last_hidden_state[:, kept]
        targets = self._targets(labels, kwargs, output.last_hidden_state.shape[1], kept)
        loss = logits = None
        if targets is not None and skip_logits:
            loss = self._loss(hidden, targets, kwargs)
        else:
            scores = self.lm_head(hidden)
            logits = scores.to(accumulate_dtype(scores))
            if targets is not None:
                loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs | {"shift_labels": targets})
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _targets(
        self, labels: Tensor | None, options: dict[str, Any], steps: int, kept: slice | Tensor
    ) -> Tensor | None:
        """Return what the kept columns are to predict (B, columns), or None without labels.

        `shift_labels` in `options` are targets already. Where there are as many as the `steps` of the input, the kept
        ones are selected, as the logits are.
        """
        targets = options.get("shift_labels")
        if targets is None and labels is not None:
            targets = F.pad(labels, (0, 1), value=options.get("ignore_index", -100))[:, 1:]
        if targets is None or targets.shape[1] != steps:
            return targets
        return targets[:, kept].contiguous()

    def _loss(self, hidden: Tensor, targets: Tensor, options: dict[str, Any]) -> Tensor:
        """Return what `loss_function` would of the logits: a sum over tokens, divided by their number or by
        `num_items_in_batch`."""
        if not are_bare(self.lm_head):
            logits = self.lm_head(hidden)
            return self.loss_function(logits, None, logits.shape[-1], **options | {"shift_labels": targets})
        targets, ignored = targets.to(hidden.device), options.get("ignore_index", -100)
        total = linear_cross_entropy(hidden, self.lm_head.weight, targets.masked_fill(targets == ignored, -100))
        count = options.get("num_items_in_batch")
        count = (targets != ignored).sum() if count is None else count
        return total / (count.to(total.device) if isinstance(count, Tensor) else count)

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Load the generation config, and turn its cache on."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config.use_cache = True

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Let transformers make the cache that was asked for, and make it Hymba's."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        hymba_memory(model_kwargs.get("past_key_values"), self.config.num_hidden_layers)


def _or(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def _steps(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """Return (B, T) of whichever input is there."""
    inputs = inputs_embeds if input_ids is None else input_ids
    if inputs is None or (input_ids is not None and inputs_embeds is not None):
        raise HymbaError("give exactly one of input_ids and inputs_embeds")
    return inputs.shape[0], inputs.shape[1]
