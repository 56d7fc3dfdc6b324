"""Every op on the GPU, in its implementations and beside other libraries where they are installed.

Bytes are those that must be read or written at least, operations those of products; a share is of what the device was
measured to do in the same run. Inputs are several sets, read in turn, that together are larger than the cache.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_attention import attentions
from benchmarks.gpu_case import Case, Set, implementations
from benchmarks.gpu_fused import KINDS, fused
from benchmarks.gpu_timing import Part, random, sets_for, shares, time_calls
from hymba.model import HymbaConfig
from hymba.ops import gpu
from hymba.ops.backend import BACKENDS, usable, use_backend


@dataclass(frozen=True)
class Sizes:
    """How large the cases are: those of Hymba-1.5B, or toy ones that a CPU can run."""

    config: HymbaConfig
    toy: bool

    @classmethod
    def toy_ones(cls) -> Sizes:
        """Return sizes that even an interpreted kernel gets through."""
        heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "v_head_dim": 16}
        width = {"hidden_size": 32, "intermediate_size": 48, "d_inner": 48, "d_state": 4, "dt_rank": 3}
        return cls(HymbaConfig.named("tiny", vocab_size=70, num_meta_tokens=3, **heads, **width), True)

    def of(self, real: int, toy: int) -> int:
        """Return one of the two."""
        return toy if self.toy else real


def measure_ops(part: Part, only: str | None, toy: bool) -> None:
    """Measure all ops, or those whose name holds `only`."""
    sizes = Sizes.toy_ones() if toy else Sizes(HymbaConfig.named("1.5b"), False)

    def items() -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
        for make in CASES:
            for case in make(sizes):
                if only is None or only in case.op:
                    yield f"{case.op}: {case.size}", partial(measure_case, case, part)

    part.measure(items(), least=3)


def measure_case(case: Case, part: Part) -> dict[str, Any]:
    """Time every implementation of one case; an implementation that fails says why in place of a time."""
    count = sets_for(case.bytes)
    sets = [case.make() for _ in range(count)]
    found: dict[str, Any] = {"op": case.op, "size": case.size, "bytes": case.bytes, "flops": case.flops, "sets": count}
    times: dict[str, Any] = {}
    for name, function in _runnable(case).items():
        quiet = torch.enable_grad() if case.gradients else torch.no_grad()
        try:
            # Ops that are made of others choose them anew: the torch path is torch throughout.
            with quiet, use_backend(name) if name in BACKENDS else nullcontext():
                calls = [_bind(case, one, function) for one in sets]
                times[name] = time_calls(calls, graph=not case.gradients)
        except Exception as error:
            times[name] = f"failed: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
    found["ms"] = times
    found |= {"peers": _peers(case, sets)} if case.peers else {}
    medians = {name: x["median"] for name, x in times.items() if "median" in x}
    ours, beside = medians.get("triton", medians.get("cpu")), medians.get("cpu")
    if ours is not None:
        found |= shares(case.bytes, case.flops, ours, part.ceilings)
        found["speedup"] = round(beside / ours, 2) if beside and "triton" in medians else None
    return found


def _runnable(case: Case) -> dict[str, Callable[..., Any]]:
    """Return what is measured: all that can run but C++, and the reference only where it is all there is."""
    left_out = {"native", *(("reference",) if "cpu" in case.implementations else ())}
    return {name: case.implementations[name] for name in usable(case.implementations) if name not in left_out}


def _bind(case: Case, one: Set, function: Callable[..., Any]) -> Callable[[], Any]:
    prepared = case.prepare(function, one) if case.prepare else None
    return lambda: case.run(function, one) if prepared is None else prepared()


def _peers(case: Case, sets: list[Set]) -> dict[str, Any]:
    """Time other libraries; one that is not installed says so."""
    found: dict[str, Any] = {}
    for name, load in case.peers.items():
        try:
            function = load()
        except ImportError:
            found[name] = "not installed"
            continue
        try:
            with torch.enable_grad() if case.gradients else torch.no_grad():
                calls = [partial(function, one) for one in sets]
                found[name] = time_calls(calls, graph=not case.gradients)
        except Exception as error:
            found[name] = f"failed: {str(error).splitlines()[0][:200]}"
    return found


def _drawn(*shapes: tuple[int, ...]) -> Set:
    return {"x": [random(*shape) for shape in shapes]}


def _call(f: Callable[..., Any], one: Set) -> Any:
    return f(*one["x"])


def _scan_set(s: Sizes, rows: int, steps: int, grad: bool) -> Set:
    c = s.config
    u, dt, gate = (random(rows, steps, c.d_inner, grad=grad) for _ in range(3))
    B, C = (random(rows, steps, c.d_state, grad=grad) for _ in range(2))
    place = u.device
    A_log = torch.arange(1.0, c.d_state + 1, device=place).log().repeat(c.d_inner, 1).requires_grad_(grad)
    D = torch.ones(c.d_inner, device=place).requires_grad_(grad)
    bias = torch.full((c.d_inner,), -4.0, device=place).requires_grad_(grad)
    state = torch.zeros(rows, c.d_inner, c.d_state, device=place)
    return {"inputs": (u, dt, A_log, B, C, D), "bias": bias, "gate": gate, "state": state, "dy": random(*u.shape)}


def _scan(f: Callable[..., Any], one: Set, state: bool = False) -> Tensor:
    states = {"initial_state": one["state"], "final_state": one["state"]} if state else {}
    return f(*one["inputs"], dt_bias=one["bias"], gate=one["gate"], **states)[0]


def _scans(s: Sizes) -> Iterator[Case]:
    c, all_of = s.config, implementations("selective_scan")
    width = 2 * c.d_inner
    long, longest = s.of(4096, 20), s.of(16384, 40)
    for rows, steps in ((s.of(8, 2), long), (1, longest), (1, s.of(2048, 9))):
        size, moved = f"{rows}×{steps}×{c.d_inner}×{c.d_state}", rows * steps * width
        yield Case(
            "selective_scan",
            f"{size} forward",
            {**all_of, **(_serial_scan(all_of) if steps == longest else {})},
            partial(_scan_set, s, rows, steps, False),
            _scan,
            4 * moved,
            peers={"mamba-ssm": _mamba_scan},
        )
        if steps == longest:
            continue
        yield Case(
            "selective_scan",
            f"{size} backward",
            all_of,
            partial(_scan_set, s, rows, steps, True),
            _scan,
            7 * moved,  # reads u, δ, gate and the output's gradient, writes three gradients
            prepare=_scan_backward,
        )
    for rows in (1, 8, s.of(128, 9)):
        state = rows * c.d_inner * c.d_state * 4
        yield Case(
            "selective_scan",
            f"{rows}×1×{c.d_inner}×{c.d_state} decode",
            all_of,
            partial(_scan_set, s, rows, 1, False),
            partial(_scan, state=True),
            2 * state + 4 * rows * width,
        )


def _serial_scan(all_of: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return the Triton scan with all of time in one segment, under a name of its own."""
    if "triton" not in all_of or gpu.why_not():
        return {}

    def run(u: Tensor, *inputs: Any, **options: Any) -> Any:
        module: Any = importlib.import_module("hymba.ops.selective_scan.triton")
        before = module.tiles

        def uncut(rows: int, steps: int, width: int) -> Any:
            whole = -(-steps // module.BLOCK) * module.BLOCK
            return before(rows, steps, width)._replace(length=whole)

        module.tiles = uncut
        try:
            return all_of["triton"](u, *inputs, **options)
        finally:
            module.tiles = before

    return {"triton, serial in time": run}


def _scan_backward(f: Callable[..., Any], one: Set) -> Callable[[], Any]:
    y, learnt = _scan(f, one), [*one["inputs"], one["bias"], one["gate"]]
    return lambda: torch.autograd.grad(y, learnt, one["dy"], retain_graph=True)


def _mamba_scan() -> Callable[[Set], Any]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # type: ignore[import-not-found]

    def run(one: Set) -> Any:
        u, dt, A_log, B, C, D = one["inputs"]
        u, dt, B, C, gate = (x.transpose(1, 2) for x in (u, dt, B, C, one["gate"]))
        return selective_scan_fn(u, dt, -A_log.exp(), B, C, D, z=gate, delta_bias=one["bias"], delta_softplus=True)

    return run


def _convolutions(s: Sizes) -> Iterator[Case]:
    c, all_of = s.config, implementations("causal_conv1d")
    for rows, steps in ((8, s.of(4096, 32)), (1, s.of(2048, 16)), (1, 1), (s.of(128, 3), 1)):

        def make(rows: int = rows, steps: int = steps) -> Set:
            wide = random(rows, steps, 2 * c.d_inner)  # a view of in_proj's output, as in the model
            state = random(rows, c.d_inner, c.d_conv - 1)
            return {"x": (wide[..., : c.d_inner], random(c.d_inner, c.d_conv), random(c.d_inner)), "state": state}

        def run(f: Callable[..., Any], one: Set) -> Any:
            return f(*one["x"], initial_state=one["state"], final_state=one["state"])[0]

        moved = 4 * rows * steps * c.d_inner + 4 * rows * c.d_inner * (c.d_conv - 1)
        size = f"{rows}×{steps}×{c.d_inner}×{c.d_conv}"
        peers = {"causal-conv1d": _dao_conv} if steps > 1 else {}
        yield Case("causal_conv1d", size, all_of, make, run, moved, peers=peers)


def _dao_conv() -> Callable[[Set], Any]:
    from causal_conv1d import causal_conv1d_fn  # type: ignore[import-not-found]

    def run(one: Set) -> Any:
        u, weight, bias = one["x"]
        return causal_conv1d_fn(u.transpose(1, 2), weight, bias, activation="silu")

    return run


def _elementwise(s: Sizes) -> Iterator[Case]:
    """Norms, gates, rotary: one read and one write of what they work on."""
    c = s.config
    norms = importlib.import_module("hymba.ops.rms_norm")
    for rows in (1, s.of(128, 4), s.of(32768, 16)):
        yield Case(
            "rms_norm",
            f"{rows}×{c.hidden_size}",
            norms.IMPLEMENTATIONS,
            partial(_drawn, (rows, c.hidden_size), (c.hidden_size,)),
            lambda f, one: f(*one["x"], 1e-6),
            4 * rows * c.hidden_size,
        )
        yield Case(
            "mean_of_norms",
            f"{rows}×{c.d_inner}",
            norms.MEANS,
            partial(_drawn, *[(rows, c.d_inner)] * 2, *[(c.d_inner,)] * 2),
            lambda f, one: f(*one["x"], 1e-6),
            6 * rows * c.d_inner,
        )
        yield Case(
            "gated_silu",
            f"{rows}×{c.intermediate_size}",
            implementations("gated"),
            partial(_drawn, *[(rows, c.intermediate_size)] * 2),
            _call,
            6 * rows * c.intermediate_size,
        )

        heads, angles = (1, rows, c.num_attention_heads, c.head_dim), (1, rows, c.head_dim // 2)
        moved = 4 * rows * c.num_attention_heads * c.head_dim + 2 * rows * c.head_dim
        size = f"{rows}×{c.num_attention_heads}×{c.head_dim}"
        yield Case("rotary", size, implementations("rotary"), partial(_drawn, heads, angles, angles), _call, moved)


def _products(s: Sizes) -> Iterator[Case]:
    """Linear maps of few rows, in each kind of weight: the largest ones of a layer, and the head."""
    c = s.config
    owner = c.num_attention_heads * c.head_dim + c.num_key_value_heads * (c.head_dim + c.v_head_dim) + 2 * c.d_inner
    shapes = {"in_proj": (c.hidden_size, owner), "down_proj": (c.intermediate_size, c.hidden_size)}
    shapes |= {"head": (c.hidden_size, c.vocab_size)}
    for kind, (width, make) in KINDS.items():
        for title, (inputs, outputs) in shapes.items():
            if title == "head" and kind != "bf16":
                continue
            for rows in (1, 8, s.of(32, 9), s.of(128, 10)):
                yield _product(f"{kind} {title}", width, make, rows, inputs, outputs)


def _product(title: str, width: float, quantize: Callable[[Tensor], Any], rows: int, inputs: int, outputs: int) -> Case:
    def make() -> Set:
        return {"x": (random(rows, inputs), quantize(random(outputs, inputs)), None)}

    return Case(
        "linear",
        f"{title}, {rows} rows × {inputs} → {outputs}",
        implementations("linear"),
        make,
        _call,
        int(width * inputs * outputs) + 2 * rows * (inputs + outputs),
        2 * rows * inputs * outputs,
    )


def _losses(s: Sizes) -> Iterator[Case]:
    c, rows = s.config, s.of(8192, 16)

    def make() -> Set:
        x, weight = random(rows, c.hidden_size, grad=True), random(c.vocab_size, c.hidden_size, grad=True)
        return {"x": (x, weight, torch.randint(c.vocab_size, (rows,), device=x.device))}

    def run(f: Callable[..., Any], one: Set) -> Any:
        return torch.autograd.grad(f(*one["x"]), one["x"][:2])

    size = f"{rows}×{c.hidden_size}→{c.vocab_size} forward and backward"
    moved = 4 * (rows + c.vocab_size) * c.hidden_size
    flops = 6 * rows * c.hidden_size * c.vocab_size
    yield Case("cross_entropy", size, implementations("cross_entropy"), make, run, moved, flops, backward=True)


def _draws(s: Sizes) -> Iterator[Case]:
    for rows in (1, 8, s.of(128, 3)):

        def make(rows: int = rows) -> Set:
            logits = random(rows, s.config.vocab_size, dtype=torch.float32)
            one = torch.ones(rows, dtype=torch.float64, device=logits.device)
            top_k = torch.full((rows,), 50, device=logits.device)
            seeds = torch.arange(rows, device=logits.device)
            return {"x": (logits, 0.8 * one, top_k, 0.95 * one, 0.02 * one, seeds, seeds)}

        size = f"{rows}×{s.config.vocab_size}, top-k 50, top-p 0.95, min-p 0.02"
        moved = 4 * rows * s.config.vocab_size
        yield Case("draw", size, implementations("draw"), make, _call, moved)


CASES: tuple[Callable[[Sizes], Iterator[Case]], ...] = (
    _scans,
    attentions,
    _products,
    fused,
    _convolutions,
    _elementwise,
    _losses,
    _draws,
)
