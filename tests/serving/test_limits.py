"""Who may come in, how much they may bring, how long it may take, and what is left when they go."""

import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import pytest
from live import PATIENCE, LiveServer, serving, wait_until

from hymba.inference import Engine
from hymba.serving import Settings

LONG = {"max_tokens": 40, "ignore_eos": True, "stream": True}


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["type"], error["code"]


def events(response: httpx.Response) -> list[str]:
    """The data of a stream's events, read to its end."""
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_a_key_is_asked_for(engine: Engine) -> None:
    with serving(engine, Settings("tiny", api_key="sesame")) as live:
        for wrong in (None, "sesame", "Bearer", "Bearer sesam", "Bearer sesame2", "Basic sesame", "Bearer sésame"):
            headers = {"Authorization": wrong.encode()} if wrong else {}
            for path in ("/v1/models", "/v1/nothing"):
                response = live.http.get(path, headers=headers)
                assert error_of(response) == (401, "authentication_error", "invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"
            assert live.http.post("/tokenize", headers=headers, content=b"{").status_code == 401
        assert live.http.get("/v1/models", headers={"Authorization": "bearer sesame"}).status_code == 200
        assert [live.http.get(path).status_code for path in ("/health", "/version", "/metrics", "/")] == [200] * 4


def test_large_bodies_are_refused(engine: Engine) -> None:
    with serving(engine, Settings("tiny", max_body_bytes=1000)) as live:
        assert live.complete("each night " * 80, max_tokens=1).status_code == 200
        assert error_of(live.complete("a" * 1000))[::2] == (413, "too_large")
        pieces = (b"[" for _ in range(2000))  # without a Content-Length
        assert live.http.post("/v1/completions", content=pieces).status_code == 413


def test_a_body_must_arrive(engine: Engine) -> None:
    with serving(engine, Settings("tiny", body_seconds=0.05)) as live:
        connection = socket.create_connection(live.listener.getsockname())
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head.encode() + b'{"a":')
        with connection, connection.makefile("rb") as answer:
            assert b" 408 " in answer.readline()


def test_a_full_queue_turns_away(still_engine: Callable[..., Engine]) -> None:
    engine = still_engine(max_waiting=2)
    with serving(engine) as live, live.http.stream("POST", "/v1/completions", json={"prompt": "a"} | LONG) as first:
        assert first.status_code == 200
        response = live.complete(["a", "b"])
        assert error_of(response) == (429, "rate_limit_error", "queue_full")
        assert response.headers["Retry-After"] == "1"
        # Of the two texts of the refused request, the one that had found a place does not keep it.
        engine.step()
        assert engine.stats().finished == {"cancelled": 1}
        engine.start()
        assert events(first)[-1] == "[DONE]"


def test_time_runs_out(still_engine: Callable[..., Engine]) -> None:
    engine = still_engine()
    with serving(engine, Settings("tiny", request_seconds=0.05)) as live:
        assert error_of(live.complete()) == (504, "timeout_error", "timeout")
        streamed = live.complete(stream=True)
        assert streamed.status_code == 200
        told, done = events(streamed)
        assert '"code": "timeout"' in told
        assert done == "[DONE]"
        assert 'hymba_errors_total{status="504"} 2.0' in live.http.get("/metrics").text
    while engine.step():
        pass
    assert engine.stats().finished == {"cancelled": 2}
    assert engine.stats().new_tokens == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(still_engine: Callable[..., Engine], path: str, stream: bool) -> None:
    engine = still_engine(max_rows=2)
    body = LONG | {"stream": stream, "n": 2} | ({"prompt": "a"} if "chat" not in path else {})
    body |= {"messages": [{"role": "user", "content": "Who?"}]} if "chat" in path else {}
    with serving(engine) as live:
        connection = socket.create_connection(live.listener.getsockname())
        request = httpx.Request("POST", live.url + path, json=body)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
        wait_until(lambda: engine.stats().waiting == 2)
        engine.step()
        assert engine.stats().running == 2
        connection.close()
        wait_until(lambda: live.server.state.active == 0)
        assert not engine.step()
        assert engine.stats().running == 0
        assert engine.stats().finished == {"cancelled": 2}


def test_a_client_that_goes_in_the_middle_of_its_body_is_no_bad_request(engine: Engine) -> None:
    with serving(engine) as live:
        connection = socket.create_connection(live.listener.getsockname())
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        wait_until(lambda: live.server.state.active == 1)
        connection.close()
        wait_until(lambda: live.server.state.active == 0)
        told = live.http.get("/metrics").text
        assert 'hymba_errors_total{status="499"} 1.0' in told
        assert 'status="400"' not in told


def test_many_clients_that_go_leave_no_row(engine: Engine, live: LiveServer) -> None:
    def visit(number: int) -> None:
        with (
            httpx.Client(base_url=live.url, timeout=60) as http,
            http.stream("POST", "/v1/completions", json={"prompt": f"Number {number}"} | LONG) as answer,
        ):
            for _, _ in zip(range(number % 5), answer.iter_lines(), strict=False):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(visit, range(24)))
    wait_until(lambda: live.server.state.active == 0 and engine.stats().running + engine.stats().waiting == 0)
    assert live.complete(max_tokens=3).status_code == 200


def test_draining_lets_running_answers_end(still_engine: Callable[..., Engine]) -> None:
    engine = still_engine()
    with serving(engine) as live, live.http.stream("POST", "/v1/completions", json={"prompt": "a"} | LONG) as answer:
        live.server.handle_exit(signal.SIGTERM, None)
        with httpx.Client(base_url=live.url) as late:
            assert error_of(late.get("/health")) == (503, "service_unavailable_error", "stopping")
            response = late.post("/v1/completions", json={"prompt": "b"})
            assert error_of(response) == (503, "service_unavailable_error", "stopping")
            assert response.headers["Retry-After"]
        engine.start()
        told = events(answer)
        assert len(told) > 2
        assert '"finish_reason": "length"' in told[-2]
        live.thread.join(PATIENCE)
        assert not live.thread.is_alive()


def test_draining_has_an_end(still_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = still_engine(speculate=False)
    stop, decode, told_to_stop = engine.stop, engine._runner.decode, Event()
    monkeypatch.setattr(engine, "stop", lambda timeout: (told_to_stop.set(), stop(timeout)))
    # A step as long as it takes to be told to stop.
    monkeypatch.setattr(engine._runner, "decode", lambda *given: told_to_stop.wait(PATIENCE) and decode(*given))
    settings = Settings("tiny", drain_seconds=0)
    body = {"prompt": "a"} | LONG
    with serving(engine, settings) as live, live.http.stream("POST", "/v1/completions", json=body) as answer:
        engine.start()
        live.server.handle_exit(signal.SIGTERM, None)
        *_, told, done = events(answer)
        assert '"code": "stopping"' in told
        assert done == "[DONE]"
        live.thread.join(PATIENCE)
        assert not live.thread.is_alive()


def test_a_dead_engine_is_told(still_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = still_engine()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(engine._runner, "prefill", fail)
    with serving(engine) as live:
        assert live.http.get("/health").json() == {"status": "ok"}
        engine.start()
        assert error_of(live.complete())[:2] == (500, "server_error")
        assert "boom" in live.http.get("/health").json()["error"]["message"]
        assert error_of(live.http.get("/health")) == (503, "service_unavailable_error", "engine_dead")
        assert error_of(live.chat()) == (503, "service_unavailable_error", "engine_dead")
        assert "hymba_engine_alive 0.0" in live.http.get("/metrics").text


def test_a_mistake_of_the_server_is_told(
    still_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(still_engine()) as live:
        monkeypatch.setattr(live.server.state.vocabulary, "encode", lambda *_, **__: 1 / 0)
        assert error_of(live.complete()) == (500, "server_error", None)
        assert 'hymba_errors_total{status="500"} 1.0' in live.http.get("/metrics").text


def test_other_origins_need_leave(engine: Engine, live: LiveServer) -> None:
    asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    assert "Access-Control-Allow-Origin" not in live.http.get("/v1/models", headers=asked).headers
    with serving(engine, Settings("tiny", api_key="sesame", origins=("http://page.example",))) as other:
        allowed = other.http.options("/v1/chat/completions", headers=asked)
        assert allowed.headers["Access-Control-Allow-Origin"] == "http://page.example"
        refused = other.http.options("/v1/chat/completions", headers=asked | {"Origin": "http://other.example"})
        assert "Access-Control-Allow-Origin" not in refused.headers
