"""A conversation runs only what is new, and what its cache holds is the conversation."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sentencepiece
import torch
from checkpoint import STORY
from micro import micro_model
from transformers import PreTrainedTokenizerBase

from hymba.errors import HymbaError
from hymba.inference import Conversation, SamplingParams, generate
from hymba.inference.step import DecodeStep
from hymba.model import Hymba
from hymba.text import STOP_STRINGS, load_tokenizer

HEARD = (
    "<extra_id_0>System\nBe brief.\n\n<extra_id_1>User\nWho is there?\n<extra_id_1>Assistant\n{}"
    "<extra_id_1>User\nWhy?\n<extra_id_1>Assistant\n"
)


@dataclass
class Puppet:
    """A model that says what it is told to, and notes every token that it runs."""

    model: Hymba
    tokenizer: PreTrainedTokenizerBase
    run: list[int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        forward = self.model.forward

        def note(tokens: torch.Tensor, **rest: object) -> object:
            self.run += tokens[0].tolist()
            return forward(tokens, **rest)

        def speak(hidden: torch.Tensor) -> torch.Tensor:
            return torch.eye(len(self.tokenizer))[self.lines.pop(0)].expand(*hidden.shape[:-1], -1)

        self.model.forward, self.model.logits = note, speak

    def say(self, text: str) -> None:
        self.lines = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def converse(self, tokens: int = 60) -> Conversation:
        params = SamplingParams(tokens, temperature=0, stop=STOP_STRINGS)
        return Conversation(self.model, self.tokenizer, params, system="Be brief.")

    @property
    def heard(self) -> str:
        return str(self.tokenizer.decode(self.run))


def train_sentencepiece(directory: Path) -> Path:
    """Train a tokenizer with LLaMA-2's settings, which puts a space before every text."""
    story = directory / "story.txt"
    story.write_text(STORY, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(story),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return directory


@pytest.fixture(autouse=True)
def unrecorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A puppet speaks in Python, which a recording would leave out."""
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, tokens: self._run(tokens[:, None], None))


@pytest.fixture(params=["byte-level", "SentencePiece"])
def puppet(request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path) -> Puppet:
    home = checkpoint if request.param == "byte-level" else train_sentencepiece(tmp_path)
    tokenizer = load_tokenizer(home)
    return Puppet(micro_model(vocab_size=len(tokenizer)).requires_grad_(False), tokenizer)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("No one.\n<extra_id_1>", "No one.\n"),
        ("No one.\n<extra_id_1>User\nAnd", "No one.\n"),
        ("No one.</s>", "No one.\n"),
        ("No one.\n</s>", "No one.\n"),
        ("No one.<extra_id_1>", "No one."),
        ("No one.\n\n<extra_id_1>", "No one.\n\n"),
        ("</s>", "\n"),
    ],
)
def test_a_turn_runs_only_what_is_new(puppet: Puppet, said: str, kept: str) -> None:
    conversation = puppet.converse()
    puppet.say(said)
    assert "".join(conversation.ask("Who is there?")).strip() == kept.strip()
    puppet.say("Because.")
    next(iter(conversation.ask(" Why? ")))
    # SentencePiece opens what it is told to say with a space.
    assert puppet.heard.replace("Assistant\n ", "Assistant\n") == HEARD.format(kept)


def test_an_interrupted_answer_is_closed(puppet: Puppet) -> None:
    conversation = puppet.converse()
    puppet.say("Nobody was there")
    answer = conversation.ask("Who is there?")
    pieces = iter(answer)
    while "Nobody" not in answer.text:
        next(pieces)
    puppet.say("Because.")
    next(iter(conversation.ask("Why?")))
    assert puppet.heard.replace("Assistant\n ", "Assistant\n") == HEARD.format(f"{answer.text.strip()}\n")


def test_an_answer_cut_at_its_length_is_closed(puppet: Puppet) -> None:
    conversation = puppet.converse(tokens=4)
    puppet.say("Nobody was there at all, said the keeper")
    said = "".join(conversation.ask("Who is there?"))
    puppet.say("Because.")
    next(iter(conversation.ask("Why?")))
    assert puppet.heard.replace("Assistant\n ", "Assistant\n") == HEARD.format(f"{said.strip()}\n")


def test_a_refused_question_changes_nothing(puppet: Puppet) -> None:
    conversation = puppet.converse()
    puppet.say("No one.\n<extra_id_1>")
    list(conversation.ask("Who is there?"))
    with pytest.raises(HymbaError, match="the question is empty"):
        conversation.ask(" \n")
    with pytest.raises(HymbaError, match="the limit is 2048"):
        conversation.ask("why " * 2048)
    puppet.say("Because.")
    next(iter(conversation.ask("Why?")))
    assert puppet.heard.replace("Assistant\n ", "Assistant\n") == HEARD.format("No one.\n")


def test_a_template_that_rewrites_the_past_is_run_anew(puppet: Puppet) -> None:
    puppet.tokenizer.chat_template = "{{ messages | length }}: {{ messages[-1].content }}\n"
    conversation = puppet.converse()
    puppet.say("No one.</s>")
    list(conversation.ask("Who is there?"))
    before = len(puppet.run)
    puppet.say("Because.")
    next(iter(conversation.ask("Why?")))
    assert puppet.tokenizer.decode(puppet.run[before:]).strip() == "4: Why?"


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_penalties_see_the_turns_before(checkpoint: Path, finish: str) -> None:
    tokenizer = load_tokenizer(checkpoint)
    model = micro_model(vocab_size=len(tokenizer), eos_token_id=None).requires_grad_(False)
    params = SamplingParams(12, seed=4, repetition_penalty=2.5, frequency_penalty=0.3)
    conversation = Conversation(model, tokenizer, params)
    first = conversation.ask("Who is there?")
    for _ in first:
        if finish == "stop" and len(first.tokens) == 5:  # interrupted
            break
    second = conversation.ask("Why?")
    tokens = list(generate(model, conversation._read, params))
    "".join(second)
    assert second.tokens == tokens


def test_a_cache_that_an_interrupted_step_changed_is_not_used(puppet: Puppet) -> None:
    conversation = puppet.converse()
    puppet.say("No one.\n<extra_id_1>")
    list(conversation.ask("Who is there?"))
    assert conversation._cache is not None
    conversation._cache.lengths += 1
    puppet.run.clear()
    puppet.say("Because.")
    next(iter(conversation.ask("Why?")))
    assert "Be brief." in puppet.heard


def test_the_meta_tokens_run_once_a_conversation(puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, original = [], puppet.model.run_meta_tokens
    monkeypatch.setattr(puppet.model, "run_meta_tokens", lambda *given: runs.append(1) or original(*given))
    conversation = puppet.converse()
    for _ in range(3):
        puppet.say("Me.</s>")
        list(conversation.ask("Who is there?"))
        conversation._cache = None  # a turn that cannot continue the cache starts another one
    assert len(runs) == 1
