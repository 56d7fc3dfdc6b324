"""What PEFT and transformers' Trainer must know about Hymba, for which they have no extension point.

Both are patched after they are imported, and act differently for Hymba models only: PEFT accepts the released names
of modules in an adapter's config and weights, and the Trainer applies weight decay to the projections alone and finds
no fault with the names in shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import wraps
from types import ModuleType
from typing import Any

from torch import nn

from hymba.hf.imports import after_import
from hymba.hf.modeling_hymba import HymbaPreTrainedModel
from hymba.hf.names import released_module_name, translate_ending, translate_name, translate_state_dict
from hymba.model import Hymba, is_matrix

# Fields of PEFT's configs that name modules: patterns or endings; endings; regular expressions with a value each.
_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")
_ENDINGS = ("modules_to_save",)
_KEYS = ("rank_pattern", "alpha_pattern")


def install() -> None:
    """Patch PEFT and the Trainer, now or when they are imported."""
    after_import("peft.utils.transformers_weight_conversion", _patch_adapter_configs)
    # Each of these has the function under its name, by import.
    for name in ("peft.utils.save_and_load", "peft.utils", "peft.peft_model", "peft"):
        after_import(name, _patch_adapter_weights)
    after_import("transformers.trainer", _patch_weight_decay)
    # The Trainer has imported the function by its name.
    after_import("transformers.trainer_utils", _patch_shards)
    after_import("transformers.trainer", _patch_shards)


def translate_adapter_config(config: Any, model: nn.Module) -> None:
    """Replace the released names of modules in a `PeftConfig` by those that `model` has, in place."""
    for field in _PATTERNS:
        value = getattr(config, field, None)
        if isinstance(value, str):
            setattr(config, field, _resolve(value, model))
        elif value:
            setattr(config, field, _translate_all(value))
    for field in _ENDINGS:
        if value := getattr(config, field, None):
            setattr(config, field, _translate_all(value))
    for field in _KEYS:
        if value := getattr(config, field, None):
            setattr(config, field, {_translate_pattern(pattern): x for pattern, x in value.items()})


def undecayed_names(model: nn.Module) -> set[str]:
    """Return the names in `model` of the Hymba parameters that weight decay does not apply to.

    They are those that `hymba.training` leaves out as well: all but the projections inside layers. A classification
    head is left to its trainer.
    """
    names = set()
    for prefix, module in model.named_modules():
        head = module.get_output_embeddings() if isinstance(module, HymbaPreTrainedModel) else None
        if not isinstance(module, Hymba) and head is None:
            continue
        for name, parameter in module.named_parameters(prefix, remove_duplicate=False):
            if (head is None and not is_matrix(name, parameter)) or (head is not None and parameter is head.weight):
                names.add(name)
    return names


def _patch_adapter_configs(module: ModuleType) -> None:
    convert = module.convert_peft_config_for_transformers

    @wraps(convert)
    def convert_hymba_too(peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, HymbaPreTrainedModel):
            translate_adapter_config(peft_config, model)
        return convert(peft_config, model, *args, **kwargs)

    module.convert_peft_config_for_transformers = convert_hymba_too  # type: ignore[attr-defined]


def _patch_adapter_weights(module: ModuleType) -> None:
    load = module.set_peft_model_state_dict
    if hasattr(load, "__wrapped__"):
        return

    @wraps(load)
    def load_released_names_too(model: Any, peft_model_state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if isinstance(model.get_base_model(), HymbaPreTrainedModel):
            peft_model_state_dict = {translate_name(name): x for name, x in peft_model_state_dict.items()}
        return load(model, peft_model_state_dict, *args, **kwargs)

    module.set_peft_model_state_dict = load_released_names_too  # type: ignore[attr-defined]


def _patch_weight_decay(module: ModuleType) -> None:
    trainer = module.Trainer
    choose = trainer.get_decay_parameter_names

    @wraps(choose)
    def choose_projections(self: Any, model: nn.Module) -> list[str]:
        undecayed = undecayed_names(model)
        return [name for name in choose(self, model) if name not in undecayed]

    trainer.get_decay_parameter_names = choose_projections


def _patch_shards(module: ModuleType) -> None:
    """Have shards compared with the model under our names; they load in either case."""
    load = module.load_sharded_checkpoint
    if hasattr(load, "__wrapped__"):
        return

    @wraps(load)
    def load_hymba_too(model: nn.Module, folder: Any, strict: bool = True, prefer_safe: bool = True) -> Any:
        if not isinstance(model, HymbaPreTrainedModel):
            return load(model, folder, strict=strict, prefer_safe=prefer_safe)
        result = load(model, folder, strict=False, prefer_safe=prefer_safe)
        own = model.state_dict().keys()
        stored: dict[str, Any] = dict.fromkeys([*(own - set(result.missing_keys)), *result.unexpected_keys])
        translate_state_dict(model, stored, "")
        missing, unexpected = [k for k in own if k not in stored], [k for k in stored if k not in own]
        if strict and (missing or unexpected):
            names = f"missing keys: {missing}, unexpected keys: {unexpected}"
            raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}: {names}")
        return type(result)(missing, unexpected)

    module.load_sharded_checkpoint = load_hymba_too  # type: ignore[attr-defined]


def _translate_all(endings: Iterable[str]) -> Iterable[str]:
    kind = set if isinstance(endings, set) else list
    return kind(translate_ending(ending) for ending in endings)


def _translate_pattern(pattern: str) -> str:
    """Return a regular expression for our names, where `pattern` is a released ending, dots escaped or not."""
    plain = pattern.replace("\\.", ".")
    translated = translate_ending(plain)
    return pattern if translated == plain else translated


def _resolve(pattern: str, model: nn.Module) -> str | list[str]:
    """Return the modules of `model` that a regular expression matches, by our name or the released one; or `pattern`
    itself where the released names change nothing."""
    names = [name for name, _ in model.named_modules()]
    ours = {name for name in names if re.fullmatch(pattern, name)}
    both = [name for name in names if name in ours or re.fullmatch(pattern, released_module_name(name))]
    return both if len(both) > len(ours) else pattern
