"""What the machine can do, measured anew in each run, and what it is: `python -m benchmarks.machine`.

A benchmark's own numbers say little: the same kernel is fast on one machine and slow on another, and a machine that is
shared changes within the hour. So every run first measures the two floors that a language model meets, how fast memory
is read and how fast matrices are multiplied, and records them beside its results.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import Json, Out, Threads, bar, finish, main, use_threads
from hymba import __version__
from hymba.ops import native

READ_BYTES = 2 << 30  # far more than any cache holds
READ_BYTES_TINY = 256 << 20  # beside a model whose weights stay in cache anyway
PASSES = 7
SQUARE = 4096  # side of the matrices multiplied


class ReadBandwidth:
    """How fast memory is read, by the threads that torch may use; `size` is that of the model measured beside it.

    Each call of :meth:`measure` adds passes, so that a run can look before and after what it times: `passes` are the
    bytes per second of all of them. The memory is anonymous, in huge pages where the system grants them, and given
    back after each measurement.
    """

    def __init__(self, size: str = "1.5b") -> None:
        self.passes: list[float] = []
        self.nbytes = READ_BYTES_TINY if size == "tiny" else READ_BYTES

    def measure(self, passes: int = PASSES) -> float:
        """Read the memory `passes` times and return the median bytes per second of these passes."""
        with mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            values = torch.frombuffer(memory, dtype=torch.float32)
            values.fill_(1.0)
            _read(values)
            measured = [self.nbytes / _seconds(_read, values) for _ in range(passes)]
            del values  # the map cannot close under it
        self.passes += measured
        return statistics.median(measured)

    @property
    def median(self) -> float:
        """Bytes per second, the median of all passes so far."""
        return statistics.median(self.passes)

    def to_record(self) -> dict[str, Any]:
        """Return the fields that a result carries: gigabytes per second, and how far the passes lie apart."""
        return {
            "bandwidth_gb_s": round(self.median / 1e9, 2),
            "bandwidth_best_gb_s": round(max(self.passes) / 1e9, 2),
            "bandwidth_spread": round((max(self.passes) - min(self.passes)) / self.median, 3),
        }


def _read(values: torch.Tensor) -> None:
    """Read all of `values` (n,) float32 once: by the kernels' own reader, or by torch where there are no kernels."""
    library = native.library()
    if library is None:
        values.sum()
    else:
        pointer, count = ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(values.numel())
        library.hymba_read_bandwidth(pointer, count, ctypes.c_int(torch.get_num_threads()))


def matrix_peak(passes: int = PASSES, side: int = SQUARE) -> dict[str, float]:
    """Return the median and the best GFLOP/s of torch's bfloat16 product of two (side, side) matrices."""
    a, b = (torch.ones(side, side, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    speeds = [2 * side**3 / _seconds(torch.matmul, a, b) / 1e9 for _ in range(passes)]
    return {"median": round(statistics.median(speeds), 1), "best": round(max(speeds), 1)}


def _seconds(work: Any, *arguments: Any) -> float:
    begun = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begun


def describe() -> dict[str, Any]:
    """Return what the machine is and what runs on it."""
    return {
        "device": slug(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "kernels": native.level() or f"none: {native.why_not()}",
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
            "hymba": __version__,  # whether installed or run from its sources
        },
    }


def slug() -> str:
    """Return a short name of the machine, such as "xeon-sapphire-rapids-2c": what results are filed under."""
    words = "".join(x if x.isalnum() else " " for x in cpu_name().lower().replace("(r)", "").replace("(tm)", ""))
    kept = [word for word in words.split() if word not in ("intel", "amd", "cpu", "processor", "with", "core")]
    return "-".join([*kept[:4], *_generation(), f"{os.cpu_count()}c"])


def cpu_name() -> str:
    """Return the processor's own name, which a virtual machine may have made vague."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _generation() -> list[str]:
    """Return the generation of a Xeon whose name is hidden, told by its instructions."""
    flags = _cpuinfo("flags").split()
    if any(x.isdigit() for x in cpu_name()) or "amx_tile" not in flags:
        return []
    return ["granite-rapids"] if "amx_fp16" in flags else ["sapphire-rapids"]


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")


def machine(threads: Threads = None, as_json: Json = False, out: Out = None) -> None:
    """Measure what the machine can do: read bandwidth, matrix products; and say what it is."""
    use_threads(threads)
    bandwidth = ReadBandwidth()
    with bar("measuring the machine", 2) as step:
        bandwidth.measure()
        step()
        peak = matrix_peak()
        step()
    result = bandwidth.to_record() | {"matrix_gflops": peak}
    lines = [
        f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, kernels: {describe()['kernels']}",
        f"reads {result['bandwidth_gb_s']} GB/s (passes differ by {result['bandwidth_spread']:.0%})",
        f"multiplies bfloat16 matrices at {peak['median']} GFLOP/s, at best {peak['best']}",
    ]
    finish("machine", {}, result, lines, as_json, out)


if __name__ == "__main__":
    main(machine)
