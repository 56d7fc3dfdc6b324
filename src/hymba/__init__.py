"""Hymba: attention heads and state-space heads side by side in every layer (arXiv 2411.13676).

The names below are loaded on first use, so that `import hymba` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hymba.errors import HymbaError
    from hymba.model import Cache, Hymba, HymbaConfig, load, save

__version__ = "0.1.0"
__all__ = ["Cache", "Hymba", "HymbaConfig", "HymbaError", "__version__", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'hymba' has no attribute {name!r}")
    home = "hymba.errors" if name == "HymbaError" else "hymba.model"
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
