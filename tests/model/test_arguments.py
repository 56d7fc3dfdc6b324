"""What the forward pass refuses, and empty calls."""

from __future__ import annotations

import pytest
import torch
from micro import micro_model

from hymba.errors import HymbaError
from hymba.inference.step import DecodeStep
from hymba.model import Hymba, quantize
from hymba.ops import use_backend
from hymba.ops.backend import missing

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
BACKENDS = [name for name in ("reference", "cpu", "native") if name not in missing()]
EVERY_BACKEND = [*BACKENDS, *([] if "triton" in missing() else [pytest.param("triton", marks=pytest.mark.slow)])]

WRONG = [
    ({"tokens": [[1, 2]]}, "tokens and embeddings must be tensors, not list"),
    ({"tokens": IDS[0]}, r"tokens must be \(batch, time\) int64, not \(3,\)"),
    ({"tokens": IDS.float()}, "tokens must be .* not .* torch.float32"),
    ({"tokens": IDS + 60}, "tokens holds 66, but must be 0 to 60"),
    ({"tokens": IDS - 2}, "tokens holds -1, but must be 0 to 60"),
    ({"embeddings": torch.zeros(2, 3)}, r"embeddings must be \(batch, time, 24\)"),
    ({"embeddings": torch.zeros(2, 3, 23)}, r"embeddings must be \(batch, time, 24\)"),
    ({"embeddings": torch.zeros(2, 3, 24).long()}, "floating dtype"),
    ({"tokens": IDS, "lengths": torch.tensor([3, 4])}, "lengths holds 4, but must be 0 to 3"),
    ({"tokens": IDS, "lengths": torch.tensor([-1, 3])}, "lengths holds -1, but must be 0 to 3"),
    ({"tokens": IDS, "lengths": torch.tensor([3])}, r"lengths must be a tensor \(2,\) of integers, not \(1,\)"),
    ({"tokens": IDS, "lengths": torch.tensor([[3], [3]])}, r"lengths must be a tensor \(2,\)"),
    ({"tokens": IDS, "lengths": torch.tensor([3.0, 3.0])}, "lengths must be .* not .* torch.float32"),
    ({"tokens": IDS, "lengths": [3, 3]}, "lengths must be a tensor .* not list"),
    ({"tokens": IDS, "documents": IDS[:, :2]}, r"documents must be a tensor \(2, 3\) of integers, not \(2, 2\)"),
    ({"tokens": IDS, "documents": IDS[:1]}, r"documents must be a tensor \(2, 3\)"),
    ({"tokens": IDS, "documents": IDS.float()}, "documents must be .* not .* torch.float32"),
    ({"tokens": IDS, "positions": IDS[0]}, r"positions must be a tensor \(2, 3\)"),
    ({"tokens": IDS, "positions": IDS.double()}, "positions must be .* not .* torch.float64"),
    ({"tokens": IDS, "positions": IDS - 2}, "positions holds -1, but must be 0 or more"),
]


@pytest.fixture(scope="module", params=[None, 8], ids=["plain", "8 bits"])
def any_model(request: pytest.FixtureRequest) -> Hymba:
    model = micro_model().requires_grad_(False)
    if request.param is not None:
        quantize(model, request.param)
    return model


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_named(any_model: Hymba, arguments: dict, message: str) -> None:
    with pytest.raises(HymbaError, match=message):
        any_model(**arguments)


def test_a_refused_call_leaves_the_cache_as_it_was(model: Hymba) -> None:
    cache = model.allocate_cache(2, 8)
    model(IDS, cache=cache)
    before = [cache.lengths.clone(), cache.ssm_state.clone(), *(k.clone() for k in cache.keys.values())]
    for arguments in ({"tokens": IDS + 60}, {"tokens": IDS, "lengths": torch.tensor([0, 4])}, {"tokens": IDS[:1]}):
        with pytest.raises(HymbaError):
            model(**arguments, cache=cache)
    assert all(map(torch.equal, before, [cache.lengths, cache.ssm_state, *cache.keys.values()]))


def test_what_stands_in_padding_is_not_checked(model: Hymba) -> None:
    lengths, ids, positions = torch.tensor([3, 1]), IDS.clone(), torch.tensor([[0, 1, 2], [0, -1, -1]])
    ids[1, 1:] = -100
    out = model(ids, lengths=lengths, positions=positions).hidden
    torch.testing.assert_close(out, model(IDS, lengths=lengths).hidden)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_other_integers_are_taken(model: Hymba, dtype: torch.dtype) -> None:
    lengths, documents = torch.tensor([3, 2]), torch.tensor([[0, 0, 1], [0, 1, 1]])
    wanted = model(IDS, lengths=lengths, documents=documents, positions=IDS).hidden
    for backend in BACKENDS:
        with use_backend(backend):
            ours = model(IDS, lengths=lengths.to(dtype), documents=documents.to(dtype), positions=IDS.to(dtype)).hidden
        torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_recorded_steps_take_lengths(model: Hymba) -> None:
    """Checks of values would end a recording."""
    ours, theirs = (model.allocate_cache(2, 20) for _ in range(2))
    step = DecodeStep(model, ours, steps=2)
    for lengths in ([2, 1], [0, 2], [1, 1]):
        expected = model.logits(model(IDS[:, :2], cache=theirs, lengths=torch.tensor(lengths)).hidden)
        torch.testing.assert_close(step(IDS[:, :2], torch.tensor(lengths)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("size", [(2, 0), (0, 3), (0, 0)])
def test_empty_calls_return_empty_outputs(any_model: Hymba, backend: str, size: tuple[int, int]) -> None:
    rows, steps = size
    empty = torch.zeros(size, dtype=torch.int64)
    with use_backend(backend):
        for more in ({}, {"lengths": empty.sum(1)}, {"documents": empty, "positions": empty}):
            out = any_model(empty, **more, output_hidden_states=True, output_attentions=True)
            assert [h.shape for h in out.hidden_states] == [(rows, steps, 24)] * 6
            assert [a.shape for a in out.attentions] == [(rows, 3, steps, 3 + steps)] * 5
            assert any_model.logits(out.hidden).shape == (rows, steps, 61)
        assert any_model(embeddings=torch.zeros(*size, 24)).hidden.shape == (rows, steps, 24)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("bits", [None, 8])
def test_an_empty_call_changes_no_cache(any_model: Hymba, backend: str, bits: int | None) -> None:
    with use_backend(backend):
        ours, theirs = (any_model.allocate_cache(2, 12, bits) for _ in range(2))
        nothing = IDS[:, :0]
        for _ in range(3):
            out = any_model(nothing, cache=ours, output_attentions=True)
            assert out.hidden.shape == (2, 0, 24)
            theirs_out = any_model(IDS, cache=theirs, output_attentions=True)
            ours_out = any_model(IDS, cache=ours, output_attentions=True)
            assert torch.equal(ours_out.hidden, theirs_out.hidden)
        assert ours.longest == theirs.longest == 9


def test_an_empty_call_can_be_differentiated() -> None:
    model = micro_model()
    model(IDS[:, :0]).hidden.sum().backward()
    assert not model.embed_tokens.weight.grad.any()
