"""Constrained texts in the engine: what was asked for, beside others that notice nothing of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from jsonschema import Draft202012Validator

from hymba.inference import Continuation, Engine, EngineOptions, SamplingParams, Sequence, encode_prompt, load_model
from hymba.inference.constraint import Constraint

MODEL, TOKENIZER = load_model("tiny", "float32", "cpu")
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", None]}, "minItems": 1, "maxItems": 3},
        "home": {
            "type": "object",
            "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}},
            "required": ["code"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "colours", "home"],
    "additionalProperties": False,
}
PLAIN = SamplingParams(max_new_tokens=40, temperature=0)
SAMPLED = SamplingParams(max_new_tokens=200, temperature=1.0, top_k=50, seed=5)
PROMPTS = ["The keeper of the lighthouse", "It was a bright cold day", '{"name": "Anne"}\n\n', "Said the captain: "]


def run(engine: Engine, asked: list[tuple[str, SamplingParams]]) -> list[Sequence]:
    """Run every prompt at once, and to its end."""
    sequences = [Sequence(encode_prompt(TOKENIZER, prompt), params) for prompt, params in asked]
    for sequence in sequences:
        engine.submit(sequence)
    while engine.step():
        pass
    return sequences


def engine(**changes: object) -> Engine:
    options = EngineOptions(max_rows=4, max_length=400, prefix_cache_bytes=1 << 24)
    return Engine(MODEL, TOKENIZER, replace(options, **changes))


@pytest.mark.parametrize("speculate", [False, True])
def test_answers_follow_their_schema_greedy_and_sampled(speculate: bool) -> None:
    constraint = Constraint.json_schema(TOKENIZER, PERSON)
    kinds = [
        replace(PLAIN, max_new_tokens=200, constraint=constraint),
        replace(SAMPLED, constraint=constraint),
        replace(SAMPLED, constraint=constraint, temperature=1.5, top_k=None, repetition_penalty=1.2),
    ]
    for sequence in run(engine(speculate=speculate), [(prompt, kind) for prompt in PROMPTS[:2] for kind in kinds]):
        assert (sequence.finish, sequence.error) == ("stop", None)
        Draft202012Validator(PERSON).validate(json.loads(sequence.text))


def test_each_text_is_what_it_would_be_alone() -> None:
    object_, date = Constraint.json_object(TOKENIZER), Constraint.regex(TOKENIZER, r"\d{4}-\d{2}-\d{2}")
    kinds = [PLAIN, replace(SAMPLED, constraint=object_, max_new_tokens=30), replace(SAMPLED, max_new_tokens=30)]
    kinds += [replace(PLAIN, constraint=date), replace(PLAIN, presence_penalty=1.0, constraint=object_)]
    asked = [(prompt, kind) for prompt in PROMPTS[1:3] for kind in kinds]
    for (prompt, kind), sequence in zip(asked, run(engine(), asked), strict=True):
        alone = Continuation(MODEL, TOKENIZER, encode_prompt(TOKENIZER, prompt), kind)
        assert "".join(alone) == sequence.text
        assert (alone.tokens, alone.finish) == (sequence.tokens, sequence.finish)
        if kind.constraint is date:
            assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", sequence.text)


def test_neighbours_change_nothing() -> None:
    """Four rows at once, of which three are constrained, and the fourth is the text it is without them."""
    constraint = Constraint.json_schema(TOKENIZER, PERSON)
    others = [(prompt, replace(SAMPLED, constraint=constraint)) for prompt in PROMPTS[1:]]
    (alone,) = run(engine(), [(PROMPTS[0], PLAIN)])
    (beside, *_) = run(engine(), [(PROMPTS[0], PLAIN), *others])
    assert beside.tokens == alone.tokens


def test_an_answer_that_is_cut_short_is_a_beginning() -> None:
    constraint = Constraint.json_schema(TOKENIZER, PERSON)
    (whole, cut) = run(
        engine(), [(PROMPTS[0], replace(PLAIN, constraint=constraint, max_new_tokens=n)) for n in (200, 9)]
    )
    assert (whole.finish, cut.finish) == ("stop", "length")
    assert cut.tokens == whole.tokens[:9]


def test_what_nothing_can_follow_ends_with_an_error_beside_others() -> None:
    """A bias against every token that the grammar allows."""
    constraint = Constraint.regex(TOKENIZER, "abc")
    allowed = constraint.begin().mask(MODEL.config.vocab_size).nonzero()[:, 0].tolist()
    banned = tuple((token, float("-inf")) for token in allowed)
    impossible = replace(PLAIN, constraint=constraint, logit_bias=banned)
    failed, well = run(engine(), [(PROMPTS[0], impossible), (PROMPTS[0], PLAIN)])
    assert (failed.finish, failed.text) == ("error", "")
    assert failed.error is not None
    assert "no token may follow" in failed.error
    assert (well.finish, len(well.tokens)) == ("length", 40)


def test_min_new_tokens_yields_to_a_grammar_that_has_ended() -> None:
    params = replace(PLAIN, constraint=Constraint.regex(TOKENIZER, "yes|no"), min_new_tokens=30)
    (sequence,) = run(engine(), [(PROMPTS[0], params)])
    assert sequence.text in ("yes", "no")
    assert sequence.finish == "stop"
