"""Files: read as text or refused in one line, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` when the block ends well, remove it when it fails.

    Whoever wrote the file, it ends with the permissions of any new file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(new_file_mode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_file_mode() -> int:
    """Return the permissions that this process gives to a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
