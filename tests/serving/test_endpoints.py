"""What tells about the model, the text and the server."""

import re
from pathlib import Path

from live import LiveServer

from hymba import __version__
from hymba.inference import Engine
from hymba.model import cache_nbytes


def test_text_and_tokens(live: LiveServer, engine: Engine) -> None:
    told = live.http.post("/tokenize", json={"prompt": "The sea"}).json()
    assert told == {
        "tokens": engine.tokenizer("The sea")["input_ids"],
        "count": len(told["tokens"]),
        "max_model_len": 600,
    }
    assert live.http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "The sea"}
    bare = live.http.post("/tokenize", json={"prompt": "The sea", "add_special_tokens": False}).json()["tokens"]
    assert [engine.tokenizer.bos_token_id, *bare] == told["tokens"]


def test_tokens_of_a_conversation(live: LiveServer) -> None:
    messages = [{"role": "user", "content": "Who?"}]
    count = live.http.post("/tokenize", json={"messages": messages}).json()["count"]
    assert count == live.chat("Who?", max_tokens=1).json()["usage"]["prompt_tokens"]


def test_the_model_says_what_it_holds(live: LiveServer, engine: Engine) -> None:
    [card] = live.http.get("/v1/models").json()["data"]
    config, cache = engine.model.config, card["cache"]
    assert card["max_length"] == 600
    for tokens in (0, 1, 77, 600):
        held = cache["fixed_bytes"] + tokens * cache["bytes_per_token"]
        assert held == cache_nbytes(config, tokens, engine.model.dtype.itemsize)
    assert cache["llama_bytes_per_token"] == 2 * 6 * 1 * 64 * 4


def test_version_and_health(live: LiveServer) -> None:
    assert live.http.get("/version").json() == {"version": __version__}
    assert live.http.get("/health").json() == {"status": "ok"}


def test_metrics_count(live: LiveServer) -> None:
    def read() -> dict[str, float]:
        lines = live.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    before = read()
    prompt = "It was a dark night on the sea. " * 12
    answers = [live.complete(prompt, max_tokens=5, ignore_eos=True).json() for _ in range(2)]
    live.complete(n=0)
    after = read()
    gained = {name: value - before.get(name, 0) for name, value in after.items()}
    assert gained["hymba_generation_tokens_total"] == 10
    assert gained['hymba_requests_total{finish="length"}'] == 2
    assert gained["hymba_prefix_cache_hits_total"] >= 1
    assert gained["hymba_prompt_tokens_cached_total"] == answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert gained["hymba_time_to_first_token_seconds_count"] == 2
    assert gained["hymba_inter_token_latency_seconds_count"] == 8
    assert gained["hymba_request_duration_seconds_count"] == 2
    assert gained['hymba_errors_total{status="400"}'] == 1
    assert after["hymba_requests_running"] == after["hymba_requests_waiting"] == after["hymba_cache_use_ratio"] == 0
    assert after["hymba_engine_alive"] == 1
    assert after["hymba_cache_bytes"] > 0


def test_metrics_endpoints_and_fields_are_documented(live: LiveServer) -> None:
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    families = re.findall(r"^# TYPE (\w+) ", live.http.get("/metrics").text, re.MULTILINE)
    shown = [name for name in families if not name.endswith("_created")]
    assert len(shown) > 15
    assert [name for name in shown if name not in page] == []
    schema = live.http.get("/openapi.json").json()
    assert [path for path in schema["paths"] if path not in page] == []
    for body in ("ChatRequest", "CompletionRequest", "TokenizeRequest", "DetokenizeRequest"):
        fields = schema["components"]["schemas"][body]["properties"]
        assert [name for name in fields if f"`{name}" not in page] == []
