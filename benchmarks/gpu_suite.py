"""The tests that belong on a GPU, run there, and what came of them as a result like any other.

They are the folder tests/gpu and every test file that runs where `kernels.DEVICE` says. A kernel that hangs, or a clock
that runs out, ends the run: what had been told by then is kept.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.command import ROOT
from hymba.files import replacing

WORKERS = 12  # pytest-xdist's: most of the time goes into compiling kernels
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for the tests that want torch deterministic
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else each worker starts one process a core
}
EVERY = 2.0  # seconds between two writings of what has been told


def files() -> list[str]:
    """Return the test files that run on the device."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in found if f.parent.name == "gpu" or "DEVICE" in f.read_text("utf-8")]


def run_tests(chosen: Sequence[str], seconds: float, workers: int) -> dict[str, Any]:
    """Run test files with pytest for at most `seconds`; return counts by outcome, failures, and how it ended."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        words = [sys.executable, "-m", "benchmarks.gpu_suite", str(told), "-q", *chosen]
        if workers > 1 and find_spec("xdist") is not None:
            words += ["-n", str(workers), "--dist", "worksteal"]
        begun = time.monotonic()
        process = subprocess.Popen(words, cwd=ROOT, env=os.environ | ENVIRONMENT, start_new_session=True)
        try:
            ended = f"pytest ended with {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"out of time after {seconds:.0f} s: what is missing was not measured"
        found = json.loads(told.read_text("utf-8")) if told.is_file() else {"counts": {}, "failures": []}
    passed = ended == "pytest ended with 0"
    return found | {"passed": passed, "ended": ended, "seconds": round(time.monotonic() - begun, 1)}


class Watcher:
    """Pytest's plugin that writes what each test came to, as it goes."""

    def __init__(self, path: Path) -> None:
        self.path, self.counts, self.failures = path, Counter[str](), list[dict[str, str]]()
        self._written = 0.0

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test; called where the workers' reports come together."""
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome if report.when == "call" else f"{report.outcome} in {report.when}"] += 1
        if report.failed:
            self._fail(report.nodeid, report.longreprtext)
        self.write()

    def pytest_collectreport(self, report: Any) -> None:
        """Count a file that does not load."""
        if report.failed:
            self.counts["failed in collection"] += 1
            self._fail(report.nodeid, report.longreprtext)

    def pytest_sessionfinish(self) -> None:
        """Write for the last time."""
        self.write(0.0)

    def _fail(self, name: str, text: str) -> None:
        if len(self.failures) < 200:
            self.failures.append({"test": name, "why": text[-1500:]})
        self.write(0.0)

    def write(self, every: float = EVERY) -> None:
        """Write what there is, not more often than every so many seconds."""
        if time.monotonic() - self._written >= every:
            with replacing(self.path) as partial:
                partial.write_text(json.dumps({"counts": self.counts, "failures": self.failures}), "utf-8")
            self._written = time.monotonic()


if __name__ == "__main__":
    import pytest

    sys.exit(pytest.main(sys.argv[2:], plugins=[Watcher(Path(sys.argv[1]))]))
