"""The loss of a head against its definition: every instruction level, values and gradients."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import DEVICE, assert_close
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import gpu, linear_cross_entropy, native, use_backend
from hymba.ops.backend import explain, usable
from hymba.ops.cross_entropy import IMPLEMENTATIONS, cpu, liger

pytestmark = pytest.mark.usefixtures("poisoned")


def problem(rows: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (2, rows, 12), a head, and targets of which some carry no loss."""
    g = torch.Generator().manual_seed(vocabulary)
    x = torch.randn(2, rows, 12, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, 12, generator=g, dtype=torch.float64)
    targets = torch.randint(0, vocabulary, (2, rows), generator=g)
    targets[0, 0] = -100
    return x.to(dtype), weight.to(dtype), targets


def run(backend: str, x: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Tensor]:
    x, weight = (v.detach().requires_grad_() for v in (x, weight))
    with use_backend(backend):
        out = linear_cross_entropy(x, weight, targets)
    (out / 8).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return {"loss": out / targets.numel(), "d x": x.grad, "d weight": weight.grad}


@pytest.mark.parametrize("vocabulary", [1, 3, 17, 100, 3073])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 2.0**-5)]
)
def test_equals_the_definition(
    level: str, dtype: torch.dtype, tolerance: float, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where blocks divide the rows unevenly, and where only the loss is wanted."""
    monkeypatch.setattr(cpu, "BLOCK", 5 * vocabulary)
    inputs = problem(7, vocabulary, dtype)
    x, weight, targets = inputs
    ours = run("native", *inputs)
    assert [v.dtype for v in ours.values()] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
    assert_close(ours, run("reference", x.double(), weight.double(), targets), tolerance)
    assert torch.equal(linear_cross_entropy(x, weight, targets) / targets.numel(), ours["loss"])


@pytest.mark.parametrize("name", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("vocabulary", [1, 17, 3073])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 2.0**-5)])
def test_every_implementation_equals_the_definition(
    name: str, dtype: torch.dtype, tolerance: float, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU if there is one; with gradients for either input alone, too."""
    monkeypatch.setattr(cpu, "BLOCK", 5 * vocabulary)
    monkeypatch.setattr(cpu, "GPU_BLOCK", 5 * vocabulary)
    device = torch.device("cpu") if name == "native" else DEVICE
    inputs = [v.to(device) for v in problem(7, vocabulary, dtype)]
    expected = run("reference", *(v.double() if v.is_floating_point() else v for v in inputs))
    assert_close(run(name, *inputs), expected, tolerance)
    for i, gradient in enumerate(("d x", "d weight")):
        leaf = inputs[i].clone().requires_grad_()
        loss = IMPLEMENTATIONS[name](*inputs[:i], leaf, *inputs[i + 1 :])
        (loss / 8).backward()
        assert leaf.grad is not None
        assert_close({gradient: leaf.grad}, {gradient: expected[gradient]}, tolerance)


def test_liger_is_asked_for_the_sum_of_targets_that_are_not_negative(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is called with, where it need not be installed."""
    asked: dict[str, Any] = {}

    def stand_in(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
        asked.update(options, targets=targets, x=x)
        return x.sum()

    functional = ModuleType("liger_kernel.transformers.functional")
    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", stand_in, raising=False)
    for module in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(gpu, "why_unfit", lambda x: "")
    x, weight, targets = problem(3, 5, torch.float32)
    liger.linear_cross_entropy(x, weight, targets)
    assert asked["x"].shape == (6, 12)
    assert asked["targets"].tolist() == targets.flatten().clamp(min=-1).tolist()
    assert (asked["ignore_index"], asked["reduction"], asked["accum_dtype"]) == (-1, "sum", torch.float32)
    asked.clear()
    liger.linear_cross_entropy(x, weight.double(), targets)
    liger.linear_cross_entropy(x, weight.requires_grad_(), targets)
    assert asked == {}


def test_it_is_told_why_liger_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: "")
    monkeypatch.setattr(gpu, "interpreted", lambda: False)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    gpu.why_no_liger.cache_clear()
    try:
        assert explain(IMPLEMENTATIONS, "cuda") == "liger-kernel is not installed: pip install liger-kernel"
    finally:
        gpu.why_no_liger.cache_clear()


def test_autocast_keeps_the_heads_gradient_wide(level: str) -> None:
    x, weight, targets = problem(20, 300, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run("native", x.bfloat16(), weight, targets)
        theirs = run("reference", x.bfloat16(), weight, targets)
    assert ours["d weight"].dtype == torch.float32
    assert_close(ours, theirs, 2.0**-6)


def test_logits_far_from_zero_neither_overflow_nor_vanish(level: str) -> None:
    weight = torch.tensor([[-1000.0], [-1001.0], [-1002.0]])
    for sign in (1, -1):
        inputs = torch.tensor([[sign * 1.0]]), weight, torch.tensor([1])
        assert_close(run("native", *inputs), run("reference", *inputs), 1e-3)


def test_no_nan_becomes_a_number(level: str) -> None:
    """Whatever its lower bits are."""
    bits = torch.tensor([0x7F800001, 0x7FC00001, 0x7FFFFFFF, -1, -0x400000], dtype=torch.int32)
    for nan in bits.view(torch.float32):
        weight = torch.stack([nan, torch.tensor(1.0)])[:, None]
        assert linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([1])).isnan()


@pytest.mark.parametrize("dtype", native.DTYPES)
def test_threads_change_no_bit(level: str, dtype: torch.dtype) -> None:
    inputs, before, results = problem(50, 1000, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(linear_cross_entropy(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, targets = problem(3, 5)
    with pytest.raises(HymbaError, match="vocabulary has 5"):
        linear_cross_entropy(x, weight, targets + 5)
    with pytest.raises(HymbaError, match="fit together"):
        linear_cross_entropy(x, weight, targets[:1])
    assert float(linear_cross_entropy(x[:, :0], weight, targets[:, :0])) == 0
