"""Compile the C++ kernels: ``python -m hymba.ops.native.build`` in a checkout, setup.py in an installation.

Needs nothing but a compiler and the standard library. Every kernel is compiled once per level of instructions, each
level into its own shared library; the loader picks one of them on the machine it finds itself on.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NATIVE = Path(__file__).parent

_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-semantic-interposition", "-Wall", "-Wextra", "-Wno-psabi"),
    *("-Wno-maybe-uninitialized", "-Wno-uninitialized"),  # GCC 12 complains about its own AVX-512 header
)
# Instructions of AVX512-BF16 are used where the source names them, after a check at run time, and nowhere else.
_AVX512 = ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mprefer-vector-width=512", "-DHYMBA_AVX512")
_LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"portable": (), "avx2": ("-march=x86-64-v3", "-DHYMBA_AVX2"), "avx512": _AVX512},
}


class BuildError(Exception):
    """The kernels could not be compiled; the message is one line."""


def levels() -> dict[str, tuple[str, ...]]:
    """Return this machine's levels of instructions and their compiler flags, slowest first."""
    machine = {"AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return _LEVELS.get(machine, {"portable": ()})


def home() -> Path:
    """Return where the libraries lie: beside this file, or where ``HYMBA_KERNELS`` says, as for sanitized ones."""
    return Path(os.environ.get("HYMBA_KERNELS") or NATIVE)


def library_path(level: str, directory: Path | None = None) -> Path:
    """Return where a level's shared library lies."""
    return (directory or home()) / f"hymba_{level}.so"


def sources() -> list[Path]:
    """Return every kernel's source: ops/<op>/*.cpp."""
    return sorted(NATIVE.parent.glob("*/*.cpp"))


def fingerprint() -> str:
    """Return a digest of the kernels' sources, by which the loader knows a library that was built from others."""
    texts = (path.read_bytes() for path in (*sources(), *sorted(NATIVE.parent.glob("*/*.h")), Path(__file__)))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def build(directory: Path | None = None, extra: tuple[str, ...] = ()) -> list[Path]:
    """Compile every level into `directory` or :func:`home`, with `extra` compiler flags; return the libraries.

    Raises:
        BuildError: there is no C++ compiler, or it failed.
    """
    compiler = _compiler()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda level: _compile(compiler, level, directory or home(), extra), levels()))


def _compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        if shutil.which(name.split()[0]):
            return name
    raise BuildError(f"no C++ compiler found ({', '.join(wanted)}): install g++ or set CXX")


def _compile(compiler: str, level: str, directory: Path, extra: tuple[str, ...]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    target = library_path(level, directory)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    flags = (*_FLAGS, *levels()[level], f"-I{NATIVE}", f'-DHYMBA_FINGERPRINT="{fingerprint()}"', *extra)
    command = [*compiler.split(), *flags, *map(str, sources()), "-o", str(partial)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        complaint = next((line for line in finished.stderr.splitlines() if "error" in line), "no message")
        raise BuildError(f"{compiler} failed on the {level} kernels: {complaint}")
    if finished.stderr:
        print(finished.stderr, file=sys.stderr)
    partial.replace(target)
    return target


if __name__ == "__main__":
    try:
        for built in build(extra=tuple(sys.argv[1:])):
            print(built)
    except BuildError as error:
        sys.exit(f"error: {error}")
