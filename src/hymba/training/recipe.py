"""A training recipe: everything that decides a run apart from its data, read from YAML."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hymba.errors import HymbaError

_ABOVE_ZERO = (
    *("peak_lr", "matrix_lr", "seq_length", "batch_rows", "micro_rows", "steps", "tokens", "epochs"),
    *("max_minutes", "save_every", "eval_every", "eval_rows"),
)
_CHOICES = {
    "optimizer": ("muon", "adamw"),
    "decay_shape": ("linear", "sqrt"),
    "save_dtype": ("bfloat16", "float32"),
}


@dataclass(frozen=True)
class Recipe:
    """One pretraining run. The keys of the YAML file are the names below.

    Raises:
        HymbaError: a number is out of its range, or two fields contradict one another.
    """

    peak_lr: float  # AdamW's: embeddings, norms, biases, the vectors of the SSM
    model: str | dict[str, Any] = "tiny"  # a named size, or {size: …} with fields of HymbaConfig to replace
    tokenizer: int | str = 4096  # the vocabulary of a new one, or the directory of a trained one
    held_out: list[str] = field(default_factory=list)  # names of data files kept from training, to measure on

    seq_length: int = 512  # tokens a row
    batch_rows: int = 16  # rows a step
    micro_rows: int | None = None  # rows a forward pass; null: all of a step at once
    steps: int | None = None  # how long to train is said by one of steps, tokens and epochs
    tokens: int | None = None
    epochs: float | None = None
    max_minutes: float | None = None  # by the clock, over all sittings; the decay is fitted into it

    optimizer: str = "muon"  # or adamw
    matrix_lr: float | None = None  # of the matrices inside layers; null: peak_lr
    min_lr: float = 1e-5  # at the last step, beside peak_lr; matrix_lr falls in the same proportion
    warmup: float = 0.01  # fraction of the steps
    decay: float = 0.2  # fraction of the steps
    decay_shape: str = "linear"  # or sqrt
    weight_decay: float = 0.1  # of the matrices inside layers; nothing else decays
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    grad_clip: float = 1.0  # of the norm of all gradients together; 0: none

    bf16: bool = True  # autocast; the weights in training stay float32, the SSM's parameters and states in every pass
    gradient_checkpointing: bool = False  # layers run twice, and a step holds little more than their inputs
    seed: int = 0
    save_every: int = 500  # steps between checkpoints
    eval_every: int = 250  # steps between looks at the held-out files
    eval_rows: int = 64  # rows of such a look; the last one takes them all
    save_dtype: str = "bfloat16"  # of the final model; or float32

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise HymbaError(problem)

    def _problems(self) -> Iterator[str]:
        if sum(length is not None for length in (self.steps, self.tokens, self.epochs)) != 1:
            yield "give exactly one of steps, tokens and epochs"
        for name in _ABOVE_ZERO:
            if (value := getattr(self, name)) is not None and not value > 0:
                yield f"{name} must be above 0, not {value}"
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                yield f"{name} must be {' or '.join(choices)}, not {getattr(self, name)!r}"
        for name in ("weight_decay", "grad_clip", "warmup", "decay", "seed"):
            if not getattr(self, name) >= 0:
                yield f"{name} must not be negative"
        if self.warmup + self.decay > 1:
            yield "warmup and decay are fractions of the run: together at most 1"
        if self.max_minutes is not None and self.decay == 1:
            yield "with max_minutes, decay must be below 1"
        if self.seq_length < 2:
            yield "seq_length must be 2 or more: a row starts with a BOS token"
        if self.batch_rows % self.rows_at_once:
            yield f"batch_rows ({self.batch_rows}) must be a multiple of micro_rows ({self.micro_rows})"
        if not 0 <= self.min_lr <= self.peak_lr:
            yield f"min_lr must lie between 0 and peak_lr ({self.peak_lr}), not {self.min_lr}"
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas must be two numbers from 0 to below 1, not {self.betas}"

    @property
    def rows_at_once(self) -> int:
        """Rows of one forward pass."""
        return self.micro_rows or self.batch_rows

    @property
    def size(self) -> str:
        """The named size that the model starts from."""
        return self.model if isinstance(self.model, str) else str(self.model.get("size", "tiny"))

    @property
    def model_changes(self) -> dict[str, Any]:
        """Fields of HymbaConfig that replace the named size's."""
        return {k: v for k, v in self.model.items() if k != "size"} if isinstance(self.model, dict) else {}

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> Recipe:
        """Read a recipe, with `changes` ("key=value", "model.key=value") instead of what the file says.

        Raises:
            HymbaError: the file is not a recipe; the message names the key.
        """
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise HymbaError(f"cannot read recipe {path}: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise HymbaError(f"{path} is not a recipe: it must hold lines of 'key: value'")
        for change in changes:
            _change(values, change)
        try:
            return cls.from_mapping(values)
        except HymbaError as error:
            raise HymbaError(f"recipe {path}: {error}") from error

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from the parsed YAML, every value checked against its field's type."""
        kinds = get_type_hints(cls)
        for key in values:
            if key not in kinds:
                raise HymbaError(f"unknown key {key!r}{suggest(key, kinds)}")
        if "peak_lr" not in values:
            raise HymbaError("peak_lr is missing")
        return cls(**{key: fit(key, value, kinds[key]) for key, value in values.items()})

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, ready for YAML or JSON."""
        return {f.name: value for f in fields(self) if (value := asdict(self)[f.name]) != _default(f)}


def suggest(key: object, known: Mapping[str, Any]) -> str:
    """Return ": did you mean …?" with the known key nearest to `key`, or a list of all where none is near."""
    near = get_close_matches(str(key), known, n=1)
    return f": did you mean {near[0]!r}?" if near else f": use some of {', '.join(known)}"


def _default(described: Any) -> Any:
    return described.default_factory() if callable(described.default_factory) else described.default


def _change(values: dict[str, Any], change: str) -> None:
    """Apply one "key=value" to the parsed recipe, in place."""
    import yaml

    key, equals, text = change.partition("=")
    if not equals:
        raise HymbaError(f"cannot apply {change!r}: write key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise HymbaError(f"cannot apply {change!r}: {text!r} is not a value") from error
    outer, _, inner = key.strip().partition(".")
    if not inner:
        values[outer] = value
    elif outer == "model":
        size = values.get("model", "tiny")
        values["model"] = (size if isinstance(size, dict) else {"size": size}) | {inner: value}
    else:
        raise HymbaError(f"cannot apply {change!r}: only model has keys inside")
    # Another way to say how long replaces the file's.
    if outer in (lengths := ("steps", "tokens", "epochs")):
        for other in lengths:
            values[other] = value if other == outer else None


def fit(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`, a type annotation. YAML reads 1e-3 as text: it is a number here.

    Raises:
        HymbaError: it cannot be one; the message names `key`.
    """
    for option in get_args(kind) if isinstance(kind, types.UnionType) else (kind,):
        try:
            return _as(value, option)
        except (TypeError, ValueError):
            continue
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    wanted = [names.get(get_origin(o) or o, "a list") for o in options if o is not types.NoneType]
    raise HymbaError(f"{key} must be {' or '.join(wanted)}, not {value!r}")


def _as(value: Any, kind: Any) -> Any:
    if get_origin(kind) in (list, tuple) and isinstance(value, list | tuple):
        return get_origin(kind)(_as(item, get_args(kind)[0]) for item in value)
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        number = float(value)
        if kind is float:
            return number
        if number == int(number):
            return int(number)
    elif isinstance(value, get_origin(kind) or kind):
        return value
    raise TypeError
