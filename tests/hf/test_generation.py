"""`generate` and the cache: whatever the strategy, the cache changes nothing but the time."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from hymba.errors import HymbaError
from hymba.hf import HymbaCache, HymbaForCausalLM
from hymba.model import Hymba
from hymba.ops import native

NEW = 16
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def prompt(rows: int = 2, columns: int = 9, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (rows, columns), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def run(model: HymbaForCausalLM, inputs: dict[str, Tensor], **options: object) -> Tensor:
    return model.generate(**inputs, **({"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1} | options))


@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 2.0},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=str,
)
def test_the_cache_changes_nothing(model: HymbaForCausalLM, strategy: dict[str, object]) -> None:
    results = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(run(model, prompt(), use_cache=use_cache, **strategy))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 2, "cache_implementation": "static"},
    ],
    ids=str,
)
def test_prefill_and_static_options(model: HymbaForCausalLM, options: dict[str, object]) -> None:
    output = run(model, prompt(), return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, run(model, prompt()))
    assert isinstance(output.past_key_values, StaticCache if "cache_implementation" in options else DynamicCache)


@pytest.mark.parametrize("kind", ["hymba", "dynamic", "config", "static"])
def test_the_callers_cache_is_filled(model: HymbaForCausalLM, kind: str) -> None:
    cache: Cache = {
        "hymba": HymbaCache,
        "dynamic": DynamicCache,
        "config": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }[kind]()
    first = run(model, prompt(), past_key_values=cache)
    assert torch.equal(first, run(model, prompt()))
    assert cache.get_seq_length() == first.shape[1] - 1
    mask = torch.nn.functional.pad(prompt()["attention_mask"], (0, NEW), value=1)
    more = run(model, {"input_ids": first, "attention_mask": mask}, past_key_values=cache, max_new_tokens=4)
    assert torch.equal(more, run(model, prompt(), max_new_tokens=NEW + 4))


def test_generation_from_embeddings(model: HymbaForCausalLM) -> None:
    inputs = prompt()
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    bare = run(model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(bare, run(model, inputs)[:, -NEW:])


@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_ragged_chunking_is_the_whole(model: HymbaForCausalLM, cuts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (2, sum(cuts)), generator=generator)
    mask, cache, logits, taken = torch.zeros(2, 0, dtype=torch.int64), HymbaCache(), [[], []], [0, 0]
    for columns in cuts:
        real = torch.randint(0, 2, (2, columns), generator=generator)
        chunk = torch.zeros(2, columns, dtype=torch.int64)
        for row in range(2):
            count = int(real[row].sum())
            chunk[row, real[row].bool()] = ids[row, taken[row] : taken[row] + count]
            taken[row] += count
        mask = torch.cat((mask, real), dim=1)
        with torch.no_grad():
            output = model(chunk, attention_mask=mask, past_key_values=cache, output_attentions=True)
        assert all(weights.shape[-1] == 3 + mask.shape[1] for weights in output.attentions)
        for row in range(2):
            logits[row].append(output.logits[row, real[row].bool()])
    with torch.no_grad():
        whole = model(ids).logits
    for row in range(2):
        torch.testing.assert_close(torch.cat(logits[row]), whole[row, : taken[row]], **TOLERANCE)


def test_cached_attentions_are_the_uncached_ones(model: HymbaForCausalLM) -> None:
    inputs = prompt(columns=20)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, output_attentions=True).attentions
        cache = model(ids[:, :13], attention_mask=mask[:, :13], use_cache=True).past_key_values
        rest = model(ids[:, 13:], attention_mask=mask, past_key_values=cache, output_attentions=True).attentions
    for ours, theirs in zip(rest, whole, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, 13:], **TOLERANCE)


def test_rows_can_be_repeated_selected_and_forgotten(model: HymbaForCausalLM) -> None:
    ids = prompt(rows=3)["input_ids"]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        fork = copy.deepcopy(cache)
        fork.batch_repeat_interleave(2)
        fork.batch_select_indices(torch.tensor([5, 0]))
        fork.reorder_cache(torch.tensor([1, 0]))
        step = ids[:, :1]
        forked = model(step[[0, 2]], past_key_values=fork).logits
        torch.testing.assert_close(forked, model(step, past_key_values=cache).logits[[0, 2]], **TOLERANCE)
        assert fork.get_seq_length() == cache.get_seq_length() == 10
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits, **TOLERANCE)


def test_each_layer_shows_its_keys_and_values(model: HymbaForCausalLM) -> None:
    inputs, shape = prompt(columns=12), model.config.core()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]  # the first row begins with four of padding
    with torch.no_grad():
        whole, chunked = HymbaCache(), HymbaCache()
        model(ids, attention_mask=mask, past_key_values=whole)
        model(ids[:, :7], attention_mask=mask[:, :7], past_key_values=chunked)
        model(ids[:, 7:], attention_mask=mask, past_key_values=chunked)
        alone = model(ids[:1, 4:], use_cache=True).past_key_values
    assert len(whole) == len(chunked) == shape.num_hidden_layers
    for i, (one, other, single) in enumerate(zip(whole.layers, chunked.layers, alone.layers, strict=True)):
        held = 12 if i in shape.global_layers else shape.sliding_window + 1
        assert one.get_seq_length() == 12
        assert one.keys.shape == (2, shape.num_key_value_heads, held, shape.head_dim)
        assert one.values.shape == (2, shape.num_key_value_heads, held, shape.v_head_dim)
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), **TOLERANCE)
            row = getattr(one, name)[:1, :, -8:]
            torch.testing.assert_close(row, getattr(single, name), **TOLERANCE)
            assert torch.equal(getattr(one, name), getattr(whole.layers[shape.owners[i]], name))
    whole.reset()
    assert whole.layers[0].keys is None
    assert not whole.is_initialized


def test_a_cache_filled_while_gradients_are_recorded(build: Callable[..., HymbaForCausalLM]) -> None:
    model, inputs = build().eval(), prompt()
    gradients = []
    for use_cache in (None, False):
        model.zero_grad()
        output = model(**inputs, labels=inputs["input_ids"], use_cache=use_cache)
        output.loss.backward()
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
        if use_cache is None:
            cache = output.past_key_values
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert cache.get_seq_length() == 9
    fork = copy.deepcopy(cache)
    longer = torch.cat((inputs["input_ids"], inputs["input_ids"][:, :2]), dim=1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    whole = run(model, {"input_ids": longer, "attention_mask": mask})
    for past in (cache, fork):
        continued = run(model, {"input_ids": longer, "attention_mask": mask}, past_key_values=past)
        assert torch.equal(continued, whole)
    assert model.train()(**inputs).past_key_values is None


@pytest.mark.parametrize("meta", [0, 3])
def test_padding_on_the_left_changes_no_column(build: Callable[..., HymbaForCausalLM], meta: int) -> None:
    model, inputs = build(num_memory_tokens=meta).eval(), prompt(columns=5)
    inputs["attention_mask"] = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    padded = {name: torch.nn.functional.pad(x, (6, 0)) for name, x in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits[:, 6:], model(**inputs).logits, **TOLERANCE)


def test_the_released_config_still_generates_with_a_cache(model: HymbaForCausalLM) -> None:
    config = copy.deepcopy(model.config)
    config.use_cache = False
    quiet = HymbaForCausalLM(config).eval()
    assert quiet.generation_config.use_cache
    with torch.no_grad():
        assert quiet(prompt()["input_ids"]).past_key_values is None
        assert quiet(prompt()["input_ids"], use_cache=True).past_key_values is not None


def test_what_a_recurrent_cache_cannot_do(model: HymbaForCausalLM) -> None:
    with torch.no_grad():
        cache = model(prompt()["input_ids"], use_cache=True).past_key_values
    with pytest.raises(HymbaError, match="cropped"):
        cache.crop(1)
    with pytest.raises(ValueError, match="stateful"):
        run(model, prompt(rows=1), prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="QuantizedCache"):
        run(model, prompt(), cache_implementation="quantized")
    foreign = DynamicCache()
    foreign.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    with pytest.raises(HymbaError, match="DynamicCache"), torch.no_grad():
        model(prompt()["input_ids"], past_key_values=foreign)


def test_a_static_cache_repeats_a_recorded_step(model: HymbaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, forward = [], Hymba.forward
    monkeypatch.setattr(Hymba, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    dynamic = run(model, prompt(), cache_implementation="dynamic")
    assert len(calls) == NEW
    assert torch.equal(run(model, prompt(), cache_implementation="static"), dynamic)
    recorded = native.library() is not None  # then the prompt, and one step
    assert len(calls) == NEW + (2 if recorded else NEW)


def test_a_static_cache_serves_beams(model: HymbaForCausalLM) -> None:
    static, dynamic = (run(model, prompt(), num_beams=3, cache_implementation=kind) for kind in ("static", "dynamic"))
    assert torch.equal(static, dynamic)
