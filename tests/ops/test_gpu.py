"""Where no Triton kernel can run, the torch path does, and `hymba info` says why."""

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch

from hymba.cli.info import OPS, _describe_op
from hymba.ops import gpu, probe
from hymba.ops.backend import selected


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The answer is kept for a process; and Triton, which may be interpreted in tests, is not."""
    gpu.why_not.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # asks for no GPU
    yield
    monkeypatch.undo()
    gpu.why_not.cache_clear()


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert gpu.why_not().startswith("Triton does not load: ")


class Broken:
    """Finds Triton, and fails to load it."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name == "triton":
            raise OSError("libcuda.so.1: cannot open\nshared object file")


def test_with_a_broken_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert gpu.why_not() == "Triton does not load: libcuda.so.1: cannot open"


def test_with_an_old_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("triton"), "__version__", "3.3.1")
    assert "Triton 3.3.1 is older than 3.4" in gpu.why_not()


def no_compiler() -> None:
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def test_without_a_c_compiler_and_what_is_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run", no_compiler)
    reason = gpu.why_not()
    assert reason.startswith("Triton does not work here: Failed to find C compiler.")
    for name in OPS:
        implementations = import_module(f"hymba.ops.{name}").IMPLEMENTATIONS
        told = _describe_op(name, "cuda")
        assert told["in_use"] == selected(implementations, "cuda") != "triton"
        if "triton" in implementations:
            assert told["why"] == reason


def test_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYMBA_TRITON", "0")
    assert gpu.why_not() == "HYMBA_TRITON=0 turns the Triton kernels off"


def test_without_a_gpu_and_with_one_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.why_not() == "no NVIDIA GPU is in reach of torch"
    gpu.why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compute capability 7.5: the kernels need 8.0" in gpu.why_not()


def test_what_no_kernel_takes() -> None:
    assert "torch.float64" in gpu.why_unfit(torch.zeros(1, dtype=torch.float64))
    assert "torch.int32" in gpu.why_unfit(torch.zeros(1, dtype=torch.int32))
