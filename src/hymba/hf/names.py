"""The released tensor names in transformers, PEFT and `load_state_dict`.

Files hold NVIDIA's names, modules have ours. transformers' own loading and saving applies :func:`renamings`;
:func:`translate_name` serves everything that bypasses it: plain state dicts, adapters and their configs.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming

from hymba.model import RELEASED_NAMES

# The attribute of `HymbaModel` that holds the core model, and that of a model with a head that holds `HymbaModel`.
CORE, BASE = "core", "model"

# Parts of a name that torch.compile and PEFT insert where they wrap a module.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|base_layer|original_module)\.")


def _module_name(tensor_name: str) -> str:
    """Return the module of a weight or bias; other parameters keep their name."""
    return tensor_name.removesuffix(".weight").removesuffix(".bias")


# Released module or parameter → ours, {} standing for a layer's number. The head has one name on both sides.
_MODULES = {
    _module_name(released).removeprefix("model."): _module_name(ours)
    for ours, released in RELEASED_NAMES.items()
    if ours != released
}
_LAYER = "layers.{}."
_IN_LAYER = {k.removeprefix(_LAYER): v.removeprefix(_LAYER) for k, v in _MODULES.items() if k.startswith(_LAYER)}
_OUTSIDE = {k: v for k, v in _MODULES.items() if not k.startswith(_LAYER)}


def _any_of(names: dict[str, str]) -> str:
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))


# A name begins at the start or after a dot, and ends before a dot or at the end.
_RELEASED = re.compile(
    rf"(?<![^.])(?<!{CORE}\.)(?:layers\.(?P<layer>\d+)\.(?P<inside>{_any_of(_IN_LAYER)})|(?P<outside>{_any_of(_OUTSIDE)}))"
    r"(?![^.])"
)
_IN_LAYER_RELEASED = {ours: released for released, ours in _IN_LAYER.items()}
_OUTSIDE_RELEASED = {ours: released for released, ours in _OUTSIDE.items()}
_OURS = re.compile(
    rf"(?<![^.]){CORE}\.(?:layers\.(?P<layer>\d+)\.(?P<inside>{_any_of(_IN_LAYER_RELEASED)})"
    rf"|(?P<outside>{_any_of(_OUTSIDE_RELEASED)}))(?![^.])"
)
# The last part of our name is enough to tell the modules of a layer apart.
_ENDINGS = {
    ending: ours.rpartition(".")[2]
    for released, ours in (_IN_LAYER | _OUTSIDE).items()
    for ending in (released, *(released.split(".", i)[i] for i in range(1, released.count(".") + 1)))
    if not ending.isdigit()
}


def renamings() -> list[WeightRenaming]:
    """Return one renaming a module or parameter of `hymba.model.RELEASED_NAMES`; none touches a name of ours."""
    rows = []
    for released, ours in _MODULES.items():
        source = re.escape(released).replace(r"\{\}", r"(\d+)")
        if source.startswith(re.escape(ours)):
            source = rf"(?<!{CORE}\.)" + source
        rows.append(WeightRenaming(source, f"{CORE}.{ours}".replace("{}", r"\1")))
    return rows


def translate_name(name: str) -> str:
    """Return our name of a tensor or module under its released name, whatever precedes and follows it; else `name`."""

    def ours(match: re.Match[str]) -> str:
        if match["outside"]:
            return f"{CORE}.{_OUTSIDE[match['outside']]}"
        return f"{CORE}.layers.{match['layer']}.{_IN_LAYER[match['inside']]}"

    return _RELEASED.sub(ours, name, count=1)


def released_module_name(name: str) -> str:
    """Return the released name of a module or parameter of ours, whatever stands before it; else `name`."""

    def released(match: re.Match[str]) -> str:
        if match["outside"]:
            return _OUTSIDE_RELEASED[match["outside"]]
        return f"layers.{match['layer']}.{_IN_LAYER_RELEASED[match['inside']]}"

    return _OURS.sub(released, name, count=1)


def translate_ending(ending: str) -> str:
    """Return our ending of the module names that end as `ending` does in a release, "x_proj.0" for one; else `ending`.

    An ending is one or several whole parts of a name, or all of it.
    """
    full = translate_name(ending)
    return _ENDINGS.get(ending, ending) if full == ending or ending in _OUTSIDE else full


def translate_state_dict(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """Rename in place what `state_dict` holds for `module` under `prefix`, to the names that the module has.

    Names that the module has already, and names that it has not in either form, stay. Parts that wrappers insert
    are inserted, a base model's tensors load into a model with a head and the reverse, and a tensor that the module
    holds under two names, as tied embeddings, need be there under one only.
    """
    tensors = dict(_named_tensors(module))
    own = {_WRAPPERS.sub("", name): name for name in tensors}

    def is_given(name: str) -> bool:  # torch.distributed.checkpoint puts the module's own tensors in for missing ones
        return state_dict.get(prefix + name, tensors[name]) is not tensors[name]

    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name in tensors:
            continue
        plain = translate_name(_WRAPPERS.sub("", name))
        forms = (plain, f"{BASE}.{plain}", plain.removeprefix(f"{BASE}."))
        found = next((own[form] for form in forms if form in own), None)
        if found is not None and not is_given(found):
            state_dict[prefix + found] = state_dict.pop(key)
    shared: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        shared[id(tensor)].append(name)
    for names in shared.values():
        given = next((name for name in names if is_given(name)), None)
        for name in names if given else ():
            if not is_given(name):
                state_dict[prefix + name] = state_dict[f"{prefix}{given}"]


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
