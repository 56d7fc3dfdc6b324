"""Each op in its implementations, side by side: `python -m benchmarks.ops --help`.

The floor of a call is the longer of two times: its bytes at the bandwidth, its multiplications at the matrix peak.
Weights are many copies of one, read in turn as a model does, so that no cache holds them.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.command import Json, Out, Size, SizeOption, Threads, Weights, bar, finish, main, use_threads
from benchmarks.machine import ReadBandwidth, matrix_peak
from benchmarks.models import SEED
from benchmarks.timing import alternate, milliseconds, rounds_within
from hymba.errors import HymbaError
from hymba.model import HymbaConfig
from hymba.ops.backend import usable
from hymba.ops.linear import QuantizedWeight, round_to_int4, round_to_int8

STEPS = 512  # tokens of a prefill call
BATCH = 8  # rows of a training step
WEIGHT_BYTES = 1 << 30  # of all copies together, but not more than …
COPIES = 64
SPEED = ("native", "cpu", "reference")  # what runs on a CPU, fastest first
BF16 = torch.bfloat16

Run = Callable[[Callable[..., Any]], Any]  # one call of an implementation


@dataclass(frozen=True)
class Case:
    """One op at one size.

    run: calls the implementation that it is given. skipped: implementations too slow to wait for.
    bytes: read and written at least. flops: of products, two for a multiply and add; 0 where none are matrices.
    """

    op: str
    size: str
    implementations: Mapping[str, Callable[..., Any]]
    run: Run
    bytes: int
    flops: int = 0
    skipped: tuple[str, ...] = ()


def ops(
    config: SizeOption = Size["1.5b"],
    only: Annotated[
        str | None, typer.Option(help="Measure only ops whose name holds this word.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time spent on each op's fastest implementation.")] = 1.0,
    threads: Threads = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time the ops of one model size: C++ kernels, the torch path, the reference, in turn within one run."""
    chosen = [make for name, make in CASES.items() if only is None or only in name]
    if not chosen:
        raise HymbaError(f"no op has {only!r} in its name: they are {', '.join(CASES)}")
    use_threads(threads)
    torch.manual_seed(SEED)
    shapes = HymbaConfig.named(config)
    bandwidth = ReadBandwidth(config)
    bandwidth.measure()
    peak = matrix_peak()
    measured = []
    with bar(f"ops of {config}", len(chosen)) as step:
        for make in chosen:
            for case in make(shapes):  # one after another, so that one is in memory at a time
                measured.append(measure(case, seconds, bandwidth.median, peak["median"] * 1e9))
            step()
    bandwidth.measure()
    result = {"ops": measured, "matrix_gflops": peak, **bandwidth.to_record()}
    name = f"ops-{config}" + (f"-{only}" if only else "")
    finish(name, {"config": config, "only": only, "seconds": seconds}, result, _lines(result), as_json, out)


def measure(case: Case, budget: float, bandwidth: float, peak: float) -> dict[str, Any]:
    """Time every implementation of `case` in turn; set the fastest against the floor of the machine."""
    names = [name for name in usable(case.implementations) if name in SPEED and name not in case.skipped]
    variants = {name: _bind(case, name) for name in names}
    fastest = "native" if "native" in names else names[-1]
    times = alternate(variants, rounds_within(variants[fastest], budget, least=3))
    floor = max(case.bytes / bandwidth, case.flops / peak)
    found = {name: milliseconds(times[name]) for name in sorted(names, key=_speed)}
    best = statistics.median(times[fastest])
    return {
        "op": case.op,
        "size": case.size,
        "ms": found,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_ms": round(floor * 1e3, 4),
        "share_of_floor": round(floor / best, 3),
        "speedup": round(statistics.median(times["cpu"]) / best, 2) if "cpu" in times and fastest != "cpu" else None,
    }


def _speed(name: str) -> int:
    return SPEED.index(name)


def _bind(case: Case, name: str) -> Callable[[], Any]:
    return lambda: case.run(case.implementations[name])


def _implementations(op: str) -> Mapping[str, Callable[..., Any]]:
    """Return what an op can be chosen from; a module with one function has one implementation."""
    module = importlib.import_module(f"hymba.ops.{op}")
    return getattr(module, "IMPLEMENTATIONS", None) or {"cpu": getattr(module, op)}


def _random(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    return torch.randn(*shape).mul_(0.5).to(dtype).requires_grad_(grad)


def _nbytes(*tensors: Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def _scans(c: HymbaConfig) -> Iterator[Case]:
    rows = BATCH if c.num_hidden_layers < 12 else 1
    size = f"{rows}×{STEPS}×{c.d_inner}×{c.d_state}"
    for grad in (False, True):
        u, dt, gate = (_random(rows, STEPS, c.d_inner, grad=grad) for _ in range(3))
        B, C = (_random(rows, STEPS, c.d_state, grad=grad) for _ in range(2))
        A = (-torch.arange(1.0, c.d_state + 1)).repeat(c.d_inner, 1).requires_grad_(grad)
        D, bias = torch.ones(c.d_inner, requires_grad=grad), torch.full((c.d_inner,), -4.0, requires_grad=grad)
        inputs = (u, dt, A, B, C, D)
        learnt = [*inputs, bias, gate]

        def forward(f: Callable[..., Any], inputs: Any = inputs, bias: Tensor = bias, gate: Tensor = gate) -> Any:
            return f(*inputs, dt_bias=bias, gate=gate)[0]

        def both(f: Callable[..., Any], learnt: list[Tensor] = learnt, forward: Any = forward) -> Any:
            return torch.autograd.grad(forward(f).float().sum(), learnt)

        moved = _nbytes(*learnt, u)
        yield Case(
            "selective_scan",
            size + (" forward and backward" if grad else " forward"),
            _implementations("selective_scan"),
            both if grad else forward,
            3 * moved if grad else moved,
            skipped=("reference",) if grad else (),
        )


def _convolutions(c: HymbaConfig) -> Iterator[Case]:
    u, weight, bias = _random(1, STEPS, c.d_inner), _random(c.d_inner, c.d_conv), _random(c.d_inner)
    yield Case(
        "causal_conv1d",
        f"{STEPS}×{c.d_inner}×{c.d_conv}",
        _implementations("causal_conv1d"),
        _without_gradients(lambda f: f(u, weight, bias)),
        _nbytes(u, u, weight, bias),
    )


def _products(c: HymbaConfig) -> Iterator[Case]:
    """The MLP's way up, the largest matrix of a layer: weights in each width, at the rows of decode and prefill."""
    plain = _random(c.intermediate_size, c.hidden_size)
    makers = {Weights.bf16: lambda w: w, Weights.int8: round_to_int8, Weights.int4: round_to_int4}
    for kind, make in makers.items():
        first = make(plain)
        nbytes = _weight_nbytes(first)
        copies = [_copy(first) for _ in range(min(COPIES, -(-WEIGHT_BYTES // nbytes)))]
        for rows in (1, BATCH, STEPS):
            x, turn = _random(rows, c.hidden_size), itertools.cycle(copies)

            def run(f: Callable[..., Any], x: Tensor = x, turn: Iterator[Any] = turn) -> Any:
                return f(x, next(turn), None)

            yield Case(
                "linear",
                f"{kind}, {rows} rows × {c.hidden_size} → {c.intermediate_size}",
                _implementations("linear"),
                _without_gradients(run),
                nbytes + x.nbytes + 2 * rows * c.intermediate_size,
                2 * rows * c.hidden_size * c.intermediate_size,
                skipped=("reference",) if kind is Weights.bf16 else (),  # the torch path itself
            )


def _copy(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    if isinstance(weight, Tensor):
        return weight.clone()
    return QuantizedWeight(weight.values.clone(), weight.scales.clone(), weight.in_features)


def _weight_nbytes(weight: Any) -> int:
    return weight.nbytes if isinstance(weight, Tensor) else _nbytes(weight.values, weight.scales)


def _attentions(c: HymbaConfig) -> Iterator[Case]:
    """A decode step and a prefill chunk, in a sliding layer with a full window and in a global layer of 8K."""
    for window, keys in ((c.sliding_window, c.sliding_window + 1), (None, 8192)):
        for steps in (1, STEPS):
            stored = c.num_meta_tokens + keys + (steps if steps > 1 and window is not None else 0)
            yield _attention(c, window, steps, stored)


def _attention(c: HymbaConfig, window: int | None, steps: int, stored: int) -> Case:
    q = _random(1, steps, c.num_attention_heads, c.head_dim)
    k = _random(1, stored, c.num_key_value_heads, c.head_dim)
    v = _random(1, stored, c.num_key_value_heads, c.v_head_dim)
    where = {
        "query_positions": torch.arange(stored - steps, stored)[None],
        "key_positions": torch.arange(stored)[None],
        "window": window,
        "num_meta": c.num_meta_tokens,
    }
    seen = [min(i + 1, stored if window is None else window + 1 + c.num_meta_tokens) for i in range(stored)]
    return Case(
        "attention",
        f"{'decode' if steps == 1 else f'{steps} queries'}, {stored} keys, {'global' if window is None else 'sliding'}",
        _implementations("attention"),
        _without_gradients(lambda f: f(q, k, v, **where)),
        _nbytes(q, k, v) + 2 * steps * c.d_inner,
        2 * sum(seen[-steps:]) * c.num_attention_heads * (c.head_dim + c.v_head_dim),
        skipped=("reference",) if window is None and steps > 1 else (),
    )


def _norms(c: HymbaConfig) -> Iterator[Case]:
    for rows in (1, STEPS):
        x, weight = _random(rows, c.hidden_size), _random(c.hidden_size)

        def run(f: Callable[..., Any], x: Tensor = x, weight: Tensor = weight) -> Any:
            return f(x, weight, 1e-6)

        size, moved = f"{rows}×{c.hidden_size}", _nbytes(x, x, weight)
        yield Case("rms_norm", size, _implementations("rms_norm"), _without_gradients(run), moved)


def _without_gradients(run: Run) -> Run:
    def quiet(f: Callable[..., Any]) -> Any:
        with torch.no_grad():
            return run(f)

    return quiet


CASES: dict[str, Callable[[HymbaConfig], Iterator[Case]]] = {
    "selective_scan": _scans,
    "causal_conv1d": _convolutions,
    "linear": _products,
    "attention": _attentions,
    "rms_norm": _norms,
}


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['bandwidth_gb_s']} GB/s, {result['matrix_gflops']['median']} GFLOP/s; milliseconds, medians"]
    for case in result["ops"]:
        times = "  ".join(f"{name} {ms['median']:.3f}" for name, ms in case["ms"].items())
        faster = f"  {case['speedup']}× the torch path" if case["speedup"] else ""
        lines.append(
            f"  {case['op']:15s} {case['size']:40s} {times}  {case['share_of_floor']:.0%} of the floor{faster}"
        )
    return lines


if __name__ == "__main__":
    main(ops)
