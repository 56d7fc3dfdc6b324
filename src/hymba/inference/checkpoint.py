"""Where a model comes from: the bundled one, a directory, or the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hymba.errors import HymbaError
from hymba.files import replacing
from hymba.model import Hymba, Rounding, load, save, scheme_of
from hymba.model.config import CONFIG_FILE, read_config
from hymba.model.quantize import CONFIG_KEY
from hymba.text import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"int8": 8, "int4": 4}  # of quantised weights, and their bits
# What stands beside the weights and the config, and belongs to the text.
TEXT_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(name: str, weights: bool = True) -> Path:
    """Return the directory of a model, downloaded first if it is a hub id.

    Args:
        name: "tiny" for the bundled model, a directory, or a hub id such as "owner/name".
        weights: whether a download takes the weights along.

    Raises:
        HymbaError: there is no such directory, and the hub does not give it.
    """
    if name == BUNDLED:
        return Path(str(resources.files("hymba") / "assets" / BUNDLED))
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise HymbaError(f"{name} is a file: give the directory that holds the model")
    if not _HUB_ID.fullmatch(name) or path.parent.is_dir():
        raise HymbaError(f"no such directory: {name} (a model is {BUNDLED!r}, a directory, or a hub id)")
    return _download(name, ["*.safetensors"] if weights else [])


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns, "*.json", "*.model", "*.jinja"]))
    except Exception as error:  # one of many: not found, gated, no network, interrupted
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        problem = f"{name} is no directory here and the hub does not give it ({reason})"
        raise HymbaError(f"{problem}: check the name and the connection") from error


def load_model(
    name: str,
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    report: Callable[[Rounding], None] = lambda rounding: None,
) -> tuple[Hymba, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer; arguments as in `find_model`, `parse_dtype`, `parse_device` and `parse_format`.

    Args:
        quantize: quantises the weights as they are read; `report` is called after each.

    Raises:
        HymbaError: see there, `hymba.model.load` and `hymba.text.load_tokenizer`.
    """
    wanted, place, bits = parse_dtype(dtype), parse_device(device), parse_format(quantize)
    directory = find_model(name)
    model = load(directory, wanted, place, bits, report).requires_grad_(False)
    return model, load_tokenizer(directory)


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype called `name`; None stays None, which means the stored one.

    Raises:
        HymbaError: it is not one of ``DTYPES``.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise HymbaError(f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def parse_format(name: str | None) -> int | None:
    """Return the bits of the weight format called `name`; None stays None, which means the stored one.

    Raises:
        HymbaError: it is not one of ``FORMATS``.
    """
    if name is None:
        return None
    if name not in FORMATS:
        raise HymbaError(f"unknown weight format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def parse_cache(name: str | None) -> int | None:
    """Return the bits of the cache format called `name`; None stays None, which means the model's dtype.

    Raises:
        HymbaError: it is not "int8".
    """
    if name not in (None, "int8"):
        raise HymbaError(f"unknown cache format {name!r}: int8 is the one beside the model's dtype")
    return None if name is None else 8


def parse_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the GPU if there is one, else the CPU.

    Raises:
        HymbaError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        seen = "" if torch.cuda.is_available() else f", since torch {torch.__version__} sees no GPU"
        raise HymbaError(f"no device {name!r} here{seen}: use auto, cpu or cuda") from error


def write_model(model: Hymba, source: Path, target: Path, max_shard_size: str = "5GB") -> None:
    """Write `model`, and what stands beside it in `source`: the tokenizer, config keys unknown to us.

    Raises:
        HymbaError: `target` already holds weights, it cannot be written, or `max_shard_size` is no size.
    """
    check_vacant(target)
    try:
        save(model, target, max_shard_size)
        _write_config(model, source, target)
        for name in TEXT_FILES:
            if (source / name).is_file():
                with replacing(target / name) as temporary:
                    shutil.copyfile(source / name, temporary)
    except HymbaError:
        raise
    except ValueError as error:
        raise HymbaError(f"{max_shard_size!r} is no size: write it like 500MB or 5GB") from error
    except OSError as error:
        raise HymbaError(f"cannot write the model to {target}: {error}") from error


def check_vacant(target: Path) -> None:
    """Check that a model may be written to the directory `target`.

    Raises:
        HymbaError: it holds one already.
    """
    if target.is_dir() and any(target.glob("*.safetensors*")):
        raise HymbaError(f"{target} already holds a model: choose another directory or empty it")


def _write_config(model: Hymba, source: Path, target: Path) -> None:
    """Write the config of `source` as it is, but for how the weights are stored. The dtype's key has had two names."""
    config, scheme = read_config(source), scheme_of(model)
    config["dtype" if "dtype" in config else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
    config |= {CONFIG_KEY: scheme.to_released()} if scheme else {}
    with replacing(target / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
