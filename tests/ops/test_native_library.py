"""The C++ library: how it is found, refused, chosen and explained, and that it builds from nothing."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hymba.errors import HymbaError
from hymba.ops import backend, native
from hymba.ops.backend import explain, selected, use_backend
from hymba.ops.native import build
from hymba.ops.selective_scan import IMPLEMENTATIONS


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_every_built_level_counts_threads_alike() -> None:
    x = torch.arange(200_001, dtype=torch.float32) % 7
    for level in native.available():
        sum_of = native.load(level).hymba_read_bandwidth
        sums = [sum_of(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), threads) for threads in (1, 2, 3)]
        assert sums[0] == sums[1] == sums[2] == pytest.approx(float(x.sum()))


def test_kernels_fork_in_torchs_own_pool() -> None:
    """Two pools would fight for the cores: after both have run on two threads, no more than one thread was added."""
    program = """
import ctypes, os, torch
from hymba.ops import native
torch.set_num_threads(2)
x = torch.ones(1 << 22)
x.add_(1)
before = len(os.listdir("/proc/self/task"))
native.library().hymba_read_bandwidth(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), 2)
x.add_(1)
print(len(os.listdir("/proc/self/task")) - before)
"""
    if sys.platform == "linux" and native.library() is not None:
        assert run(program).stdout.strip() == "0"


def test_the_environment_turns_kernels_off() -> None:
    program = """
from hymba.ops import native
from hymba.ops.backend import explain
from hymba.ops.selective_scan import IMPLEMENTATIONS
print(native.library(), native.level() == "", explain(IMPLEMENTATIONS, "cpu"))
"""
    assert run(program, HYMBA_NATIVE="0").stdout.strip() == "None True HYMBA_NATIVE=0 turns the C++ kernels off"


def test_a_cpu_without_kernels_says_so_in_one_line_and_once(tmp_path: Path) -> None:
    program = (
        "import torch; from hymba.ops.rms_norm import rms_norm; [rms_norm(*2 * (torch.ones(3),), 0) for _ in range(3)]"
    )
    told = run(program, HYMBA_KERNELS=str(tmp_path), HYMBA_NATIVE="1").stderr.splitlines()
    assert len(told) == 1
    assert told[0].startswith("running without C++ kernels, several times slower: the C++ kernels are not built")
    assert run(program, HYMBA_NATIVE="0").stderr == ""


def test_the_environment_picks_a_level() -> None:
    program = "from hymba.ops import native; print(native.library() is not None, native.level())"
    for level in native.available():
        assert run(program, HYMBA_SIMD=level, HYMBA_NATIVE="1").stdout.strip() == f"True {level}"
    assert "HYMBA_SIMD takes one of" in run(program, HYMBA_SIMD="mmx", HYMBA_NATIVE="1").stderr


def test_kernels_come_first_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backend._WHY_NOT, "triton", lambda: "no GPU")
    if native.library() is not None:
        assert selected(IMPLEMENTATIONS, "cpu") == "native"
        assert explain(IMPLEMENTATIONS, "cpu") == f"C++ kernels, {native.level()}"
    assert selected(IMPLEMENTATIONS, "cuda") == "cpu"
    assert explain(IMPLEMENTATIONS, "cuda") == "no GPU"


def test_a_missing_or_foreign_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYMBA_NATIVE", raising=False)
    monkeypatch.setattr(build, "library_path", lambda level: tmp_path / f"{level}.so")
    for clear in (native.load, native._reason_against, native._chosen):
        monkeypatch.setattr(native, clear.__name__, clear.__wrapped__)
    assert native.library() is None
    assert "not built" in native.why_not()
    with pytest.raises(HymbaError, match="not built"):
        native.load("portable")
    (tmp_path / "portable.so").write_text("not a library")
    assert "do not load" in native._reason_against("portable")
    monkeypatch.setattr(native, "_chosen", lambda: (None, "no kernels"))
    with use_backend("native"), pytest.raises(HymbaError, match="no kernels"):
        selected(IMPLEMENTATIONS, "cpu")


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_reason_against", native._reason_against.__wrapped__)
    monkeypatch.setattr(build, "fingerprint", lambda: "other")
    assert native.library() is None or "older than their sources" in native._reason_against("portable")


def test_a_missing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found"):
        build.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_builds_from_nothing(tmp_path: Path) -> None:
    try:
        built = build.build(tmp_path)
    except build.BuildError:
        assert not any(map(shutil.which, ("g++", "clang++", "c++")))
        return
    assert [path.name for path in built] == [f"hymba_{level}.so" for level in build.levels()]
    assert all(hasattr(ctypes.CDLL(str(built[0])), name) for name in ("hymba_supports", "hymba_selective_scan_forward"))
