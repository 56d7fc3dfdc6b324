"""Code that runs once another package has been imported, which Hymba does not import itself."""

from __future__ import annotations

import importlib.abc
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call `action` with the module `name`: now if it is imported already, else when it is, if ever.

    A failure of `action`, as with another version of that package, is logged, and the import succeeds.
    """
    module = sys.modules.get(name)
    if module is not None:
        _apply(action, module)
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


def _apply(action: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        action(module)
    except Exception as error:
        logging.getLogger("hymba").warning("cannot adapt %s to Hymba models: %s", module.__name__, error)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds a module by the finders after it, and adds an action to its loading."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the one module, its loader changed, and None for any other."""
        if name != self.name or self not in sys.meta_path:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _apply(self.action, module)

            loader.exec_module = exec_module
        return spec
