"""The network, its configuration, its cache and its checkpoints."""

from hymba.model.cache import Cache, Prefix, cache_nbytes, paper_cache_nbytes
from hymba.model.config import SIZES, HymbaConfig
from hymba.model.hymba import Hymba, HymbaOutput
from hymba.model.init import init_weights, skeleton
from hymba.model.projection import is_matrix
from hymba.model.quantize import Rounding, Scheme, count_parameters, quantize, scheme_of
from hymba.model.weights import RELEASED_NAMES, load, released_name, save

__all__ = [
    "RELEASED_NAMES",
    "SIZES",
    "Cache",
    "Hymba",
    "HymbaConfig",
    "HymbaOutput",
    "Prefix",
    "Rounding",
    "Scheme",
    "cache_nbytes",
    "count_parameters",
    "init_weights",
    "is_matrix",
    "load",
    "paper_cache_nbytes",
    "quantize",
    "released_name",
    "save",
    "scheme_of",
    "skeleton",
]
