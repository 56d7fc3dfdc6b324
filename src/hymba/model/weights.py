"""Checkpoints in the released layout: safetensors under NVIDIA's tensor names, in one file or in shards."""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hymba.errors import HymbaError
from hymba.files import replacing
from hymba.model.config import CONFIG_FILE, HymbaConfig
from hymba.model.hymba import Hymba

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_ALIGNMENT = 64  # bytes: a cache line

# The one table of names, ours and NVIDIA's; {} stands for a layer's number. Shapes are the same on both sides.
RELEASED_NAMES: dict[str, str] = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "meta_tokens": "model.memory_tokens",
    "final_norm.weight": "model.final_layernorm.weight",
    "lm_head.weight": "lm_head.weight",
    "layers.{}.input_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.mixer.in_proj.weight": "model.layers.{}.mamba.in_proj.weight",
    "layers.{}.mixer.conv.weight": "model.layers.{}.mamba.conv1d.weight",
    "layers.{}.mixer.conv.bias": "model.layers.{}.mamba.conv1d.bias",
    "layers.{}.mixer.x_proj.weight": "model.layers.{}.mamba.x_proj.0.weight",
    "layers.{}.mixer.dt_norm.weight": "model.layers.{}.mamba.dt_layernorm.weight",
    "layers.{}.mixer.B_norm.weight": "model.layers.{}.mamba.B_layernorm.weight",
    "layers.{}.mixer.C_norm.weight": "model.layers.{}.mamba.C_layernorm.weight",
    "layers.{}.mixer.dt_proj.weight": "model.layers.{}.mamba.dt_proj.0.weight",
    "layers.{}.mixer.dt_proj.bias": "model.layers.{}.mamba.dt_proj.0.bias",
    "layers.{}.mixer.A_log": "model.layers.{}.mamba.A_log.0",
    "layers.{}.mixer.D": "model.layers.{}.mamba.D.0",
    "layers.{}.mixer.attention_norm.weight": "model.layers.{}.mamba.pre_avg_layernorm1.weight",
    "layers.{}.mixer.ssm_norm.weight": "model.layers.{}.mamba.pre_avg_layernorm2.weight",
    "layers.{}.mixer.out_proj.weight": "model.layers.{}.mamba.out_proj.weight",
    "layers.{}.mlp_norm.weight": "model.layers.{}.pre_moe_layernorm.weight",
    "layers.{}.mlp.gate_proj.weight": "model.layers.{}.moe.experts.0.gate_proj.weight",
    "layers.{}.mlp.up_proj.weight": "model.layers.{}.moe.experts.0.up_proj.weight",
    "layers.{}.mlp.down_proj.weight": "model.layers.{}.moe.experts.0.down_proj.weight",
}
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def released_name(name: str) -> str:
    """Return NVIDIA's name of our parameter `name`.

    Raises:
        KeyError: `name` is not one of ours.
    """
    layer = _LAYER.search(name)
    pattern = RELEASED_NAMES[_LAYER.sub("{}", name, count=1)]
    return pattern.format(layer[0]) if layer else pattern


def load(directory: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Hymba:
    """Load a checkpoint in the released layout.

    Each tensor goes straight into its final dtype and device, so that the peak is one copy of the model.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``, or shards and their index.
        dtype: of all weights; None keeps the stored one.
        device: where the weights go.

    Raises:
        HymbaError: a file is missing, truncated or corrupt; a tensor is missing, unknown or of the wrong shape.
    """
    config = HymbaConfig.from_directory(directory)
    with torch.device("meta"):
        model = Hymba(config)
    wanted = {released_name(name): (name, parameter.shape) for name, parameter in model.named_parameters()}
    loaded: dict[str, Tensor] = {}
    arena = _Arena(_nbytes(Path(directory), model, dtype)) if torch.device(device).type == "cpu" else None
    for name, tensor in _stored_tensors(Path(directory)):
        if name not in wanted:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            raise HymbaError(f"{directory} holds a tensor {name!r} that the config has no place for")
        ours, shape = wanted[name]
        if tensor.shape != shape:
            raise HymbaError(f"{directory}: {name} has shape {tuple(tensor.shape)}, but the config says {tuple(shape)}")
        kept = dtype or tensor.dtype
        loaded[ours] = arena.keep(tensor, kept) if arena else tensor.to(device=device, dtype=kept)
    missing = [name for name, (ours, _) in wanted.items() if ours not in loaded]
    if missing:
        raise HymbaError(
            f"{directory} lacks the tensor {missing[0]!r}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
        )
    model.load_state_dict(loaded, assign=True)
    return model.eval()


def save(model: Hymba, directory: str | Path, max_shard_size: str = "5GB") -> None:
    """Write `model` in the released layout, each file under a temporary name first.

    Raises:
        HymbaError: the directory cannot be written.
    """
    directory = Path(directory)
    tensors = {released_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for filename, names in shards.filename_to_tensors.items():
            with replacing(directory / filename) as temporary:
                save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            with replacing(directory / INDEX_FILE) as temporary:
                temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        with replacing(directory / CONFIG_FILE) as temporary:
            config = model.config.to_released() | {"torch_dtype": dtype}
            temporary.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise HymbaError(f"cannot write the model to {directory}: {error}") from error


def _nbytes(directory: Path, model: Hymba, dtype: torch.dtype | None) -> int:
    """Return how much memory a model's weights take at most, in a dtype or as they are stored."""
    parameters = list(model.parameters())
    if dtype is None:
        stored = sum(file.stat().st_size for file in _weight_files(directory))
    else:
        stored = dtype.itemsize * sum(p.numel() for p in parameters)
    return stored + _ALIGNMENT * len(parameters)


class _Arena:
    """One stretch of huge pages for all weights of a model on the CPU.

    Decoding reads every weight for each token, and from here it does so about 15% faster than from a mapped file, whose
    pages are small; and no page is held twice, in the file's mapping and in a copy.
    """

    def __init__(self, nbytes: int) -> None:
        self._free = memoryview(b"")
        if hasattr(mmap, "MAP_ANONYMOUS"):  # not on Windows, where the allocator serves
            try:
                memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise HymbaError(f"the weights need {nbytes / 1e9:,.1f} GB of memory: {error}") from error
            with suppress(AttributeError, OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._free = memoryview(memory)

    def keep(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy of a tensor read from a file, and let go of the pages that the reading took."""
        size = tensor.numel() * dtype.itemsize
        if 0 < size <= len(self._free):
            place = torch.frombuffer(self._free, dtype=dtype, count=tensor.numel()).view(tensor.shape)
            self._free = self._free[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        else:
            place = torch.empty(tensor.shape, dtype=dtype)
        place.copy_(tensor)
        _release(tensor)
        return place


def _release(mapped: Tensor) -> None:
    """Tell Linux that the pages of a tensor in a mapped file are not needed now; they come back when read again."""
    if sys.platform == "linux":
        start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _stored_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every stored tensor, one at a time."""
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a dict
                    yield name, stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise HymbaError(f"{file} is truncated or corrupt ({error}): copy or download it again") from error


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        raise HymbaError(f"no {WEIGHTS_FILE} and no {INDEX_FILE} in {directory}: weights load from safetensors only")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise HymbaError(f"{index} is corrupt ({error}): copy or download it again") from error
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise HymbaError(f"{directory} lacks the shard {absent[0]}: copy or download it again")
    return [directory / name for name in names]
