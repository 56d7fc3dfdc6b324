"""Whatever is wrong with a request, the answer is a 4xx in OpenAI's shape that says what."""

import json

import pytest
from live import LiveServer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "Who?"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}


def deep(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels):
        value = {"properties": value}
    return value


def refused(response, status: int = 400) -> dict:
    """The error of a response that has the right shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    return error


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (TEXT, {"temperature": float("nan")}, "temperature"),
        (TEXT, {"temperature": float("inf")}, "temperature"),
        (TEXT, {"temperature": -0.5}, "temperature"),
        (TEXT, {"temperature": "hot"}, "temperature"),
        (TEXT, {"temperature": True}, "temperature"),
        (TEXT, {"top_p": 0}, "top_p"),
        (TEXT, {"top_p": 1.5}, "top_p"),
        (TEXT, {"top_k": -2}, "top_k"),
        (TEXT, {"top_k": 1.5}, "top_k"),
        (TEXT, {"min_p": 2}, "min_p"),
        (TEXT, {"repetition_penalty": 0}, "repetition_penalty"),
        (TEXT, {"presence_penalty": 3}, "presence_penalty"),
        (TEXT, {"frequency_penalty": float("-inf")}, "frequency_penalty"),
        (TEXT, {"n": -1}, "n"),
        (TEXT, {"n": 0}, "n"),
        (TEXT, {"n": 129}, "n"),
        (TEXT, {"n": "2"}, "n"),
        (TEXT, {"max_tokens": -1}, "max_tokens"),
        (TEXT, {"max_tokens": 10**400}, "max_tokens"),
        (TEXT, {"seed": -1}, "seed"),
        (TEXT, {"seed": 1 << 63}, "seed"),
        (TEXT, {"logprobs": 21}, "logprobs"),
        (TEXT, {"logprobs": True}, "logprobs"),
        (TEXT, {"stop": [""]}, "stop.0"),
        (TEXT, {"stop": ["a"] * 17}, "stop"),
        (TEXT, {"stop": 5}, "stop"),
        (TEXT, {"stop_token_ids": [-1]}, "stop_token_ids.0"),
        (TEXT, {"stop_token_ids": [999_999]}, "stop_token_ids"),
        (TEXT, {"logit_bias": {"x": 1}}, "logit_bias"),
        (TEXT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
        (TEXT, {"logit_bias": {"999999": 1}}, "logit_bias"),
        (TEXT, {"stream": "yes"}, "stream"),
        (TEXT, {"prompt": 5}, "prompt"),
        (TEXT, {"prompt": []}, "prompt"),
        (TEXT, {"prompt": [[]]}, "prompt"),
        (TEXT, {"prompt": ["a", 5]}, "prompt.1"),
        (TEXT, {"prompt": [1, "a"]}, "prompt.1"),
        (TEXT, {"prompt": [1, 999_999]}, "prompt"),
        (TEXT, {"prompt": [-1]}, "prompt.0"),
        (TEXT, {"prompt": "half \ud800"}, "prompt"),
        (TEXT, {"suffix": "the end"}, "suffix"),
        (TEXT, {"best_of": 2}, "best_of"),
        (TEXT, {"nonsense": 1}, "nonsense"),
        (TEXT, {"\ud800": 1}, None),
        (TEXT, {"structured_outputs": {"regex": "(", "json": {}}}, "structured_outputs"),
        (TEXT, {"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice"),
        (TEXT, {"structured_outputs": {"regex": "("}}, None),
        (TEXT, {"min_tokens": 99}, None),
        (TEXT, {"stream_options": {"include_usage": True}}, None),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "Who?"}, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": "?", "name": "Ida"}]}, "messages.0.name"),
        (CHAT, {"messages": [{"role": "wizard", "content": "?"}]}, "messages.0"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 4, "max_completion_tokens": 5}, None),
        (CHAT, {"top_logprobs": 2}, None),
        (CHAT, {"logprobs": 2}, "logprobs"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools.0.function"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            CHAT,
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": deep(99)}}]},
            "tools.0.function.parameters",
        ),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"functions": []}, "functions"),
        (CHAT, {"contexts": "one"}, "contexts"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (CHAT, {"response_format": SCHEMA}, None),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "messages": QUESTION}, None),
        ("/detokenize", {"tokens": [999_999]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_fields_are_named(live: LiveServer, path: str, fields: dict, param: str | None) -> None:
    good = {CHAT: {"messages": QUESTION, "max_tokens": 1}, TEXT: {"prompt": "a", "max_tokens": 1}}.get(path, {})
    body = json.dumps(good | fields).encode()  # httpx refuses to write NaN; a client in another language may not
    error = refused(live.http.post(path, content=body, headers={"Content-Type": "application/json"}))
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["code"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "a",}',
        b'"prompt"',
        b"[]",
        b"null",
        b'{"prompt": "\xff\xfe"}',
        b"\x00",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content)[:30],
)
def test_bodies_that_are_no_json_object(live: LiveServer, content: bytes) -> None:
    refused(live.http.post(TEXT, content=content, headers={"Content-Type": "application/json"}))


def test_a_form_is_no_json(live: LiveServer) -> None:
    refused(live.http.post(TEXT, data={"prompt": "a"}))


def test_null_is_absent(live: LiveServer) -> None:
    fields = {"temperature": None, "stop": None, "logit_bias": None, "stream_options": None, "model": None}
    assert live.complete(max_tokens=1, **fields).status_code == 200


def test_unknown_model_path_and_method(live: LiveServer) -> None:
    for response in (live.complete(model="gpt"), live.chat(model="gpt"), live.http.get("/v1/models/gpt")):
        error = refused(response, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "'tiny'" in error["message"]
    assert refused(live.http.get("/v1/nothing"), 404)["type"] == "not_found_error"
    assert "does not take GET" in refused(live.http.get(TEXT), 405)["message"]


def test_a_long_prompt_is_told_both_numbers(live: LiveServer) -> None:
    for response in (live.complete([5] * 601), live.chat("sea " * 700, stream=True)):
        error = refused(response)
        assert error["code"] == "context_length_exceeded"
        assert "600" in error["message"]
    assert "601" in refused(live.complete([5] * 601))["message"]


def test_a_grammar_that_cannot_be_followed_ends_its_answer_alone(live: LiveServer) -> None:
    keys = [f"k{i}" for i in range(40)]
    schemas = [
        {"type": "object", "properties": {key: {"type": "string"} for key in keys[:count]}} for count in range(40)
    ]
    error = refused(live.complete(structured_outputs={"json": {"anyOf": schemas}}))
    assert error["code"] in ("generation_failed", "invalid_value")
    assert live.complete(max_tokens=2).status_code == 200


def test_more_texts_than_could_ever_wait(live: LiveServer) -> None:
    assert refused(live.complete(["a"] * 300))["param"] == "n"


def test_an_answer_fills_the_length(live: LiveServer) -> None:
    choice = live.complete([5] * 595, max_tokens=100, ignore_eos=True).json()
    assert choice["choices"][0]["finish_reason"] == "length"
    assert choice["usage"]["total_tokens"] in (600, 601)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": "half \ud800"}]},
        {"contexts": ["half \ud800"]},
        {"stop": "\ud800"},
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"\ud800": 1}}}]},
        {"tools": [{"type": "function", "function": {"name": "a", "description": "\ud800"}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "\ud800"}}}},
        {"structured_outputs": {"regex": "\ud800"}},
        {"model": "\ud800"},
    ],
    ids=range(8),
)
def test_half_a_character_is_refused_everywhere(live: LiveServer, fields: dict) -> None:
    body = json.dumps({"messages": QUESTION, "max_tokens": 1} | fields).encode()
    response = live.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    refused(response, 404 if "model" in fields else 400)
