"""The scan as an operator of torch: what it declares holds, and its gradients are those of the definition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.ops.backend import use_backend
from hymba.ops.selective_scan import operator, selective_scan

OPTIONS = ("gate", "initial_state", "lengths", "document_offsets")


def arguments(options: tuple[str, ...], dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """The operator's arguments, (B, T, E, N) being (2, 7, 6, 3)."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 7, 6), (2, 7, 6), (6, 3), (2, 7, 3), (2, 7, 3), (6,), (6,), (2, 7, 6), (2, 6, 3)]
    floats = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    counts = [torch.tensor([7, 4]), torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 0, 1, 2]])]
    given = dict(zip(OPTIONS, (*floats[7:], *counts), strict=True))
    required = [x.requires_grad_() for x in floats[:7]]
    for name in ("gate", "initial_state"):
        given[name].requires_grad_()
    return [*required, *(x if name in options else None for name, x in given.items())]


def run(inputs: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The definition."""
    u, dt, A_log, B, C, D, dt_bias, *rest = inputs
    options: dict[str, Any] = dict(zip(OPTIONS, rest, strict=True))
    with use_backend("reference"):
        return selective_scan(u, dt, A_log, B, C, D, dt_bias=dt_bias, **options)


@pytest.mark.parametrize("options", [(), OPTIONS, ("gate", "lengths"), ("initial_state", "document_offsets")], ids=str)
def test_outputs_and_gradients(options: tuple[str, ...]) -> None:
    inputs = arguments(options)
    found = []
    for function in (lambda x: operator.selective_scan(*x), run):
        y, final = function(inputs)
        if "lengths" in options:  # what y holds behind a row's end has no meaning
            y = y[:, :4]
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found.append((y, final, *torch.autograd.grad(y.sin().sum() + final.cos().sum(), wanted)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [(), OPTIONS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_declaration_holds(options: tuple[str, ...], dtype: torch.dtype) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.selective_scan, arguments(options, dtype), test_utils=checks)
