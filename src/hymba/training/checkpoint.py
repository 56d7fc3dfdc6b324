"""Checkpoints of a run: written whole, and checked before one is resumed from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from hymba.errors import HymbaError
from hymba.files import digest_files, replace_directory
from hymba.hf import HymbaConfig
from hymba.model import HymbaConfig as CoreConfig

PREFIX = "checkpoint-"
MANIFEST = "manifest.json"  # SHA-256 of every other file
STATE = "trainer_state.json"
PICKLED = ("optimizer.pt", "scheduler.pt")
KEPT = 2


def list_checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints in `out`, the latest first; one that was never finished has another name."""
    found = [path for path in out.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def last_checkpoint(out: Path) -> Path | None:
    """Return the checkpoint of the largest step in `out`."""
    return next(iter(list_checkpoints(out)), None)


def step_of(checkpoint: Path) -> int:
    """Return the number of steps trained at a checkpoint."""
    return int(checkpoint.name.removeprefix(PREFIX))


def planned_steps(checkpoint: Path) -> int:
    """Return the steps of the checkpoint's run: fewer than the recipe's once max_minutes has cut it short."""
    return int(json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["max_steps"])


def publish(written: Path, checkpoint: Path) -> None:
    """Add a manifest to the files in `written`, and rename the directory once all is on the disk."""
    files = sorted(path for path in written.iterdir() if path.is_file())
    digests = dict(zip((file.name for file in files), digest_files(files), strict=True))
    (written / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    replace_directory(written, checkpoint)


def remove_old(out: Path, step: int) -> None:
    """Keep the last checkpoints up to `step`; later ones are of an attempt that was given up."""
    found = list_checkpoints(out)
    reached = [checkpoint for checkpoint in found if step_of(checkpoint) <= step]
    for checkpoint in {*found} - {*reached[:KEPT]}:
        shutil.rmtree(checkpoint, ignore_errors=True)


def find_whole_checkpoint(out: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the latest checkpoint in `out` that can be resumed from; None if there are no checkpoints at all.

    `warn` is called with a line for each later one that cannot.

    Raises:
        HymbaError: none of the checkpoints is whole.
    """
    skipped: list[str] = []
    for checkpoint in list_checkpoints(out):
        problem = find_problem(checkpoint)
        if problem is None:
            for line in skipped:
                warn(f"warning: skipping {line}; resuming from {checkpoint.name}")
            return checkpoint
        skipped.append(f"{checkpoint}: {problem}")
    if skipped:
        problem = f"no checkpoint can be resumed from ({'; '.join(skipped)})"
        raise HymbaError(f"{problem}: delete them to start over, or choose another --out")
    return None


def find_problem(checkpoint: Path) -> str | None:
    """Return what keeps a checkpoint from being resumed from, in a few words, or None.

    Its files must be there, be what was written, load without running code, and hold finite numbers.
    """
    weights = sorted(file.name for file in checkpoint.glob("*.safetensors")) or ["model.safetensors"]
    generators = sorted(file.name for file in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]  # one a process
    checks = dict.fromkeys([*PICKLED, *generators, *weights], _check_tensors)
    for name, check in (_READABLE | checks).items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        try:
            problem = check(checkpoint / name)
        except Exception as error:  # a damaged file makes its reader raise almost anything
            return f"{name} cannot be read ({' '.join(str(error).split())[:100] or type(error).__name__})"
        if problem is not None:
            return f"{name} {problem}"
    return _compare_manifest(checkpoint)


def _compare_manifest(checkpoint: Path) -> str | None:
    """Find a file that is not what was written; checkpoints made before there was a manifest have none."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        found = digest_files([checkpoint / name for name in manifest])
        changed = [name for name, digest in zip(manifest, found, strict=True) if digest != manifest[name]]
        return f"{changed[0]} was damaged or changed" if changed else None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or a file named in it cannot be read ({error})"


def _check_state(path: Path) -> str | None:
    state = TrainerState.load_from_json(str(path))
    if state.global_step != step_of(path.parent) or not state.max_steps >= state.global_step:
        return f"is of step {state.global_step}"
    return None if "Journal" in (state.stateful_callbacks or {}) else "lacks the time spent"


def _check_json(path: Path) -> str | None:
    return None if isinstance(json.loads(path.read_text(encoding="utf-8")), dict) else "is no JSON object"


def _check_config(path: Path) -> str | None:
    read_config(path.parent)
    return None


def _check_tokenizer(path: Path) -> str | None:
    Tokenizer.from_file(str(path))
    return None


def _check_tensors(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as stored:
            finite = all(_is_finite(stored.get_tensor(name)) for name in stored.keys())  # noqa: SIM118
    else:
        with safe_globals():
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        finite = all(_is_finite(tensor) for tensor in tensors_in(tree))
    return None if finite else "holds numbers that are not finite"


_READABLE: dict[str, Callable[[Path], str | None]] = {
    "config.json": _check_config,
    "tokenizer.json": _check_tokenizer,
    "tokenizer_config.json": _check_json,
    STATE: _check_state,
}


def read_config(checkpoint: Path) -> CoreConfig:
    """Return the shape of the model that a directory holds."""
    return HymbaConfig.from_pretrained(checkpoint).core()


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(branch)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def is_finite(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Say whether all weights, and all numbers of the optimizer's state, are finite."""
    return all(map(_is_finite, [*model.parameters(), *tensors_in(optimizer.state_dict())]))
