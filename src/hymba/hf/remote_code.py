"""Two small files that let transformers load a saved model with `trust_remote_code=True`, without an import of hymba.

transformers finds them through `auto_map` in config.json, and asks for them where the classes are not registered yet:
in `lm_eval`, `trl`, `transformers serve` and other programs. They import the classes from the installed package and
hold no code of their own. The released checkpoints have an `auto_map` of the same form for NVIDIA's files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from hymba.errors import HymbaError
from hymba.files import replacing
from hymba.model.config import CONFIG_FILE, read_config

CONFIGURATION, MODELING = "configuration_hymba", "modeling_hymba"
_AUTO_CLASSES = (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)
_FIRST_LINE = '"""Hymba\'s classes are in the package `hymba`; this file imports them for transformers."""'
_FILE = """{first_line}

try:
    from hymba.hf import {names}
except ModuleNotFoundError as error:
    if error.name not in ("hymba", "hymba.hf"):
        raise
    raise ImportError("this model needs the package hymba: pip install hymba") from None

__all__ = {quoted}
"""


def auto_map(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """Return the `auto_map` of config.json for every auto class that knows `config_class`."""
    mappings = {auto_class.__name__: auto_class._model_mapping for auto_class in _AUTO_CLASSES}
    models = {name: mapping[config_class].__name__ for name, mapping in mappings.items() if config_class in mapping}
    references = {name: f"{MODELING}.{model}" for name, model in models.items()}
    return {"AutoConfig": f"{CONFIGURATION}.{config_class.__name__}"} | references


def add_remote_code(directory: Path, config_class: type[PreTrainedConfig]) -> None:
    """Add an `auto_map` to config.json in `directory`, in place of any other, and the files that it names.

    Raises:
        HymbaError: there is no config.json, or a file of that name has other contents.
    """
    for path in (directory / f"{module}.py" for module in (CONFIGURATION, MODELING)):
        if not _is_ours_to_write(path):
            raise HymbaError(f"{path} is there already with other code: choose another directory or remove it")
    config = read_config(directory) | {"auto_map": auto_map(config_class)}
    write_remote_code(directory, config_class, config["auto_map"])
    with replacing(directory / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_remote_code(directory: Path, config_class: type[PreTrainedConfig], given: Mapping[str, Any]) -> None:
    """Write the files that the `auto_map` `given` refers to, unless others have their names or its classes."""
    ours = auto_map(config_class)
    if not given or any(ours.get(name) != reference for name, reference in given.items()):
        return
    classes: dict[str, list[str]] = {CONFIGURATION: [], MODELING: []}
    for reference in given.values():
        module, name = reference.split(".")
        classes[module].append(name)
    for module, names in classes.items():
        path = directory / f"{module}.py"
        if names and _is_ours_to_write(path):
            text = _FILE.format(
                first_line=_FIRST_LINE, names=", ".join(sorted(names)), quoted=json.dumps(sorted(names))
            )
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def _is_ours_to_write(path: Path) -> bool:
    """Return whether there is no such file, or one that this module has written."""
    return not path.exists() or path.read_text(encoding="utf-8", errors="replace").startswith(_FIRST_LINE)
