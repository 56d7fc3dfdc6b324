"""The plain loop: prefill, then one token a step. Everything faster must agree with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hymba.errors import HymbaError
from hymba.inference.prefill import prefill_cuts
from hymba.inference.sampling import Choice, SamplingParams, SamplingState, sample
from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba
from hymba.text import StopCutter, TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: Hymba,
    tokens: Sequence[int] | Tensor,
    params: SamplingParams,
    cache: Cache | None = None,
    max_prompt_tokens: int | None = None,
    cache_bits: int | None = None,
    held: Sequence[int] | Tensor | None = None,
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
        held: (S,) ids of the tokens in `cache`, from which it cannot be read. `params.repetition_penalty` applies to
            them as to the rest of the prompt; without that penalty they may be left out.

    Raises:
        HymbaError: at the call, not later: the prompt is empty or too long, `cache` has several rows, or `held` is
            missing or does not fit `cache`.
    """
    ids = torch.as_tensor(tokens, dtype=torch.int64, device=model.device)
    past = 0 if cache is None else int(cache.lengths.max())
    room = model.config.max_position_embeddings
    limit = room if max_prompt_tokens is None else min(room, max_prompt_tokens)
    if ids.dim() != 1 or len(ids) == 0:
        raise HymbaError("the prompt is empty: give at least one token, in one row")
    if past + len(ids) > limit:
        raise HymbaError(f"the prompt has {past + len(ids)} tokens and the limit is {limit}: shorten it")
    if cache is not None and cache.rows != 1:
        raise HymbaError(f"generate() continues one sequence, but the cache holds {cache.rows}")
    read = _held_ids(model, params, past, held)
    # The last token is yielded but never run, so it needs no position.
    count = min(params.max_new_tokens, room - past - len(ids) + 1)
    length = past + len(ids) + count - 1
    ahead = cache is None and model.device.type == "cuda"
    if cache is None:
        cache = model.allocate_cache(rows=1, max_length=length, bits=cache_bits)
    cache.grow(length)
    return _run(model, ids, params, cache, count, ahead, read)


def _held_ids(model: Hymba, params: SamplingParams, past: int, held: Sequence[int] | Tensor | None) -> list[int]:
    """Return the ids of the `past` tokens in a cache, or none if nothing depends on them.

    Raises:
        HymbaError: they are needed and missing, or they do not fit the cache or the vocabulary.
    """
    if held is None:
        if past and params.repetition_penalty != 1:
            raise HymbaError(
                f"repetition_penalty applies to the whole prompt, but the ids of {past} tokens in the cache are"
                " unknown: pass them as `held`"
            )
        return []
    ids = torch.as_tensor(held, dtype=torch.int64).flatten().tolist()
    if len(ids) != past:
        raise HymbaError(f"`held` has {len(ids)} ids, but the cache holds {past} tokens: pass the ids of all of them")
    vocabulary = model.config.vocab_size
    if wrong := [token for token in ids if not 0 <= token < vocabulary]:
        raise HymbaError(f"`held` contains token {wrong[0]}, but the model has tokens 0 to {vocabulary - 1}")
    return ids


def end_ids(model: Hymba, params: SamplingParams) -> set[int]:
    """Return the tokens that end a text."""
    own = model.config.eos_token_id
    return {*params.stop_ids} | ({own} if own is not None and not params.ignore_eos else set())


@torch.no_grad()
def _run(
    model: Hymba,
    ids: Tensor,
    params: SamplingParams,
    cache: Cache,
    count: int,
    ahead: bool = False,
    held: Sequence[int] = (),
) -> Iterator[int]:
    """Yield up to `count` tokens.

    held: what the cache holds, as far as it is known. ahead: run each token before it is read, so that a GPU need not
    wait for Python; the cache then holds the last token too.
    """
    stops = end_ids(model, params)
    state = SamplingState(params, [*held, *ids.tolist()], stops)
    for chunk in ids.split(prefill_cuts(model, int(cache.lengths.max()), len(ids))):
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
        held: Sequence[int] | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.text = ""
        self.finish: str | None = None
        self._stops = end_ids(model, params)
        self._stream, self._cutter = TextStream(tokenizer), StopCutter(params.stop)
        self._ids = generate(model, prompt, params, cache, max_prompt_tokens, cache_bits, held)

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
