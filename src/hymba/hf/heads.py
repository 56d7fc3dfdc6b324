"""Hymba with a classification head: of sequences, of tokens, and of where an answer begins and ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from hymba.errors import HymbaError
from hymba.hf.configuration_hymba import HymbaConfig
from hymba.hf.layout import last_columns
from hymba.hf.modeling_hymba import HymbaPreTrainedModel


class _WithHead:
    """A head in the dtype of the model below it, which transformers builds in that of the config."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.to(self.model.dtype)  # type: ignore[attr-defined]


class HymbaForSequenceClassification(_WithHead, GenericForSequenceClassification, HymbaPreTrainedModel):
    """Hymba with a linear map of each row's last token to `config.num_labels` scores. A reward model has one label.

    The last token is the last one that `attention_mask` shows, whichever side the padding is on; without a mask, the
    last one that is not `config.pad_token_id`.

    :meth:`forward` takes labels (B,), or (B, labels) for several at once, and otherwise what
    :class:`~hymba.hf.HymbaModel` takes.

    Returns:
        logits (B, labels); loss, given labels; and what `HymbaModel` returns but last_hidden_state.

    Raises:
        HymbaError: several rows come without a mask, and the config has no padding token.
    """

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
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Run the model, and its head on each row's last token."""
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
        hidden = output.last_hidden_state
        last = self._last_columns(input_ids, attention_mask, hidden)
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _last_columns(self, input_ids: Tensor | None, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the column of each row's last token (B,); 0 in a row of padding alone."""
        rows, columns = hidden.shape[:2]
        pad, real = self.config.pad_token_id, last_columns(mask, (rows, columns))
        if real is None and input_ids is not None and pad is not None:
            real = input_ids - pad
        elif real is None and input_ids is not None and rows > 1:
            raise HymbaError("several rows and no padding token: pass attention_mask, or set config.pad_token_id")
        elif real is None:
            real = torch.ones(rows, columns)
        return (real.bool().to(hidden.device) * torch.arange(columns, device=hidden.device)).argmax(dim=1)


class HymbaForTokenClassification(_WithHead, GenericForTokenClassification, HymbaPreTrainedModel):
    """Hymba with a linear map of each token to `config.num_labels` scores: logits (B, T, labels)."""


class HymbaForQuestionAnswering(_WithHead, GenericForQuestionAnswering, HymbaPreTrainedModel):
    """Hymba with a linear map of each token to two scores, of an answer's start and of its end: logits (B, T)."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)
