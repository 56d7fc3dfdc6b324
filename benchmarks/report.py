"""Tables and figures from the recorded results: `python -m benchmarks.report`.

It writes benchmarks/results/README.md and the table of the project's README, from the newest result of each name and
from nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import gpu_tables, tables
from benchmarks.command import ROOT, main
from benchmarks.figures import draw, figures, is_current
from benchmarks.results import MISSING, RESULTS, devices
from hymba.errors import HymbaError
from hymba.files import replacing

BEGIN = "<!-- results: written by `python -m benchmarks.report` -->"
END = "<!-- end of results -->"
_SECTIONS = (
    ("Decoding", tables.decoding),
    ("Prompts", tables.prefilling),
    ("Other models", tables.comparison),
    ("The engine", tables.engine),
    ("Training", tables.steps_of_training),
    ("Memory", tables.memories),
    ("Quality of quantised models", tables.qualities),
    ("Ops, in milliseconds", tables.operations),
    ("Where the numbers come from", tables.provenance),
)
_CAPTIONS = {
    "prefill": "Seconds that prompts of growing length take",
    "peers": "Tokens per second of Hymba and of other models",
}


def report(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if something is out of date.")] = False,
) -> None:
    """Write the tables and figures anew from the recorded results."""
    if check:
        stale = stale_documents()
        if stale:
            raise HymbaError(f"out of date: {', '.join(stale)}; run `python -m benchmarks.report`")
        return
    for device, held in devices().items():
        draw(held, RESULTS / device)
    for path, text in documents().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")
            typer.echo(f"written: {path.relative_to(ROOT)}")


def documents(results: Path = RESULTS, readme: Path = ROOT / "README.md") -> dict[Path, str]:
    """Return the text of every document that has results in it, as it should be.

    Raises:
        HymbaError: the README has no marks between which its table belongs.
    """
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise HymbaError(f"{readme.name} lacks the marks {BEGIN} and {END}")
    page = results / "README.md"
    return {readme: f"{before}{begin}\n\n{_overview(results)}\n\n{end}{after}", page: _page(results)}


def stale_documents(results: Path = RESULTS, readme: Path = ROOT / "README.md") -> list[str]:
    """Return the names of documents and figures that do not show the newest results."""
    texts = documents(results, readme).items()
    stale = [str(path) for path, text in texts if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for device, held in devices(results).items():
        drawn = ((results / device / f"{name}.svg", data) for name, _, data in figures(held))
        stale += [str(path) for path, data in drawn if not is_current(path, data)]
    return stale


def _overview(results: Path) -> str:
    """Return the README's table, of the device that was measured last, and a line on where it comes from."""
    device, held = next(((name, held) for name, held in devices(results).items() if not _is_gpu(held)), ("", {}))
    if not held:
        return tables.overview({}) + f"\n\nNo machine: {MISSING}."
    machine = max(held.values(), key=lambda record: record["date"])["machine"]
    last = max(record["date"] for record in held.values())[:10]
    where = f"{machine['cpu']}, {machine['cores']} cores, kernels at level {machine['kernels']}; last measured {last}"
    return f"{tables.overview(held)}\n\n`{device}`: {where}."


def _is_gpu(held: tables.Held) -> bool:
    return any(name.startswith("gpu-") for name in held)


def _page(results: Path) -> str:
    """Return the page of all results."""
    parts = [
        "# Results",
        "Written by `python -m benchmarks.report` from the files beside it: the newest result of each name. "
        "What the numbers mean and how they are taken: [docs/benchmarks.md](../../docs/benchmarks.md).",
    ]
    found = devices(results)
    if not found:
        parts.append(f"No machine: {MISSING}.")
    for device, held in found.items():
        parts += _gpu_part(device, held) if _is_gpu(held) else _cpu_part(device, held)
    if not any(map(_is_gpu, found.values())):
        parts += ["## NVIDIA GPU", "No result from a GPU yet. What is aimed at:", gpu_tables.targets({})]
    return "\n\n".join(parts) + "\n"


def _cpu_part(device: str, held: tables.Held) -> list[str]:
    machine = max(held.values(), key=lambda record: record["date"])["machine"]
    parts = [f"## {device}"]
    parts.append(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB; {_versions(machine)}.")
    parts += [f"![{_CAPTIONS[name]}]({device}/{name}.svg)" for name, _, _ in figures(held)]
    for title, make in _SECTIONS:
        parts += [f"### {title}", make(held)]
    return parts


def _gpu_part(device: str, held: tables.Held) -> list[str]:
    machine = max(held.values(), key=lambda record: record["date"])["machine"]
    told = f"{machine.get('gpu', device)}, {machine.get('gpu_memory_gb', '–')} GB, capability "
    told += f"{machine.get('capability', '–')}; kernels: {machine.get('triton_kernels', '–')}; {_versions(machine)}."
    parts = [f"## {device}", told]
    for title, make in gpu_tables.SECTIONS:
        parts += [f"### {title}", make(held)]
    return parts


def _versions(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in machine["versions"].items())


if __name__ == "__main__":
    main(report)
