"""Results from a GPU as Markdown tables, and the targets set for it. What has not been measured says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.results import MISSING, Record
from benchmarks.tables import Held, table

Item = Mapping[str, Any]


class Target(NamedTuple):
    """What is aimed at on an H200, and how it is read off the results; None: not measured."""

    name: str
    wanted: str
    least: float
    measured: Callable[[Held], float | None]
    shown: str  # a format of the number


def items(held: Held, part: str) -> Sequence[Item]:
    """Return what a part has, measured or not."""
    found: Sequence[Item] = held.get(f"gpu-{part}", {}).get("items", ())
    return [item for item in found if "kernels" not in item]


def _field(part: str, beginning: str, field: str) -> Callable[[Held], float | None]:
    def read(held: Held) -> float | None:
        found = (x[field] for x in items(held, part) if x["item"].startswith(beginning) and x.get(field) is not None)
        return next(found, None)

    return read


def _scan_cut(held: Held) -> float | None:
    """How many times the scan is faster with time cut into segments than walked through."""
    for item in items(held, "ops"):
        times = item.get("ms", {})
        ours, serial = times.get("triton"), times.get("triton, serial in time")
        if item["item"].startswith("selective_scan: 1×16384") and isinstance(ours, dict) and isinstance(serial, dict):
            return float(serial["median"] / ours["median"])
    return None


def _against(peer: str, what: str) -> Callable[[Held], float | None]:
    return lambda held: held.get("gpu-paper", {}).get("ratios", {}).get(peer, {}).get(what)


def _passed(held: Held) -> float | None:
    record = held.get("gpu-tests")
    return None if record is None else float(record["passed"])


TARGETS = (
    Target("Tests on the GPU", "all pass", 1, _passed, "{:.0%}"),
    Target(
        "Scan forward, 8×4096×3200",
        "60% of the copy bandwidth",
        0.6,
        _field("ops", "selective_scan: 8×4096×3200×16 forward", "share_of_copy"),
        "{:.0%}",
    ),
    Target(
        "Scan backward, 8×4096×3200",
        "45% of the copy bandwidth",
        0.45,
        _field("ops", "selective_scan: 8×4096×3200×16 backward", "share_of_copy"),
        "{:.0%}",
    ),
    Target("Scan of 1×16384, against one serial in time", "3×", 3, _scan_cut, "{:.1f}×"),
    Target(
        "Decoding, one row, bf16: the whole step",
        "55% of the copy bandwidth",
        0.55,
        _field("decode", "1.5b bf16, 1 rows, 1024 held", "share_of_copy"),
        "{:.0%}",
    ),
    Target(
        "Decoding, one row, bf16",
        "750 tokens/s",
        750,
        _field("decode", "1.5b bf16, 1 rows, 1024 held", "tokens_per_second"),
        "{:.0f} tokens/s",
    ),
    Target(
        "Generation at 8K, batch 128 halved where memory ends, against Llama-3.2-3B in transformers",
        "3.49×",
        3.49,
        _against("llama-3.2-3b", "speed"),
        "{:.2f}×",
    ),
    Target("The same, as we would have it", "8×", 8, _against("llama-3.2-3b", "speed"), "{:.2f}×"),
    Target("Cache at 8K, Llama-3.2-3B's against ours", "11.67×", 11.67, _against("llama-3.2-3b", "cache"), "{:.2f}×"),
    Target(
        "Prompt of 8192 tokens",
        "45% of the matrix peak",
        0.45,
        _field("prompts", "1.5b bf16, prompt of 8192 whole", "share_of_matrix"),
        "{:.0%}",
    ),
    Target(
        "Training the 1.5b at 2048 tokens",
        "40% MFU",
        0.4,
        _field("training", "1.5b, without checkpointing", "mfu"),
        "{:.0%}",
    ),
)


def targets(held: Held) -> str:
    """Return the table of targets: what was aimed at, what was measured, whether it is reached."""
    rows = []
    for target in TARGETS:
        found = target.measured(held)
        reached = MISSING if found is None else "reached" if found >= target.least else "not reached"
        rows.append((target.name, target.wanted, "" if found is None else target.shown.format(found), reached))
    return table(("target on an H200", "wanted", "measured", ""), rows)


def speeds(held: Held) -> str:
    """Return the table of decoding, generation and prompts."""
    rows: list[Sequence[Any]] = []
    for item in (*items(held, "decode"), *items(held, "prompts")):
        if "not_measured" in item:
            rows.append((item["item"], "", "", item["not_measured"]))
        elif "greedy" in item:
            told = (f"{kind} {item[kind]['tokens_per_second']:.0f}" for kind in ("greedy", "sampled"))
            rows.append((item["item"], ", ".join(told), "", ""))
        else:
            share = item.get("share_of_copy", item.get("share_of_matrix"))
            of = "the copy bandwidth" if "share_of_copy" in item else "the matrix peak"
            ms = item.get("step_ms", item.get("prompt_ms"))
            rows.append((item["item"], f"{item['tokens_per_second']:.0f}", f"{ms:.2f}", f"{share:.0%} of {of}"))
    return table(("what", "tokens/s", "ms", ""), rows or [("decoding and prompts", "", "", MISSING)])


def generation(held: Held) -> str:
    """Return the paper's table as measured: speed and cache beside models of transformers, each way that was tried."""
    rows: list[Sequence[Any]] = []
    for item in items(held, "paper"):
        if "not_measured" in item:
            rows.append((item["item"], *[""] * 3, item["not_measured"]))
            continue
        speed = f"{item['tokens_per_second']:.0f}"
        rows.append((item["item"], item["rows"], speed, f"{item['step_ms']:.2f}", f"{item['cache_mb_a_row']:.1f}"))
    for peer, found in held.get("gpu-paper", {}).get("ratios", {}).items():
        rows.append((f"ours against {peer} ({found['way']})", "", f"{found['speed']}×", "", f"{found['cache']}×"))
    header = ("model, way", "rows", "tokens/s", "ms a step", "cache, MB a row")
    return table(header, rows or [("all models", *[""] * 3, MISSING)])


def steps(held: Held) -> str:
    """Return the table of training steps."""
    rows: list[Sequence[Any]] = []
    for item in items(held, "training"):
        if "not_measured" in item:
            rows.append((item["item"], *[""] * 4, item["not_measured"]))
            continue
        shape = f"{item['rows']}×{item['length']}"
        share, memory = f"{item['mfu']:.0%}", f"{item['peak_memory_gb']} GB"
        rows.append((item["item"], shape, item["tokens_per_second"], item["step_ms"], share, memory))
    header = ("model", "tokens a step", "tokens/s", "ms a step", "MFU", "peak memory")
    return table(header, rows or [("all sizes", *[""] * 4, MISSING)])


def operations(held: Held) -> str:
    """Return the table of ops: milliseconds of kernels and torch path, share of a ceiling, other libraries."""
    rows: list[Sequence[Any]] = []
    for item in items(held, "ops"):
        if "not_measured" in item:
            rows.append((item["item"], *[""] * 5, item["not_measured"]))
            continue
        times, peers = item["ms"], item.get("peers", {})
        beside = [(name, x) for name, x in times.items() if name not in ("triton", "cpu")] + list(peers.items())
        rows.append(
            (
                item["item"],
                *(_ms(times.get(name)) for name in ("triton", "cpu")),
                *(f"{item[key]:.0%}" if key in item else "–" for key in ("share_of_copy", "share_of_matrix")),
                f"{item['speedup']}×" if item.get("speedup") else "–",
                ", ".join(f"{name} {_ms(x)}" for name, x in beside) or "–",
            )
        )
    header = ("op", "Triton", "PyTorch", "of the copy bandwidth", "of the matrix peak", "faster", "beside")
    return table(header, rows or [("all ops", *[""] * 5, MISSING)])


def _ms(found: Any) -> str:
    if isinstance(found, Mapping) and "median" in found:
        return f"{found['median']:.4f}" + ("" if found["by"] == "graph" else f" ({found['by']})")
    return "–" if found is None else str(found)


def kernels(held: Held) -> str:
    """Return the table of the kernels that a step, a prompt and a training step spend their time in."""
    rows: list[Sequence[Any]] = []
    for part in ("decode", "prompts", "training"):
        for item in held.get(f"gpu-{part}", {}).get("items", ()):
            found = item.get("kernels", ())
            if isinstance(found, str):
                rows.append((item["item"], found, "", ""))
                continue
            total = sum(x["us"] for x in found)
            for x in found[:10]:
                name = x["kernel"].replace("|", "/")[:60]
                rows.append((item["item"], f"`{name}`", f"{x['launches']:g}", f"{x['us']:.1f} ({x['us'] / total:.0%})"))
    return table(("of", "kernel", "launches", "µs, share of those seen"), rows or [("all", "", "", MISSING)])


def suite(held: Held) -> str:
    """Return the table of what the tests came to."""
    record = held.get("gpu-tests")
    if record is None:
        return table(("tests", "count"), [("all", MISSING)])
    rows: Iterable[Sequence[Any]] = [*record["counts"].items(), ("ended", record["ended"])]
    return table(("tests", "count"), [*rows, *((x["test"], "failed") for x in record["failures"])])


def ceilings(held: Held) -> str:
    """Return the table of what the device was measured to do, and of the versions."""
    header = ("result", "date", "commit", "copy, GB/s", "matrices, TFLOP/s", "command")
    return table(header, [_ceiling(name, record) for name, record in sorted(held.items())] or [("all", *[MISSING] * 5)])


def _ceiling(name: str, record: Record) -> Sequence[Any]:
    found = record.get("ceilings", {})
    speeds = found.get("copy_gb_s", "–"), found.get("matrix_tflops", "–")
    return name, record["date"][:10], f"`{record['commit']}`", *speeds, f"`{record['command']}`"


SECTIONS: tuple[tuple[str, Callable[[Held], str]], ...] = (
    ("Targets", targets),
    ("Decoding and prompts", speeds),
    ("The paper's table", generation),
    ("Training on the GPU", steps),
    ("Ops on the GPU, in milliseconds", operations),
    ("Where a GPU's time goes", kernels),
    ("Tests on the GPU", suite),
    ("Where the GPU's numbers come from", ceilings),
)
