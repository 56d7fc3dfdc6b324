"""Classes as attributes of transformers, where some programs look for the one that config.json names."""

from __future__ import annotations

import sys
from types import ModuleType


def add_to_transformers(*classes: type) -> None:
    """Make `transformers.NAME` each of `classes`, as `transformers serve`, pipelines and TRL expect.

    One of transformers' modules loads the package anew, so that a process holds it twice: as the modules that were
    loaded before have imported it, and as later ones will.
    """
    holders = [getattr(module, "__dict__", {}).get("transformers") for module in list(sys.modules.values())]
    for package in (sys.modules["transformers"], *holders):
        if isinstance(package, ModuleType) and package.__name__ == "transformers":
            for each in classes:
                setattr(package, each.__name__, each)
