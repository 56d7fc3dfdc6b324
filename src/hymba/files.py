"""Files: read as text or refused in one line, digested, written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from hymba.errors import HymbaError


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, every byte of it, newlines as they are.

    Raises:
        HymbaError: the file cannot be read or is not UTF-8.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise HymbaError(f"{path} is not UTF-8 text, from its byte {error.start} on") from error
    except OSError as error:
        raise HymbaError(f"cannot read {path}: {error.strerror}") from error


def digest_files(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file's content, in hex. Files are streamed, several at a time.

    Raises:
        HymbaError: a file cannot be read.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HymbaError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` when the block ends well, remove it when it fails.

    The content is on the disk before the rename: after a power loss `path` is the old file or the new one, never
    a part. It has the permissions of any new file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(new_file_mode())
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_directory(partial: Path, directory: Path) -> None:
    """Rename the finished directory `partial` to `directory`, which it replaces, with its content on the disk first.

    The old directory is removed last: until then it is there under one name or another.
    """
    for root, _, names in os.walk(partial):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_file_mode() -> int:
    """Return the permissions that this process gives to a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
