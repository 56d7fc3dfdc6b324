"""`hymba batch`: every line answered exactly once, whatever interrupts it, as over HTTP."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint import write_checkpoint
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from hymba.cli import app as command_line
from hymba.errors import HymbaError
from hymba.inference import EngineOptions
from hymba.serving.batch import Answers, Groups, Item, Tally, answer_here, parse_line, read_items, run, survey
from hymba.serving.service import Service, name_of
from hymba.serving.settings import Settings


def request(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"prompt": "The sea", "max_tokens": 4, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_with_nothing(items: Iterator[Item]) -> Groups:
    for item in items:
        yield [{"id": item.id, "custom_id": item.custom_id, "response": None, "error": item.problem}]


def answer(source: Path, target: Path) -> Tally:
    return run(source, target, answer_with_nothing, lambda tally: None)


def begin(source: Path, target: Path, pause: float = 0.0) -> BaseProcess:
    """Start a run without an engine in a process of its own: two answers a group, each telling its request."""

    def answering(items: Iterator[Item]) -> Groups:
        while group := list(islice(items, 2)):
            time.sleep(pause)
            yield [
                {"id": i.id, "custom_id": i.custom_id, "response": i.body.decode() * 50, "error": None} for i in group
            ]

    process = multiprocessing.get_context("fork").Process(
        target=run, args=(source, target, answering, lambda tally: None)
    )
    process.start()
    return process


def finish(process: BaseProcess) -> int | None:
    process.join(30)
    return process.exitcode


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 7 is not JSON"),
        ("[" * 100_000, "line 7 is not JSON"),
        ("\udcff", "line 7 is not JSON"),
        ("[]", 'no object with a "custom_id"'),
        ("{}", 'no object with a "custom_id"'),
        ('{"custom_id": 3}', 'no object with a "custom_id"'),
        ('{"custom_id": "a"}', '"method" must be "POST"'),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/embeddings"}', '"url" must be /v1/chat/completions or'),
        ('{"custom_id": "a", "method": "POST", "url": ["/v1/completions"]}', '"url" must be'),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions"}', '"body" must be an object'),
        (
            '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"stream": true}}',
            '"stream" has no meaning in a batch',
        ),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: str, problem: str) -> None:
    item = parse_line(7, line.encode(errors="surrogateescape"))
    assert item.problem is not None
    assert problem in item.problem


def test_blank_lines_ends_of_lines_and_a_byte_order_mark_mean_nothing(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", request("a"), request("b"))
    other = tmp_path / "other"
    other.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n\r\n  \n").rstrip())
    assert [item.id for item in read_items(plain)] == [item.id for item in read_items(other)]
    assert [item.line for item in read_items(other)] == [1, 4]


def test_a_custom_id_given_twice_is_an_error_with_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a"), request("b"), "", request("a"), request("b"))
    with pytest.raises(HymbaError, match=r"'a' in lines 1 and 4, 'b' in lines 2 and 5"):
        survey(source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_requests_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "in").write_text(content)
    with pytest.raises(HymbaError, match="holds no request"):
        survey(tmp_path / "in")


def test_lines_that_repeat_without_an_id_are_answered_each(tmp_path: Path) -> None:
    source = write(tmp_path / "in", "{", "{", request("a"))
    assert answer(source, tmp_path / "out").done == 3
    assert answer(source, tmp_path / "out").done == 3
    assert [line["custom_id"] for line in read(tmp_path / "out")] == [None, None, "a"]


@pytest.mark.parametrize("torn", ['{"id": "batch', "x", '{"id": "y"}', "\0\0\0"])
def test_a_torn_last_line_is_answered_again(tmp_path: Path, torn: str) -> None:
    source, target = write(tmp_path / "in", request("a"), request("b")), tmp_path / "out"
    answer(source, target)
    whole = target.read_text()
    target.write_text(whole.splitlines(keepends=True)[0] + torn)
    answer(source, target)
    assert target.read_text() == whole


def test_more_requests_may_be_added(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", request("a")), tmp_path / "out"
    answer(source, target)
    write(source, request("b"), request("a"))
    assert answer(source, target) == Tally(total=2, done=2)
    assert [line["custom_id"] for line in read(target)] == ["a", "b"]


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        ("hello\n", "line 1, is no answer of a batch"),
        ("[]\n", "line 1, is no answer of a batch"),
        (json.dumps(request("a")) + "\n", "line 1, is no answer of a batch"),
        ('{"id": "batch_req_0", "custom_id": "a"}\n', "line 1, answers another request 'a'"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, out: str, problem: str) -> None:
    source, target = write(tmp_path / "in", request("a")), tmp_path / "out"
    target.write_text(out)
    with pytest.raises(HymbaError, match=problem):
        answer(source, target)
    assert target.read_text() == out


def test_a_request_that_has_changed_is_refused(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", request("a"), request("b")), tmp_path / "out"
    answer(source, target)
    write(source, request("a"), request("b", max_tokens=5))
    with pytest.raises(HymbaError, match="line 2, answers another request 'b' than the input holds"):
        answer(source, target)


def test_requests_and_answers_are_two_files(tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a"))
    with pytest.raises(HymbaError, match="cannot go to the file that holds the requests"):
        answer(source, source)
    with pytest.raises(HymbaError, match="not a regular file"):
        answer(source, Path(os.devnull))
    with pytest.raises(HymbaError, match="not a regular file"):
        answer(Path(os.devnull), tmp_path / "out")


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", request("a")), tmp_path / "out"
    with Answers(target), pytest.raises(HymbaError, match="another run is writing"):
        answer(source, target)
    assert answer(source, target).done == 1


def test_killed_at_any_moment_every_line_is_answered_once(tmp_path: Path) -> None:
    names = [f"request {number}" for number in range(300)]
    source, target = write(tmp_path / "in", *(request(name) for name in names)), tmp_path / "out"
    moments, kills = random.Random(0), 0
    for _ in range(100):
        process = begin(source, target, 0.004)
        held = target.stat().st_size if target.exists() else 0
        while process.is_alive() and (not target.exists() or target.stat().st_size == held):
            time.sleep(0.002)  # until this run has written something
        time.sleep(moments.random() * 0.05)
        process.kill()
        kills += finish(process) == -signal.SIGKILL
        if moments.random() < 0.5:  # as a crash of the machine would leave it
            with target.open("ab") as file:
                file.write(b'{"id": "batch_r')
        if len(target.read_bytes().splitlines()) > len(names):
            break
    assert finish(begin(source, target)) == 0
    assert kills > 3
    assert sorted(line["custom_id"] for line in read(target)) == sorted(names)
    assert all(json.loads(line["response"][: len(line["response"]) // 50]) for line in read(target))


def test_ctrl_c_leaves_whole_lines(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", *(request(f"{n}") for n in range(100))), tmp_path / "out"
    process = begin(source, target, 0.02)
    while not target.exists() or not target.stat().st_size:
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGINT)
    assert finish(process) == 1
    begun = len(read(target))
    assert 0 < begun < 100
    assert finish(begin(source, target)) == 0
    assert len({line["custom_id"] for line in read(target)}) == len(read(target)) == 100


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", *(request(f"{n}") for n in range(20))), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # writes beyond fail, as on a disk without room
    try:
        with pytest.raises(HymbaError, match=r"cannot write .*out: File too large; what it holds is whole"):
            answer(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    begun = len(read(target))
    assert 0 < begun < 20
    assert answer(source, target).done == 20
    assert len({line["custom_id"] for line in read(target)}) == len(read(target)) == 20


def test_what_is_done_asks_nothing_of_a_model(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in", request("a")), tmp_path / "out"
    answer(source, target)
    code, _, err = batch("no/such/directory", source, target)
    assert (code, err) == (0, f"{target} answers 1 of 1 requests\n")


# ---- With an engine ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "micro")


def batch(model: Path | str, source: Path, target: Path, *more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command."""
    result = CliRunner().invoke(
        command_line, ["batch", str(source), "--out", str(target), "--model", str(model), *more]
    )
    return result.exit_code, result.stdout, result.stderr


def test_a_body_means_what_it_means_over_http(checkpoint: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 5, "seed": 3, "n": 2}
    lines = {
        "plain": request("plain"),
        "drawn": request("drawn", temperature=1.0, seed=7, max_tokens=9),
        "chat": request("chat") | {"url": "/v1/chat/completions", "body": chat},
        "unknown field": request("unknown field", colour="red"),
        "no prompt": request("no prompt") | {"body": {}},
        "too long": request("too long", prompt="sea " * 3000),
        "another model": request("another model", model="gpt-5"),
    }
    assert batch(checkpoint, write(tmp_path / "in", *lines.values()), tmp_path / "out")[0] == 0
    engine, app = Service(str(checkpoint), settings=Settings(model_name=name_of(str(checkpoint)))).start()
    with TestClient(app) as client:
        for line in read(tmp_path / "out"):
            asked = lines.pop(line["custom_id"])
            there = client.post(asked["url"], json=asked["body"])
            assert line["response"]["status_code"] == there.status_code
            assert without_names(line["response"]["body"]) == without_names(there.json())
            told = there.json().get("error")
            assert line["error"] == (told and {"code": told["code"] or told["type"], "message": told["message"]})
    engine.stop()
    assert not lines


def without_names(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created")}


def test_bad_lines_are_answered_beside_good_ones(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", "{", request("good"), "[]", request("bad", max_tokens=-1))
    code, out, err = batch(checkpoint, source, tmp_path / "out")
    assert (code, out, err) == (0, "", f"{tmp_path / 'out'} answers 4 of 4 requests, 3 of them with an error\n")
    told = {(line["custom_id"], line["error"] is None, line["response"] is None) for line in read(tmp_path / "out")}
    assert told == {(None, False, True), ("good", True, False), ("bad", False, False)}


def test_more_requests_than_rows_and_queue(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", *(request(f"{n}", max_tokens=2, n=9) for n in range(12)))
    assert batch(checkpoint, source, tmp_path / "out", "--max-rows", "2")[0] == 0
    assert [line["response"]["status_code"] for line in read(tmp_path / "out")] == [200] * 12


def test_an_engine_that_dies_ends_the_run_and_not_the_requests(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503})
        await send({"type": "http.response.body", "body": b'{"error": {"message": "gone", "code": "engine_dead"}}'})

    engine: Any = SimpleNamespace(
        dead="RuntimeError: out of memory", options=EngineOptions(), stop=lambda timeout: None
    )
    source, target = write(tmp_path / "in", request("a")), tmp_path / "out"
    with pytest.raises(HymbaError, match="the engine stopped: RuntimeError: out of memory; the same command goes on"):
        run(source, target, partial(answer_here, engine, app), lambda tally: None)
    assert target.read_bytes() == b""


def test_a_bad_model_or_file_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in", request("a"))
    for model, requests, problem in [
        (tmp_path / "none", source, "no such directory"),
        (checkpoint, tmp_path / "none", "none: No such file or directory"),
        (checkpoint, write(tmp_path / "empty"), "holds no request"),
    ]:
        code, _, err = batch(model, requests, tmp_path / "out")
        assert (code, err.count("\n")) == (1, 1)
        assert err.startswith("error: ")
        assert problem in err


@pytest.mark.parametrize(("package", "extra"), [("ray", "cluster"), ("fastapi", "serve")])
def test_a_package_that_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("hymba.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    source = write(tmp_path / "in", request("a"))
    code, _, err = batch("tiny", source, tmp_path / "out", "--replicas", "2")
    assert (code, err) == (1, f"error: {package} is not installed, and this needs it: pip install 'hymba[{extra}]'\n")


@pytest.mark.slow
def test_the_command_killed_and_interrupted_answers_everything_once(tmp_path: Path) -> None:
    names = [f"request {number}" for number in range(60)]
    source, target = write(tmp_path / "in", *(request(name, max_tokens=100) for name in names)), tmp_path / "out"
    command = [sys.executable, "-c", "from hymba.cli import main; main()", "batch", str(source), "--out", str(target)]
    for lines, number, code in ((10, signal.SIGKILL, -signal.SIGKILL), (30, signal.SIGINT, 130)):
        process = subprocess.Popen(command)
        while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < lines):
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == code
    assert subprocess.run(command).returncode == 0
    assert sorted(line["custom_id"] for line in read(target)) == sorted(names)
    assert all(line["response"]["status_code"] == 200 for line in read(target))
