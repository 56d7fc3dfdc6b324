"""What the GPU's benchmarks share: clocks, ceilings, and results that are written as soon as there is something."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks.command import new_record, write_record
from benchmarks.machine import cpu_name, slug
from hymba.ops import gpu

RESTART = 75  # exit code: this process can measure no more, a new one may go on with --resume
COPY_BYTES = 2 << 30
SQUARE = 8192  # side of the matrices multiplied
L2_SHARE = 3  # sets of inputs together are this many times what the cache holds
SETS = 96  # but no more than this
PASSES = 9
LATE = "out of time"

Call = Callable[[], Any]


def device() -> torch.device:
    """Return where things are measured: the GPU, or for trials at toy sizes the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sets_for(nbytes: int) -> int:
    """Return how many sets of inputs of `nbytes` each are read in turn, so that the cache holds none of them."""
    if not torch.cuda.is_available():
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(SETS, -(-L2_SHARE * cache // max(nbytes, 1))))


def time_calls(calls: Sequence[Call], budget: float = 0.12, graph: bool = True) -> dict[str, Any]:
    """Time calls, each on inputs of its own, one after another; return the median and best milliseconds of one.

    On a GPU they are recorded as a CUDA graph and repeated, so that no Python is in between; what cannot be recorded is
    called and timed with events. `by` says which.
    """
    for call in calls:  # compiles
        call()
    if not torch.cuda.is_available():
        return _milliseconds([_clock(calls) for _ in range(3)], len(calls), "clock")
    torch.cuda.synchronize()
    if not graph:
        return _repeat(lambda: [call() for call in calls], len(calls), budget, "events")
    try:
        recorded = record_graph(calls)
    except Exception as error:  # it looks at values on the way, say
        torch.cuda.synchronize()
        found = _repeat(lambda: [call() for call in calls], len(calls), budget, "events")
        return found | {"no_graph": f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"}
    return _repeat(recorded.replay, len(calls), budget, "graph")


def record_graph(calls: Sequence[Call]) -> Any:
    """Return a CUDA graph of `calls`, which have run before.

    Raises:
        RuntimeError: a call waits for the GPU on the way; nothing was recorded.
    """
    before = torch.cuda.current_stream()
    aside = torch.cuda.Stream()
    aside.wait_stream(before)
    torch.cuda.set_sync_debug_mode("error")  # a recording that fails leaves torch's memory in disorder: ask first
    try:
        with torch.cuda.stream(aside):
            calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    before.wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in calls:
                call()
    except Exception:
        _broken.append("a recording failed")
        raise
    finally:
        torch.cuda.set_stream(before)  # where recording fails, torch leaves its own stream in force
    return graph


_broken: list[str] = []  # why this process should measure nothing more


def _repeat(run: Call, calls: int, budget: float, by: str) -> dict[str, Any]:
    first = _events(run)
    count = max(3, min(200, int(budget / max(first, 1e-6))))
    return _milliseconds([_events(run) for _ in range(count)], calls, by)


def _events(run: Call) -> float:
    """Return the seconds that the GPU takes for what `run` starts."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    run()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def _clock(calls: Sequence[Call]) -> float:
    begun = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begun


def _milliseconds(seconds: Sequence[float], calls: int, by: str) -> dict[str, Any]:
    times = [spent * 1e3 / calls for spent in seconds]
    return {"median": round(statistics.median(times), 5), "best": round(min(times), 5), "by": by}


def kernel_times(run: Call, count: int, most: int = 24) -> list[dict[str, Any]] | str:
    """Return the kernels that `count` calls start, by the time they take: microseconds and launches a call.

    Where the profiler does not work, why.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    try:
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
            for _ in range(count):
                run()
            if on_gpu:
                torch.cuda.synchronize()
        field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        spent = sorted(found.key_averages(), key=lambda x: -getattr(x, field))
    except Exception as error:
        return f"the profiler does not work here: {error}"
    return [
        {"kernel": x.key[:100], "us": round(getattr(x, field) / count, 2), "launches": round(x.count / count, 2)}
        for x in spent[:most]
        if getattr(x, field) > 0
    ]


def ceilings(toy: bool) -> dict[str, float]:
    """Return what the device can do: bytes a second of a copy, read and written, and bfloat16 operations a second."""
    count, side = (1 << 20, 128) if toy else (COPY_BYTES, SQUARE)
    place, passes = device(), 3 if toy else PASSES
    source = torch.ones(count, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    copied = time_calls([lambda: target.copy_(source)] * 2, 0.1, graph=False)
    a, b = (torch.randn(side, side, device=place).to(torch.bfloat16) for _ in range(2))
    multiplied = time_calls([lambda: a @ b] * passes, 0.1, graph=False)
    return {
        "copy_gb_s": round(2 * count / copied["median"] / 1e6, 2),
        "matrix_tflops": round(2 * side**3 / multiplied["median"] / 1e9, 3),
    }


def shares(nbytes: float, flops: float, ms: float, ceiling: Mapping[str, float]) -> dict[str, float]:
    """Return what a time in milliseconds makes of the two ceilings."""
    found = {"share_of_copy": round(nbytes / ms / 1e6 / ceiling["copy_gb_s"], 3)}
    if flops:
        found["share_of_matrix"] = round(flops / ms / 1e9 / ceiling["matrix_tflops"], 3)
    return found


class Part:
    """One part of the GPU's benchmarks: items measured one after another, written after each, and an end in time.

    Args:
        name: of the result, such as "gpu-ops".
        seconds: after which nothing new is begun; what is left says so.
        out: the folder of results, or None.
        resume: go on with the items that the result of the same name in `out` already holds.
    """

    def __init__(
        self, name: str, settings: Mapping[str, Any], seconds: float, out: Path | None, resume: bool = False
    ) -> None:
        self.ends, self.out = time.monotonic() + seconds, out
        place = describe_device()
        self.record = new_record(name, settings, {"ceilings": {}, "items": []}) | {"machine": place}
        if resume and (held := self._held()) is not None:
            self.record |= {"items": held["items"], "ceilings": held["ceilings"]}

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.monotonic()

    @property
    def ceilings(self) -> Mapping[str, float]:
        """What the device can do, measured at the first question."""
        if not self.record["ceilings"]:
            self.record["ceilings"] = ceilings(bool(self.record["settings"].get("toy")))
        return dict(self.record["ceilings"])

    def measure(self, items: Iterable[tuple[str, Callable[[], Mapping[str, Any]]]], least: float = 0.0) -> None:
        """Measure what is not there yet; of what fails, the reason is kept. Nothing begins with `least` seconds left.

        Raises:
            SystemExit: this process can measure no more; the code is ``RESTART``.
        """
        done = {item["item"] for item in self.record["items"] if item.get("not_measured") != LATE}
        self.record["items"] = [item for item in self.record["items"] if item["item"] in done]
        for name, run in items:
            if name in done:
                continue
            begun = time.monotonic()
            found: Mapping[str, Any] = {"not_measured": LATE}
            if self.left > least:
                found = _attempt(run)
            self.add(name, found, time.monotonic() - begun)
            if not _alive():
                why = _broken[0] if _broken else "the GPU answers no more"
                typer.secho(f"{why}: a new process goes on with --resume", fg="yellow", err=True)
                sys.exit(RESTART)

    def add(self, name: str, found: Mapping[str, Any], spent: float) -> None:
        """Keep and tell one result."""
        self.record["items"].append({"item": name, **found, "spent_s": round(spent, 1)})
        typer.echo(f"{spent:6.1f} s  {name}: {_brief(found)}")
        self.write()

    def write(self) -> None:
        """Write what there is."""
        if self.out is not None:
            write_record(self.record, self.out)

    def finish(self, as_json: bool) -> None:
        """Write for the last time; print everything as the last line if asked to."""
        self.write()
        if as_json:
            typer.echo(json.dumps(self.record))

    def _held(self) -> Mapping[str, Any] | None:
        found = sorted((self.out or Path()).glob(f"{self.record['machine']['device']}/*-{self.record['name']}.json"))
        return json.loads(found[-1].read_text(encoding="utf-8")) if self.out is not None and found else None


def _brief(found: Mapping[str, Any]) -> str:
    """Return a result in one line: times by implementation, and all other numbers that were measured."""
    words = []
    for key, value in found.items():
        if key in ("ms", "peers"):
            words += [f"{name} {_time(x)}" for name, x in value.items()]
        elif key == "kernels" and not isinstance(value, str):
            words += [f"{x['us']} us in {x['launches']:g} {x['kernel'][:40]}" for x in value[:9]]
        elif key not in ("op", "size", "sets", "bytes", "flops", "bytes_per_step", "weight_bytes"):
            words.append(f"{key} {value}")
    return ", ".join(words)


def _time(found: Any) -> str:
    return f"{found['median']} ms ({found['by']})" if "median" in found else str(found)


def _attempt(run: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        return {"not_measured": "out of memory"}
    except Exception as error:  # one that fails must not take the others with it
        first = (str(error).strip() or "no message").splitlines()[0]
        return {"not_measured": f"{type(error).__name__}: {first[:300]}"}
    finally:
        release()


def release() -> None:
    """Give memory back to the GPU."""
    import gc

    gc.collect()
    if torch.cuda.is_available():
        try:
            torch.cuda.empty_cache()
        except Exception:  # after an error inside a kernel every call fails
            return


def _alive() -> bool:
    if _broken or not torch.cuda.is_available():
        return not _broken
    try:
        torch.cuda.synchronize()
        return float(torch.ones(2, device="cuda").sum()) == 2.0
    except Exception:
        return False


def describe_device() -> dict[str, Any]:
    """Return what the device is and what runs on it."""
    from benchmarks.machine import describe

    told = describe()
    versions = dict(told["versions"])
    for name in ("triton", "mamba-ssm", "causal-conv1d", "flash-attn"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    if not torch.cuda.is_available():
        return told | {"versions": versions, "device": slug(), "gpu": "none"}
    has = torch.cuda.get_device_properties(0)
    return told | {
        "versions": versions | {"cuda": str(torch.version.cuda)},
        "device": "-".join(has.name.lower().replace("/", " ").split()),
        "gpu": has.name,
        "gpu_memory_gb": round(has.total_memory / 1e9, 1),
        "multiprocessors": has.multi_processor_count,
        "capability": f"{has.major}.{has.minor}",
        "triton_kernels": gpu.why_not() or "in use",
        "cpu": cpu_name(),
    }


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    """Return normal numbers of deviation ½ on the device."""
    return torch.randn(*shape, device=device()).mul_(0.5).to(dtype).requires_grad_(grad)


def nbytes(*tensors: Tensor) -> int:
    """Return the bytes of tensors together."""
    return sum(x.nbytes for x in tensors)
