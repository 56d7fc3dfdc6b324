"""The plain loop: prefill, then one token a step. Everything faster must agree with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hymba.errors import HymbaError
from hymba.inference.sampling import Choice, SamplingParams, SamplingState, sample
from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba, scheme_of
from hymba.text import StopCutter, TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFILL_CHUNK = 512  # tokens of the prompt run at once: bounds the memory that a long prompt takes
GPU_PREFILL_CHUNK = 8192  # on a GPU, which fewer would not fill


def prefill_chunk(model: Hymba) -> int:
    """Return how many tokens of a prompt are run at once: twice as many where each chunk widens quantised weights."""
    if model.device.type == "cuda":
        return GPU_PREFILL_CHUNK
    return PREFILL_CHUNK if scheme_of(model) is None else 2 * PREFILL_CHUNK


def generate(
    model: Hymba,
    tokens: Sequence[int] | Tensor,
    params: SamplingParams,
    cache: Cache | None = None,
    max_prompt_tokens: int | None = None,
    cache_bits: int | None = None,
) -> Iterator[int]:
    """Yield new token ids, each as soon as it is chosen; one that stops the text is the last to be yielded.

    The text ends at the model's end-of-text token, at one of `params.stop_ids`, after
    `params.max_new_tokens`, or where it fills `max_position_embeddings`. `params.stop` is about text: see
    :class:`Continuation`.

    Args:
        tokens: (T,) ids of the prompt, its BOS included; or what follows the tokens that `cache` holds.
        cache: of one row; it grows as needed, and afterwards holds everything but the last token yielded. None
            allocates one, which runs the meta tokens; callers that generate many texts from weights that do not change
            run them once, and pass ``model.allocate_cache(1, 1, prefix=prefix)``.
        max_prompt_tokens: a limit below `max_position_embeddings`.
        cache_bits: 8 quantises the keys and values of the cache that is made where none is given.

    Raises:
        HymbaError: at the call, not later: the prompt is empty or too long, or `cache` has several rows.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=model.device)
    held = 0 if cache is None else int(cache.lengths.max())
    room = model.config.max_position_embeddings
    limit = room if max_prompt_tokens is None else min(room, max_prompt_tokens)
    if ids.dim() != 1 or len(ids) == 0:
        raise HymbaError("the prompt is empty: give at least one token, in one row")
    if held + len(ids) > limit:
        raise HymbaError(f"the prompt has {held + len(ids)} tokens and the limit is {limit}: shorten it")
    if cache is not None and cache.rows != 1:
        raise HymbaError(f"generate() continues one sequence, but the cache holds {cache.rows}")
    # The last token is yielded but never run, so it needs no position.
    count = min(params.max_new_tokens, room - held - len(ids) + 1)
    length = held + len(ids) + count - 1
    ahead = cache is None and model.device.type == "cuda"
    if cache is None:
        cache = model.allocate_cache(rows=1, max_length=length, bits=cache_bits)
    cache.grow(length)
    return _run(model, ids, params, cache, count, ahead)


def end_ids(model: Hymba, params: SamplingParams) -> set[int]:
    """Return the tokens that end a text."""
    own = model.config.eos_token_id
    return {*params.stop_ids} | ({own} if own is not None and not params.ignore_eos else set())


@torch.no_grad()
def _run(
    model: Hymba, ids: Tensor, params: SamplingParams, cache: Cache, count: int, ahead: bool = False
) -> Iterator[int]:
    """Yield up to `count` tokens. `ahead`: run each before it is read, so that a GPU need not wait for Python; the
    cache then holds the last token too."""
    stops = end_ids(model, params)
    state = SamplingState(params, ids.tolist(), stops)
    for chunk in ids.split(prefill_chunk(model)):
        hidden = model(chunk[None], cache=cache).hidden
    logits, run_step = model.logits(hidden[:, -1]), DecodeStep(model, cache)
    for step in range(count):
        next_id = sample(logits, [state])
        choice, is_last = Choice(next_id), step == count - 1
        if ahead and not is_last:
            logits = run_step(next_id.clamp(min=0))  # what is no token is told of below
        yield (token := choice.read()[0])
        state.accept(token)
        if token in stops or is_last:
            return
        if not ahead:
            logits = run_step(next_id)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text to continue, BOS first if the tokenizer has one.

    Raises:
        HymbaError: there is no text.
    """
    if not text.strip():
        raise HymbaError("the prompt is empty: give some text to continue")
    return list(tokenizer(text, verbose=False)["input_ids"])


class Continuation:
    """Text as it is generated: iterate once for its pieces, one per token, often a word, sometimes "".

    Arguments and errors are those of :func:`generate`; `params.stop` is obeyed too.

    tokens: the ids so far, one that stopped the text included.
    pieces: what each of them added to the raw text.
    text: what has been yielded, without a stop string.
    finish: "stop" after a stop token or string, "length" when the tokens or the positions ran out, else None.
    """

    def __init__(
        self,
        model: Hymba,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Sequence[int],
        params: SamplingParams,
        cache: Cache | None = None,
        max_prompt_tokens: int | None = None,
        cache_bits: int | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.text = ""
        self.finish: str | None = None
        self._stops = end_ids(model, params)
        self._stream, self._cutter = TextStream(tokenizer), StopCutter(params.stop)
        self._ids = generate(model, prompt, params, cache, max_prompt_tokens, cache_bits)

    def __iter__(self) -> Iterator[str]:
        for token in self._ids:
            self.tokens.append(token)
            self.pieces.append(self._stream.push(token))
            yield self._grow(self._cutter.push(self.pieces[-1]))
            if self._cutter.stopped or token in self._stops:
                self.finish = "stop"
                break
        else:
            self.finish = "length"
        yield self._grow(self._cutter.push(self._stream.flush()) + self._cutter.flush())

    def _grow(self, piece: str) -> str:
        self.text += piece
        return piece
