"""The whole model on Triton's kernels, on a GPU or interpreted, against the model on the references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels import DEVICE
from micro import micro_model
from torch import Tensor

from hymba.inference import SamplingParams, generate
from hymba.model import Hymba
from hymba.ops import use_backend

pytestmark = pytest.mark.slow

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}
WIDTHS = {"head_dim": 16, "v_head_dim": 32, "d_inner": 96, "hidden_size": 48}  # of the micro model, for matrix units


@pytest.fixture(scope="module")
def model() -> Hymba:
    return micro_model(**WIDTHS).to(DEVICE)


def ids(rows: int, steps: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (rows, steps), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def on_both(run: Callable[[], list]) -> list[list]:
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            results.append(run())
    return results


def test_packed_documents_and_every_gradient(model: Hymba) -> None:
    tokens, documents = ids(2, 14), torch.tensor([[0] * 5 + [1] * 9, [0] * 2 + [1] * 4 + [2] * 8]).to(DEVICE)
    weights = torch.randn(2, 14, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run() -> list[Tensor]:
        hidden = model(tokens, documents=documents).hidden
        return [hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), list(model.parameters()))]

    model.requires_grad_(True)
    ours, theirs = on_both(run)
    model.requires_grad_(False)
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("bits", [None, 8])
def test_ragged_prompts_chunks_steps_and_drafts(model: Hymba, bits: int | None) -> None:
    def run() -> list[Tensor]:
        cache, out = model.allocate_cache(2, 30, bits), []
        for seed, (steps, lengths) in enumerate([(9, [9, 4]), (7, [7, 7]), (1, None), (1, [0, 1]), (4, [4, 1])]):
            real = torch.tensor(lengths or [steps] * 2).to(DEVICE)
            hidden = model(ids(2, steps, seed), cache=cache, lengths=None if lengths is None else real).hidden
            out.append(hidden[torch.arange(steps, device=DEVICE) < real[:, None]])
        return [*out, cache.ssm_state, cache.conv_state]

    with torch.no_grad():
        ours, theirs = on_both(run)
    loose = {"atol": 2e-2, "rtol": 2e-2} if bits else TOLERANCE  # a key next to a step of 8 bits may fall either way
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, expected, **loose)


def test_generated_texts(model: Hymba) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True)
    ours, theirs = on_both(lambda: list(generate(model, ids(1, 6)[0], params)))
    assert ours == theirs


def test_half_precision_is_as_near_as_the_references(model: Hymba) -> None:
    tokens, half = ids(2, 12), micro_model(dtype=torch.bfloat16, **WIDTHS).to(DEVICE)
    with torch.no_grad():
        truth = model(tokens).hidden
        ours, theirs = on_both(lambda: [half(tokens).hidden.float()])
    assert (ours[0] - truth).square().mean() < 1.5 * (theirs[0] - truth).square().mean()
