"""The benchmarks run, at toy sizes, and their tables show the newest results and nothing else."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.command import main
from benchmarks.machine import slug
from benchmarks.models import kv_bytes, random_model, random_tokens, state_bytes, weight_bytes
from benchmarks.prefill import parse_lengths, prompt_flops
from benchmarks.report import BEGIN, END, documents, stale_documents
from benchmarks.results import MISSING, devices
from benchmarks.timing import Spent, alternate, timed_kernels, timed_ops
from hymba.errors import HymbaError
from hymba.model import HymbaConfig
from hymba.model.cache import cache_nbytes
from hymba.ops import native

ROOT = Path(__file__).parent.parent
COMMON = {"name", "settings", "command", "date", "commit", "machine"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)


def measured(*words: str) -> dict[str, Any]:
    """What a benchmark prints last."""
    finished = run(*words, "--json")
    assert finished.returncode == 0, finished.stderr
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def test_decode_tells_what_it_promises(tmp_path: Path) -> None:
    words = ("--config", "tiny", "--context", "32", "--tokens", "4", "--threads", "1", "--out", str(tmp_path))
    result = measured("benchmarks.decode", *words)
    wanted = {"tokens_per_second", "step_ms", "bytes_per_token", "bandwidth_gb_s", "share_of_bandwidth", "overhead"}
    assert result.keys() >= COMMON | wanted | {"peak_rss", "kernel_shares"}
    assert result["command"] == "python -m benchmarks.decode --config tiny --context 32 --tokens 4 --threads 1"
    assert result["step_ms"]["best"] <= result["step_ms"]["median"]
    assert 0 < result["peak_rss"] < 8e9
    if native.library() is not None:
        assert result["kernel_calls"] > 0
        assert 0 < result["overhead"] < 1
    (written,) = tmp_path.glob(f"{slug()}/{result['date'][:10]}-{result['commit']}-decode-tiny-bf16-32context.json")
    assert json.loads(written.read_text()) == result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("machine --threads 1", {"bandwidth_gb_s", "matrix_gflops"}),
        ("prefill --config tiny --tokens 16,48 --repeat 1", {"tokens_per_second", "curve", "bandwidth_gb_s"}),
        ("decode --config tiny --rows 2 --context 8 --tokens 2 --weights bf16", {"tokens_per_second", "overhead"}),
        ("ops --config tiny --only conv --seconds 0.01", {"ops", "matrix_gflops", "bandwidth_gb_s"}),
        ("training --rows 1 --length 32 --repeat 1 --threads 1", {"tokens_per_second", "step_ms", "speedup"}),
        (
            "serving --config tiny --streams 2 --tokens 200 --long-prompt 80 --chat 90 --repeat 1 --threads 1",
            {"throughput", "interference", "second_turn", "drafts", "overhead", "http"},
        ),
        ("soak --clients 3 --seconds 5", {"requests", "rss_growth", "running", "waiting", "same_answers"}),
        ("memory --config tiny --context 64 --threads 1", {"peak_rss", "weight_bytes", "cache_bytes", "beside_bytes"}),
    ],
    ids=lambda value: value.partition(" ")[0] if isinstance(value, str) else "",
)
def test_every_benchmark_runs(words: str, fields: set[str]) -> None:
    name, *rest = words.split()
    assert measured(f"benchmarks.{name}", *rest).keys() >= COMMON | fields


@pytest.mark.slow
def test_peers_are_compared_and_leave_nothing_behind(tmp_path: Path) -> None:
    words = "--config tiny --context 16 --tokens 2 --rounds 1 --threads 1 --only tiny-bf16,llama-3.2-1b --store"
    result = measured("benchmarks.peers", *words.split(), str(tmp_path))
    assert list(result["peers"]) == ["hymba-tiny-bf16", "llama-3.2-1b-bf16 (transformers)"]
    assert result["peers"]["hymba-tiny-bf16"]["decode_ratio"] == 1
    assert (tmp_path / "measured.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("prefill --config tiny --tokens 16,x", "cannot read lengths"),
        ("peers --only nothing", "no model has 'nothing' in its name"),
        ("ops --config tiny --only nothing", "no op has 'nothing' in its name"),
    ],
)
def test_errors_are_one_line(
    words: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = words.split()[0]
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit, match="1"):
        main(getattr(importlib.import_module(f"benchmarks.{name}"), name))
    told = capsys.readouterr().err
    assert problem in told
    assert told.count("\n") == 1


def test_bytes_of_a_step_are_those_of_the_model() -> None:
    model = random_model("tiny")
    unread = model.meta_tokens
    assert unread is not None
    assert weight_bytes(model) == sum(p.nbytes for p in model.parameters()) - unread.nbytes
    cache = model.allocate_cache(2, 300)
    whole, lengths = 2 * cache_nbytes(model.config, 300), cache.lengths.nbytes
    keys = sum(x.nbytes for held in (cache.keys, cache.values) for x in held.values())
    assert whole == keys + state_bytes(cache) // 2 + lengths
    shared = sum(cache.keys[o].nbytes + cache.values[o].nbytes for o in model.config.owners)
    assert kv_bytes(cache, 300) == shared
    assert kv_bytes(cache, 10) < kv_bytes(cache, 200) < shared


def test_operations_of_a_prompt_are_those_that_the_mask_allows() -> None:
    config = HymbaConfig.named("tiny")
    without = HymbaConfig.named("tiny", num_meta_tokens=0, sliding_window=10**6)
    length = config.sliding_window + 50
    pairs = sum(
        sum(window is None or i - j <= window for i in range(length) for j in range(i + 1))
        + length * config.num_meta_tokens
        for window in map(config.window, range(config.num_hidden_layers))
    )
    plain = config.num_hidden_layers * length * (length + 1) // 2
    widths = config.num_attention_heads * (config.head_dim + config.v_head_dim)
    assert prompt_flops(config, length) - prompt_flops(without, length) == 2 * widths * (pairs - plain)


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "a", "1.5"])
def test_lengths_are_whole_and_positive(text: str) -> None:
    with pytest.raises(HymbaError, match="cannot read lengths"):
        parse_lengths(text)


def test_clocks_count_what_runs_inside_and_put_everything_back() -> None:
    model = random_model("tiny")
    tokens = random_tokens(model, 1, 1)
    with torch.no_grad():
        cache = model.allocate_cache(1, 8)
        expected = model(tokens, cache=model.allocate_cache(1, 8)).hidden
        with timed_kernels() as kernels, timed_ops() as ops:
            assert torch.equal(model(tokens, cache=cache).hidden, expected)
    assert ops.calls["selective_scan"] == model.config.num_hidden_layers
    counted = dict(kernels.calls)
    assert (sum(counted.values()) > 0) == (native.library() is not None)
    with torch.no_grad():
        model(tokens, cache=cache)
    assert kernels.calls == counted
    assert ops.calls["selective_scan"] == model.config.num_hidden_layers


def test_shares_add_up_and_variants_alternate() -> None:
    spent, order = Spent(), []
    spent.seconds["a"] = 0.25
    assert spent.shares(1.0) == {"a": 0.25, "other": 0.75}
    times = alternate({"x": lambda: order.append("x"), "y": lambda: order.append("y")}, rounds=2)
    assert "".join(order) == "xy" * 3
    assert [len(x) for x in times.values()] == [2, 2]


def test_tables_of_this_repository_are_current() -> None:
    assert stale_documents() == [], "run `python -m benchmarks.report`"


def record(name: str, date: str, **fields: Any) -> dict[str, Any]:
    versions = {"python": "3", "torch": "2"}
    machine = {"cpu": "a cpu", "cores": 2, "threads": 2, "memory_gb": 8.0, "kernels": "avx2", "versions": versions}
    return {"name": name, "date": date, "commit": "abc", "command": "python", "machine": machine, **fields}


def test_the_newest_result_of_a_name_counts_and_the_rest_is_not_guessed(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    folder = tmp_path / "results" / "machine"
    folder.mkdir(parents=True)
    fields = {"settings": {"config": "1.5b", "weights": "bf16", "rows": 1, "context": 512}, "bytes_per_step": 3e9}
    fields |= {"step_ms": {"median": 125.0, "best": 120.0}, "bandwidth_gb_s": 30.0, "overhead": 0.02, "peak_rss": 4e9}
    for date, speed in (("2026-01-02", 7.5), ("2026-01-01", 5.5)):
        one = record("decode-1.5b-bf16", date, tokens_per_second=speed, share_of_bandwidth=0.8, **fields)
        (folder / f"{date}-abc-decode.json").write_text(json.dumps(one))
    assert devices(tmp_path / "results")["machine"]["decode-1.5b-bf16"]["tokens_per_second"] == 7.5
    texts = documents(tmp_path / "results", readme)
    assert "| 7.5 tokens/s | 80% of what memory can read |" in texts[readme]
    assert texts[readme].count(MISSING) > 10
    assert "5.5" not in "".join(texts.values())
    assert stale_documents(tmp_path / "results", readme) == [str(path) for path in texts]
    for path, text in texts.items():
        path.write_text(text)
    assert stale_documents(tmp_path / "results", readme) == []


def test_a_file_that_is_no_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "odd.json").write_text("{}")
    with pytest.raises(HymbaError, match=r"odd\.json is no benchmark's result"):
        devices(tmp_path)
