"""The GPU measured: `python -m benchmarks.gpu --help`, or `make bench-gpu` for all of it in nine minutes.

Each part is a command with a limit of seconds; it writes its result after every item, and what it did not come to is
recorded as such. Without a GPU the same code runs at toy sizes, with --toy, which tells whether it runs at all.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import ROOT, Json, Out, main
from benchmarks.gpu_timing import RESTART, Part
from hymba.errors import HymbaError

# The parts that `all` runs and the seconds of each, the most telling first.
PARTS = (("decode", 90), ("paper", 120), ("ops", 130), ("training", 100), ("prompts", 60))
WHOLE = 510
GRACE = 15  # seconds that a part may take beyond its limit, to end what it has begun
MOST_STARTS = 6  # of one part, where a process can measure no more

Toy = Annotated[bool, typer.Option("--toy", help="Toy sizes, also without a GPU: whether it runs, not how fast.")]
Seconds = Annotated[float, typer.Option(help="Begin nothing new after this many seconds.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the newest result of this part in --out.")]
Only = Annotated[str | None, typer.Option(help="Only what has this word in its name.", show_default=False)]


def ops(
    only: Only = None,
    seconds: Seconds = 540,
    toy: Toy = False,
    resume: Resume = False,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time every op in its implementations, against bandwidth and matrix peak."""
    from benchmarks.gpu_ops import measure_ops

    part = _part("ops", {"only": only}, seconds, toy, out, resume)
    measure_ops(part, only, toy)
    part.finish(as_json)


def decode(
    seconds: Seconds = 540, toy: Toy = False, resume: Resume = False, as_json: Json = False, out: Out = None
) -> None:
    """Time decode steps of Hymba-1.5B, and `generate`."""
    from benchmarks.gpu_decode import measure_decode

    part = _part("decode", {}, seconds, toy, out, resume)
    measure_decode(part, "tiny" if toy else "1.5b", toy)
    part.finish(as_json)


def prompts(
    seconds: Seconds = 540, toy: Toy = False, resume: Resume = False, as_json: Json = False, out: Out = None
) -> None:
    """Time prompts of Hymba-1.5B."""
    from benchmarks.gpu_decode import measure_prompts

    part = _part("prompts", {}, seconds, toy, out, resume)
    measure_prompts(part, "tiny" if toy else "1.5b", toy)
    part.finish(as_json)


def paper(
    only: Only = None,
    compiling: Annotated[bool, typer.Option("--compile", help="Compile transformers' models too.")] = False,
    seconds: Seconds = 540,
    toy: Toy = False,
    resume: Resume = False,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Time generation behind 8K tokens beside models of transformers, as the paper's table does."""
    from benchmarks.gpu_peers import measure_paper

    part = _part("paper", {"only": only, "compile": compiling}, seconds, toy, out, resume)
    measure_paper(part, only, toy, compiling)
    part.finish(as_json)


def training(
    seconds: Seconds = 540, toy: Toy = False, resume: Resume = False, as_json: Json = False, out: Out = None
) -> None:
    """Time training steps of the 350m and the 1.5b."""
    from benchmarks.gpu_training import measure_training

    part = _part("training", {}, seconds, toy, out, resume)
    measure_training(part, toy)
    part.finish(as_json)


def suite(
    chosen: Annotated[list[str] | None, typer.Argument(help="Test files; without any, all that belong here.")] = None,
    seconds: Annotated[float, typer.Option(help="End after this many seconds.")] = 510,
    workers: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 12,
    toy: Toy = False,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Run the tests that belong on a GPU; record counts and failures."""
    from benchmarks.gpu_suite import files, run_tests

    found = chosen or files()
    part = _part("tests", {"files": found}, seconds, toy, out, resume=False)
    part.record |= run_tests(found, seconds, workers)
    part.finish(as_json)
    told = ", ".join(f"{count} {outcome}" for outcome, count in part.record["counts"].items()) or "no test was told of"
    typer.echo(f"{told}; {part.record['ended']} in {part.record['seconds']} s")
    if not part.record["passed"]:
        raise typer.Exit(1)


def all_parts(
    seconds: Annotated[float, typer.Option(help="For everything together.")] = WHOLE, toy: Toy = False, out: Out = None
) -> None:
    """Run every part in a process of its own, the most telling first; seconds that one leaves go to the next."""
    ends = time.monotonic() + seconds
    share = seconds / sum(limit for _, limit in PARTS)
    spare = 0.0
    for name, limit in PARTS:
        begun, allowed = time.monotonic(), limit * share + spare
        _run_part(name, min(allowed, ends - begun), toy, out)
        spare = allowed - (time.monotonic() - begun)


def _run_part(name: str, seconds: float, toy: bool, out: Path | None) -> None:
    """Run a part, again where the GPU stopped answering; end it where it overruns."""
    begun = time.monotonic()
    for start in range(MOST_STARTS):
        left = seconds - (time.monotonic() - begun)
        if left < 5:
            typer.secho(f"{name}: out of time", fg="yellow", err=True)
            return
        words = [sys.executable, "-m", "benchmarks.gpu", name, "--seconds", f"{left:.0f}"]
        words += ["--toy"] * toy + (["--out", str(out)] if out else []) + ["--resume"] * (start > 0)
        typer.secho(f"--- {name}, {left:.0f} s", bold=True)
        try:
            ended = subprocess.run(words, cwd=ROOT, timeout=left + GRACE, check=False)
        except subprocess.TimeoutExpired:
            typer.secho(
                f"{name}: ended after {left + GRACE:.0f} s; what was measured is written", fg="yellow", err=True
            )
            return
        if ended.returncode != RESTART:
            return


def _part(name: str, asked: dict[str, Any], seconds: float, toy: bool, out: Path | None, resume: bool) -> Part:
    """Return the part, ready to measure.

    Raises:
        HymbaError: there is no GPU, and toy sizes were not asked for.
    """
    if not toy and not torch.cuda.is_available():
        raise HymbaError("torch reaches no GPU here: --toy runs the same code at toy sizes")
    torch.manual_seed(0)
    kept = {key: value for key, value in asked.items() if value}
    named = f"gpu-{name}" + (f"-{asked['only']}" if asked.get("only") else "") + ("-toy" if toy else "")
    return Part(named, kept | ({"toy": True} if toy else {}), seconds, out and out.resolve(), resume)


suite.__name__, all_parts.__name__ = "tests", "all"

if __name__ == "__main__":
    main(ops, decode, prompts, paper, training, suite, all_parts)
