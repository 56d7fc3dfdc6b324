"""`hymba serve`, as it is typed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live import PATIENCE
from typer.testing import CliRunner

from hymba.cli import app

PROGRAM = "from hymba.cli import main; main()"


@pytest.mark.slow
def test_one_line_then_answers_then_a_quiet_end() -> None:
    command = [sys.executable, "-c", PROGRAM, "serve", "--port", "0", "--max-rows", "2"]
    environment = os.environ | {"HYMBA_API_KEY": "sesame"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = server.stdout.readline()
        [address] = re.findall(r"^tiny is served at (http://127\.0\.0\.1:\d+)$", line.rstrip())
        body = {"prompt": "The sea", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.Client(headers={"Authorization": "Bearer sesame"}, timeout=PATIENCE) as http:
            assert httpx.get(f"{address}/v1/models").status_code == 401
            with http.stream("POST", f"{address}/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                server.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        out, err = server.communicate(timeout=PATIENCE)
        assert (server.returncode, out) == (0, "")
        assert "Traceback" not in err
    finally:
        server.kill()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "guard.txt").write_text("(")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for arguments, problem in (
            (("--port", str(taken.getsockname()[1])), "choose another --host or --port"),
            (("--host", "nowhere.invalid"), "cannot listen on nowhere.invalid"),
            (("--guard", str(tmp_path / "guard.txt")), "is no regular expression"),
            (("--guard", str(tmp_path / "none.txt")), "cannot read"),
            (("--max-length", "99999"), "the model's limit is 2048"),
            ((str(tmp_path / "none"),), "no such directory"),
        ):
            result = CliRunner().invoke(app, ["serve", *arguments])
            assert result.exit_code == 1
            assert problem in result.stderr
            assert result.stderr.splitlines()[-1].startswith("error: ")
