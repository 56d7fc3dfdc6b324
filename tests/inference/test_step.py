"""A recorded decode step against the model itself."""

import pytest
import torch
from micro import micro_model

from hymba.errors import HymbaError
from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba, quantize
from hymba.ops import native
from hymba.ops.backend import use_backend
from hymba.ops.recording import Recording

STEPS = 13  # more than the window: rings go round


def filled(model: Hymba, lengths: list[int], room: int) -> Cache:
    cache = model.allocate_cache(len(lengths), room)
    tokens = torch.randint(61, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(tokens, cache=cache, lengths=torch.tensor(lengths))
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[7], [1, 9, 4]])
def test_recorded_steps_equal_the_model(dtype: torch.dtype, lengths: list[int]) -> None:
    model = micro_model(dtype=dtype).requires_grad_(False)
    ours, theirs = (filled(model, lengths, 30) for _ in range(2))
    step, draw = DecodeStep(model, ours), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        tokens = torch.randint(61, (len(lengths),), generator=draw)
        with torch.no_grad():
            expected = model.logits(model(tokens[:, None], cache=theirs).hidden[:, -1])
        torch.testing.assert_close(step(tokens), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.lengths, theirs.lengths)
    assert ours.longest == theirs.longest
    torch.testing.assert_close(ours.ssm_state, theirs.ssm_state)
    assert all(torch.equal(ours.keys[i], theirs.keys[i]) for i in ours.keys) or dtype == torch.float32


@pytest.mark.parametrize("level", native.available())
def test_python_stays_out_of_later_steps(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, token = micro_model().requires_grad_(False), torch.tensor([5])
    with native.use_level(level):
        step = DecodeStep(model, filled(model, [4], 10))
        step(token)
        monkeypatch.setattr(Hymba, "forward", lambda *_, **__: pytest.fail("the model was called"))
        step(token)


def test_a_full_cache_is_refused_and_left_as_it_is() -> None:
    model, token = micro_model().requires_grad_(False), torch.tensor([5])
    cache = filled(model, [4], 6)
    step = DecodeStep(model, cache)
    step(token)
    step(token)
    before = cache.ssm_state.clone()
    with pytest.raises(HymbaError, match="the cache holds 6 tokens a row"):
        step(token)
    assert torch.equal(cache.ssm_state, before)


def test_a_base_that_grows_with_the_text_is_not_recorded() -> None:
    model = micro_model(rope_type="dynamic_ntk", orig_max_position_embeddings=8).requires_grad_(False)
    ours, theirs = (filled(model, [3], 30) for _ in range(2))
    step, token = DecodeStep(model, ours), torch.tensor([7])
    for _ in range(STEPS):
        with torch.no_grad():
            expected = model.logits(model(token[:, None], cache=theirs).hidden[:, -1])
        assert torch.equal(step(token), expected)


def test_torch_operations_can_be_recorded_too() -> None:
    """Without kernels nothing is recorded, for no one has need of it; but it would be right."""
    model = micro_model(dtype=torch.float64).requires_grad_(False)
    cache, other = (filled(model, [7], 30) for _ in range(2))
    tokens = torch.tensor([[4]])
    with use_backend("reference"), torch.no_grad():
        cache.whole = True
        with Recording() as recording:
            hidden = model(tokens, cache=cache).hidden
        for token in (4, 9, 11, 30):
            if token != 4:
                tokens.fill_(token)
                recording.replay()
            torch.testing.assert_close(hidden, model(torch.tensor([[token]]), cache=other).hidden)


@pytest.mark.parametrize("weights", [None, 8, 4])
@pytest.mark.parametrize("bits", [None, 8])
def test_recorded_steps_of_quantised_models_equal_the_model(weights: int | None, bits: int | None) -> None:
    model = micro_model().requires_grad_(False)
    if weights is not None:
        quantize(model, weights)
    ours, theirs = (model.allocate_cache(2, 30, bits) for _ in range(2))
    step, draw = DecodeStep(model, ours), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        tokens = torch.randint(61, (2,), generator=draw)
        with torch.no_grad():
            expected = model.logits(model(tokens[:, None], cache=theirs).hidden[:, -1])
        torch.testing.assert_close(step(tokens), expected, atol=1e-2 * float(expected.abs().max()), rtol=0)
    if bits is not None:
        # What lay between two whole numbers may be rounded to either.
        assert int((ours.keys[0].values.int() - theirs.keys[0].values.int()).abs().max()) <= 1
        torch.testing.assert_close(ours.keys[0].scales, theirs.keys[0].scales)
