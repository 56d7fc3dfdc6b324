"""The network, its configuration, its cache and its checkpoints."""

from hymba.model.cache import Cache, Prefix, cache_nbytes, paper_cache_nbytes
from hymba.model.config import SIZES, HymbaConfig
from hymba.model.hymba import Hymba, HymbaOutput
from hymba.model.init import init_weights
from hymba.model.weights import RELEASED_NAMES, load, released_name, save

__all__ = [
    "RELEASED_NAMES",
    "SIZES",
    "Cache",
    "Hymba",
    "HymbaConfig",
    "HymbaOutput",
    "Prefix",
    "cache_nbytes",
    "init_weights",
    "load",
    "paper_cache_nbytes",
    "released_name",
    "save",
]
