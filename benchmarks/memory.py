"""How much memory a model takes beside its weights and its cache: `python -m benchmarks.memory --help`.

A checkpoint is written, and a fresh process loads it, reads a long prompt and continues it, as a user's would. Its peak
is set against the bytes of the weights and of the cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import (
    ROOT,
    Json,
    Out,
    Size,
    SizeOption,
    Threads,
    Weights,
    WeightsOption,
    bar,
    finish,
    main,
)
from benchmarks.models import all_weight_bytes, random_model, random_tokens
from benchmarks.timing import forget_peak, peak_rss
from hymba.errors import HymbaError

CONTINUED = 16  # tokens generated behind the prompt


def memory(
    config: SizeOption = Size["1.5b"],
    weights: WeightsOption = Weights.bf16,
    context: Annotated[int, typer.Option(min=CONTINUED + 1, help="Tokens that the cache holds at the end.")] = 8192,
    model: Annotated[
        Path | None, typer.Option(help="A checkpoint to load in place of a random one.", show_default=False)
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Measure the peak memory of a process that fills a model's cache, beside its weights and that cache."""
    with bar("memory: write a model, load and run it", 2) as step, tempfile.TemporaryDirectory() as scratch:
        if model is None:
            _run(f"write({scratch!r}, {str(config)!r}, {str(weights)!r})", None)
        step()
        measured = _run(f"fill({str(model or scratch)!r}, {context})", threads)
        step()
    beside = measured["peak_rss"] - measured["weight_bytes"] - measured["cache_bytes"]
    result = measured | {"beside_bytes": beside}
    settings = {"config": config, "weights": weights, "context": context, "model": model and model.name}
    lines = [
        f"memory, {config} {weights}, {context} tokens: peak {measured['peak_rss'] / 1e9:.2f} GB",
        f"  weights {measured['weight_bytes'] / 1e9:.2f} GB, cache {measured['cache_bytes'] / 1e6:.1f} MB, "
        f"beside them {beside / 1e9:.2f} GB, of it {measured['imports_rss'] / 1e9:.2f} GB for Python and torch",
        f"  peak while loading {measured['loading_rss'] / 1e9:.2f} GB",
    ]
    name = f"memory-{config}-{weights}" + (f"-{context}context" if context != 8192 else "")
    finish(name, settings, result, lines, as_json, out)


def _run(call: str, threads: int | None) -> dict[str, Any]:
    """Run one of this module's functions in a process of its own, and return what it prints."""
    program = f"import json; from benchmarks import memory; print(json.dumps(memory.{call}))"
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env=os.environ | limits
    )
    if finished.returncode:
        reason = finished.stderr.strip().splitlines()[-1:] or [f"exit code {finished.returncode}"]
        raise HymbaError(f"the measured process failed: {reason[0]}")
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def write(directory: str, config: str, weights: str) -> dict[str, Any]:
    """Write a random model into `directory`."""
    from hymba.model import save

    save(random_model(config, Weights(weights)), directory)
    return {}


@torch.no_grad()
def fill(directory: str, context: int) -> dict[str, int]:
    """Load the model in `directory`, hold `context` tokens, generating the last few; return bytes and peaks."""
    from hymba.inference import SamplingParams, generate
    from hymba.model import load

    imports = peak_rss()
    forget_peak()
    model = load(directory)
    loading = peak_rss()
    forget_peak()
    prompt = random_tokens(model, 1, context - CONTINUED)[0]
    cache = model.allocate_cache(1, context)
    for _ in generate(model, prompt, SamplingParams(CONTINUED + 1, temperature=0), cache):
        pass
    return {
        "imports_rss": imports,
        "loading_rss": loading,
        "peak_rss": peak_rss(),
        "weight_bytes": all_weight_bytes(model),
        "cache_bytes": cache.nbytes(),
        "tokens": int(cache.lengths.max()),
    }


if __name__ == "__main__":
    main(memory)
