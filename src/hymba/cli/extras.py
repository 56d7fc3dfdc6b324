"""Packages that only some commands need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hymba.errors import HymbaError


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Import in this block what is installed by `hymba[extra]`.

    Raises:
        HymbaError: one of the packages is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise HymbaError(f"{package} is not installed, and this needs it: pip install 'hymba[{extra}]'") from error
