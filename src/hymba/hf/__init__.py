"""Hymba in transformers: importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from hymba.hf.cache import HymbaCache
from hymba.hf.configuration_hymba import HymbaConfig
from hymba.hf.heads import HymbaForQuestionAnswering, HymbaForSequenceClassification, HymbaForTokenClassification
from hymba.hf.integrations import install
from hymba.hf.modeling_hymba import HymbaForCausalLM, HymbaModel, HymbaPreTrainedModel
from hymba.hf.names import renamings
from hymba.hf.registration import add_to_transformers

AutoConfig.register(HymbaConfig.model_type, HymbaConfig)
AutoModel.register(HymbaConfig, HymbaModel)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM)
AutoModelForSequenceClassification.register(HymbaConfig, HymbaForSequenceClassification)
AutoModelForTokenClassification.register(HymbaConfig, HymbaForTokenClassification)
AutoModelForQuestionAnswering.register(HymbaConfig, HymbaForQuestionAnswering)
register_checkpoint_conversion_mapping(HymbaConfig.model_type, renamings())
install()

# Models, by the names that config.json gives.
add_to_transformers(
    HymbaForCausalLM,
    HymbaForQuestionAnswering,
    HymbaForSequenceClassification,
    HymbaForTokenClassification,
    HymbaModel,
)

__all__ = [
    "HymbaCache",
    "HymbaConfig",
    "HymbaForCausalLM",
    "HymbaForQuestionAnswering",
    "HymbaForSequenceClassification",
    "HymbaForTokenClassification",
    "HymbaModel",
    "HymbaPreTrainedModel",
]
