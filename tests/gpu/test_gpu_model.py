"""The model on the GPU equals NVIDIA's, and itself however its input is cut."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE
from micro import micro_model
from safetensors.torch import load_file

from hymba.inference.step import DecodeStep
from hymba.model import Hymba, load, quantize, released_name

CASES = ["b1_L1", "b1_L4", "b1_L8", "b1_L13", "b1_L40", "b3_L5", "b3_L40"]


def logits_of(model: Hymba, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(tokens.to(model.device)).hidden)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float32(backend: str, case: str, tiny_a: Path, expected: dict[str, torch.Tensor]) -> None:
    found = logits_of(load(tiny_a, dtype=torch.float32).to(DEVICE), expected[f"{case}.input_ids"])
    torch.testing.assert_close(found.cpu(), expected[f"{case}.logits"], atol=2e-3, rtol=0)  # they reach 32


@pytest.mark.parametrize("case", ["b1_L13", "b1_L40"])
def test_logits_in_float64(backend: str, case: str, tiny_a: Path, expected: dict[str, torch.Tensor]) -> None:
    found = logits_of(load(tiny_a, dtype=torch.float64).to(DEVICE), expected[f"{case}.input_ids"])
    torch.testing.assert_close(found.cpu(), expected[f"{case}.logits_f64"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["b1_L40", "b3_L40"])
def test_half_precision_errs_no_more_than_on_a_cpu(
    backend: str, dtype: torch.dtype, case: str, tiny_a: Path, expected: dict[str, torch.Tensor]
) -> None:
    model, tokens = load(tiny_a, dtype=dtype), expected[f"{case}.input_ids"]
    truth = expected[f"{case}.logits"]
    with torch.no_grad():
        on_cpu = (model.logits(model(tokens).hidden).float() - truth).square().mean().sqrt()
    on_gpu = (logits_of(model.to(DEVICE), tokens).cpu().float() - truth).square().mean().sqrt()
    assert float(on_gpu) < 1.5 * float(on_cpu)


def test_loss_and_gradients(backend: str, tiny_a: Path, expected: dict[str, torch.Tensor]) -> None:
    grads = load_file(tiny_a / "grads_b3_L40.safetensors")
    norms = dict(zip(json.loads((tiny_a / "grad_names.json").read_text()), grads["grad_norms"].tolist(), strict=True))
    model = load(tiny_a, dtype=torch.float32).to(DEVICE)
    tokens = expected["b3_L40.input_ids"].to(DEVICE)
    logits = model.logits(model(tokens).hidden)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu(), grads["loss"][0], rtol=1e-3, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm().item() == pytest.approx(norms[released_name(name)], rel=2e-3), name


@pytest.fixture(scope="module")
def micro() -> Hymba:
    return micro_model().to(DEVICE).requires_grad_(False)


@settings(max_examples=15)
@given(data=st.data())
def test_any_chunks_are_the_whole(micro: Hymba, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 30))
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(1, length), max_size=4))})
    tokens = torch.randint(60, (2, length), generator=torch.Generator().manual_seed(length)).to(DEVICE)
    whole = logits_of(micro, tokens)
    cache = micro.allocate_cache(2, length)
    with torch.no_grad():
        parts = [micro.logits(micro(tokens[:, a:b], cache=cache).hidden) for a, b in pairwise(cuts)]
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4 * whole.abs().max()


@settings(max_examples=10)
@given(data=st.data())
def test_ragged_rows_are_each_row_alone(micro: Hymba, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=4))
    tokens = torch.randint(60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        batch = micro.logits(micro(tokens, lengths=torch.tensor(lengths, device=DEVICE)).hidden)
    for row, length in enumerate(lengths):
        alone = logits_of(micro, tokens[row : row + 1, :length])[0]
        assert (batch[row, :length] - alone).abs().max() < 1e-4 * alone.abs().max()


def test_packed_documents_are_each_document_alone(micro: Hymba) -> None:
    tokens = torch.randint(60, (1, 29), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    starts = [0, 7, 8, 20, 29]
    documents = torch.tensor([[sum(i >= s for s in starts[1:]) for i in range(29)]], device=DEVICE)
    with torch.no_grad():
        packed = micro.logits(micro(tokens, documents=documents).hidden)
    for a, b in pairwise(starts):
        alone = logits_of(micro, tokens[:, a:b])
        assert (packed[:, a:b] - alone).abs().max() < 1e-4 * alone.abs().max()


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("bits", [None, 8])
def test_repeated_steps_are_a_recomputation(rows: int, bits: int | None) -> None:
    """Far past the window, and with the step captured as a graph from the third on."""
    model = micro_model().to(DEVICE).requires_grad_(False)
    tokens = torch.randint(60, (rows, 24), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    cache = model.allocate_cache(rows, 24, bits)
    step = DecodeStep(model, cache)
    found = [step(tokens[:, i]).clone() for i in range(24)]
    whole = logits_of(model, tokens)
    limit = (1e-4 if bits is None else 3e-2) * whole.abs().max()
    assert (torch.stack(found, dim=1) - whole).abs().max() < limit
    assert cache.lengths.tolist() == [24] * rows


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_models_are_what_they_are_on_a_cpu(bits: int) -> None:
    tokens = torch.randint(60, (2, 17), generator=torch.Generator().manual_seed(4))
    model = quantize(micro_model(), bits)
    with torch.no_grad():
        on_cpu = model.logits(model(tokens).hidden)
    on_gpu = logits_of(model.to(DEVICE), tokens).cpu()
    assert (on_gpu - on_cpu).abs().max() < 1e-4 * on_cpu.abs().max()
