"""The decode step, recorded once and repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba.model import Cache, Hymba
from hymba.ops import native
from hymba.ops.attention import blocks
from hymba.ops.recording import Recording


class DecodeStep:
    """Runs a few tokens a row through the model and the cache, and returns their logits: the same, step after step.

    With C++ kernels the first step is recorded and the others repeat it (:class:`hymba.ops.recording.Recording`), which
    leaves Python out of them; elsewhere each step is a call of the model. Weights must keep their memory meanwhile.

    Args:
        steps: tokens a row at each call. More than one are T columns, of which `lengths` says how many are real.
    """

    def __init__(self, model: Hymba, cache: Cache, steps: int = 1) -> None:
        self.model, self.cache, self.steps = model, cache, steps
        self._recording: Recording | None = None
        # The rotary base of "dynamic_ntk" is computed in Python from the length.
        self._can_record = native.library() is not None and cache.lengths.is_cpu
        self._can_record &= model.config.rope_type != "dynamic_ntk"
        # With other kernels, attention of several queries looks at their positions in Python.
        self._can_record &= steps == 1 or blocks.fits(torch.empty(1, steps, dtype=model.dtype))

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Take tokens in, (B,), or (B, T) and their lengths (B,) where there are several steps.

        Returns:
            Logits (B, vocab) or (B, T, vocab), overwritten by the next call.

        Raises:
            HymbaError: the cache is full.
        """
        tokens = tokens if self.steps > 1 else tokens[:, None]
        if self._recording is None:
            return self._record(tokens, lengths) if self._can_record else self._run(tokens, lengths)
        self.cache.reserve(lengths, self.steps)
        self._tokens.copy_(tokens)
        if self._lengths is not None and lengths is not None:
            self._lengths.copy_(lengths)
        self._recording.replay()
        self.cache.longest += self.steps
        return self._logits

    def _run(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        hidden = self.model(tokens, cache=self.cache, lengths=lengths).hidden
        return self.model.logits(hidden if self.steps > 1 else hidden[:, -1])

    def _record(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        self._tokens, self._lengths = tokens.clone(), None if lengths is None else lengths.clone()
        whole, self.cache.whole = self.cache.whole, True
        try:
            with Recording() as recording:
                self._logits = self._run(self._tokens, self._lengths)
        finally:
            self.cache.whole = whole
        self._recording = recording
        return self._logits
