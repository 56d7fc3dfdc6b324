"""Many requests from a file, their answers into another, each exactly once: OpenAI's batch format.

An answer is appended to OUT as soon as it is there, so answers stand in the order in which requests ended. Its
"id" is made of the request's line: OUT alone tells what is done, whenever a run was interrupted, and a request
that has changed since it was answered is noticed.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import stat
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hymba.errors import HymbaError
from hymba.serving.inprocess import App, Call, fetch

if TYPE_CHECKING:
    from hymba.inference import Engine

PATHS = ("/v1/chat/completions", "/v1/completions")
NAMED = 5  # doubles that an error lists
AHEAD = 2  # requests under way for each row of the engine, so that none stays empty


@dataclass(frozen=True)
class Item:
    """A line of IN.

    line: its number, from 1.
    id: of its answer, made of the line itself; of its number too where it has no custom_id.
    body: JSON, as it would be posted to `path`.
    problem: why it cannot be asked, else None.
    """

    line: int
    id: str
    custom_id: str | None
    path: str = ""
    body: bytes = b""
    problem: str | None = None


@dataclass
class Tally:
    """How far a run is: lines of IN, those that OUT answers, and those of this run that were answered with an error."""

    total: int
    done: int
    failed: int = 0


def read_items(path: Path) -> Iterator[Item]:
    """Yield the requests of a file one by one; blank lines are none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.strip().removeprefix(b"\xef\xbb\xbf")
            if text:
                yield parse_line(number, text)


def parse_line(number: int, text: bytes) -> Item:
    """Return the request that a line holds, or what is wrong with it."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Item(number, _answer_id(b"%d %b" % (number, text)), None, problem=f"line {number} is not JSON: {error}")
    custom_id = given.get("custom_id") if isinstance(given, dict) else None
    if not isinstance(custom_id, str) or not custom_id:
        nameless = f'line {number} is no object with a "custom_id", a text that is not empty'
        return Item(number, _answer_id(b"%d %b" % (number, text)), None, problem=nameless)
    if problem := _find_problem(given):
        return Item(number, _answer_id(text), custom_id, problem=f"line {number}: {problem}")
    return Item(number, _answer_id(text), custom_id, given["url"], json.dumps(given["body"]).encode())


def _find_problem(given: dict[str, Any]) -> str | None:
    if given.get("method") != "POST":
        return '"method" must be "POST"'
    if given.get("url") not in PATHS:
        return f'"url" must be {" or ".join(PATHS)}'
    if not isinstance(given.get("body"), dict):
        return '"body" must be an object'
    if given["body"].get("stream"):
        return '"stream" has no meaning in a batch'
    return None


def _answer_id(text: bytes) -> str:
    return f"batch_req_{hashlib.sha256(text).hexdigest()[:32]}"


async def answer(app: App, item: Item) -> dict[str, Any]:
    """Return the line of OUT that answers `item`, asked of `app` as over HTTP.

    `error` tells of every request that did not get its text; `response` is what HTTP would have said, or null
    where the line could not be asked at all.
    """
    line: dict[str, Any] = {"id": item.id, "custom_id": item.custom_id, "response": None, "error": None}
    if item.problem:
        return line | {"error": {"code": "invalid_request", "message": item.problem}}
    head, content = await fetch(app, Call("POST", item.path, body=item.body))
    body = json.loads(content)
    line["response"] = {"status_code": head.status, "request_id": uuid.uuid4().hex, "body": body}
    if head.status != 200:
        told = body.get("error") if isinstance(body, dict) else None
        told = told if isinstance(told, dict) else {"message": str(body)}
        line["error"] = {"code": str(told.get("code") or told.get("type")), "message": told.get("message")}
    return line


async def answer_all(app: App, items: Iterator[Item], parallel: int) -> AsyncGenerator[list[dict[str, Any]], None]:
    """Yield answers in the groups in which they come, `parallel` requests being under way at a time."""
    running: set[asyncio.Task[dict[str, Any]]] = set()
    try:
        while True:
            while len(running) < parallel and (item := next(items, None)) is not None:
                running.add(asyncio.create_task(answer(app, item)))
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            yield [task.result() for task in done]
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class Answers:
    """OUT, open for one run at a time: read what it holds, then append.

    Every line in it is whole: one that a killed run left half written is cut off here.

    Raises:
        HymbaError: it is no regular file, or another run is writing it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._claim()
        except BaseException:
            os.close(self._file)
            raise

    def _claim(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise HymbaError(f"{self._path} is not a regular file: an interrupted batch could not be resumed from it")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HymbaError(f"another run is writing {self._path}: wait for it, or choose another --out") from error

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read_done(self, asked: set[str]) -> set[str]:
        """Return the ids of the answers that are there, and cut off a last line that is torn.

        Args:
            asked: the ids of all answers that IN asks for.

        Raises:
            HymbaError: there is a line that answers no request of IN.
        """
        done: set[str] = set()
        end = 0
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    done.add(self._identify(number, line, asked))
                    end += len(line)
        os.ftruncate(self._file, end)
        return done

    def _identify(self, number: int, line: bytes, asked: set[str]) -> str:
        given = None
        with suppress(ValueError):
            given = json.loads(line)
        name = given.get("id") if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(name, str):
            raise HymbaError(f"{self._path}, line {number}, is no answer of a batch: choose another --out")
        if name not in asked:
            raise HymbaError(
                f"{self._path}, line {number}, answers another request {given.get('custom_id')!r} than the input "
                "holds, which has changed since: choose another --out"
            )
        return name

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Write answers and wait until the disk has them; all of them or, on a full disk, none.

        Raises:
            HymbaError: they cannot be written.
        """
        data = memoryview("".join(json.dumps(line) + "\n" for line in lines).encode())
        end = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, end)
            raise HymbaError(
                f"cannot write {self._path}: {error.strerror}; what it holds is whole, and the same command goes on"
            ) from error


def survey(path: Path) -> set[str]:
    """Return the ids of all answers that IN asks for.

    Raises:
        HymbaError: a custom_id was given twice, or there is no request.
    """
    asked: set[str] = set()
    lines: dict[str, int] = {}
    doubles: list[str] = []
    for item in read_items(path):
        if item.custom_id is not None and lines.setdefault(item.custom_id, item.line) != item.line:
            doubles.append(f"{item.custom_id!r} in lines {lines[item.custom_id]} and {item.line}")
        asked.add(item.id)
    if doubles:
        more = f" and {len(doubles) - NAMED} more" if len(doubles) > NAMED else ""
        raise HymbaError(f"{path} gives a custom_id twice: {', '.join(doubles[:NAMED])}{more}")
    if not asked:
        raise HymbaError(f"{path} holds no request")
    return asked


Groups = Generator[list[dict[str, Any]], None, None]  # lines of OUT, as they come
Answering = Callable[[Iterator[Item]], Groups]


def run(source: Path, target: Path, answering: Answering, report: Callable[[Tally], None]) -> Tally:
    """Answer what IN asks and OUT does not answer yet.

    Args:
        answering: takes requests and yields groups of their answers, such as :func:`answer_here` with an engine.
            It is not called when nothing is left to answer.
        report: is called after each group that has been written.

    Raises:
        HymbaError: IN or OUT is unusable, OUT cannot be written, or the engine died. OUT stays whole, and the same
            call goes on.
    """
    if source.exists() and not source.is_file():
        raise HymbaError(f"{source} is not a regular file: it is read twice, and again by a run that goes on")
    if target.exists() and target.samefile(source):
        raise HymbaError("the answers cannot go to the file that holds the requests: choose another --out")
    asked = survey(source)
    with Answers(target) as answers:
        done = answers.read_done(asked)
        tally = Tally(len(asked), len(done))
        report(tally)
        if len(done) < len(asked):
            left = (item for item in read_items(source) if item.id not in done)
            with closing(answering(left)) as groups:
                for lines in groups:
                    answers.append(lines)
                    tally.done += len(lines)
                    tally.failed += sum(line["error"] is not None for line in lines)
                    report(tally)
    return tally


def answer_here(engine: Engine, app: App, items: Iterator[Item]) -> Groups:
    """Yield groups of answers from an engine in this process and the app before it, and stop the engine.

    Raises:
        HymbaError: the engine died.
    """
    groups = answer_all(app, items, AHEAD * engine.options.max_rows)

    async def advance() -> list[dict[str, Any]] | None:
        return await anext(groups, None)

    with asyncio.Runner() as runner:
        try:
            while (lines := runner.run(advance())) is not None:
                if engine.dead:
                    raise HymbaError(f"the engine stopped: {engine.dead}; the same command goes on from here")
                yield lines
        finally:
            runner.run(groups.aclose())
            engine.stop(timeout=0)
