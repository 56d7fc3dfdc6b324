"""The decode step, recorded once and repeated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from hymba.model import Cache, Hymba
from hymba.ops import gpu, native
from hymba.ops.attention import IMPLEMENTATIONS, blocks
from hymba.ops.attention.native import MOST_POSITIONS
from hymba.ops.backend import selected
from hymba.ops.graph import Graph
from hymba.ops.recording import Recording

R = TypeVar("R", bound=AbstractContextManager[Any])


class DecodeStep:
    """Runs a few tokens a row through the model and the cache, and returns their logits: the same, step after step.

    With C++ kernels the first step is recorded (:class:`hymba.ops.recording.Recording`), with Triton's the second is
    captured (:class:`hymba.ops.graph.Graph`); the others repeat it, which leaves Python out of them. Elsewhere each
    step is a call of the model. Weights must keep their memory meanwhile.

    Args:
        steps: tokens a row at each call. More than one are T columns, of which `lengths` says how many are real.
        head: whether to return logits; else the hidden states that they are made of.
        pool: of CUDA memory, as :class:`hymba.ops.graph.Graph` takes it.
    """

    def __init__(self, model: Hymba, cache: Cache, steps: int = 1, *, head: bool = True, pool: Any = None) -> None:
        self.model, self.cache, self.steps, self.head = model, cache, steps, head
        self._pool, self._is_warm = pool, False
        self._recording: Recording | Graph | None = None
        self._tokens: Tensor | None = None
        self._lengths: Tensor | None = None
        # The rotary base of "dynamic_ntk" is computed in Python from the length.
        fixed, on_cpu = model.config.rope_type != "dynamic_ntk", cache.lengths.is_cpu
        in_triton = selected(IMPLEMENTATIONS, cache.lengths.device.type) == "triton"
        self._captures = fixed and in_triton and not on_cpu and not gpu.why_unfit(cache.conv_state)
        # Torch's attention of several queries looks at their positions in Python.
        in_blocks = blocks.fits(torch.empty(1, steps, dtype=model.dtype))
        takes_steps = steps == 1 or in_blocks or native.is_batch_invariant(model.dtype, quantized=False)
        takes_steps &= cache.max_length + model.config.num_meta_tokens <= MOST_POSITIONS
        self._records = fixed and on_cpu and not in_triton and native.library() is not None and takes_steps

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Take tokens in, (B,), or (B, T) where there are several steps. `lengths` (B,) says how many of a row's are
        real, at every call or at none.

        Returns:
            Logits (B, vocab) or (B, T, vocab), or hidden states (B, D) or (B, T, D), overwritten by the next call.

        Raises:
            HymbaError: the cache is full.
        """
        tokens = tokens if self.steps > 1 else tokens[:, None]
        if not (self._records or self._captures):
            return self._run(tokens, lengths)
        self.cache.reserve(lengths, self.steps)
        longest = self.cache.longest
        self._take(tokens, lengths)
        if self._recording is not None:
            self._recording.replay()
        elif self._records:
            self._recording = self._run_inside(Recording())
        elif self._is_warm and longest + self.steps <= self.cache.max_length:
            self._recording = self._run_inside(Graph(self._pool))
            self._recording.replay()  # to capture is not to run
        else:
            self._run_inside(nullcontext())
            self._is_warm = True
        self.cache.longest = longest + self.steps
        return self._out

    def _take(self, tokens: Tensor, lengths: Tensor | None) -> None:
        """Put the inputs where a recording finds them."""
        if self._tokens is None:
            self._tokens, self._lengths = tokens.clone(), None if lengths is None else lengths.clone()
            return
        self._tokens.copy_(tokens)
        if self._lengths is not None and lengths is not None:
            self._lengths.copy_(lengths)

    def _run_inside(self, context: R) -> R:
        """Run the step on whole buffers, so that its shapes are those of every later one."""
        assert self._tokens is not None
        whole, self.cache.whole = self.cache.whole, True
        try:
            with context:
                self._out = self._run(self._tokens, self._lengths)
        finally:
            self.cache.whole = whole
        return context

    def _run(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        hidden = self.model(tokens, cache=self.cache, lengths=lengths).hidden
        out = self.model.logits(hidden) if self.head else hidden
        return out if self.steps > 1 else out[:, 0]
