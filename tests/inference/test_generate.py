"""The plain loop: equal to recomputing everything, with clear ends and refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro import micro_model
from safetensors.torch import load_file

from hymba.errors import HymbaError
from hymba.inference import Continuation, SamplingParams, encode_prompt, generate, load_model
from hymba.inference.prefill import PREFILL_CHUNK
from hymba.model import Hymba, load

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
PROMPT = [1, 5, 44, 30, 9, 17, 2, 60, 33, 21]
TINY_A = Path(__file__).parent.parent / "fixtures" / "tiny_a"


@pytest.fixture(scope="module")
def model() -> Hymba:
    return micro_model(eos_token_id=None).requires_grad_(False)


def recompute(model: Hymba, tokens: list[int], count: int) -> list[int]:
    """Greedy decoding that runs the whole text anew for each token."""
    text = list(tokens)
    for _ in range(count):
        text.append(int(model.logits(model(torch.tensor([text])).hidden[0, -1]).argmax()))
    return text[-count:]


def test_equals_full_recompute(model: Hymba) -> None:
    assert list(generate(model, PROMPT, GREEDY)) == recompute(model, PROMPT, 12)


@pytest.mark.parametrize("prompt", ["greedy_P5", "greedy_P20"])
def test_equals_the_official_greedy_text(prompt: str) -> None:
    expected = load_file(TINY_A / "expected.safetensors")
    tokens = expected[f"{prompt}.tokens"][0].tolist()
    params = SamplingParams(max_new_tokens=len(tokens), temperature=0)
    made = list(generate(load(TINY_A, torch.float32), expected[f"{prompt}.prompt"][0], params))
    assert made == tokens[: len(made)]
    assert len(made) == len(tokens) or made[-1] == 2


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_filled_cache_is_continued(model: Hymba, cut: int) -> None:
    cache = model.allocate_cache(rows=1, max_length=cut)
    with torch.no_grad():
        model(torch.tensor([PROMPT[:cut]]), cache=cache)
    assert list(generate(model, PROMPT[cut:], GREEDY, cache)) == recompute(model, PROMPT, 12)
    assert int(cache.lengths) == len(PROMPT) + 12 - 1


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(12, seed=3)])
def test_penalties_see_what_the_cache_holds(model: Hymba, params: SamplingParams) -> None:
    params = replace(params, repetition_penalty=3.0, presence_penalty=0.5, frequency_penalty=0.2)
    whole = list(generate(model, PROMPT, params))
    for held in (PROMPT[:6], torch.tensor(PROMPT[:6])):
        cache = model.allocate_cache(rows=1, max_length=6)
        with torch.no_grad():
            model(torch.tensor([PROMPT[:6]]), cache=cache)
        assert list(generate(model, PROMPT[6:], params, cache, held=held)) == whole
    assert whole != list(generate(model, PROMPT[6:], params))


def test_ids_of_a_filled_cache_are_asked_for_and_checked(model: Hymba) -> None:
    cache, penalized = model.allocate_cache(rows=1, max_length=3), replace(GREEDY, repetition_penalty=1.1)
    with torch.no_grad():
        model(torch.tensor([PROMPT[:3]]), cache=cache)
    with pytest.raises(HymbaError, match="the ids of 3 tokens in the cache are unknown: pass them as `held`"):
        generate(model, PROMPT[3:], penalized, cache)
    for params in (GREEDY, penalized):
        with pytest.raises(HymbaError, match="`held` has 2 ids, but the cache holds 3 tokens"):
            generate(model, PROMPT[3:], params, cache, held=PROMPT[:2])
    with pytest.raises(HymbaError, match="`held` has 2 ids, but the cache holds 0 tokens"):
        generate(model, PROMPT, penalized, held=[1, 2])
    with pytest.raises(HymbaError, match="`held` contains token -1"):
        generate(model, PROMPT[3:], penalized, cache, held=[1, 2, -1])
    list(generate(model, PROMPT[3:], replace(GREEDY, presence_penalty=1.0), cache))  # counts new tokens only


def test_a_prompt_of_several_chunks(model: Hymba) -> None:
    prompt = torch.randint(60, (PREFILL_CHUNK + 37,), generator=torch.Generator().manual_seed(0))
    assert list(generate(model, prompt, replace(GREEDY, max_new_tokens=3))) == recompute(model, prompt.tolist(), 3)


def test_a_seed_decides_the_text(model: Hymba) -> None:
    texts = [list(generate(model, PROMPT, SamplingParams(20, seed=seed))) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_gradients_stay_on_for_the_caller(model: Hymba) -> None:
    for _ in generate(model, PROMPT, GREEDY):
        assert torch.is_grad_enabled()


def test_stops_at_stop_ids_and_end_of_text(model: Hymba) -> None:
    made = list(generate(model, PROMPT, GREEDY))
    end = made.index(made[4]) + 1
    assert list(generate(model, PROMPT, replace(GREEDY, stop_ids=(made[4],)))) == made[:end]
    ended = micro_model(eos_token_id=made[4])
    assert list(generate(ended, PROMPT, GREEDY)) == made[:end]


def test_stops_where_the_positions_end() -> None:
    short = micro_model(eos_token_id=None, max_position_embeddings=12, orig_max_position_embeddings=12)
    assert list(generate(short, PROMPT, GREEDY)) == recompute(short, PROMPT, 3)
    assert len(list(generate(short, [*PROMPT, 3, 4], GREEDY))) == 1


def test_refusals_come_at_the_call(model: Hymba) -> None:
    with pytest.raises(HymbaError, match="the prompt is empty"):
        generate(model, [], GREEDY)
    with pytest.raises(HymbaError, match="the prompt has 10 tokens and the limit is 9"):
        generate(model, PROMPT, GREEDY, max_prompt_tokens=9)
    with pytest.raises(HymbaError, match="the prompt has 2049 tokens and the limit is 2048"):
        generate(model, [3] * 2049, GREEDY, max_prompt_tokens=10**6)
    with pytest.raises(HymbaError, match="the cache holds 2"):
        generate(model, PROMPT, GREEDY, model.allocate_cache(rows=2, max_length=4))


def test_continuation_is_the_decoded_text(checkpoint: Path) -> None:
    model, tokenizer = load_model(str(checkpoint))
    ids = encode_prompt(tokenizer, "The keeper")
    assert ids[0] == tokenizer.bos_token_id
    continuation = Continuation(model, tokenizer, ids, SamplingParams(40, seed=1))
    pieces = list(continuation)
    assert "".join(pieces) == continuation.text == tokenizer.decode(continuation.tokens, skip_special_tokens=True)
    assert len(continuation.tokens) == 40
    assert continuation.finish == "length"


def test_continuation_is_cut_at_a_stop_string(checkpoint: Path) -> None:
    model, tokenizer = load_model(str(checkpoint))
    ids, params = encode_prompt(tokenizer, "The keeper"), SamplingParams(60, seed=1)
    whole = Continuation(model, tokenizer, ids, params)
    text = "".join(whole)
    stop = text[20:23]
    cut = Continuation(model, tokenizer, ids, replace(params, stop=(stop,)))
    assert "".join(cut) == text[: text.index(stop)]
    assert cut.finish == "stop"
    assert len(cut.tokens) < len(whole.tokens)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_prompt_is_refused(checkpoint: Path, text: str) -> None:
    with pytest.raises(HymbaError, match="the prompt is empty"):
        encode_prompt(load_model(str(checkpoint))[1], text)
