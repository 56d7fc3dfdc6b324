"""Prefill: prompts of growing length. `python -m benchmarks.prefill --help`.

Products dominate, so the matrix peak is the floor. In sliding layers the work per token stops growing at the window,
and recurrence costs the same at any length: what still grows is the attention of the three global layers.
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import (
    Json,
    Out,
    Rows,
    Size,
    SizeOption,
    Threads,
    Weights,
    WeightsOption,
    bar,
    finish,
    main,
    use_threads,
)
from benchmarks.decode import prefill as run_prompt
from benchmarks.machine import ReadBandwidth, matrix_peak
from benchmarks.models import all_weight_bytes, random_model, random_tokens
from benchmarks.timing import forget_peak, peak_rss, seconds, timed_ops
from hymba.errors import HymbaError
from hymba.inference.prefill import prefill_chunk
from hymba.model import Hymba, HymbaConfig

LENGTHS = "512,1024,2048,4096,8192,16384"


def prefill(
    config: SizeOption = Size["1.5b"],
    weights: WeightsOption = Weights.bf16,
    rows: Rows = 1,
    tokens: Annotated[str, typer.Option(help="Prompt lengths, with commas between.")] = LENGTHS,
    chunk: Annotated[
        int | None,
        typer.Option(min=0, help="Tokens run at once; 0: the whole prompt.", show_default="as in generation"),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Times that each length is run; the median counts.")] = 3,
    threads: Threads = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time the prefill of random prompts, against the matrix peak of the same minute, with each op's share."""
    use_threads(threads)
    lengths = parse_lengths(tokens)
    bandwidth = ReadBandwidth(config)
    bandwidth.measure()
    peaks = [matrix_peak()]
    model = random_model(config, weights)
    tokens_at_once = prefill_chunk(model) if chunk is None else chunk
    forget_peak()
    with bar(f"prefill {config} {weights}", len(lengths) * repeat) as step, torch.no_grad():
        curve = []
        for length in lengths:
            curve.append(measure(model, rows, length, tokens_at_once, repeat, step))
    peak = peak_rss()
    peaks.append(matrix_peak())
    gflops = statistics.mean(peak["median"] for peak in peaks)
    for point in curve:
        point["share_of_matrix_peak"] = round(point["gflops"] / gflops, 3)
    best = max(curve, key=lambda point: point["tokens_per_second"])
    result = {
        "tokens_per_second": best["tokens_per_second"],
        "curve": curve,
        "matrix_gflops": {"before": peaks[0], "after": peaks[1]},
        **bandwidth.to_record(),
        "weight_bytes": all_weight_bytes(model),
        "peak_rss": peak,
    }
    settings = {"config": config, "weights": weights, "rows": rows, "tokens": lengths, "chunk": tokens_at_once}
    name = f"prefill-{config}-{weights}" + (f"-{rows}rows" if rows > 1 else "")
    name += "" if chunk is None else f"-{chunk or 'no'}chunks"
    finish(name, settings, result, _lines(result, settings), as_json, out)


def parse_lengths(text: str) -> list[int]:
    """Return the whole numbers above zero in `text`, which has commas between them.

    Raises:
        HymbaError: it holds something else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise HymbaError(f"cannot read lengths {text!r}: write whole numbers with commas between, such as 512,2048")
    return [int(part) for part in parts]


def measure(model: Hymba, rows: int, length: int, chunk: int, repeat: int, step: Any) -> dict[str, Any]:
    """Time the prefill of (rows, length) tokens, then book one more run by op. Needs no gradients."""
    tokens = random_tokens(model, rows, length)

    def run() -> float:
        cache = model.allocate_cache(rows, length)
        return seconds(lambda: run_prompt(model, tokens, cache, chunk or length))

    times = []
    for _ in range(repeat):
        times.append(run())
        step()
    with timed_ops() as spent:
        total = run()
    median, work = statistics.median(times), rows * prompt_flops(model.config, length)
    return {
        "tokens": length,
        "tokens_per_second": round(rows * length / median, 2),
        "seconds": {"median": round(median, 4), "best": round(min(times), 4)},
        "gflops": round(work / median / 1e9, 1),
        "op_shares": spent.shares(total),
    }


def prompt_flops(config: HymbaConfig, length: int) -> float:
    """Return the floating-point operations that a prompt's products and attention take; two for a multiply and add.

    Counted are matrices of layers for each token, the head for the last one, and every visible pair of a query and a
    key; the rest (scan, convolution, norms) is below two per cent in the released model.
    """
    c, owners = config, set(config.owners)
    query, keys_values = c.num_attention_heads * c.head_dim, c.num_key_value_heads * (c.head_dim + c.v_head_dim)
    shared = c.hidden_size * (query + 2 * c.d_inner + 3 * c.intermediate_size) + c.d_inner * (
        c.hidden_size + c.dt_rank + 2 * c.d_state + c.dt_rank
    )
    matrices = c.num_hidden_layers * shared + len(owners) * c.hidden_size * keys_values
    pairs = sum(visible_pairs(length, c.num_meta_tokens, c.window(layer)) for layer in range(c.num_hidden_layers))
    attention = pairs * c.num_attention_heads * (c.head_dim + c.v_head_dim)
    return 2 * (length * matrices + c.hidden_size * c.vocab_size + attention)


def visible_pairs(length: int, meta: int, window: int | None) -> int:
    """Return how many keys `length` text tokens see together in one layer: meta tokens, and W + 1 or all text."""
    seen = length if window is None else min(length, window + 1)
    return length * meta + seen * (seen + 1) // 2 + (length - seen) * seen


def _lines(result: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    before = result["matrix_gflops"]["before"]["median"]
    lines = [f"prefill, {settings['config']} {settings['weights']}; matrix peak {before} GFLOP/s (median, before)"]
    for point in result["curve"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in point["op_shares"].items())
        speed = f"{point['tokens_per_second']:8.1f} tokens/s, {point['gflops']:7.1f} GFLOP/s"
        lines.append(
            f"  {point['tokens']:6d} tokens: {speed} ({point['share_of_matrix_peak']:.0%} of the peak); {shares}"
        )
    return [*lines, f"  peak memory {result['peak_rss'] / 1e9:.2f} GB, weights {result['weight_bytes'] / 1e9:.2f} GB"]


if __name__ == "__main__":
    main(prefill)
