"""Results as Markdown tables. What has not been measured says so."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results import MISSING, Record

Held = Mapping[str, Record]
KINDS = ("bf16", "int8", "int4")
SIZE = "1.5b"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; the first column is text, the others are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def overview(held: Held) -> str:
    """Return the short table of the project's README: what a user would ask first."""
    return table(("Hymba-1.5B on a CPU", "measured", "beside"), [*_decode_overview(held), *_other_overview(held)])


def _decode_overview(held: Held) -> Iterable[Sequence[str]]:
    for kind in KINDS:
        one = held.get(f"decode-{SIZE}-{kind}")
        beside = one and f"{one['share_of_bandwidth']:.0%} of what memory can read"
        yield f"Decoding, {kind}, one sequence", _speed(one), beside or MISSING
    one, many = held.get(f"decode-{SIZE}-bf16"), held.get(f"decode-{SIZE}-bf16-8rows")
    ratio = f"{many['tokens_per_second'] / one['tokens_per_second']:.1f}× one sequence" if one and many else MISSING
    yield "Decoding, bf16, eight sequences", _speed(many), ratio


def _other_overview(held: Held) -> Iterable[Sequence[str]]:
    prefill = held.get(f"prefill-{SIZE}-bf16")
    point = next((p for p in prefill["curve"] if p["tokens"] == 2048), None) if prefill else None
    beside = point and f"{point['share_of_matrix_peak']:.0%} of what the cores can multiply"
    yield "Prompt of 2048 tokens, bf16", _speed(point), beside or MISSING
    memory = held.get(f"memory-{SIZE}-bf16")
    beside = memory and f"weights {_gb(memory['weight_bytes'])}, cache {_gb(memory['cache_bytes'])}"
    yield "Memory with 8192 tokens held, bf16", _gb(memory["peak_rss"]) if memory else MISSING, beside or MISSING
    scans = [x for x in held.get(f"ops-{SIZE}", {}).get("ops", ()) if x["op"] == "selective_scan"]
    for title, ending in (("forward", " forward"), ("forward and backward", "backward")):
        scan = next((x for x in scans if x["size"].endswith(ending) and x["speedup"]), None)
        ms = f"{scan['ms']['native']['median']:.1f} ms" if scan else MISSING
        yield f"Scan of 512 tokens, {title}", ms, f"{scan['speedup']}× the PyTorch path" if scan else MISSING
    training = held.get("training-tiny")
    ms, ratio = _training_step(training)
    yield "Training step of the bundled model, one thread", ms, ratio
    peers = held.get(f"peers-{SIZE}", {}).get("peers", {})
    for name, title in (("llama-3.2-1b-bf16", "bf16"), ("llama-3.2-1b-q8_0", "Q8_0"), ("llama-3.2-1b-q4_0", "Q4_0")):
        peer = peers.get(f"{name} (llama.cpp)")
        beside = peer and f"{peer['share_of_bandwidth']:.0%} of what memory can read"
        yield f"For comparison: Llama-3.2-1B in llama.cpp, decoding, {title}", _speed(peer), beside or MISSING


def _training_step(record: Record | None) -> tuple[str, str]:
    found = record["step_ms"].get("native, 1 threads") if record else None
    if not record or not found:
        return MISSING, MISSING
    return f"{found['median']:.0f} ms", f"{record['speedup']['1 threads']}× the PyTorch path"


def _speed(record: Mapping[str, Any] | None) -> str:
    return f"{record['tokens_per_second']:.1f} tokens/s" if record else MISSING


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def decoding(held: Held) -> str:
    """Return the table of all decoding results, the expected ones first."""
    names = [*(f"decode-{SIZE}-{kind}" for kind in KINDS), f"decode-{SIZE}-bf16-8rows"]
    names += [name for name in held if name.startswith("decode-") and name not in names]
    header = ("model", "rows", "tokens held", "tokens/s", "ms a step", "MB a step", "GB/s", "of the bandwidth")
    return table((*header, "outside kernels", "peak memory"), (_decoding_row(name, held.get(name)) for name in names))


def _decoding_row(name: str, record: Record | None) -> Sequence[Any]:
    if record is None:
        return name.removeprefix("decode-"), *[""] * 8, MISSING
    asked, ms = record["settings"], record["step_ms"]
    outside = "all" if record["overhead"] is None else f"{record['overhead']:.1%}"
    return (
        f"{asked['config']} {asked['weights']}",
        asked["rows"],
        asked["context"],
        f"{record['tokens_per_second']:.2f}",
        f"{ms['median']:.1f} (best {ms['best']:.1f})",
        f"{record['bytes_per_step'] / 1e6:.0f}",
        record["bandwidth_gb_s"],
        f"{record['share_of_bandwidth']:.1%}",
        outside,
        _gb(record["peak_rss"]),
    )


def engine(held: Held) -> str:
    """Return the table of the engine: what streams, prompts, snapshots and drafts cost one another; then the soak."""
    names = [*(name for name in held if name.startswith("serving-")), *(name for name in held if name == "soak")]
    rows = [row for name in names for row in (_soak if name == "soak" else _serving)(held[name])]
    return table(("what", "measured", "beside"), rows or [("an engine", MISSING, "")])


def _serving(record: Record) -> Iterable[Sequence[str]]:
    asked, streams = record["settings"], record["throughput"]
    beside, turn, drafts = record["interference"], record["second_turn"], record["drafts"]
    title = f"{asked['config']} {asked['weights']}, {asked['threads']} threads: "
    rate, alone = streams["tokens_per_second"], streams["one_tokens_per_second"]
    yield f"{title}{asked['streams']} streams", f"{rate} tokens/s", f"{streams['ratio']}× one stream's {alone}"
    late, median = beside["beside_p99_ms"], beside["beside_median_ms"]
    yield (
        f"{title}wait for a token while {asked['long_prompt']} tokens are read, 99th percentile",
        f"{late} ms",
        f"{beside['p99_over_median']}× the median of {median} ms; {beside['alone_ms']['median']} ms without them",
    )
    first = f"{turn['ratio']}× faster than the first turn's {turn['first_seconds']} s"
    yield f"{title}second turn of {asked['chat']} tokens, first token", f"{turn['second_seconds']} s", first
    for name, text in (("repeating", "text that repeats its prompt"), ("never", "text that never repeats")):
        found = drafts[name]
        yield f"{title}drafts on {text}", f"{found['tokens_per_second']} tokens/s", f"{found['ratio']}× without drafts"
    own, http = record["overhead"], record["http"]
    bare = f"{own['share']:.1%} more than the bare step's {own['bare_step_ms']} ms"
    yield f"{title}a step of {asked['streams']} streams", f"{own['step_ms']} ms", bare
    fewer = f"{http['share']:.1%} fewer than from the engine alone"
    yield f"{title}{asked['streams']} streams over HTTP", f"{http['tokens_per_second']} tokens/s", fewer


def _soak(record: Record) -> Iterable[Sequence[str]]:
    asked, requests = record["settings"], record["requests"]
    title = f"{asked['model']}, {asked['clients']} clients for {asked['seconds']:g} s"
    left = f"{record['running'] + record['waiting']} texts left, memory {record['rss_growth']:+.1%}"
    same = "the same answers" if record["same_answers"] else "other answers"
    counts = ", ".join(f"{count} {name}" for name, count in sorted(requests.items()))
    yield title, counts, f"{left}, {same}"


def prefilling(held: Held) -> str:
    """Return the table of prefill: a row for each length and kind of weights."""
    names = [f"prefill-{SIZE}-{kind}" for kind in KINDS]
    names += [name for name in held if name.startswith("prefill-") and name not in names]
    header = ("model", "tokens", "tokens/s", "seconds", "GFLOP/s", "of the matrix peak", "where the time goes")
    rows: list[Sequence[Any]] = []
    for name in names:
        if name not in held:
            rows.append((name.removeprefix("prefill-"), *[""] * 5, MISSING))
            continue
        asked = held[name]["settings"]
        for point in held[name]["curve"]:
            shares = ", ".join(f"{op} {share:.0%}" for op, share in point["op_shares"].items() if share >= 0.005)
            speed = f"{point['tokens_per_second']:.1f}", f"{point['seconds']['median']:.2f}", f"{point['gflops']:.0f}"
            kind = f"{asked['config']} {asked['weights']}"
            rows.append((kind, point["tokens"], *speed, f"{point['share_of_matrix_peak']:.0%}", shares))
    return table(header, rows)


def operations(held: Held) -> str:
    """Return the table of ops, milliseconds by implementation."""
    header = ("op", "size", "C++", "PyTorch", "reference", "of the floor", "C++ against PyTorch")
    rows: list[Sequence[Any]] = []
    for name in (f"ops-{SIZE}", "ops-tiny"):
        if name not in held:
            rows.append((f"all ops of {name.removeprefix('ops-')}", *[""] * 5, MISSING))
            continue
        for case in held[name]["ops"]:
            times = (f"{ms['median']:.3f}" if (ms := case["ms"].get(key)) else "–" for key in _IMPLEMENTATIONS)
            faster = f"{case['speedup']}×" if case["speedup"] else "–"
            rows.append((case["op"], case["size"], *times, f"{case['share_of_floor']:.0%}", faster))
    return table(header, rows)


_IMPLEMENTATIONS = ("native", "cpu", "reference")


def steps_of_training(held: Held) -> str:
    """Return the table of training steps."""
    header = ("recipe", "kernels", "ms a step", "tokens/s", "against the PyTorch path")
    rows: list[Sequence[Any]] = []
    records = {"training-tiny": held.get("training-tiny")}
    records |= {name: record for name, record in held.items() if name.startswith("training-")}
    for name, record in records.items():
        if record is None:
            rows.append((name.removeprefix("training-"), "", "", "", MISSING))
            continue
        asked = record["settings"]
        shape = f"{asked['recipe']}, {asked['rows']}×{asked['length']} tokens"
        for kind, ms in record["step_ms"].items():
            threads = kind.partition(", ")[2]
            faster = f"{record['speedup'][threads]}×" if kind.startswith("native") else "1×"
            speed = round(asked["rows"] * asked["length"] / ms["median"] * 1e3)
            named = kind.replace("native", "C++").replace("torch", "PyTorch")
            rows.append((shape, named, f"{ms['median']:.0f} (best {ms['best']:.0f})", speed, faster))
    return table(header, rows)


def memories(held: Held) -> str:
    """Return the table of peak memory."""
    names = [f"memory-{SIZE}-bf16"]
    names += [name for name in held if name.startswith("memory-") and name not in names]
    header = ("model", "tokens held", "peak", "weights", "cache", "beside both", "of it Python and torch")
    rows: list[Sequence[Any]] = []
    for name in names:
        record = held.get(name)
        if record is None:
            rows.append((name.removeprefix("memory-"), *[""] * 5, MISSING))
            continue
        keys = ("peak_rss", "weight_bytes", "cache_bytes", "beside_bytes", "imports_rss")
        asked = record["settings"]
        kind = f"{asked['config']} {asked['weights']}"
        rows.append((kind, asked["context"], *(_gb(record[key]) for key in keys)))
    return table(header, rows)


def comparison(held: Held) -> str:
    """Return the table of other models."""
    record = held.get(f"peers-{SIZE}")
    header = ("model", "decode tokens/s", "beside ours in bf16", "of the bandwidth", "prompt tokens/s", "weights")
    if record is None:
        return table((*header, "peak memory"), [("all models", *[""] * 5, MISSING)])
    rows = [
        (
            name,
            f"{entry['tokens_per_second']:.2f}",
            f"{entry['decode_ratio']:.2f}×" if "decode_ratio" in entry else "–",
            f"{entry['share_of_bandwidth']:.0%}",
            f"{entry['prompt_tokens_per_second']:.1f}",
            _gb(entry["weight_bytes"]),
            _gb(entry["peak_rss"]),
        )
        for name, entry in record["peers"].items()
    ]
    return table((*header, "peak memory"), rows)


def qualities(held: Held) -> str:
    """Return the table of what quantising costs: bits per byte, and the errors of weights and their outputs."""
    names = sorted({"quality-tiny", *(name for name in held if name.startswith("quality-"))}, reverse=True)
    header = ("model", "kept as", "bits per byte", "rise", "median error of a weight", "of its output")
    rows: list[Sequence[Any]] = []
    for name in names:
        record = held.get(name)
        if record is None:
            rows.append((name.removeprefix("quality-"), *[""] * 4, MISSING))
            continue
        for kind, bits in record["bits_per_byte"].items():
            errors = _median_errors(record["layers"].get(kind, ()))
            rise = record["rise_percent"][kind]
            rows.append((record["settings"]["model"], kind, f"{bits:.4f}", f"{rise:+.2f}%", *errors))
    return table(header, rows)


def _median_errors(layers: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the median errors of the weights that have the fewest bits, and of what they give."""
    fewest = [layer for layer in layers if layer["bits"] == min(x["bits"] for x in layers)]
    if not fewest:
        return "–", "–"
    weight, output = (statistics.median(layer[key] for layer in fewest) for key in ("error", "output_error"))
    return f"{weight:.1%}", f"{output:.1%}"


def provenance(held: Held) -> str:
    """Return the table of where each result comes from."""
    header = ("result", "date", "commit", "threads", "GB/s", "command")
    return table(
        header,
        (
            (
                name,
                record["date"][:10],
                f"`{record['commit']}`",
                record["machine"]["threads"],
                record.get("bandwidth_gb_s", "–"),
                f"`{record['command']}`",
            )
            for name, record in sorted(held.items())
        ),
    )
