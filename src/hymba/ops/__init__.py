"""Functions of tensors: each op has a reference, which is the definition, and faster implementations that equal it."""

from hymba.ops.attention import attention
from hymba.ops.backend import use_backend
from hymba.ops.causal_conv1d import causal_conv1d
from hymba.ops.cross_entropy import linear_cross_entropy
from hymba.ops.draw import draw_tokens
from hymba.ops.gated import gated_silu
from hymba.ops.linear import linear
from hymba.ops.projection import linear_residual, mean_of_norms_linear, norm_gated_linear, norm_linear
from hymba.ops.rms_norm import mean_of_norms, norm_parts, rms_norm
from hymba.ops.rotary import apply_rotary, rotary_tables
from hymba.ops.selective_scan import selective_scan

__all__ = [
    "apply_rotary",
    "attention",
    "causal_conv1d",
    "draw_tokens",
    "gated_silu",
    "linear",
    "linear_cross_entropy",
    "linear_residual",
    "mean_of_norms",
    "mean_of_norms_linear",
    "norm_gated_linear",
    "norm_linear",
    "norm_parts",
    "rms_norm",
    "rotary_tables",
    "selective_scan",
    "use_backend",
]
