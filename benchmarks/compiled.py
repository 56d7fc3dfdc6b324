"""Triton kernels compiled for a GPU that need not be here: `python -m benchmarks.compiled --help`.

Each case calls an op's wrapper with tensors on the CPU, at the sizes of Hymba-1.5B. Launches are caught: the kernel is
compiled as the launch would have it, and not run. What ptxas says of registers and spills, and the instructions found
in the machine code, tell much of a kernel's speed before any GPU has seen it.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.command import Json, Out, bar, finish, main
from benchmarks.compiled_cases import CASES
from hymba.errors import HymbaError
from hymba.ops import gpu

# What instructions do, by the beginnings of their names.
KINDS = {
    "exp": ("MUFU",),
    "float": ("FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FMNMX", "FSEL", "FSETP"),
    "matrix": ("HMMA", "HGMMA", "IMMA", "QGMMA"),
    "convert": ("F2F", "I2F", "F2I", "PRMT", "I2FP", "F2FP"),
    "integer": ("IMAD", "IADD", "LOP3", "SHF", "LEA", "ISETP", "SEL", "VIADD"),
    "global load": ("LDG", "LDGSTS", "UBLKCP"),
    "global store": ("STG", "RED", "ATOM"),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "shuffle": ("SHFL",),
    "barrier": ("BAR",),
    "spill": ("LDL", "STL"),
}


def compiled(
    arch: Annotated[int, typer.Option(help="Compute capability: 80 (A100), 86, 89 (RTX 40), 90 (H100, H200) ….")] = 90,
    only: Annotated[
        str | None, typer.Option(help="Compile only ops whose name holds this word.", show_default=False)
    ] = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Compile the Triton kernels for a GPU that need not be here; tell their registers, spills and instructions."""
    if gpu.interpreted():
        raise HymbaError("TRITON_INTERPRET=1 is set, which keeps Triton from compiling: unset it")
    chosen = {name: run for name, run in CASES.items() if only is None or only in name}
    if not chosen:
        raise HymbaError(f"no op has {only!r} in its name: they are {', '.join(CASES)}")
    found: list[dict[str, Any]] = []
    with bar(f"compiling for sm_{arch}", len(chosen)) as step, catch_launches(arch) as kernels:
        for name, run in chosen.items():
            run()
            found += [{"case": name, **describe(kernel)} for kernel in kernels]
            kernels.clear()
            step()
    result = {"arch": arch, "kernels": found}
    finish(f"compiled-sm{arch}", {"arch": arch, "only": only}, result, _lines(result), as_json, out)


@contextmanager
def catch_launches(arch: int) -> Iterator[list[Any]]:
    """Compile what is launched inside the block for `arch`, and run nothing; yield the list of what was compiled.

    The process can launch nothing afterwards.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """A driver for a GPU that is not there."""

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    kernels: list[Any] = []
    launch, fits = JITFunction.run, gpu.why_unfit

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        kernel = launch(self, *arguments, grid=grid, warmup=True, **keywords)
        if kernel not in kernels:
            kernels.append(kernel)
        return kernel

    driver.set_active(Absent())
    JITFunction.run, gpu.why_unfit = compile_only, lambda x: ""
    try:
        yield kernels
    finally:
        JITFunction.run, gpu.why_unfit = launch, fits


def describe(kernel: Any) -> dict[str, Any]:
    """Return what is known of a compiled kernel: registers, spilled and shared bytes, instructions by kind."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    names = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", code, re.M))
    kinds = {kind: sum(names[n] for n in names if n in starts) for kind, starts in KINDS.items()}
    return {
        "kernel": kernel.metadata.name,
        "warps": kernel.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),  # type: ignore[index]
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),  # type: ignore[index]
        "shared_bytes": kernel.metadata.shared,
        "instructions": {"all": sum(names.values()), **{kind: n for kind, n in kinds.items() if n}},
    }


def _cuobjdump(option: str, path: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, option, path], check=True, capture_output=True, text=True).stdout


def _lines(result: dict[str, Any]) -> list[str]:
    lines = []
    for k in result["kernels"]:
        counts = ", ".join(f"{n} {kind}" for kind, n in k["instructions"].items() if kind != "all")
        lines.append(
            f"{k['case']:16s} {k['kernel']:28s} {k['warps']} warps, {k['registers']} registers, {k['stack_bytes']} B "
            f"stack, {k['shared_bytes']} B shared; {k['instructions']['all']} instructions: {counts}"
        )
    return lines


if __name__ == "__main__":
    main(compiled)
