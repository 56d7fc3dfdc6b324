"""The decode step, recorded once and repeated."""

from __future__ import annotations

import torch
from torch import Tensor

from hymba.model import Cache, Hymba
from hymba.ops import native
from hymba.ops.recording import Recording


class DecodeStep:
    """Runs one token a row through the model and the cache, and returns the logits: the same, step after step.

    With C++ kernels the first step is recorded and the others repeat it (:class:`hymba.ops.recording.Recording`), which
    leaves Python out of them; elsewhere each step is a call of the model. Weights must keep their memory meanwhile.
    """

    def __init__(self, model: Hymba, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._recording: Recording | None = None
        # The rotary base of "dynamic_ntk" is computed in Python from the length.
        self._can_record = native.library() is not None and cache.lengths.is_cpu
        self._can_record &= model.config.rope_type != "dynamic_ntk"

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Take tokens (B,) in; return logits (B, vocab), overwritten by the next call.

        Raises:
            HymbaError: the cache is full.
        """
        if self._recording is None:
            return self._record(tokens) if self._can_record else self._run(tokens[:, None])
        self.cache.reserve(None, 1)
        self._tokens.copy_(tokens[:, None])
        self._recording.replay()
        self.cache.longest += 1
        return self._logits

    def _run(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self.model(tokens, cache=self.cache).hidden[:, -1])

    def _record(self, tokens: Tensor) -> Tensor:
        self._tokens = tokens[:, None].clone()
        whole, self.cache.whole = self.cache.whole, True
        try:
            with Recording() as recording:
                self._logits = self._run(self._tokens)
        finally:
            self.cache.whole = whole
        self._recording = recording
        return self._logits
