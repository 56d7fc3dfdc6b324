"""Where kernels of GPUs are tested, and how outputs of kernels are compared."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

# Where Triton kernels run; on the CPU they are interpreted.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Compare by the largest value of each tensor."""
    for name, expected in theirs.items():
        x, expected = ours[name].detach().cpu().double(), expected.detach().cpu().double()
        error = (x - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert float(error) <= tolerance, f"{name}: {float(error):.1e}"  # also where it is NaN


def _mend_interpreter() -> None:
    """Let Triton's interpreter round float32 to the nearest bfloat16, as GPUs do: by itself it cuts the bits off. And
    let loops run up to a loaded number under numpy 2.4, which makes none of an array of one."""
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


if DEVICE.type == "cpu":
    _mend_interpreter()
