"""The cache: sizes, limits, the meta tokens' state computed once."""

import pytest
import torch
from micro import micro_model

from hymba.errors import HymbaError
from hymba.model import Cache, HymbaConfig, cache_nbytes, paper_cache_nbytes
from hymba.ops.attention import QuantizedHeads, round_heads


def test_sliding_layers_stop_growing(model):
    window, owners = model.config.sliding_window, set(model.config.owners)
    short, long = model.allocate_cache(1, 10), model.allocate_cache(1, 1000)
    for owner in owners:
        slots = model.config.num_meta_tokens + (window + 1 if model.config.window(owner) is not None else 1000)
        assert long.keys[owner].shape[1] == slots
        if model.config.window(owner) is not None:
            assert short.keys[owner].shape == long.keys[owner].shape
    assert 2 not in owners  # a consumer holds no keys


@pytest.mark.parametrize("rows", [1, 3])
def test_predicted_bytes_are_the_bytes_held(model, rows):
    cache = model.allocate_cache(rows, 50)
    assert cache.nbytes() == rows * cache_nbytes(model.config, 50, element_size=4)


@pytest.mark.parametrize(
    ("tokens", "megabytes"), [(1000, 37.6), (2000, 44.0), (4000, 55.6), (8000, 78.6), (16000, 124.7)]
)
def test_the_papers_arithmetic(tokens, megabytes):
    assert round(paper_cache_nbytes(HymbaConfig.named("1.5b"), tokens) / 1e6, 1) == megabytes


def test_a_full_cache_says_so_and_keeps_what_it_holds(model):
    cache = model.allocate_cache(1, 4)
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    with pytest.raises(HymbaError, match="larger max_length"):
        model(torch.tensor([[1, 2]]), cache=cache)
    assert cache.lengths.tolist() == [3]
    model(torch.tensor([[1]]), cache=cache)


def test_growing_keeps_the_sequence(model):
    tokens = torch.arange(20)[None]
    cache = model.allocate_cache(1, 8)
    model(tokens[:, :8], cache=cache)
    cache.grow(20)
    torch.testing.assert_close(model(tokens[:, 8:], cache=cache).hidden, model(tokens).hidden[:, 8:])


def test_wrong_rows_and_sizes_are_refused(model):
    with pytest.raises(HymbaError, match="2 rows, the input has 1"):
        model(torch.tensor([[1]]), cache=model.allocate_cache(2, 4))
    with pytest.raises(HymbaError, match="at least one row"):
        model.allocate_cache(0, 4)
    tokens, cache = torch.tensor([[1]]), model.allocate_cache(1, 4)
    with pytest.raises(HymbaError, match="documents"):
        model(tokens, cache=cache, documents=tokens)
    with pytest.raises(HymbaError, match="either tokens or embeddings"):
        model()


def test_gradients_reach_the_meta_tokens_through_every_state():
    model = micro_model(dtype=torch.float64)
    model(torch.tensor([[1, 2, 3]])).hidden.sum().backward()
    assert model.meta_tokens.grad.abs().min() > 0


def test_gradients_flow_within_a_call_and_stop_at_the_cache():
    tokens = torch.arange(12)[None]
    whole, cached = micro_model(dtype=torch.float64), micro_model(dtype=torch.float64)
    whole(tokens).hidden.square().sum().backward()
    cache = Cache.start(cached.config, cached.prefix(), rows=1, max_length=20)
    cached(tokens, cache=cache).hidden.square().sum().backward()
    wanted = dict(whole.named_parameters())
    for name, parameter in cached.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, msg=name)
    assert not cache.ssm_state.requires_grad
    cached.zero_grad()
    cached(tokens[:, :3], cache=cache).hidden.sum().backward()
    assert cached.meta_tokens.grad is None
    assert cached.layers[0].mixer.in_proj.weight.grad.any()


def rounding_by_hand(monkeypatch):
    """A cache in the model's dtype that holds, and attends to, what 8 bits would hold."""
    start, extend = Cache.start.__func__, Cache.extend

    def rounded_extend(self, window, stored, k, v, slots):
        return extend(self, window, stored, *(round_heads(x).dequantize(x.dtype) for x in (k, v)), slots)

    def rounded_start(cls, config, prefix, rows, max_length, bits=None):
        cache = start(cls, config, prefix, rows, max_length)
        for held in (cache.keys, cache.values):
            held.update({i: round_heads(x).dequantize(x.dtype) for i, x in held.items()})
        return cache

    monkeypatch.setattr(Cache, "extend", rounded_extend)
    monkeypatch.setattr(Cache, "start", classmethod(rounded_start))


@torch.no_grad()
def run(model, tokens, cuts, lengths=None, **cache_options):
    cache, outputs = model.allocate_cache(tokens.shape[0], tokens.shape[1], **cache_options), []
    for chunk in tokens.split(cuts, dim=1):
        outputs.append(model(chunk, cache=cache).hidden)
    return torch.cat(outputs, dim=1), cache


CUTS = [[30], [1] * 30, [7, 1, 1, 9, 1, 11]]


@pytest.mark.parametrize("cuts", CUTS, ids=["whole", "single", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_equal_the_computation_with_what_they_stand_for(monkeypatch, cuts, dtype):
    model, tokens = micro_model(dtype=dtype).requires_grad_(False), torch.arange(60).view(2, 30)
    hidden, cache = run(model, tokens, cuts, bits=8)
    assert {type(x) for x in (*cache.keys.values(), *cache.values.values())} == {QuantizedHeads}
    rounding_by_hand(monkeypatch)
    wanted, _ = run(model, tokens, cuts)
    # By hand, what they stand for is rounded to the dtype once more.
    tolerance = (0.05 if dtype == torch.bfloat16 else 1e-4) * float(wanted.abs().max())
    torch.testing.assert_close(hidden, wanted, atol=tolerance, rtol=0)


def test_8_bits_cut_anywhere_are_the_same(model):
    tokens = torch.arange(60).view(2, 30)
    whole, first = run(model, tokens, CUTS[0], bits=8)
    for cuts in CUTS[1:]:
        hidden, cache = run(model, tokens, cuts, bits=8)
        torch.testing.assert_close(hidden, whole, atol=2e-2 * float(whole.abs().max()), rtol=0)
        assert float((hidden - whole).abs().mean()) < 1e-3 * float(whole.abs().mean())
        assert cache.nbytes() == first.nbytes()


@pytest.mark.parametrize("rows", [1, 3])
def test_8_bits_hold_half(model, rows):
    cache = model.allocate_cache(rows, 50, bits=8)
    assert cache.nbytes() == rows * cache_nbytes(model.config, 50, element_size=4, bits=8)
    config = HymbaConfig.named("1.5b")
    states = cache_nbytes(config, 1) - cache_nbytes(config, 0)  # one slot of the three global layers
    assert cache_nbytes(config, 1, bits=8) - cache_nbytes(config, 0, bits=8) < 0.52 * states


def test_8_bits_are_selected_grown_and_padded(model):
    tokens = torch.arange(40).view(2, 20)
    whole, _ = run(model, tokens, [20], bits=8)
    with torch.no_grad():
        cache = model.allocate_cache(2, 12, bits=8)
        ragged = torch.tensor([12, 5])
        model(tokens[:, :12], cache=cache, lengths=ragged)
        assert torch.equal(cache.keys[0].scales[1, 3 + 5 :], torch.zeros(7, 1, dtype=torch.bfloat16))
        fork = cache.select(torch.tensor([1, 0, 0]))
        fork.grow(20)
        hidden = model(tokens[[1, 0, 0], 12:], cache=fork).hidden
        assert cache.lengths.tolist() == [12, 5]
    for row in (1, 2):
        torch.testing.assert_close(hidden[row], whole[0, 12:], atol=2e-2 * float(whole.abs().max()), rtol=0)


def test_8_bits_refuse_what_they_cannot_do(model):
    with pytest.raises(HymbaError, match="in 8 bits, not in 4"):
        model.allocate_cache(1, 4, bits=4)
    trained = micro_model()
    with pytest.raises(HymbaError, match="carries no gradients"):
        trained(torch.tensor([[1]]), cache=trained.allocate_cache(1, 4, bits=8))
    tokens, cache = torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), model.allocate_cache(1, 9, bits=8)
    frozen = model(tokens, cache=cache, output_attentions=True)  # with gradients switched on, none asked for
    assert frozen.hidden.isfinite().all()
    assert frozen.attentions[0].shape == (1, 3, 7, 3 + 7)
