"""transformers' door: once imported, `AutoModelForCausalLM.from_pretrained` and `generate` know Hymba."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from hymba.hf.cache import HymbaCache
from hymba.hf.configuration_hymba import HymbaConfig
from hymba.hf.modeling_hymba import HymbaForCausalLM, HymbaModel, HymbaPreTrainedModel
from hymba.hf.names import renamings
from hymba.hf.registration import add_to_transformers

AutoConfig.register(HymbaConfig.model_type, HymbaConfig)
AutoModel.register(HymbaConfig, HymbaModel)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM)
register_checkpoint_conversion_mapping(HymbaConfig.model_type, renamings())

add_to_transformers(HymbaConfig, HymbaForCausalLM, HymbaModel)

__all__ = ["HymbaCache", "HymbaConfig", "HymbaForCausalLM", "HymbaModel", "HymbaPreTrainedModel"]
