"""The engine: every text is what the plain loop makes of it alone, whatever runs beside it."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from micro import micro_model
from transformers import PreTrainedTokenizerBase

from hymba.errors import HymbaError
from hymba.inference import Engine, EngineOptions, SamplingParams, Sequence, Update, generate
from hymba.inference.bounds import EngineDeadError, PromptTooLongError, QueueFullError
from hymba.model import Hymba
from hymba.text import load_tokenizer

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
PARAMS = [
    GREEDY,
    SamplingParams(9, seed=1),
    SamplingParams(14, temperature=0.7, top_k=20, top_p=0.9, seed=2),
    SamplingParams(10, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=3),
    SamplingParams(8, temperature=0, logit_bias=((5, 3.0), (7, -100.0))),
    SamplingParams(11, min_new_tokens=6, stop_ids=(4, 9, 30), temperature=1.3, seed=4),
]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> Hymba:
    wide = micro_model(vocab_size=len(tokenizer), dtype=torch.float64, max_position_embeddings=80)
    return wide.requires_grad_(False)


@pytest.fixture
def engine(model: Hymba, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Engine]:
    return lambda **options: Engine(model, tokenizer, EngineOptions(**({"max_rows": 3} | options)))


def random_prompts(count: int, longest: int = 25, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(60, (length,), generator=draw).tolist() for length in lengths]


def alone(model: Hymba, sequence: Sequence) -> list[int]:
    return list(generate(model, sequence.prompt, replace(sequence.params, logprobs=None)))


def run(engine: Engine, *sequences: Sequence) -> None:
    for sequence in sequences:
        engine.submit(sequence)
    while engine.step():
        pass


@pytest.mark.parametrize("options", [{}, {"prefill_tokens": 3}, {"prefix_cache_bytes": 0, "speculate": False}])
def test_texts_are_what_they_are_alone(model: Hymba, engine: Callable[..., Engine], options: dict[str, int]) -> None:
    sequences = [Sequence(prompt, PARAMS[i % len(PARAMS)]) for i, prompt in enumerate(random_prompts(14))]
    run(made := engine(**options), *sequences)
    assert [s.tokens for s in sequences] == [alone(model, s) for s in sequences]
    assert {s.finish for s in sequences} <= {"stop", "length"}
    stats = made.stats()
    assert (stats.running, stats.waiting, sum(stats.finished.values())) == (0, 0, 14)
    assert stats.new_tokens == sum(len(s.tokens) for s in sequences)


def test_updates_add_up_to_the_text(engine: Callable[..., Engine]) -> None:
    updates: list[Update] = []
    sequence = Sequence([5, 9, 11], SamplingParams(20, seed=3), updates.append)
    run(engine(), sequence)
    assert [token for update in updates for token in update.tokens] == sequence.tokens
    assert "".join(update.text for update in updates) == sequence.text
    assert [update.finish for update in updates] == [None] * (len(updates) - 1) + [sequence.finish]
    assert sequence.arrived <= sequence.first_token_at <= sequence.finished_at


def test_a_prompt_seen_before_is_not_read_again(model: Hymba, engine: Callable[..., Engine]) -> None:
    prompt = random_prompts(1, seed=4)[0] * 40
    prompt = prompt[:50]
    made = engine()
    first = Sequence(prompt, PARAMS[1])
    again = Sequence(prompt, PARAMS[2])
    run(made, first)
    run(made, again)
    longer = Sequence([*first.prompt, *first.tokens, 7, 8, 9], GREEDY)
    run(made, longer)
    assert [s.cached_tokens for s in (first, again, longer)] == [0, 50, 50 + len(first.tokens) - 1]
    assert [s.tokens for s in (first, again, longer)] == [alone(model, s) for s in (first, again, longer)]
    assert made.stats().prefix_hits == 2


def test_a_common_beginning_is_kept_where_prompts_part(model: Hymba, engine: Callable[..., Engine]) -> None:
    common, made = random_prompts(1, seed=5)[0] * 40, engine()
    sequences = [Sequence([*common[:45], end, end + 1], GREEDY) for end in (3, 9, 20)]
    for sequence in sequences:
        run(made, sequence)
    assert [s.cached_tokens for s in sequences] == [0, 0, 45]
    assert [s.tokens for s in sequences] == [alone(model, s) for s in sequences]


def test_the_prefix_cache_stays_within_its_bytes(engine: Callable[..., Engine]) -> None:
    made = engine(prefix_cache_bytes=200_000)
    for prompt in random_prompts(12, seed=6):
        run(made, Sequence((prompt * 40)[:40], GREEDY))
        assert made.stats().prefix_bytes <= 200_000
    assert made.stats().prefix_entries > 1


def test_drafts_change_nothing_but_the_number_of_steps(model: Hymba, engine: Callable[..., Engine]) -> None:
    again, steps = [3, 14, 15, 9, 26, 5, 35, 8] * 4, []
    bias = tuple((token, 4.0) for token in set(again))
    for speculate in (True, False):
        made = engine(speculate=speculate)
        sequences = [
            Sequence(again, SamplingParams(30, temperature=0, logit_bias=bias)),
            Sequence(again[3:], SamplingParams(30, seed=1, repetition_penalty=0.6)),
        ]
        for sequence in sequences:
            run(made, sequence)
        assert [s.tokens for s in sequences] == [alone(model, s) for s in sequences]
        steps.append(made.stats().steps)
        assert (made.stats().accepted_tokens > 0) == speculate
    assert steps[0] < steps[1]


def test_logprobs_are_the_models_own(model: Hymba, engine: Callable[..., Engine]) -> None:
    updates: list[Update] = []
    params = replace(PARAMS[2], logprobs=3, prompt_logprobs=2)
    sequence = Sequence([5, 9, 11, 40], params, updates.append)
    run(engine(prefill_tokens=3), sequence)
    logits = model.logits(model(torch.tensor([sequence.ids])).hidden[0])
    wanted = logits.log_softmax(-1)
    found = [logprob for update in updates for logprob in update.logprobs]
    prompt = updates[0].prompt_logprobs
    assert prompt[0] is None
    assert [x.token for x in (*prompt[1:], *found)] == sequence.ids[1:]
    for i, x in enumerate((*prompt[1:], *found)):
        assert x.logprob == pytest.approx(float(wanted[i, x.token]), abs=1e-8)
        assert [p for _, p in x.top] == pytest.approx(wanted[i].topk(2 if i < 3 else 3).values.tolist(), abs=1e-8)
    assert sequence.tokens == alone(model, sequence)


def test_cancelling_frees_the_row_at_the_next_step(model: Hymba, engine: Callable[..., Engine]) -> None:
    made = engine(max_rows=2)
    sequences = [Sequence(prompt, replace(GREEDY, max_new_tokens=30)) for prompt in random_prompts(3, seed=8)]
    for sequence in sequences:
        made.submit(sequence)
    for _ in range(4):
        made.step()
    made.cancel(sequences[0])
    made.step()
    assert sequences[0].finish == "cancelled"
    assert made.stats().waiting == 0
    made.cancel(sequences[0])
    while made.step():
        pass
    assert sequences[0].tokens == alone(model, sequences[0])[: len(sequences[0].tokens)]
    assert [s.tokens for s in sequences[1:]] == [alone(model, s) for s in sequences[1:]]


def test_what_cannot_run_is_refused(engine: Callable[..., Engine]) -> None:
    made = engine(max_length=20, max_waiting=2)
    with pytest.raises(HymbaError, match="the prompt is empty"):
        made.submit(Sequence([], GREEDY))
    with pytest.raises(PromptTooLongError, match="the prompt has 21 tokens and the limit is 20"):
        made.submit(Sequence([1] * 21, GREEDY))
    with pytest.raises(HymbaError, match="the prompt holds token 9999, but the model has tokens 0 to"):
        made.submit(Sequence([9999], GREEDY))
    made.submit(Sequence([1], GREEDY))
    made.submit(Sequence([1], GREEDY))
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        made.submit(Sequence([1], GREEDY))


def test_a_row_is_filled_to_its_last_position(model: Hymba, engine: Callable[..., Engine]) -> None:
    sequence = Sequence(random_prompts(1, seed=9)[0][:10], replace(GREEDY, max_new_tokens=500, ignore_eos=True))
    made = engine(max_length=20)
    run(made, sequence)
    assert (len(sequence.ids), sequence.finish) == (21, "length")
    assert sequence.tokens == alone(model, sequence)[: len(sequence.tokens)]


def test_an_error_ends_its_own_text_only(model: Hymba, engine: Callable[..., Engine]) -> None:
    forbidden = SamplingParams(5, logit_bias=tuple((i, -float("inf")) for i in range(model.config.vocab_size)))
    bad, good = Sequence([1, 2], forbidden), Sequence([3, 4], GREEDY)
    run(engine(), bad, good)
    assert (bad.finish, good.finish) == ("error", "length")
    assert bad.error == "no token may follow: the constraint or the bias forbids them all"
    assert good.tokens == alone(model, good)


def test_the_thread_serves_and_drains(model: Hymba, engine: Callable[..., Engine]) -> None:
    made, ended = engine(), Event()
    made.start()
    sequence = Sequence([5, 6], GREEDY, lambda update: ended.set() if update.finish else None)
    made.submit(sequence)
    assert ended.wait(60)
    last = Sequence([7, 8], GREEDY)
    made.submit(last)
    made.stop()
    assert [sequence.tokens, last.tokens] == [alone(model, sequence), alone(model, last)]
    with pytest.raises(EngineDeadError, match="it is shutting down"):
        made.submit(Sequence([1], GREEDY))


def test_stopping_cancels_what_takes_too_long(engine: Callable[..., Engine]) -> None:
    made = engine()
    sequence = Sequence([5, 6], replace(GREEDY, max_new_tokens=70))
    made.submit(sequence)
    made.start()
    made.stop(timeout=0)
    assert sequence.finish == "cancelled"


def test_a_dead_engine_says_why(engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine()
    monkeypatch.setattr(made._runner, "prefill", lambda *_, **__: 1 / 0)
    sequence = Sequence([5, 6], GREEDY)
    made.submit(sequence)
    made.start()
    made._thread.join(60)
    assert made.dead == "ZeroDivisionError: division by zero"
    assert (sequence.finish, sequence.error) == ("error", f"the engine has stopped: {made.dead}")
    with pytest.raises(EngineDeadError, match="division by zero"):
        made.submit(Sequence([1], GREEDY))


def test_a_listener_that_fails_ends_its_own_text_only(model: Hymba, engine: Callable[..., Engine]) -> None:
    bad, good = Sequence([1, 2], GREEDY, lambda update: 1 / 0), Sequence([3, 4], GREEDY)
    run(engine(), bad, good)
    assert bad.finish == "cancelled"
    assert good.tokens == alone(model, good)


def test_an_idle_engine_waits(engine: Callable[..., Engine]) -> None:
    made = engine()
    made.start()
    before = time.thread_time()
    steps = made.stats().steps
    Event().wait(0.2)
    assert made.stats().steps <= steps + 1
    assert time.thread_time() >= before
    made.stop()
