"""The engine: streams side by side, long prompts beside them, chats, drafts. `python -m benchmarks.serving --help`.

The weights are random, so what texts say is forced where it matters: by a constraint that lets one token follow. What
is compared takes turns within one run.
"""

from __future__ import annotations

import functools
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.command import (
    Json,
    Out,
    Size,
    SizeOption,
    Threads,
    Weights,
    WeightsOption,
    bar,
    finish,
    main,
    use_threads,
)
from benchmarks.models import random_model
from benchmarks.timing import milliseconds, seconds
from hymba.errors import HymbaError
from hymba.inference import Engine, EngineOptions, SamplingParams, Sequence, Update
from hymba.inference.step import DecodeStep
from hymba.model import Hymba

PROMPT = 128  # tokens
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=0, ignore_eos=True)


def serving(
    config: SizeOption = Size["350m"],
    weights: WeightsOption = Weights.bf16,
    streams: Annotated[int, typer.Option(min=2, help="Texts side by side.")] = 8,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of each text.")] = 128,
    long_prompt: Annotated[int, typer.Option(min=64, help="Tokens of the prompt that arrives beside streams.")] = 4096,
    chat: Annotated[int, typer.Option(min=64, help="Tokens of the chat whose second turn is timed.")] = 8192,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; medians count.")] = 3,
    threads: Threads = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time the engine with random weights: what streams, prompts, snapshots and drafts cost one another."""
    use_threads(threads)
    bench = Bench(random_model(config, weights), streams, tokens)
    with bar(f"serving {config} {weights}", 6) as step, torch.no_grad():
        result: dict[str, Any] = {}
        for name, measure in (
            ("throughput", lambda: bench.throughput(repeat)),
            ("interference", lambda: bench.interference(long_prompt)),
            ("second_turn", lambda: bench.second_turn(chat)),
            ("drafts", lambda: bench.drafts(repeat)),
            ("overhead", lambda: bench.overhead(repeat)),
            ("http", lambda: bench.http(repeat)),
        ):
            result[name] = measure()
            step()
    settings = {"config": config, "weights": weights, "streams": streams, "tokens": tokens}
    settings |= {"long_prompt": long_prompt, "chat": chat, "threads": torch.get_num_threads()}
    finish(f"serving-{config}-{weights}", settings, result, _lines(result, settings), as_json, out)


@dataclass
class Bench:
    """The measurements, each of which begins with an engine of its own."""

    model: Hymba
    streams: int
    tokens: int
    made: int = 0

    def engine(self, rows: int, length: int, **options: Any) -> Engine:
        """Return an engine; it drafts nothing unless told to."""
        chosen = EngineOptions(**{"max_rows": rows, "max_length": length, "speculate": False} | options)
        return Engine(self.model, _tokenizer(self.model.config.vocab_size), chosen)

    def prompt(self, count: int) -> list[int]:
        """Return a prompt unlike those before."""
        self.made += 1
        draw = torch.Generator().manual_seed(self.made)
        return torch.randint(3, self.model.config.vocab_size, (count,), generator=draw).tolist()

    def throughput(self, repeat: int) -> dict[str, Any]:
        """Tokens a second of one stream and of several, the prompts not counted."""
        engine = self.engine(self.streams, PROMPT + self.tokens)
        rates: dict[int, list[float]] = {1: [], self.streams: []}
        for _ in range(repeat + 1):
            for count, found in rates.items():
                found.append(self._stream(engine, count))
        one, many = (statistics.median(found[1:]) for found in rates.values())  # the first records its steps
        return {
            "one_tokens_per_second": round(one, 2),
            "tokens_per_second": round(many, 2),
            "ratio": round(many / one, 2),
        }

    def _stream(self, engine: Engine, count: int) -> float:
        read = engine.stats().prompt_tokens + count * PROMPT
        for i in range(count):
            engine.submit(Sequence(self.prompt(PROMPT), replace(SAMPLED, max_new_tokens=self.tokens, seed=i)))
        rate = _rate(engine, read, engine.step)
        _run(engine)
        return rate

    def interference(self, long_prompt: int) -> dict[str, Any]:
        """How long streams wait for a token while a long prompt is read beside them."""
        engine = self.engine(self.streams, PROMPT + long_prompt + 1024)
        times: list[list[float]] = [[] for _ in range(self.streams - 1)]
        for i, seen in enumerate(times):
            params = replace(SAMPLED, max_new_tokens=10_000, seed=i)
            engine.submit(Sequence(self.prompt(PROMPT), params, functools.partial(_note, seen)))
        while min(len(seen) for seen in times) < 40:
            engine.step()
        arrived, newcomer = time.perf_counter(), Sequence(self.prompt(long_prompt), replace(SAMPLED, max_new_tokens=1))
        engine.submit(newcomer)
        while newcomer.finish is None:
            engine.step()
        alone = [b - a for seen in times for a, b in pairwise(seen) if b < arrived][8 * len(times) :]
        beside = [b - a for seen in times for a, b in pairwise(seen) if b >= arrived]
        median, late = statistics.median(beside), statistics.quantiles(beside, n=100)[98]
        return {
            "alone_ms": milliseconds(alone),
            "beside_median_ms": round(median * 1e3, 2),
            "beside_p99_ms": round(late * 1e3, 2),
            "p99_over_median": round(late / median, 2),
            "p99_over_alone": round(late / statistics.median(alone), 2),
            "prompt_seconds": round(time.perf_counter() - arrived, 2),
        }

    def second_turn(self, chat: int) -> dict[str, Any]:
        """The time to the first token of a chat's first turn and of its second, which adds a short question."""
        engine = self.engine(1, chat)
        first = Sequence(self.prompt(chat - 64), replace(SAMPLED, max_new_tokens=16))
        times = [self._first_token(engine, first)]
        second = Sequence([*first.ids[:-1], *self.prompt(32)], replace(SAMPLED, max_new_tokens=16))
        times.append(self._first_token(engine, second))
        return {
            "first_seconds": round(times[0], 3),
            "second_seconds": round(times[1], 3),
            "ratio": round(times[0] / times[1], 1),
            "cached_tokens": second.cached_tokens,
        }

    def _first_token(self, engine: Engine, sequence: Sequence) -> float:
        engine.submit(sequence)
        _run(engine)
        assert sequence.first_token_at is not None
        return sequence.first_token_at - sequence.arrived

    def drafts(self, repeat: int) -> dict[str, Any]:
        """One stream with drafts over one without, on a text that repeats its prompt and on one that never does."""
        rounds = {"repeating": self.prompt(PROMPT), "never": _without_repeats(self.model.config.vocab_size)}
        result = {}
        for name, text in rounds.items():
            rates: dict[bool, list[float]] = {True: [], False: []}
            engines = {on: self.engine(1, 2048, speculate=on, prefix_cache_bytes=0) for on in rates}
            for _ in range(repeat + 1):
                for on, engine in engines.items():
                    forced = SamplingParams(4 * self.tokens, temperature=0, constraint=Forced(text), ignore_eos=True)
                    begun = Sequence(text[:PROMPT], forced)
                    engine.submit(begun)
                    engine.step()
                    clock = time.perf_counter()
                    _run(engine)
                    rates[on].append((len(begun.tokens) - 1) / (time.perf_counter() - clock))
            drafting, plain = (statistics.median(found[1:]) for found in rates.values())
            result[name] = {"tokens_per_second": round(drafting, 2), "ratio": round(drafting / plain, 3)}
        return result

    def overhead(self, repeat: int) -> dict[str, Any]:
        """What the engine adds to the bare step of all streams."""
        engine = self.engine(self.streams, PROMPT + self.tokens)
        cache = self.model.allocate_cache(self.streams, PROMPT + (repeat + 1) * self.tokens)
        self.model(torch.tensor([self.prompt(PROMPT) for _ in range(self.streams)]), cache=cache)
        step, chosen = DecodeStep(self.model, cache), torch.zeros(self.streams, dtype=torch.int64)
        bare: list[float] = []
        whole: list[float] = []
        for round_ in range(repeat + 1):
            rate = self._stream(engine, self.streams)
            spent = [seconds(lambda: step(chosen)) for _ in range(self.tokens - 8)]
            if round_:
                whole.append(self.streams / rate)
                bare.append(statistics.median(spent))
        ours, floor = statistics.median(whole), statistics.median(bare)
        return {
            "step_ms": round(ours * 1e3, 2),
            "bare_step_ms": round(floor * 1e3, 2),
            "share": round(ours / floor - 1, 3),
        }

    def http(self, repeat: int) -> dict[str, Any]:
        """Tokens a second of all streams, asked for over HTTP by a client in a process of its own, and the engine's."""
        from hymba.serving import Settings
        from hymba.serving.server import Server

        engine = self.engine(self.streams, PROMPT + self.tokens)
        rates: dict[str, list[float]] = {"engine": [], "http": []}
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = Server(engine, Settings(), lambda address: None)
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            engine.start()
            for _ in range(repeat + 1):
                read = engine.stats().prompt_tokens + self.streams * PROMPT
                for i in range(self.streams):
                    engine.submit(Sequence(self.prompt(PROMPT), replace(SAMPLED, max_new_tokens=self.tokens, seed=i)))
                rates["engine"].append(_rate(engine, read, _wait))
                _drain(engine)
                client = self._client(listener.getsockname()[1])
                rates["http"].append(_rate(engine, read + self.streams * PROMPT, _wait))
                client.wait()
                _drain(engine)
            engine.stop()
            server.should_exit = True
            thread.join()
        ours, theirs = (statistics.median(found[1:]) for found in rates.values())
        return {"tokens_per_second": round(theirs, 2), "share": round(1 - theirs / ours, 3)}

    def _client(self, port: int) -> subprocess.Popen[str]:
        prompts = [self.prompt(PROMPT) for _ in range(self.streams)]
        command = [sys.executable, "-c", CLIENT, str(port), str(self.tokens)]
        client = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        assert client.stdin is not None
        client.stdin.write(json.dumps(prompts))
        client.stdin.close()
        return client


# Streams a text for each prompt that it reads, all at once.
CLIENT = """
import asyncio, json, sys
import httpx

async def stream(http, prompt):
    body = {"prompt": prompt, "max_tokens": int(sys.argv[2]), "stream": True, "temperature": 0.8, "top_p": 0.95}
    async with http.stream("POST", "/v1/completions", json=body | {"ignore_eos": True}) as response:
        response.raise_for_status()
        async for _ in response.aiter_bytes():
            pass

async def main():
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{sys.argv[1]}", timeout=600) as http:
        await asyncio.gather(*(stream(http, prompt) for prompt in json.load(sys.stdin)))

asyncio.run(main())
"""


class Forced:
    """A constraint that repeats a text, again and again."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def begin(self) -> _ForcedText:
        """Return where a text stands that begins with the first PROMPT tokens."""
        return _ForcedText(self.text)


class _ForcedText:
    def __init__(self, text: list[int]) -> None:
        self._following = self._endless(text)
        self._next = next(self._following)
        self._mask: Tensor | None = None

    @staticmethod
    def _endless(text: list[int]) -> Iterator[int]:
        at = PROMPT
        while True:
            yield text[at % len(text)]
            at += 1

    def mask(self, vocab_size: int) -> Tensor:
        if self._mask is None:
            self._mask = torch.zeros(vocab_size, dtype=torch.bool)
        self._mask.zero_()
        self._mask[self._next] = True
        return self._mask

    def accept(self, token: int) -> None:
        self._next = next(self._following)


def _without_repeats(vocabulary: int) -> list[int]:
    """Return a text in which no three tokens stand twice, though each of them does."""
    return [3 + (i * i + 7 * i * (i % 13)) % (vocabulary - 3) for i in range(1500)]


def _rate(engine: Engine, read: int, pass_time: Callable[[], Any]) -> float:
    """Return the tokens a second of an engine from when so many tokens of prompts are read until a text ends."""
    while engine.stats().prompt_tokens < read:
        pass_time()
    begun, before = time.perf_counter(), engine.stats()
    while engine.stats().finished == before.finished and engine.stats().running:
        pass_time()
    if engine.stats().new_tokens == before.new_tokens:
        raise HymbaError("the texts end before they can be timed: ask for more --tokens")
    return (engine.stats().new_tokens - before.new_tokens) / (time.perf_counter() - begun)


def _wait() -> None:
    time.sleep(0.02)


def _drain(engine: Engine) -> None:
    while engine.stats().running:
        _wait()


@functools.cache
def _tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer whose every token is a word, so that each of them is a text to be sent."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"▁w{i}": i for i in range(vocabulary)}, unk_token="▁w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))


def _note(times: list[float], update: Update) -> None:
    times.append(time.perf_counter())


def _run(engine: Engine) -> None:
    while engine.step():
        pass


def _lines(result: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    through, beside, turn = result["throughput"], result["interference"], result["second_turn"]
    drafts, overhead, http = result["drafts"], result["overhead"], result["http"]
    return [
        f"serving, {settings['config']} {settings['weights']}, {settings['threads']} threads",
        f"  {settings['streams']} streams: {through['tokens_per_second']} tokens/s, {through['ratio']}× one stream's "
        f"{through['one_tokens_per_second']}",
        f"  while a prompt of {settings['long_prompt']} tokens is read: {beside['beside_p99_ms']} ms at the 99th "
        f"percentile, {beside['p99_over_median']}× the median; alone {beside['alone_ms']['median']} ms",
        f"  second turn of a chat of {settings['chat']} tokens: {turn['second_seconds']} s to the first token, "
        f"{turn['ratio']}× faster than the first",
        f"  drafts: {drafts['repeating']['ratio']}× on text that repeats its prompt, "
        f"{drafts['never']['ratio']}× on text that never does",
        f"  a step takes {overhead['step_ms']} ms, the bare one {overhead['bare_step_ms']}: {overhead['share']:.1%} "
        "more",
        f"  over HTTP: {http['tokens_per_second']} tokens/s, {http['share']:.1%} fewer than from the engine alone",
    ]


if __name__ == "__main__":
    main(serving)
