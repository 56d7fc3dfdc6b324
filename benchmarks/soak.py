"""Clients that come, listen and go at random, and what they leave behind: `python -m benchmarks.soak --help`.

A server runs in a process of its own. Some clients stream and some do not; some hang up in the middle. In the end there
must be no text left in the engine, no more memory and threads than after as long a time before, and the same answers.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.command import Json, Out, bar, finish, main
from hymba.errors import HymbaError

WORDS = ("the", "sea", "was", "cold", "and", "nobody", "answered", "when", "he", "called", "from", "the", "lighthouse")


def soak(
    model: Annotated[str, typer.Argument(help="What `hymba serve` takes.")] = "tiny",
    clients: Annotated[int, typer.Option(min=1, help="Clients at a time.")] = 200,
    seconds: Annotated[float, typer.Option(min=5, help="How long they come and go, twice.")] = 120,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Let clients come and go, and compare the server before and after."""
    program = "from hymba.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", model, "--port", "0", "--max-length", "512"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if (found := re.search(r"http://\S+", server.stdout.readline())) is None:
            raise HymbaError("the server did not start")
        with bar("soak", int(seconds)) as step:
            result = asyncio.run(_soak(found[0], server.pid, clients, seconds, step))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    result["exit_code"] = server.returncode
    lines = [
        f"soak, {model}, {clients} clients for {seconds:g} s: {sum(result['requests'].values())} requests "
        f"({', '.join(f'{count} {name}' for name, count in sorted(result['requests'].items()))})",
        f"  memory {result['rss_before'] / 1e6:.0f} MB before, {result['rss_after'] / 1e6:.0f} MB after "
        f"({result['rss_growth']:+.1%}); threads {result['threads_before']} and {result['threads_after']}",
        f"  left in the engine: {result['running']} running, {result['waiting']} waiting; "
        f"the same answers: {'yes' if result['same_answers'] else 'NO'}",
    ]
    finish("soak", {"model": model, "clients": clients, "seconds": seconds}, result, lines, as_json, out)


async def _soak(address: str, pid: int, clients: int, seconds: float, step: Any) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"{address.rstrip('/')}/v1", timeout=120, limits=limits) as http:
        before = await _answers(http)
        await _crowd(http, clients, seconds, Counter(), lambda: None)
        await _quiet(http)
        rss, threads, requests = _rss(pid), _threads(pid), Counter[str]()
        await _crowd(http, clients, seconds, requests, step)
        running, waiting = await _quiet(http)
        after = await _answers(http)
        grown = _rss(pid)
        return {
            "requests": dict(requests),
            "rss_before": rss,
            "rss_after": grown,
            "rss_growth": round(grown / rss - 1, 4),
            "threads_before": threads,
            "threads_after": _threads(pid),
            "running": running,
            "waiting": waiting,
            "same_answers": before == after,
        }


async def _crowd(http: httpx.AsyncClient, clients: int, seconds: float, counts: Counter[str], step: Any) -> None:
    end = time.monotonic() + seconds

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            counts[await _request(http, draw)] += 1

    async def clock() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(1)
            step()

    await asyncio.gather(clock(), *(client(number) for number in range(clients)))


async def _request(http: httpx.AsyncClient, draw: random.Random) -> str:
    """Ask for a text, listen to all of it or to a part; return what became of it."""
    body = {
        "model": (await _model(http)),
        "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 60))),
        "max_tokens": draw.randint(1, 60),
        "temperature": draw.choice([0, 1]),
        "stream": draw.random() < 0.7,
    }
    patience = draw.uniform(0.01, 3) if draw.random() < 0.5 else 100
    try:
        async with asyncio.timeout(patience):
            async with http.stream("POST", "/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    pass
                return {200: "answered", 429: "queue full"}.get(response.status_code, f"HTTP {response.status_code}")
    except TimeoutError:
        return "hung up"
    except httpx.HTTPError as error:
        return type(error).__name__


async def _model(http: httpx.AsyncClient) -> str:
    if not hasattr(http, "model"):
        http.model = (await http.get("/models")).json()["data"][0]["id"]  # type: ignore[attr-defined]
    return str(http.model)  # type: ignore[attr-defined]


async def _answers(http: httpx.AsyncClient) -> list[str]:
    """Return greedy texts behind a few prompts."""
    texts = []
    for start in ("It was", "The sea", "Call me"):
        body = {"model": await _model(http), "prompt": start, "max_tokens": 40, "temperature": 0}
        texts.append((await http.post("/completions", json=body)).json()["choices"][0]["text"])
    return texts


async def _quiet(http: httpx.AsyncClient) -> tuple[int, int]:
    """Wait up to half a minute until the engine is empty; return what runs and waits then."""
    running = waiting = -1
    for _ in range(60):
        text = (await http.get(str(http.base_url).removesuffix("v1/") + "metrics")).text
        running, waiting = (_metric(text, name) for name in ("running", "waiting"))
        if running == waiting == 0:
            break
        await asyncio.sleep(0.5)
    return running, waiting


def _metric(text: str, name: str) -> int:
    found = re.search(rf"^hymba_requests_{name} (\S+)$", text, re.MULTILINE)
    if found is None:
        raise HymbaError(f"the server's metrics say nothing of {name!r}")
    return int(float(found[1]))


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


if __name__ == "__main__":
    main(soak)
