"""Stretches of modules that run as one op: the same numbers, and nothing left out that somebody has added."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from micro import micro_model
from torch import Tensor, nn

from hymba.model import quantize
from hymba.model.projection import Linear, RMSNorm, add_projected_mean, add_projection, project_gated, project_norm

NAMES = ("input_norm", "mlp_norm", "mixer.in_proj", "mixer.out_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
Add = Callable[[nn.Module, Callable[[], None]], None]


def add_hook(module: nn.Module, call: Callable[[], None]) -> None:
    module.register_forward_hook(lambda *_: call())


def add_hook_before(module: nn.Module, call: Callable[[], None]) -> None:
    module.register_forward_pre_hook(lambda *_: call())


def replace_forward(module: nn.Module, call: Callable[[], None]) -> None:
    """As accelerate does."""
    forward = module.forward
    module.forward = lambda x: (call(), forward(x))[1]  # type: ignore[method-assign]


def change_class(module: nn.Module, call: Callable[[], None]) -> None:
    """As an adapter does that takes the module's place."""

    class Adapter(type(module)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            call()
            return super().forward(x)

    module.__class__ = Adapter


@pytest.mark.parametrize("add", [add_hook, add_hook_before, replace_forward, change_class])
def test_what_is_added_to_a_module_runs(add: Add) -> None:
    tiny, tokens, calls = micro_model(), torch.arange(6)[None], []
    expected = tiny(tokens).hidden
    for name in NAMES:
        add(tiny.layers[1].get_submodule(name), lambda name=name: calls.append(name))
    assert torch.equal(tiny(tokens).hidden, expected)
    assert set(calls) == set(NAMES)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_stretch_equals_its_modules_one_by_one(bits: int | None) -> None:
    tiny = micro_model()
    if bits:
        quantize(tiny, bits)
    layer, width = tiny.layers[0], tiny.config.hidden_size
    mixer, mlp = layer.mixer, layer.mlp
    stream, attended, scanned = (torch.randn(2, 3, n) for n in (width, *2 * (tiny.config.d_inner,)))
    norms: tuple[RMSNorm, RMSNorm] = (mixer.attention_norm, mixer.ssm_norm)
    down: Linear = mlp.down_proj

    def run() -> tuple[Tensor, ...]:
        inner = project_gated(layer.mlp_norm, mlp.gate_proj, mlp.up_proj, stream)
        mean = add_projected_mean(norms, mixer.out_proj, attended, scanned, stream)
        return project_norm(layer.input_norm, mixer.in_proj, stream), inner, add_projection(down, inner, stream), mean

    whole = run()
    for module in (mixer.in_proj, mixer.out_proj, mlp.up_proj, down):
        module.register_forward_hook(lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))
