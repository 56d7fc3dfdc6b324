"""Repairs to Triton's interpreter, which runs the kernels on a CPU for tests (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch


@functools.cache
def mend() -> None:
    """Let it round float32 to the nearest bfloat16, as GPUs do: by itself it cuts the bits off. And let loops run up to
    a loaded number under numpy 2.4, which makes none of an array of one."""
    from triton.runtime import interpreter

    convert, patch = interpreter._convert_float, interpreter._patch_lang_tensor

    def rounded(x: np.ndarray, from_dtype: Any, to_dtype: Any, mode: Any) -> np.ndarray:
        if (str(from_dtype), str(to_dtype)) != ("fp32", "bf16"):
            return convert(x, from_dtype, to_dtype, mode)
        values = torch.from_numpy(np.array(x).view(np.float32)).bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16)

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._convert_float, interpreter._patch_lang_tensor = rounded, patched
