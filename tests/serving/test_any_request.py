"""Requests drawn at random from the server's own schema, and beside it, never find a mistake in the server."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from live import LiveServer
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models/{name}"),
]
CALM = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def schema(live: LiveServer) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        (*operation, mode)
        for operation in OPERATIONS
        for mode in GenerationMode
        if operation[0] == "POST" or mode.is_positive
    ],
)
def test_no_request_is_a_server_error(
    schema: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    statuses = set()

    @CALM
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def call(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("messages"), list):
            case.body.setdefault("max_tokens", 4)
        response = case.call_and_validate(checks=[not_a_server_error], timeout=60)
        statuses.add(response.status_code)

    call()
    assert statuses
    assert max(statuses) < 500


def test_all_that_takes_input_is_drawn(schema: schemathesis.BaseSchema) -> None:
    drawn = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    plain = {"/v1/models", "/health", "/version", "/metrics"}
    assert drawn == {*OPERATIONS, *(("GET", path) for path in plain)}
