"""Everything that the official client can ask for, through a real server with the bundled model."""

import json
import math

import openai
import pytest
from live import PATIENCE, LiveServer

QUESTION = [{"role": "user", "content": "Who is there?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
# The bundled model was never taught to call tools: a grammar has it write one.
CALL = r'<toolcall> \{"name": "get_weather", "arguments": \{"town": "[A-Z][a-z]{2,6}"\}\} </toolcall>'
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def ask(client: openai.OpenAI, **fields):
    defaults = {"model": "tiny", "messages": QUESTION, "max_tokens": 12, "seed": 3}
    return client.chat.completions.create(**defaults | fields)


def write(client: openai.OpenAI, **fields):
    return client.completions.create(**{"model": "tiny", "prompt": "The sea", "max_tokens": 12, "seed": 3} | fields)


def test_chat(client: openai.OpenAI) -> None:
    answer = ask(client)
    [choice] = answer.choices
    assert (answer.object, answer.model, choice.message.role) == ("chat.completion", "tiny", "assistant")
    assert choice.message.content.strip()
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_prompt_that_was_read_is_cached(client: openai.OpenAI) -> None:
    long = [{"role": "system", "content": "The keeper climbed the stairs each night. " * 12}, *QUESTION]
    first, second = ask(client, messages=long), ask(client, messages=long)
    assert second.usage.prompt_tokens_details.cached_tokens > 0.8 * second.usage.prompt_tokens
    assert first.choices == second.choices


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client)
    events = list(ask(client, stream=True, stream_options={"include_usage": True}))
    *pieces, last = events
    assert "".join(event.choices[0].delta.content or "" for event in pieces) == whole.choices[0].message.content
    assert [event.choices[0].delta.role for event in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert [event.choices[0].finish_reason for event in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert last.choices == []
    assert last.usage.completion_tokens == 12
    assert {event.id for event in events} == {last.id}
    assert all(event.usage is None for event in pieces)


def test_no_usage_unless_asked_for(client: openai.OpenAI) -> None:
    assert all(event.choices for event in ask(client, stream=True))


def test_completion_and_its_stream(client: openai.OpenAI) -> None:
    whole = write(client)
    assert (whole.object, whole.choices[0].finish_reason) == ("text_completion", "length")
    pieces = list(write(client, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text != ""
    assert pieces[-1].choices[0].finish_reason == "length"


def test_lists_of_prompts_and_tokens(client: openai.OpenAI, live: LiveServer) -> None:
    texts = ["The sea", "It was a cold morning"]
    ids = [live.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in texts]
    alone = [write(client, prompt=text, temperature=0).choices[0].text for text in texts]
    for prompt in (texts, ids):
        together = write(client, prompt=prompt, temperature=0)
        assert [choice.text for choice in together.choices] == alone
        assert [choice.index for choice in together.choices] == [0, 1]
        assert together.usage.prompt_tokens == sum(map(len, ids))
    assert write(client, prompt=ids[0], temperature=0).choices[0].text == alone[0]


def test_n_texts_have_seeds_of_their_own(client: openai.OpenAI) -> None:
    several = ask(client, n=3, seed=10)
    texts = [choice.message.content for choice in several.choices]
    assert texts == [ask(client, seed=seed).choices[0].message.content for seed in (10, 11, 12)]
    assert len(set(texts)) == 3
    assert several.usage.completion_tokens == 36
    assert several.usage.prompt_tokens == ask(client).usage.prompt_tokens
    streamed = ["", "", ""]
    for event in ask(client, n=3, seed=10, stream=True):
        streamed[event.choices[0].index] += event.choices[0].delta.content or ""
    assert streamed == texts


def test_stop_strings_are_cut_off(client: openai.OpenAI) -> None:
    text = write(client, temperature=0, max_tokens=30).choices[0].text
    words = text.split()
    stopped = write(client, temperature=0, max_tokens=30, stop=[words[3], "never said"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(words[3])]
    streamed = write(client, temperature=0, max_tokens=30, stop=words[3], stream=True)
    assert "".join(event.choices[0].text for event in streamed) == stopped.text


def test_bias_and_stop_ids(client: openai.OpenAI, live: LiveServer) -> None:
    *_, token = live.http.post("/tokenize", json={"prompt": "Where"}).json()["tokens"]
    text = live.http.post("/detokenize", json={"tokens": [token]}).json()["prompt"]
    biased = write(client, logit_bias={str(token): 100}, max_tokens=4)
    assert biased.choices[0].text == text * 4
    stopped = write(client, logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]})
    assert (stopped.choices[0].finish_reason, stopped.usage.completion_tokens) == ("stop", 1)
    later = {"stop_token_ids": [token], "min_tokens": 3}
    assert write(client, logit_bias={str(token): 100}, extra_body=later).usage.completion_tokens == 4


def test_penalties_and_cuts_change_the_text(client: openai.OpenAI) -> None:
    plain = write(client, temperature=0, max_tokens=40).choices[0].text
    for fields in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 2.0}}):
        assert write(client, temperature=0, max_tokens=40, **fields).choices[0].text != plain
    for cut in ({"top_k": 1}, {"min_p": 1.0}):
        assert write(client, max_tokens=40, extra_body=cut).choices[0].text == plain
    assert write(client, max_tokens=40, top_p=1e-9).choices[0].text == plain


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=3, temperature=0).choices[0]
    content = choice.logprobs.content
    assert len(content) == 12
    assert b"".join(bytes(token.bytes) for token in content).decode() == choice.message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1
    streamed = ask(client, logprobs=True, top_logprobs=3, temperature=0, stream=True)
    told = [event.choices[0].logprobs for event in streamed]
    assert [token for logprobs in told if logprobs for token in logprobs.content] == content
    assert ask(client).choices[0].logprobs is None


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    choice = write(client, logprobs=2, temperature=0).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(12)]
    assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs
    assert {len(top) for top in found.top_logprobs} == {2}


def test_a_prompt_is_scored_by_echo(client: openai.OpenAI) -> None:
    """What generating says of its tokens, scoring says of the same tokens in a prompt."""
    new = write(client, logprobs=1, temperature=0)
    text = "The sea" + new.choices[0].text
    scored = write(client, prompt=text, echo=True, logprobs=1, max_tokens=0)
    [choice] = scored.choices
    assert (choice.text, choice.finish_reason, scored.usage.completion_tokens) == (text, "length", 0)
    found = choice.logprobs
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert len(found.tokens) == scored.usage.prompt_tokens
    assert found.token_logprobs[-12:] == pytest.approx(new.choices[0].logprobs.token_logprobs, abs=1e-4)
    assert found.tokens[-12:] == new.choices[0].logprobs.tokens
    places = list(zip(found.text_offset, found.tokens, strict=True))
    assert places[0] == (0, "<s>")
    assert all(text[offset:].startswith(token) for offset, token in places[1:])


def test_echo_and_new_tokens(client: openai.OpenAI) -> None:
    plain = write(client, temperature=0)
    echoed = write(client, temperature=0, echo=True, logprobs=0)
    assert echoed.choices[0].text == "The sea" + plain.choices[0].text
    assert len(echoed.choices[0].logprobs.tokens) == plain.usage.total_tokens
    streamed = write(client, temperature=0, echo=True, stream=True)
    assert "".join(event.choices[0].text for event in streamed) == echoed.choices[0].text


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    forced = {"structured_outputs": {"regex": CALL}}
    answer = ask(client, tools=[WEATHER], max_tokens=80, extra_body=forced)
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.function.name) == ("tool_calls", None, "get_weather")
    assert json.loads(call.function.arguments)["town"].istitle()
    streamed = list(ask(client, tools=[WEATHER], max_tokens=80, extra_body=forced, stream=True))
    deltas = [delta for event in streamed for delta in event.choices[0].delta.tool_calls or []]
    assert [delta.index for delta in deltas] == [0]
    assert deltas[0].function.model_dump() == call.function.model_dump()
    assert not any(event.choices[0].delta.content for event in streamed)
    assert streamed[-1].choices[0].finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "content": "Rain."}
    assert ask(client, messages=[*QUESTION, choice.message, result], tools=[WEATHER]).usage.completion_tokens == 12


def test_without_tools_a_call_is_text(client: openai.OpenAI) -> None:
    forced = {"structured_outputs": {"regex": CALL}}
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = ask(client, max_tokens=80, extra_body=forced, **fields).choices[0]
        assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
        assert choice.message.content.startswith("<toolcall>")


def test_tools_and_contexts_are_in_the_prompt(client: openai.OpenAI) -> None:
    plain = ask(client).usage.prompt_tokens
    assert ask(client, tools=[WEATHER]).usage.prompt_tokens > plain + 20
    assert ask(client, tools=[WEATHER], tool_choice="none").usage.prompt_tokens == plain
    context = {"contexts": ["The keeper of the light is called Ida."]}
    assert ask(client, extra_body=context).usage.prompt_tokens > plain + 8


def test_answers_keep_to_json(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    person = json.loads(ask(client, response_format=schema, max_tokens=120).choices[0].message.content)
    assert list(person) == ["name", "age"]
    assert 0 <= person["age"] <= 99
    streamed = ask(client, response_format=schema, max_tokens=120, stream=True)
    assert json.loads("".join(event.choices[0].delta.content or "" for event in streamed)) == person
    structured = write(client, max_tokens=120, extra_body={"structured_outputs": {"json": PERSON}})
    assert set(json.loads(structured.choices[0].text)) == {"name", "age"}
    anything = ask(client, response_format={"type": "json_object"}, max_tokens=6).choices[0].message.content
    assert anything.lstrip().startswith("{")


def test_answers_keep_to_a_regex(client: openai.OpenAI) -> None:
    answer = write(client, max_tokens=30, extra_body={"structured_outputs": {"regex": "(yes|no), [0-9]{3}"}}).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.text[:-3] in ("yes, ", "no, ")
    assert answer.text[-3:].isdigit()


def test_models(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert (card.id, card.owned_by) == ("tiny", "hymba")
    assert client.models.retrieve("tiny") == card


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        ask(client, model="other")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, extra_body={"best_of": 3})
    assert refused.value.param == "best_of"
