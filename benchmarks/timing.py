"""Clocks: repeated and alternating timings, time inside kernels and ops, and the memory a process has held."""

from __future__ import annotations

import functools
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hymba.ops import native


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def alternate(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time each of the variants in turn, `rounds` times over, after one call of each that does not count.

    A machine that slows down between rounds slows all variants: what is compared was measured side by side.
    """
    for work in variants.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            times[name].append(seconds(work))
    return times


def rounds_within(work: Callable[[], Any], budget: float, least: int = 5, most: int = 200) -> int:
    """Return how many calls of `work` take about `budget` seconds."""
    work()
    return max(least, min(most, int(budget / max(seconds(work), 1e-7))))


def milliseconds(times: Sequence[float]) -> dict[str, float]:
    """Return the median and the best of times in seconds."""
    return {"median": round(statistics.median(times) * 1e3, 4), "best": round(min(times) * 1e3, 4)}


class Spent:
    """Seconds and calls by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def add(self, name: str, seconds: float) -> None:
        """Book one call."""
        self.seconds[name] += seconds
        self.calls[name] += 1

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time booked under `name`."""

        def call(*arguments: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            result = function(*arguments, **options)
            self.add(name, time.perf_counter() - begun)
            return result

        return call

    def shares(self, total: float) -> dict[str, float]:
        """Return each name's share of `total` seconds, the largest first, and the rest as "other"."""
        shares = {name: spent / total for name, spent in sorted(self.seconds.items(), key=lambda item: -item[1])}
        return {name: round(share, 4) for name, share in (shares | {"other": 1 - sum(shares.values())}).items()}


@contextmanager
def timed_kernels() -> Iterator[Spent]:
    """Book the time of every call into the C++ library while the block runs, by function.

    The clock sits in the class of the library's functions, so that it also sees those that somebody has kept.
    """
    spent, library = Spent(), native.library()
    if library is None:
        yield spent
        return
    kernel: Any = library._FuncPtr
    untimed = kernel.__call__

    def call(function: Any, *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = untimed(function, *arguments)
        spent.add(function.__name__.removeprefix("hymba_"), time.perf_counter() - begun)
        return result

    kernel.__call__ = call
    try:
        yield spent
    finally:
        kernel.__call__ = untimed


@contextmanager
def timed_ops() -> Iterator[Spent]:
    """Book the time of every op that is chosen among implementations while the block runs, by op."""
    spent, before = Spent(), []
    for name, module in list(sys.modules.items()):
        implementations = getattr(module, "IMPLEMENTATIONS", None)
        if name.startswith("hymba.ops.") and isinstance(implementations, dict):
            before.append((implementations, dict(implementations)))
            timed = functools.partial(spent.timed, name.removeprefix("hymba.ops."))
            implementations.update({key: timed(function) for key, function in implementations.items()})
    try:
        yield spent
    finally:
        for implementations, originals in before:
            implementations.update(originals)


def forget_peak() -> None:
    """Start counting the peak memory from here, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_rss() -> int:
    """Return the most bytes of memory that this process has held, since the last `forget_peak` where that works."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
