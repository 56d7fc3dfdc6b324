"""The engine while requests arrive, are cancelled and end at random: each text is what the plain loop makes of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from checkpoint import write_checkpoint
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from micro import micro_model

from hymba.inference import Continuation, Engine, EngineOptions, SamplingParams, Sequence, Update, engine, scheduler
from hymba.text import load_tokenizer

LONGEST = 112
with TemporaryDirectory() as directory:
    TOKENIZER = load_tokenizer(write_checkpoint(Path(directory) / "micro"))
# In float64 no rounding decides a draw; some texts end by themselves, others in a loop, which drafts foresee.
MODEL = micro_model(1, torch.float64, vocab_size=len(TOKENIZER), max_position_embeddings=LONGEST).requires_grad_(False)

IDS = st.integers(3, len(TOKENIZER) - 1)
DOCUMENTS = [
    torch.randint(3, len(TOKENIZER), (75,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in (1, 2)
]
TAILS = st.lists(IDS, max_size=4) | st.builds(
    lambda ids, count: ids * count, st.lists(IDS, min_size=1, max_size=4), st.integers(2, 6)
)
PROMPTS = st.builds(
    lambda document, cut, tail: [1, *document[:cut], *tail],
    st.sampled_from(DOCUMENTS),
    st.sampled_from([0, 0, 5, 31, 40, 64, 75]),
    TAILS,
)
# A text of three tokens only repeats itself all the time, and goes on differently as often: drafts right and wrong.
FEW = ((40, 100.0), (41, 100.0), (43, 100.0))
GREEDY = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 18),
    temperature=st.just(0.0),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.3]),
    stop=st.sampled_from([(), (), ("e", "th"), ("\ufffd" * 3,)]),
    logprobs=st.just(0),
)
SAMPLED = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 18),
    min_new_tokens=st.integers(0, 1),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([None, 1, 20]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    logit_bias=st.sampled_from([FEW, FEW, ()]),
    seed=st.integers(0, 3),
    stop=st.sampled_from([(), ("e", "t", " s"), ("\ufffd\ufffd",)]),
    stop_ids=st.sampled_from([(), tuple(range(3, 290, 13))]),
    ignore_eos=st.booleans(),
    logprobs=st.just(0),
    prompt_logprobs=st.sampled_from([None, None, 0]),
)
OPTIONS = {
    "all": {"max_rows": 3, "prefix_cache_bytes": 1 << 24},
    "small": {"max_rows": 2, "prefix_cache_bytes": 1 << 19, "prefill_tokens": 5},
    "one row": {"max_rows": 1, "prefix_cache_bytes": 1 << 24, "prefill_tokens": 11},
    "plain": {"max_rows": 4, "prefix_cache_bytes": 0, "speculate": False, "prefill_tokens": 16},
}


@dataclass(frozen=True)
class Alone:
    """What the plain loop makes of a prompt."""

    tokens: list[int]
    text: str
    finish: str | None


@lru_cache(None)
def alone(prompt: tuple[int, ...], params: SamplingParams) -> Alone:
    made = Continuation(MODEL, TOKENIZER, prompt, params)
    text = "".join(made)
    return Alone(made.tokens, text, made.finish)


@lru_cache(None)
@torch.no_grad()
def logprobs(ids: tuple[int, ...]) -> list[float]:
    """The log-probability of each of `ids` but the first, from one call without a cache."""
    scores = MODEL.logits(MODEL(torch.tensor([ids])).hidden[0, :-1]).log_softmax(dim=-1)
    found: list[float] = scores.gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()
    return found


@dataclass(eq=False)
class Request:
    sequence: Sequence
    updates: list[Update] = field(default_factory=list)
    cancelled: bool = False

    @property
    def open(self) -> bool:
        return not self.updates or self.updates[-1].finish is None

    def check(self) -> None:
        """What was reported is what was kept; what was kept is what it would be alone, or its beginning."""
        sequence, last = self.sequence, self.updates[-1]
        assert [token for update in self.updates for token in update.tokens] == sequence.tokens
        assert "".join(update.text for update in self.updates) == sequence.text
        assert [update.finish for update in self.updates[:-1]] == [None] * (len(self.updates) - 1)
        assert last.finish == sequence.finish
        reported = [entry for update in self.updates for entry in (*update.prompt_logprobs, *update.logprobs) if entry]
        if sequence.tokens:
            wanted = logprobs(tuple(sequence.ids))[-len(reported) :]
            assert [entry.token for entry in reported] == sequence.ids[-len(reported) :]
            assert [entry.logprob for entry in reported] == pytest.approx(wanted, abs=1e-9)
        assert not sequence.tokens or len(reported) >= len(sequence.tokens)
        whole = alone(tuple(sequence.prompt), sequence.params)
        if last.finish == "cancelled":
            assert self.cancelled
            assert sequence.tokens == whole.tokens[: len(sequence.tokens)]
            assert whole.text.startswith(sequence.text)
        else:
            assert (sequence.tokens, sequence.text, last.finish) == (whole.tokens, whole.text, whole.finish)


class EngineMachine(RuleBasedStateMachine):
    options: EngineOptions
    seen: Counter[str]  # over all runs: that what is tested did happen

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(MODEL, TOKENIZER, self.options)
        self.requests: list[Request] = []

    @property
    def open(self) -> list[Request]:
        return [request for request in self.requests if request.open]

    def ask(self, prompt: list[int], params: SamplingParams) -> None:
        request = Request(Sequence(prompt, params))
        request.sequence.listener = request.updates.append
        self.engine.submit(request.sequence)
        self.requests.append(request)

    @rule(prompt=PROMPTS, params=GREEDY | SAMPLED)
    def submit(self, prompt: list[int], params: SamplingParams) -> None:
        self.ask(prompt, params)

    @rule(prompts=st.lists(PROMPTS, min_size=2, max_size=4), params=GREEDY | SAMPLED)
    def submit_several(self, prompts: list[list[int]], params: SamplingParams) -> None:
        for prompt in prompts:
            self.ask(prompt, params)

    @precondition(lambda self: any(not request.open for request in self.requests))
    @rule(which=st.integers(0, 99), tail=TAILS, params=GREEDY | SAMPLED)
    def submit_next_turn(self, which: int, tail: list[int], params: SamplingParams) -> None:
        """A prompt that goes on where an earlier text ended."""
        ended = [request for request in self.requests if not request.open]
        self.ask([*ended[which % len(ended)].sequence.ids, *tail][:LONGEST], params)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        request = self.open[which % len(self.open)]
        request.cancelled = True
        self.engine.cancel(request.sequence)

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        for _ in range(count):
            before = self.open
            self.engine.step()
            ended = [request for request in before if not request.open]
            for request in ended:
                request.check()
                assert request.sequence.row is None
            # No one waits for a row that nobody has: all were taken by those that run or ended in this step.
            rows = sum(request.updates[-1].finish != "cancelled" for request in ended)
            rows += sum(request.sequence.row is not None for request in self.open)
            assert rows == self.options.max_rows or not self.engine.stats().waiting

    @invariant()
    def rows_are_those_of_the_texts_that_run(self) -> None:
        rows = [request.sequence.row for request in self.open if request.sequence.row is not None]
        stats = self.engine.stats()
        assert len(rows) == len(set(rows)) == stats.running
        assert all(0 <= row < self.options.max_rows for row in rows)
        assert stats.running + stats.waiting == len(self.open)

    def teardown(self) -> None:
        for _ in range(60 * (1 + len(self.requests))):
            if not self.engine.step():
                break
        assert not self.open
        for request in self.requests:
            request.check()
            assert request.sequence.row is None
        stats = self.engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.new_tokens == sum(len(request.sequence.tokens) for request in self.requests)
        assert stats.finished == Counter(request.sequence.finish for request in self.requests)
        self.seen.update(stats.finished, requests=len(self.requests), hits=stats.prefix_hits)
        self.seen.update(accepted=stats.accepted_tokens, refused=stats.drafted_tokens - stats.accepted_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_each_text_is_what_it_is_alone_whatever_happens_around_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock decides nothing, so that a run can be repeated: there are drafts wherever there can be one.
    monkeypatch.setattr(scheduler.Pace, "stepped", lambda pace, seconds, checked: None)
    monkeypatch.setattr(scheduler.Pace, "price", 1.0)
    monkeypatch.setattr(engine, "_ROWS_WITH_DRAFTS", 3)
    machine = type("Machine", (EngineMachine,), {"options": EngineOptions(**OPTIONS[name]), "seen": Counter()})
    kept = settings(max_examples=6, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow])
    run_state_machine_as_test(machine, settings=kept)
    wanted = {"requests", "stop", "length", "cancelled"}
    wanted |= {"accepted", "refused"} if machine.options.speculate else set()
    wanted |= {"hits"} if machine.options.prefix_cache_bytes else set()
    assert min(machine.seen[kind] for kind in wanted) > 0, machine.seen
