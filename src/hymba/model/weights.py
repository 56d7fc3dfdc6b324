"""Checkpoints in the released layout: safetensors under NVIDIA's tensor names, in one file or in shards."""

from __future__ import annotations

import ctypes
import json
import mmap
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hymba.errors import HymbaError
from hymba.files import replacing
from hymba.model.config import CONFIG_FILE, HymbaConfig, read_config
from hymba.model.hymba import Hymba
from hymba.model.init import skeleton
from hymba.model.quantize import CONFIG_KEY, PARTS, Rounding, Scheme, hollow, quantizable, round_weight, scheme_of

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
_PART = re.compile(rf"(?<=\.weight)({'|'.join(PARTS)})$")


def released_name(name: str) -> str:
    """Return NVIDIA's name of our tensor `name`; the parts of a quantised weight keep what follows its name.

    Raises:
        KeyError: `name` is not one of ours.
    """
    layer, part = _LAYER.search(name), _PART.search(name)
    pattern = RELEASED_NAMES[_PART.sub("", _LAYER.sub("{}", name, count=1))]
    return (pattern.format(layer[0]) if layer else pattern) + (part[0] if part else "")


def load(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    bits: int | None = None,
    report: Callable[[Rounding], None] = lambda rounding: None,
) -> Hymba:
    """Load a checkpoint in the released layout, or one that was quantised and saved.

    Each tensor goes straight into its final dtype and device, so that the peak is one copy of the model.

    Args:
        directory: holds ``config.json`` and ``model.safetensors``, or shards and their index.
        dtype: of all weights that are not quantised; None keeps the stored one.
        device: where the weights go.
        bits: 8 or 4 quantises each weight as it is read; see `hymba.model.quantize`.
        report: called after each weight that is quantised.

    Raises:
        HymbaError: a file is missing, truncated or corrupt; a tensor is missing, unknown, or of the wrong shape or
            dtype; the checkpoint is quantised in a way unknown here, or to other `bits`.
    """
    directory = Path(directory)
    released = read_config(directory)
    model = skeleton(HymbaConfig.from_released(released))
    scheme, tensors = Scheme.from_released(released), _stored_tensors(directory)
    if bits is not None and scheme is None:
        scheme = Scheme(bits)
        tensors = _quantized(tensors, directory, quantizable(model), scheme, report)
    elif scheme is not None and bits not in (None, scheme.bits):
        raise HymbaError(f"{directory} is quantised to {scheme.bits} bits already: quantise what it was made from")
    if scheme is not None:
        hollow(model, scheme)
    arena = _Arena(_nbytes(directory, model, dtype)) if torch.device(device).type == "cpu" else None

    def keep(tensor: Tensor, wanted: Tensor) -> Tensor:
        kept = dtype or tensor.dtype if isinstance(wanted, nn.Parameter) else wanted.dtype
        return arena.keep(tensor, kept) if arena else tensor.to(device=device, dtype=kept)

    model.load_state_dict(_match(model, directory, tensors, keep), assign=True)
    return model.eval()


def _match(
    model: Hymba,
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    keep: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Return what `keep` makes of each of the stored `tensors` and the one on the meta device whose place it takes."""
    wanted = {released_name(name): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    loaded: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if name not in wanted:
            if name == "lm_head.weight" and model.config.tie_word_embeddings:
                continue
            raise HymbaError(f"{directory} holds a tensor {name!r} that the config has no place for")
        ours, place = wanted[name]
        _check_shape(directory, name, tensor, place)
        if not isinstance(place, nn.Parameter) and tensor.dtype != place.dtype:
            raise HymbaError(f"{directory}: {name} is {tensor.dtype}, but the config's scheme says {place.dtype}")
        loaded[ours] = keep(tensor, place)
    missing = [name for name, (ours, _) in wanted.items() if ours not in loaded]
    if missing:
        raise HymbaError(
            f"{directory} lacks the tensor {missing[0]!r}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
        )
    return loaded


def _quantized(
    tensors: Iterable[tuple[str, Tensor]],
    directory: Path,
    modules: Iterable[tuple[str, nn.Module]],
    scheme: Scheme,
    report: Callable[[Rounding], None],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored `tensors`, but for each weight of `modules` its quantised parts."""
    covered = {released_name(f"{name}.weight"): (name, module) for name, module in modules}
    for name, tensor in tensors:
        if name in covered:
            ours, module = covered[name]
            _check_shape(directory, name, tensor, module.weight)
            weight, rounding = round_weight(f"{ours}.weight", tensor, scheme.bits_of(ours))
            report(rounding)
            yield from ((name + part, x) for part, x in zip(PARTS, (weight.values, weight.scales), strict=True))
        else:
            yield name, tensor


def _check_shape(directory: Path, name: str, tensor: Tensor, wanted: Any) -> None:
    if tensor.shape != wanted.shape:
        shapes = f"{tuple(tensor.shape)}, but the config says {tuple(wanted.shape)}"
        raise HymbaError(f"{directory}: {name} has shape {shapes}")


def save(model: Hymba, directory: str | Path, max_shard_size: str = "5GB") -> None:
    """Write `model` in the released layout, each file under a temporary name first.

    Raises:
        HymbaError: the directory cannot be written.
    """
    directory, scheme = Path(directory), scheme_of(model)
    tensors = {released_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
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
        config = model.config.to_released() | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
        config |= {CONFIG_KEY: scheme.to_released()} if scheme else {}
        with replacing(directory / CONFIG_FILE) as temporary:
            temporary.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise HymbaError(f"cannot write the model to {directory}: {error}") from error


def _nbytes(directory: Path, model: Hymba, dtype: torch.dtype | None) -> int:
    """Return how much memory a model's weights take at most, in a dtype or as they are stored."""
    parameters, quantised = list(model.parameters()), list(model.buffers())
    if dtype is None and not quantised:
        stored = sum(file.stat().st_size for file in _weight_files(directory))
    else:
        stored = (dtype or torch.float64).itemsize * sum(p.numel() for p in parameters)
    return stored + sum(x.nbytes for x in quantised) + _ALIGNMENT * (len(parameters) + len(quantised))


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
        """Return a copy of a tensor."""
        size = tensor.numel() * dtype.itemsize
        if 0 < size <= len(self._free):
            place = torch.frombuffer(self._free, dtype=dtype, count=tensor.numel()).view(tensor.shape)
            self._free = self._free[-(-size // _ALIGNMENT) * _ALIGNMENT :]
        else:
            place = torch.empty(tensor.shape, dtype=dtype)
        return place.copy_(tensor)


def _release(mapped: Tensor) -> None:
    """Tell Linux that the pages of a tensor in a mapped file are not needed now; they come back when read again."""
    if sys.platform == "linux":
        start = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (mapped.data_ptr() + mapped.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _stored_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every stored tensor, one at a time, and let go of the pages that its reading took."""
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a dict
                    yield name, (tensor := stored.get_tensor(name))
                    _release(tensor)
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
