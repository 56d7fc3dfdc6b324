"""The GPU's benchmarks run, at toy sizes on a CPU, end in time, go on where they stopped, and fill their tables."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_tables, gpu_timing
from benchmarks.gpu import PARTS, WHOLE
from benchmarks.gpu_attention import attentions
from benchmarks.gpu_ops import CASES, Sizes
from benchmarks.gpu_peers import OURS, halving, ratios
from benchmarks.gpu_suite import files, run_tests
from benchmarks.gpu_timing import LATE, RESTART, Part, sets_for, time_calls
from benchmarks.gpu_training import training_flops
from benchmarks.prefill import prompt_flops
from benchmarks.report import BEGIN, END, documents
from benchmarks.results import MISSING, devices
from hymba.model import HymbaConfig

ROOT = Path(__file__).parent.parent


def not_interpreted() -> dict[str, str]:
    """The environment, without Triton's interpreter, under which whole models would take minutes."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def measured(part: str, *words: str) -> dict[str, Any]:
    """What a part prints last."""
    command = [sys.executable, "-m", "benchmarks.gpu", part, "--toy", "--json", *words]
    done = subprocess.run(command, cwd=ROOT, env=not_interpreted(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def failures(record: dict[str, Any]) -> list[Any]:
    """Items without a number, and implementations that failed in an item."""
    whole = [item for item in record["items"] if "not_measured" in item]
    return whole + [
        item for item in record["items"] for x in item.get("ms", {}).values() if isinstance(x, str) and "failed" in x
    ]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["decode", "prompts", "training", "paper", "ops"])
def test_every_part_runs(words: str) -> None:
    record = measured(*words.split())
    assert record["name"] == f"gpu-{words}-toy"
    assert record["items"]
    assert failures(record) == []
    assert {"copy_gb_s", "matrix_tflops"} == record["ceilings"].keys() or words == "paper"
    if words == "paper":
        assert record["ratios"].keys() == {
            "llama-3.2-3b", "llama-3.2-1b", "qwen2.5-1.5b", "smollm2-1.7b", "falcon-h1-1.5b",
        }  # fmt: skip


@pytest.mark.slow
def test_all_parts_are_written_side_by_side_and_fill_the_page(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "all", "--toy", "--seconds", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=not_interpreted(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (held,) = devices(tmp_path).values()
    assert "gpu-decode-toy" in held  # the others may come to nothing on a machine that is busy
    assert held.keys() <= {f"gpu-{name}-toy" for name, _ in PARTS}
    named = {name.removesuffix("-toy"): record for name, record in held.items()}
    for _, make in gpu_tables.SECTIONS:
        assert "| --- |" in make(named)


@pytest.mark.slow
def test_the_tests_of_the_gpu_pass_on_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say is true of the model; with kernels it takes a GPU to be told in time."""
    monkeypatch.setenv("HYMBA_TRITON", "0")
    chosen = sorted(str(x.relative_to(ROOT)) for x in (ROOT / "tests/gpu").glob("test_*.py"))
    found = run_tests([*chosen, "-k", "not triton and not gradients_of_the_kernels and not in_bfloat16"], 300, 1)
    assert (found["failures"], found["passed"]) == ([], True)
    assert found["counts"]["passed"] > 30


@pytest.mark.slow
def test_tests_of_the_gpu_are_found_and_their_ends_are_told(tmp_path: Path) -> None:
    assert {"tests/gpu/test_gpu_model.py", "tests/gpu/test_gpu_training.py"} <= {*files()}
    (tmp_path / "test_mixed.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    found = run_tests([str(tmp_path)], 60, 1)
    assert found["counts"] == {"passed": 1, "failed": 1}
    assert (found["passed"], found["ended"]) == (False, "pytest ended with 1")
    assert "assert 1 == 2" in found["failures"][0]["why"]
    (tmp_path / "test_mixed.py").write_text("def test_a(): pass\ndef test_b():\n    while True: pass\n")
    found = run_tests([str(tmp_path)], 6, 1)
    assert "out of time" in found["ended"]
    assert not found["passed"]


@pytest.mark.slow
def test_nothing_of_the_gpu_is_collected_without_one() -> None:
    if not torch.cuda.is_available():
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/gpu"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 5  # nothing collected


def part(tmp_path: Path, seconds: float = 60, resume: bool = False) -> Part:
    return Part("gpu-x-toy", {"toy": True}, seconds, tmp_path, resume)


def test_a_part_keeps_what_it_has_and_goes_on(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise ValueError("no such\nkernel")

    def out_of_memory() -> dict[str, Any]:
        raise torch.cuda.OutOfMemoryError("much")

    first = part(tmp_path)
    first.measure([("a", lambda: {"n": 1}), ("b", fail), ("c", out_of_memory)])
    assert {x["item"]: x.get("not_measured", x.get("n")) for x in first.record["items"]} == {
        "a": 1, "b": "ValueError: no such", "c": "out of memory",
    }  # fmt: skip
    late = part(tmp_path, seconds=-1, resume=True)
    late.measure([("a", fail), ("d", lambda: {"n": 2})])
    assert late.record["items"][-1]["not_measured"] == LATE
    last = part(tmp_path, resume=True)
    last.measure([("a", fail), ("b", fail), ("d", lambda: {"n": 3})])
    assert [(x["item"], x.get("n")) for x in last.record["items"]] == [("a", 1), ("b", None), ("c", None), ("d", 3)]
    (written,) = tmp_path.glob("*/*-gpu-x-toy.json")
    assert json.loads(written.read_text())["items"] == last.record["items"]


def test_a_gpu_that_answers_no_more_asks_for_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu_timing._alive", lambda: False)
    with pytest.raises(SystemExit, match=str(RESTART)):
        part(tmp_path).measure([("a", lambda: {"n": 1}), ("b", lambda: {"n": 2})])
    assert [x["item"] for x in part(tmp_path, resume=True).record["items"]] == ["a"]


def test_every_call_is_timed_and_sets_fill_more_than_a_cache() -> None:
    order: list[int] = []
    found = time_calls([lambda i=i: order.append(i) for i in range(4)])  # type: ignore[misc]
    assert order == [0, 1, 2, 3] * (len(order) // 4)
    assert 0 < found["best"] <= found["median"]
    assert sets_for(1) >= 1


class Recorded:
    """A CUDA graph, a stream and an event, as far as the clocks use them."""

    calls: list[str]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> None:
        self.calls.append("recording")

    def __exit__(self, *raised: object) -> None:
        self.calls.append("recorded")

    def replay(self) -> None:
        self.calls.append("replay")

    def elapsed_time(self, other: object) -> float:
        return 6.0

    def nothing(self, *arguments: object) -> None: ...

    wait_stream = record = synchronize = nothing


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU would be asked, without one."""
    calls: list[str] = []
    monkeypatch.setattr(Recorded, "calls", calls, raising=False)
    monkeypatch.setattr(gpu_timing, "_broken", [])
    for name in ("CUDAGraph", "Event", "Stream", "current_stream", "graph", "stream"):
        monkeypatch.setattr(torch.cuda, name, Recorded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "set_stream", "set_sync_debug_mode", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, name=name: calls.append(f"{name} {arguments}"))
    return calls


def test_calls_are_recorded_as_a_graph_or_timed_one_by_one(pretended: list[str]) -> None:
    found = time_calls([lambda: pretended.append("call")] * 3, budget=0.03)
    assert found == {"median": 2.0, "best": 2.0, "by": "graph"}
    assert pretended.count("replay") == 6
    assert pretended[pretended.index("recording", 9) :].count("call") == 3
    pretended.clear()
    assert time_calls([lambda: pretended.append("call")] * 3, budget=0.03, graph=False)["by"] == "events"
    assert "replay" not in pretended


def test_what_waits_for_the_gpu_is_never_recorded(pretended: list[str]) -> None:
    def call() -> None:
        if pretended and pretended[-1] == "recording":
            raise RuntimeError("called a synchronizing operation")

    found = time_calls([call], budget=0.03)
    assert (found["by"], found["no_graph"]) == ("events", "RuntimeError: called a synchronizing operation")
    assert gpu_timing._broken == []
    assert pretended.count("recording") == 1  # the trial aside
    assert "set_sync_debug_mode ('default',)" in pretended


def test_after_a_recording_that_failed_a_new_process_goes_on(pretended: list[str]) -> None:
    def call() -> None:
        if pretended.count("recording") == 2 and "failed" not in pretended:
            pretended.append("failed")
            raise RuntimeError("operation not permitted")

    assert time_calls([call], budget=0.03)["by"] == "events"
    assert not gpu_timing._alive()


def test_rows_are_halved_where_memory_ends() -> None:
    def run(rows: int) -> dict[str, Any]:
        if rows > 20:
            raise torch.cuda.OutOfMemoryError("much")
        return {"rows": rows}

    assert halving(128, run) == {"rows": 16}
    with pytest.raises(torch.cuda.OutOfMemoryError):
        halving(8, lambda rows: run(100))


def test_the_fastest_way_of_a_peer_counts() -> None:
    def item(name: str, way: str, speed: float) -> dict[str, Any]:
        named = name + (f", {way}" if way else "")
        return {"item": named, "way": way, "rows": 8, "tokens_per_second": speed, "cache_mb_a_row": 900.0}

    ours = item(OURS, "", 700.0) | {"cache_mb_a_row": 90.0}
    found = ratios([ours, item("llama-3.2-3b", "graph", 200.0), item("llama-3.2-3b", "static", 100.0)])
    assert found == {
        "llama-3.2-3b": {"way": "graph", "rows": 8, "tokens_per_second": 200.0, "speed": 3.5, "cache": 10.0}
    }
    assert ratios([item("llama-3.2-3b", "graph", 200.0)]) == {}


def test_cases_of_both_sizes_have_names_and_bytes_of_their_own() -> None:
    for toy in (False, True):
        sizes = Sizes.toy_ones() if toy else Sizes(HymbaConfig.named("1.5b"), False)
        cases = [case for make in CASES for case in make(sizes)]  # makes no tensor
        assert len({(case.op, case.size) for case in cases}) == len(cases)
        assert all(case.bytes > 0 for case in cases)
    scan = next(case for case in cases if case.op == "selective_scan")
    one = scan.make()
    assert one["inputs"][0].nbytes * 4 == scan.bytes
    assert [case.op for case in attentions(Sizes.toy_ones())].count("attention of torch") == 4


def test_operations_of_training_are_thrice_those_of_the_prompt_and_every_head() -> None:
    c = HymbaConfig.named("tiny")
    heads = 2 * 63 * c.hidden_size * c.vocab_size
    assert training_flops(c, 3, 64) == 9 * (prompt_flops(c, 64) + heads)


def test_the_whole_fits_the_time_there_is() -> None:
    assert sum(seconds for _, seconds in PARTS) <= WHOLE <= 525
    makefile = (ROOT / "Makefile").read_text()
    assert f"GPU_SECONDS ?= {WHOLE}" in makefile


def gpu_record(name: str, **fields: Any) -> dict[str, Any]:
    machine = {"device": "nvidia-h200", "gpu": "NVIDIA H200", "cpu": "a cpu", "cores": 2, "threads": 2}
    machine |= {"versions": {"torch": "2"}, "memory_gb": 8.0, "kernels": "none"}
    told = {"name": name, "date": "2026-01-01", "commit": "abc", "command": "python", "machine": machine}
    return told | {"settings": {}, "ceilings": {"copy_gb_s": 4300.0, "matrix_tflops": 790.0}, "items": []} | fields


def test_targets_are_read_off_the_results(tmp_path: Path) -> None:
    scan = {"item": "selective_scan: 8×4096×3200×16 forward", "share_of_copy": 0.61, "ms": {}, "speedup": None}
    slow = {"item": "selective_scan: 8×4096×3200×16 backward", "share_of_copy": 0.3, "ms": {}, "speedup": None}
    times = {"triton": {"median": 1.0, "by": "graph"}, "triton, serial in time": {"median": 4.0, "by": "graph"}}
    cut = {"item": "selective_scan: 1×16384×3200×16 forward", "ms": times, "share_of_copy": 0.5}
    late = {"item": "draw: 1", "not_measured": LATE}
    folder = tmp_path / "results" / "nvidia-h200"
    folder.mkdir(parents=True)
    (folder / "a-gpu-ops.json").write_text(json.dumps(gpu_record("gpu-ops", items=[scan, slow, cut, late])))
    tested = {"counts": {"passed": 9}, "failures": [], "passed": True, "ended": "pytest ended with 0"}
    (folder / "a-gpu-tests.json").write_text(json.dumps(gpu_record("gpu-tests", **tested)))
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    texts = documents(tmp_path / "results", readme)
    page = texts[tmp_path / "results" / "README.md"]
    for line in (
        "| Scan forward, 8×4096×3200 | 60% of the copy bandwidth | 61% | reached |",
        "| Scan backward, 8×4096×3200 | 45% of the copy bandwidth | 30% | not reached |",
        "| Scan of 1×16384, against one serial in time | 3× | 4.0× | reached |",
        "| Tests on the GPU | all pass | 100% | reached |",
        f"| Training the 1.5b at 2048 tokens | 40% MFU |  | {MISSING} |",
        LATE,
        "triton, serial in time 4.0000",
    ):
        assert line in page
    assert texts[readme].count(MISSING) > 5  # the table of CPUs takes nothing from a GPU


def test_without_a_gpu_every_target_is_named(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"{BEGIN}\n{END}\n")
    page = documents(tmp_path / "results", readme)[tmp_path / "results" / "README.md"]
    assert all(f"| {target.name} | {target.wanted} |  | {MISSING} |" in page for target in gpu_tables.TARGETS)


def test_a_copy_without_history_can_be_told_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import command

    monkeypatch.setenv("HYMBA_COMMIT", "0123456789abcdef")
    assert command.commit() == "01234567"
    monkeypatch.delenv("HYMBA_COMMIT")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nothing"))
    assert command.commit() == "unknown"
    assert os.environ["GIT_DIR"]
