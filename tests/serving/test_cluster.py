"""Replicas on Ray: they share the work by what requests begin with, and outlive one another."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.slow

HYMBA = [sys.executable, "-c", "from hymba.cli import main; main()"]
# Two replicas of four rows each, which take eight requests before the other is asked.
SERVER = [*HYMBA, "serve", "tiny", "--replicas", "2", "--max-rows", "4", "--port", "0"]

LONG = 1000  # tokens of an answer that is still under way when something happens to it


class Cluster:
    """A server with two replicas, in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(SERVER, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        told = next((line for line in self.process.stdout if line.startswith("tiny is served at ")), None)
        assert told is not None, "the server has not started"
        self.client = httpx.Client(base_url=told.split()[-1], timeout=60)

    def ask(self, session: str | None = None, **body: Any) -> httpx.Response:
        headers = {} if session is None else {"X-Session-Id": session}
        body = {"prompt": "The sea was", "max_tokens": 4, "temperature": 0} | body
        return self.client.post("/v1/completions", json=body, headers=headers)

    def stream(self, session: str, **body: Any) -> Any:
        body = {"prompt": "The sea was", "max_tokens": LONG, "ignore_eos": True, "stream": True} | body
        return self.client.stream("POST", "/v1/completions", json=body, headers={"X-Session-Id": session})

    def finished(self) -> dict[str, int]:
        """Return how many texts each replica has ended."""
        text = self.client.get("/metrics").text
        found = re.findall(r'^hymba_requests_total\{.*replica="(\w+)".*\} ([\d.]+)', text, re.MULTILINE)
        counts = dict.fromkeys(re.findall(r'hymba_requests_running\{replica="(\w+)"\}', text), 0)
        for name, count in found:
            counts[name] += int(float(count))
        return counts

    def pids(self) -> list[int]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [process.pid for process in found if "ServeReplica:hymba:Replica" in " ".join(process.cmdline())]

    def wait_for(self, replicas: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.client.get("/health").json().get("replicas") != replicas:
            assert time.monotonic() < deadline, "no new replica"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    if cluster.process.poll() is None:
        cluster.process.terminate()
    cluster.process.wait(60)


def gained(before: dict[str, int], after: dict[str, int]) -> list[int]:
    return sorted(after[name] - before[name] for name in after)


def events(lines: Iterable[str]) -> list[str]:
    return [line.removeprefix("data: ") for line in lines if line]


def test_it_answers_as_one_server_does(cluster: Cluster) -> None:
    assert cluster.client.get("/health").json() == {"status": "ok", "replicas": 2}
    assert cluster.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert "text/html" in cluster.client.get("/").headers["content-type"]
    assert cluster.client.get("/nothing").status_code == 404
    assert cluster.ask(max_tokens=-1).json()["error"]["param"] == "max_tokens"
    assert cluster.client.post("/v1/completions", content=b"x" * (9 << 20)).status_code == 413
    whole = cluster.ask(max_tokens=9).json()["choices"][0]
    with cluster.stream("any", max_tokens=9, temperature=0) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *told, end = events(response.iter_lines())
    pieces = [json.loads(event)["choices"][0] for event in told]
    assert (end, "".join(piece["text"] for piece in pieces)) == ("[DONE]", whole["text"])


def test_what_begins_alike_meets_in_one_cache(cluster: Cluster) -> None:
    for topic in ("ships", "bread", "winter", "money"):
        messages = [{"role": "user", "content": f"Tell me of {topic}. " + "It has been a long day. " * 10}]
        cached, before = [], cluster.finished()
        for _ in range(4):
            body = {"messages": messages, "max_tokens": 8, "temperature": 0}
            told = cluster.client.post("/v1/chat/completions", json=body).json()
            cached.append(told["usage"]["prompt_tokens_details"]["cached_tokens"] / told["usage"]["prompt_tokens"])
            answer = {"role": "assistant", "content": told["choices"][0]["message"]["content"] or "Well."}
            messages = [*messages, answer, {"role": "user", "content": "And then?"}]
        assert gained(before, cluster.finished()) == [0, 4]
        assert min(cached[1:]) > 0.5


def test_sessions_are_shared_out_and_a_busy_replica_is_passed_over(cluster: Cluster) -> None:
    before = cluster.finished()
    for session in range(12):
        assert cluster.ask(f"{session}").status_code == 200
    assert gained(before, cluster.finished())[0] > 0
    before = cluster.finished()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: cluster.ask("one", max_tokens=50, ignore_eos=True), range(16)))
    assert [answer.status_code for answer in answers] == [200] * 16
    assert gained(before, cluster.finished())[0] > 0


def test_a_client_that_leaves_frees_the_row(cluster: Cluster) -> None:
    with cluster.stream("leaver") as response:
        next(response.iter_lines())
        assert "hymba_requests_running" in cluster.client.get("/metrics").text
    deadline = time.monotonic() + 10
    while not re.search(r'finish="cancelled".*\} [1-9]', cluster.client.get("/metrics").text):
        assert time.monotonic() < deadline, "the answer went on without a reader"
        time.sleep(0.1)


def test_a_killed_replica_loses_nothing_that_nobody_saw(cluster: Cluster) -> None:
    """One stream on each replica and a whole answer beside it; one replica dies."""
    sessions = two_sessions(cluster)
    begun = [threading.Event() for _ in sessions]
    with ThreadPoolExecutor(4) as pool:
        wholes = [pool.submit(cluster.ask, session, max_tokens=LONG, ignore_eos=True) for session in sessions]
        streams = [
            pool.submit(read_stream, cluster, session, event) for session, event in zip(sessions, begun, strict=True)
        ]
        assert all(event.wait(30) for event in begun)
        victim = cluster.pids()[0]
        psutil.Process(victim).kill()
        killed = time.monotonic()
        assert [cluster.ask(session).status_code for session in sessions] == [200, 200]
        assert time.monotonic() - killed < 30
        assert [whole.result().status_code for whole in wholes] == [200, 200]
        assert [whole.result().json()["usage"]["completion_tokens"] for whole in wholes] == [LONG, LONG]
        broken, healthy = sorted((stream.result() for stream in streams), key=lambda told: "error" not in told[-2])
    assert json.loads(broken[-2])["error"]["code"] == "replica_died"
    assert len(broken) > 2
    assert json.loads(healthy[-2])["choices"][0]["finish_reason"] == "length"
    assert broken[-1] == healthy[-1] == "[DONE]"
    cluster.wait_for(replicas=2, seconds=60)
    assert victim not in cluster.pids()


def test_with_all_replicas_killed_requests_wait_for_new_ones(cluster: Cluster) -> None:
    for pid in cluster.pids():
        psutil.Process(pid).kill()
    begun = time.monotonic()
    assert cluster.ask().status_code == 200
    assert time.monotonic() - begun < 30


def test_a_signal_lets_answers_end_and_then_ends_everything(cluster: Cluster) -> None:
    processes = psutil.Process(cluster.process.pid).children(recursive=True)
    with cluster.stream("last") as response:
        lines = response.iter_lines()
        first = next(lines)
        cluster.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert cluster.ask().json()["error"]["code"] == "stopping"
        assert cluster.client.get("/health").status_code == 503
        told = events(chain([first], lines))
    assert json.loads(told[-2])["choices"][0]["finish_reason"] == "length"
    assert cluster.process.wait(60) == 0
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


def two_sessions(cluster: Cluster) -> list[str]:
    """Return a session for each replica."""
    found: dict[str, str] = {}
    for session in map(str, range(50)):
        before = cluster.finished()
        cluster.ask(session)
        after = cluster.finished()
        found.setdefault(next(name for name in after if after[name] > before[name]), session)
        if len(found) == 2:
            return list(found.values())
    raise AssertionError("fifty sessions went to one replica")


def read_stream(cluster: Cluster, session: str, begun: threading.Event) -> list[str]:
    with cluster.stream(session) as response:
        lines = response.iter_lines()
        first = next(lines)
        begun.set()
        return events(chain([first], lines))


def test_a_batch_runs_on_several_engines(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "The sea", "max_tokens": 5, "ignore_eos": True}
    lines = [{"custom_id": f"{n}", "method": "POST", "url": "/v1/completions", "body": body} for n in range(40)]
    source.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"custom_id": "bad"}]))
    command = [*HYMBA, "batch", str(source), "--replicas", "2", "--out", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in answers) == sorted([*(f"{n}" for n in range(40)), "bad"])
    tokens = [answer["response"]["body"]["usage"]["completion_tokens"] for answer in answers if answer["response"]]
    assert tokens == [5] * 40
