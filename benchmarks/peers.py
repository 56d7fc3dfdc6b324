"""Hymba beside other models and llama.cpp on this machine: `python -m benchmarks.peers --help`.

Every model runs in a process of its own, one at a time, and the rounds interleave them: a machine that slows down slows
all. Weights are random; what is timed is a prompt, then greedy decoding of one sequence with the model's own cache. The
read bandwidth is measured before and after each.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import ROOT, Context, Json, Out, Size, Threads, Weights, bar, commit, finish, main, use_threads
from benchmarks.decode import WARM_UP, Decoder, prefill
from benchmarks.machine import ReadBandwidth
from benchmarks.memory import write
from benchmarks.models import all_weight_bytes, random_tokens
from benchmarks.timing import peak_rss, seconds
from hymba.errors import HymbaError
from hymba.files import replacing

BASE = "hymba-1.5b-bf16"  # what ratios are against
PASSES = 3  # of the bandwidth, before each model and after it
STORE = ROOT / "runs" / "peers"


@dataclass(frozen=True)
class Peer:
    """One model in one format, and the program that measures it."""

    runner: str  # "hymba", "transformers" or "llama.cpp"
    model: str
    weights: str

    @property
    def name(self) -> str:
        """What tables and --only call it."""
        engine = "" if self.runner == "hymba" else f" ({self.runner})"
        return f"{self.model}-{self.weights}{engine}"


def peers_of(config: str) -> list[Peer]:
    """Return all models that can be measured, ours first."""
    ours = [Peer("hymba", f"hymba-{config}", str(kind)) for kind in Weights]
    models = ("llama-3.2-1b", "llama-3.2-3b", "falcon-h1-1.5b", "mamba-1.4b")
    theirs = [Peer("transformers", model, "bf16") for model in models]
    return ours + theirs + [Peer("llama.cpp", "llama-3.2-1b", kind) for kind in ("bf16", "q8_0", "q4_0")]


def peers(
    config: Annotated[Size, typer.Option(help="Hymba's size; with tiny, the others are cut to two layers.")] = Size[
        "1.5b"
    ],
    only: Annotated[
        str | None, typer.Option(help="Only models with one of these words, commas between.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each model is measured.")] = 3,
    context: Context = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Decode steps that are timed.")] = 32,
    llama_python: Annotated[
        Path | None,
        typer.Option(help="A Python that has llama-cpp-python and gguf; without it, no llama.cpp.", show_default=False),
    ] = None,
    store: Annotated[Path, typer.Option(help="Where model files and measurements are kept; to resume, run again.")] = (
        STORE
    ),
    threads: Threads = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Compare prompt and decoding speed with other models, in interleaved rounds.

    Each measurement is written to STORE/measured.jsonl at once; a run that was interrupted goes on from there. When all
    rounds are done they are removed from it.
    """
    use_threads(threads)
    settings = {"config": config, "context": context, "tokens": tokens, "threads": torch.get_num_threads()}
    chosen = [peer for peer in peers_of(config) if peer.runner != "llama.cpp" or llama_python is not None]
    words = [word.strip() for word in only.split(",")] if only else [""]
    chosen = [peer for peer in chosen if any(word in peer.name for word in words)]
    if not chosen:
        raise HymbaError(f"no model has {only!r} in its name: {', '.join(p.name for p in peers_of(config))}")
    store.mkdir(parents=True, exist_ok=True)
    log = Log(store / "measured.jsonl", settings | {"commit": commit()})
    with bar("peers", rounds * len(chosen)) as step:
        for turn in range(rounds):
            for peer in chosen:
                if log.count(peer) <= turn:
                    log.add(peer, measure(peer, settings, store, llama_python))
                step()
    found = {peer.name: summary(log.of(peer)) for peer in chosen}
    base = BASE.replace("1.5b", config)
    if base in found:
        for entry in found.values():
            entry["decode_ratio"] = round(entry["tokens_per_second"] / found[base]["tokens_per_second"], 3)
    bandwidths = [entry["bandwidth_gb_s"] for entry in found.values()]
    result = {"peers": found, "rounds": rounds, "bandwidth_gb_s": round(statistics.median(bandwidths), 2)}
    finish(f"peers-{config}", settings, result, _lines(found, settings), as_json, out)
    log.forget(chosen)


class Log:
    """The measurements so far, one JSON line each; those of other settings or of another commit are not counted."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.entries = [entry for entry in map(json.loads, lines) if entry["settings"] == self.settings]

    def of(self, peer: Peer) -> list[dict[str, Any]]:
        """Return the measurements of one model."""
        return [entry for entry in self.entries if entry["peer"] == peer.name]

    def count(self, peer: Peer) -> int:
        """Return how many measurements of one model there are."""
        return len(self.of(peer))

    def add(self, peer: Peer, measured: Mapping[str, Any]) -> None:
        """Keep one more."""
        entry = {"peer": peer.name, "settings": self.settings, **measured}
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def forget(self, peers: Sequence[Peer]) -> None:
        """Remove the measurements of a run that is done."""
        done = {peer.name for peer in peers}
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        entries = [(line, json.loads(line)) for line in lines]
        kept = [line for line, entry in entries if entry["settings"] != self.settings or entry["peer"] not in done]
        with replacing(self.path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")


def measure(peer: Peer, settings: Mapping[str, Any], store: Path, llama_python: Path | None) -> dict[str, Any]:
    """Measure one model in a process of its own, and the bandwidth before and after it.

    Raises:
        HymbaError: the process failed; the message holds its last line.
    """
    _prepare(peer, settings["config"], store)
    bandwidth = ReadBandwidth(settings["config"])
    bandwidth.measure(PASSES)
    task = {"model": peer.model, "weights": peer.weights, "store": str(store), "toy": settings["config"] == "tiny"}
    task |= {name: settings[name] for name in ("context", "tokens", "threads")}
    if peer.runner == "llama.cpp":
        command = [str(llama_python), str(Path(__file__).with_name("peers_llama.py"))]
    else:
        module = "benchmarks.peers" if peer.runner == "hymba" else "benchmarks.peers_transformers"
        command = [sys.executable, "-c", f"import sys, {module}; {module}.child(sys.argv[1])"]
    limits = {"OMP_NUM_THREADS": str(settings["threads"])}
    finished = subprocess.run(
        [*command, json.dumps(task)], cwd=ROOT, capture_output=True, text=True, env=os.environ | limits
    )
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]
        raise HymbaError(f"{peer.name} failed: {reason}")
    bandwidth.measure(PASSES)
    return dict(json.loads(finished.stdout.splitlines()[-1])) | {"bandwidth_gb_s": bandwidth.median / 1e9}


def _prepare(peer: Peer, config: str, store: Path) -> None:
    """Write our model's checkpoint, once; it loads as a user's would."""
    if peer.runner != "hymba" or (store / peer.name).is_dir():
        return
    partial = store / f"{peer.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    write(str(partial), config, peer.weights)
    partial.rename(store / peer.name)


@torch.no_grad()
def child(text: str) -> None:
    """Measure our model as the JSON object `text` says, and print the result."""
    from hymba.model import load

    task = json.loads(text)
    model = load(Path(task["store"]) / f"{task['model']}-{task['weights']}").requires_grad_(False)
    tokens = random_tokens(model, 1, task["context"])
    prefill(model, tokens, model.allocate_cache(1, task["context"]))
    cache = model.allocate_cache(1, task["context"] + WARM_UP + task["tokens"])
    last: list[torch.Tensor] = []
    prompt = seconds(lambda: last.append(prefill(model, tokens, cache)))
    decoder = Decoder(model, cache, last[0])
    for _ in range(WARM_UP):
        decoder.step()
    steps = [seconds(decoder.step) for _ in range(task["tokens"])]
    print_result(prompt, steps, all_weight_bytes(model))


def print_result(prompt: float, steps: Sequence[float], weight_bytes: int) -> None:
    """Print what a measured process tells the one that compares: seconds, bytes, as one line of JSON."""
    measured = {"prompt_seconds": prompt, "step_seconds": statistics.median(steps), "best_step_seconds": min(steps)}
    print(json.dumps(measured | {"weight_bytes": weight_bytes, "peak_rss": peak_rss()}))


def summary(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the medians over a model's rounds. The weights are taken to be read once a step, embedding included."""

    def median(key: str) -> float:
        return statistics.median(entry[key] for entry in entries)

    tokens, nbytes = entries[0]["settings"]["context"], entries[0]["weight_bytes"]
    shares = [nbytes / entry["step_seconds"] / entry["bandwidth_gb_s"] / 1e9 for entry in entries]
    return {
        "tokens_per_second": round(1 / median("step_seconds"), 2),
        "prompt_tokens_per_second": round(tokens / median("prompt_seconds"), 1),
        "step_ms": {
            "median": round(median("step_seconds") * 1e3, 3),
            "best": round(min(entry["best_step_seconds"] for entry in entries) * 1e3, 3),
        },
        "weight_bytes": nbytes,
        "bandwidth_gb_s": round(median("bandwidth_gb_s"), 2),
        "share_of_bandwidth": round(statistics.median(shares), 3),
        "peak_rss": max(entry["peak_rss"] for entry in entries),
    }


def _lines(found: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    lines = [f"a prompt of {settings['context']} tokens, then {settings['tokens']} more, {settings['threads']} threads"]
    for name, entry in found.items():
        ratio = f"  {entry['decode_ratio']:.2f}× {BASE}" if "decode_ratio" in entry else ""
        lines.append(
            f"  {name:34s} decode {entry['tokens_per_second']:7.2f} tokens/s ({entry['share_of_bandwidth']:.0%} of "
            f"{entry['bandwidth_gb_s']} GB/s)  prompt {entry['prompt_tokens_per_second']:8.1f} tokens/s{ratio}"
        )
    return lines


if __name__ == "__main__":
    main(peers)
