"""The directory of a run: which recipe and data it belongs to, and what may change when it is resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from hymba.errors import HymbaError
from hymba.files import replacing
from hymba.training.data import describe_data, describe_tokenizer
from hymba.training.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RUN, REPORT, MODEL = "run.json", "report.json", "model"
# These change nothing in what is learnt, so a run may go on with other values.
FREE_TO_CHANGE = ("max_minutes", "save_every", "eval_every", "eval_rows", "micro_rows", "save_dtype")
# These may change once a run has diverged: with them it can go on from a checkpoint before that.
FREE_ONCE_DIVERGED = ("peak_lr", "matrix_lr", "min_lr", "grad_clip")
DIVERGED = "diverged_at"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file of a run, or None if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object that `read_json` reads, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def is_begun(out: Path) -> bool:
    """Say whether there is something in `out` that a run would go on from or overwrite."""
    return (out / REPORT).is_file() or any(out.glob("checkpoint-*"))


@dataclass(frozen=True)
class DataFiles:
    """Files to tokenize, in the order of the run, each with its digest from `describe_data`."""

    paths: list[Path]
    digests: list[str]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> DataFiles:
        """Read the files' content for its digests."""
        return cls(list(paths), describe_data(paths))

    def ordered_as(self, digests: Sequence[str]) -> DataFiles:
        """Return the same files in the order of `digests`, if they are the same; as they are if not."""
        if sorted(digests) != sorted(self.digests):
            return self
        place = {digest: index for index, digest in enumerate(digests)}
        pairs = sorted(zip(self.digests, self.paths, strict=True), key=lambda pair: place[pair[0]])
        return DataFiles([path for _, path in pairs], [digest for digest, _ in pairs])

    def describe(self) -> list[str]:
        """Return each file's name and size, for people."""
        names = (path.name.encode("utf-8", "replace").decode() for path in self.paths)
        return [f"{name}, {path.stat().st_size} bytes" for name, path in zip(names, self.paths, strict=True)]


def claim(out: Path, recipe: Recipe, train: DataFiles, held_out: DataFiles) -> tuple[DataFiles, DataFiles]:
    """Write down which run `out` belongs to, or make sure that it is this one.

    Returns the files in the order in which the run reads them. The same content under other names, in another
    place or order, is the same data.

    Raises:
        HymbaError: `out` was started with a different recipe or different data.
    """
    before = read_json(out / RUN)
    if before is None and is_begun(out):
        raise HymbaError(f"{out} holds a run whose {RUN} is missing or damaged: choose another --out, or delete {out}")
    digests = (before or {}).get("digests", {})
    train, held_out = train.ordered_as(digests.get("data", [])), held_out.ordered_as(digests.get("held_out", []))
    now = json.loads(json.dumps(recipe.to_mapping()))
    now["data"] = train.describe() + held_out.describe()
    now["digests"] = {"data": train.digests, "held_out": held_out.digests}
    if before is not None:
        if DIVERGED in before:
            now[DIVERGED] = before[DIVERGED]
        if differing := _find_differences(before, now):
            if is_begun(out):
                raise HymbaError(
                    f"{out} was started with different {', '.join(differing)}: choose another --out, "
                    f"or delete {out} to start over"
                )
            shutil.rmtree(out / "tokenizer", ignore_errors=True)  # it may have been trained on other data
    write_json(out / RUN, now)
    return train, held_out


def _find_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys in which two runs differ and may not."""
    free = {*FREE_TO_CHANGE, *(FREE_ONCE_DIVERGED if DIVERGED in before else ()), DIVERGED, "digests"}
    if "digests" in before:  # else the run is of a time when only names and sizes were compared
        free |= {"data", "held_out"}
        parts = [key for key in ("data", "held_out") if before["digests"].get(key) != now["digests"][key]]
    else:
        parts = []
    if isinstance(before.get("tokenizer"), str) and isinstance(now.get("tokenizer"), str):
        free.add("tokenizer")  # two directories: their content is compared, by `refuse_other_tokenizer`
    return sorted({*parts, *(key for key in {*now, *before} - free if now.get(key) != before.get(key))})


def refuse_other_tokenizer(out: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that what was trained in `out` was trained with this tokenizer.

    Raises:
        HymbaError: a checkpoint or the model has a tokenizer that gives other ids.
    """
    mine = describe_tokenizer(tokenizer.backend_tokenizer)
    for file in [*out.glob("checkpoint-*/tokenizer.json"), out / MODEL / "tokenizer.json"]:
        try:
            theirs = describe_tokenizer(Tokenizer.from_file(str(file)))
        except Exception:  # the library's only error; a damaged checkpoint is dealt with when one is chosen
            continue
        if theirs != mine:
            raise HymbaError(
                f"{out} was started with a different tokenizer: choose another --out, or delete {out} to start over"
            )
