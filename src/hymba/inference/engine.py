"""Many texts at once: continuous batching over the rows of one cache.

A step reads a piece of a prompt, then adds a token to every text that runs. What each text becomes is what
:func:`hymba.inference.generate` makes of it alone, a function of weights, prompt, parameters and seed: a row sees
nothing of the others, a seed's draws do not depend on them, and with batch-invariant arithmetic what is computed for a
token is the same bit for bit in any batch and any piece of a prompt. Elsewhere on a CPU, prompts are cut at fixed
places (:func:`hymba.inference.prefill.prefill_block`), only snapshots that prefill took there are reused, and nothing
is drafted.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from hymba.errors import HymbaError
from hymba.inference.bounds import EngineDeadError, EngineOptions, EngineStats, PromptTooLongError, QueueFullError
from hymba.inference.generate import end_ids
from hymba.inference.prefill import is_batch_invariant, prefill_block, prefill_chunk
from hymba.inference.prefix_cache import PrefixCache
from hymba.inference.runner import DRAFTED, Runner
from hymba.inference.sampling import Choice, sample
from hymba.inference.scheduler import Pace, Scheduler
from hymba.inference.sequence import Sequence, token_logprobs
from hymba.inference.speculation import Drafter
from hymba.model import Hymba

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SNAPSHOT_EVERY = 2048  # tokens of a long prompt
_WORTH_KEEPING = 16  # tokens that a snapshot must save
_ROWS_WITH_DRAFTS = 2  # more together than this make the check of a draft no cheaper than its tokens one by one


class Engine:
    """Runs sequences, in a thread of its own after :meth:`start`, or a :meth:`step` at a time.

    dead: one line on the error that ended the thread, else None. max_length: tokens of a sequence.

    Raises:
        HymbaError: `options` ask for more tokens than the model's limit, or for more memory than there is.
    """

    def __init__(self, model: Hymba, tokenizer: PreTrainedTokenizerBase, options: EngineOptions | None = None) -> None:
        options, limit = options or EngineOptions(), model.config.max_position_embeddings
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.max_length = limit if options.max_length is None else options.max_length
        if self.max_length > limit:
            raise HymbaError(f"max_length is {self.max_length}, but the model's limit is {limit}")
        try:
            self._runner = Runner(model, options.max_rows, self.max_length, options.cache_bits)
        except (RuntimeError, MemoryError) as error:
            raise HymbaError(
                f"no memory for {options.max_rows} rows of {self.max_length} tokens: ask for fewer or shorter ones"
            ) from error
        self._scheduler = Scheduler(self._runner)
        self._cache_bytes, kept = self._runner.cache.nbytes(), options.prefix_cache_bytes
        self._prefixes = PrefixCache(2 * self._cache_bytes if kept is None else kept)
        self._pace = Pace(options.prefill_tokens or prefill_chunk(model))
        self._block = prefill_block(model)
        self._speculates = is_batch_invariant(model) if options.speculate is None else options.speculate
        self._drafters: dict[Sequence, Drafter] = {}
        self._marks: dict[Sequence, int] = {}  # where a prompt leaves those before it
        self._counts, self._finished = EngineStats(), Counter[str]()
        self._inbox: deque[Sequence] = deque()
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping: float | None = None  # when what still runs is cancelled
        self.dead: str | None = None

    # ---- From any thread ----

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; its listener hears the rest.

        Raises:
            PromptTooLongError: it does not fit a row.
            QueueFullError: too many wait.
            EngineDeadError: the engine has stopped.
            HymbaError: the prompt is empty, or holds an id that the model does not have.
        """
        if not sequence.prompt:
            raise HymbaError("the prompt is empty: give at least one token")
        if len(sequence.prompt) > self.max_length:
            raise PromptTooLongError(len(sequence.prompt), self.max_length)
        vocabulary = self.model.config.vocab_size
        wrong = next((token for token in sequence.prompt if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise HymbaError(f"the prompt holds token {wrong}, but the model has tokens 0 to {vocabulary - 1}")
        room = self.max_length - len(sequence.prompt) + 1  # the last token is not run
        sequence.begin(self.tokenizer, end_ids(self.model, sequence.params), room)
        with self._lock:
            if self.dead or self._stopping is not None:
                raise EngineDeadError(f"the engine has stopped: {self.dead or 'it is shutting down'}")
            waiting = len(self._inbox) + len(self._scheduler.waiting)
            if waiting >= self.options.max_waiting:
                raise QueueFullError(waiting)
            self._inbox.append(sequence)
            self._lock.notify()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence at the next step, if it has not ended by then."""
        sequence.cancelled = True
        with self._lock:
            self._lock.notify()

    def start(self) -> None:
        """Run in a thread of its own from now on. On a GPU this waits until the kernels are compiled."""
        self._runner.warm()
        self._thread = threading.Thread(target=self._loop, name="hymba-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Take no more, wait up to `timeout` seconds for what runs (None: as long as it takes), and cancel the rest."""
        with self._lock:
            self._stopping = float("inf") if timeout is None else time.monotonic() + timeout
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def stats(self) -> EngineStats:
        """Return what the engine holds and has done."""
        prefixes, scheduler = self._prefixes, self._scheduler
        return replace(
            self._counts,
            running=len(scheduler.running) + len(scheduler.reading),
            waiting=len(scheduler.waiting) + len(self._inbox),
            rows=self.options.max_rows,
            prefix_entries=prefixes.entries,
            prefix_bytes=prefixes.nbytes,
            prefix_hits=prefixes.hits,
            prefix_queries=prefixes.queries,
            cache_bytes=self._cache_bytes,
            finished=dict(self._finished),
        )

    # ---- In the engine's thread ----

    def _loop(self) -> None:
        try:
            while True:
                if self.step():
                    continue
                with self._lock:
                    if self._inbox:
                        continue
                    if self._stopping is not None:
                        return
                    self._lock.wait()
        except BaseException as error:
            with self._lock:
                self.dead = f"{type(error).__name__}: {error}".splitlines()[0]
                left = [*self._scheduler, *self._inbox]
            for sequence in left:
                sequence.fail(f"the engine has stopped: {self.dead}")
                sequence.report()
            if not isinstance(error, Exception):
                raise

    def step(self) -> bool:
        """Read some of the prompts, and add a token or more to each sequence that runs; False: there are none."""
        self._take_in()
        self._scheduler.admit()
        if self._scheduler.reading:
            self._read()
        if self._scheduler.running:
            self._continue()
        self._counts.steps += 1
        return bool(self._scheduler.running or self._scheduler.reading or self._scheduler.waiting or self._inbox)

    def _take_in(self) -> None:
        """Queue what was submitted, and let go of what was cancelled."""
        with self._lock:
            while self._inbox:
                self._scheduler.add(self._inbox.popleft())
            too_late = self._stopping is not None and time.monotonic() > self._stopping
        for sequence in list(self._scheduler):
            if sequence.cancelled or too_late:
                sequence.finish = "cancelled"
                self._release(sequence)
                sequence.report()

    # ---- Prompts ----

    def _read(self) -> None:
        budget = self._pace.budget(len(self._scheduler.running))
        while budget > 0 and self._scheduler.reading:
            sequence = self._scheduler.reading[0]
            if not sequence.computed:
                self._look_up(sequence)
            logits = sequence.logits
            if logits is None:
                end = self._chunk_end(sequence, budget)
                budget -= end - sequence.computed
                logits = self._run_prompt(sequence, end)
            if sequence.computed == len(sequence.prompt):
                self._begin(sequence, logits)
            else:
                self._scheduler.reading.rotate(-1)

    def _look_up(self, sequence: Sequence) -> None:
        """Start a prompt from the longest text before it that it begins with."""
        if not self._prefixes.limit or sequence.params.prompt_logprobs is not None:
            return
        snapshot, shared = self._prefixes.find(sequence.prompt, self._block)
        if snapshot is not None:
            assert sequence.row is not None
            self._runner.restore(sequence.row, snapshot)
            sequence.computed = sequence.cached_tokens = snapshot.tokens
            self._counts.cached_tokens += snapshot.tokens
            if snapshot.tokens == len(sequence.prompt):
                sequence.logits = None if snapshot.logits is None else snapshot.logits[None]
        mark = self._last_cut(shared)
        if mark - sequence.computed >= _WORTH_KEEPING:
            self._marks[sequence] = mark

    def _last_cut(self, length: int) -> int:
        """Return the last place up to `length` where a text may be cut."""
        return length // self._block * self._block

    def _chunk_end(self, sequence: Sequence, budget: int) -> int:
        """Return where the next piece of a prompt ends: no later than where a snapshot is to be taken."""
        if self._block > 1:
            return min(self._last_cut(sequence.computed) + self._block, len(sequence.prompt))
        ends = [sequence.computed + budget, len(sequence.prompt)]
        if self._prefixes.limit:
            ends.append((sequence.computed // _SNAPSHOT_EVERY + 1) * _SNAPSHOT_EVERY)
            if (mark := self._marks.get(sequence, 0)) > sequence.computed:
                ends.append(mark)
        return min(ends)

    def _run_prompt(self, sequence: Sequence, end: int) -> Tensor:
        """Run a prompt's tokens up to `end`; return the logits behind them, (1, vocab)."""
        assert sequence.row is not None
        piece, top = sequence.prompt[sequence.computed : end], sequence.params.prompt_logprobs
        begun = time.perf_counter()
        logits = self._runner.prefill(sequence.row, sequence.computed, piece, every=top is not None)
        self._pace.read(len(piece), time.perf_counter() - begun)
        if top is not None:
            behind = sequence.prompt[sequence.computed + 1 : end + 1]
            found = token_logprobs(logits[: len(behind)], behind, top)
            sequence.prompt_logprobs += [*([] if sequence.computed else [None]), *found]
            logits = logits[-1:]
        self._counts.prompt_tokens += len(piece)
        sequence.computed = end
        ended = end == len(sequence.prompt)
        is_last_cut = self._block > 1 and end == self._last_cut(len(sequence.prompt))
        if ended or is_last_cut or end % _SNAPSHOT_EVERY == 0 or end == self._marks.get(sequence):
            self._keep(sequence, logits[0] if ended else None)
        return logits

    def _begin(self, sequence: Sequence, logits: Tensor) -> None:
        """Choose a sequence's first token, and let it run."""
        self._scheduler.start(sequence)
        self._marks.pop(sequence, None)
        sequence.logits = None
        self._choose([sequence], logits)
        self._settle([sequence])

    def _keep(self, sequence: Sequence, logits: Tensor | None = None) -> None:
        """Take a snapshot of what a sequence's row holds, unless there is one that serves as well."""
        ids = sequence.ids[: sequence.computed]
        is_worth_it = self._prefixes.limit and len(ids) >= _WORTH_KEEPING
        if is_worth_it and not self._prefixes.has(ids, with_logits=logits is not None):
            assert sequence.row is not None
            kept = None if logits is None else logits.clone()
            self._prefixes.add(ids, self._runner.save(sequence.row, len(ids), kept))

    # ---- Continuations ----

    def _continue(self) -> None:
        """Add a token or more to every sequence that runs."""
        running = list(self._scheduler.running)
        begun = time.perf_counter()
        drafts = self._draft(running)
        checks = any(drafts) or any(len(sequence.ids) - sequence.computed > 1 for sequence in running)
        if checks:
            self._check(running, drafts)
        else:
            logits = self._runner.decode([s.ids[-1] for s in running], max(s.computed for s in running))
            for sequence in running:
                sequence.computed += 1
            self._choose(running, logits)
        self._pace.stepped(time.perf_counter() - begun, checks)
        self._settle(running)

    def _draft(self, running: list[Sequence]) -> list[list[int]]:
        if not self._speculates or len(running) > _ROWS_WITH_DRAFTS:
            return [[] for _ in running]
        drafts = []
        for sequence in running:
            if sequence not in self._drafters:  # not before: most texts of a full engine never draft
                self._drafters[sequence] = Drafter(sequence.ids)
            room = min(DRAFTED - len(sequence.pending), self.max_length - len(sequence.ids))
            drafts.append(self._drafters[sequence].draft(sequence.ids, room, self._pace.price))
        return drafts

    def _check(self, running: list[Sequence], drafts: list[list[int]]) -> None:
        """Run what is pending and what is drafted, and keep as much of it as would have been chosen."""
        fed = [[*sequence.pending, *draft] for sequence, draft in zip(running, drafts, strict=True)]
        undos = [self._runner.undo(i, s.computed) if drafts[i] else None for i, s in enumerate(running)]
        logits = self._runner.check(fed, max(s.computed for s in running))
        for i, (sequence, draft, undo) in enumerate(zip(running, drafts, undos, strict=True)):
            pending = len(fed[i]) - len(draft)
            accepted = self._accept(sequence, draft, logits[i, pending - 1 : len(fed[i])])
            if undo is not None:
                self._drafters[sequence].learn(accepted)
                self._counts.drafted_tokens += len(draft)
                self._counts.accepted_tokens += accepted
            if undo is None or accepted == len(draft):
                sequence.computed += len(fed[i])
            else:
                undo()

    def _accept(self, sequence: Sequence, draft: list[int], logits: Tensor) -> int:
        """Choose tokens from logits (1 + drafted, vocab) as long as the draft foresaw them; return how many it did."""
        for i in range(len(logits)):
            self._choose([sequence], logits[i : i + 1])
            if sequence.finish or i == len(draft) or sequence.ids[-1] != draft[i]:
                return i
        return len(draft)

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Choose each sequence's next token; one for which nothing can be chosen ends with an error."""
        chosen: list[int | HymbaError]
        try:
            chosen = [*Choice(sample(logits, [sequence.state for sequence in sequences])).read()]
        except HymbaError:
            chosen = [_try_to_choose(sequence, logits[i : i + 1]) for i, sequence in enumerate(sequences)]
        for i, (sequence, token) in enumerate(zip(sequences, chosen, strict=True)):
            if isinstance(token, HymbaError):
                sequence.fail(str(token))
                continue
            top = sequence.params.logprobs
            try:
                sequence.take(token, None if top is None else token_logprobs(logits[i : i + 1], [token], top)[0])
            except HymbaError as error:  # a grammar may find out only behind a token that it cannot be followed
                sequence.fail(str(error))
            self._counts.new_tokens += 1

    def _settle(self, sequences: list[Sequence]) -> None:
        """Report what is new, and let go of what has ended."""
        for sequence in sequences:
            if sequence.finish and sequence.row is not None:
                if sequence.finish != "error" and self._block == 1:  # else decode leaves what prefill would not
                    self._keep(sequence)
                self._release(sequence)
            sequence.report()

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.release(sequence)
        self._drafters.pop(sequence, None)
        self._marks.pop(sequence, None)
        self._finished[str(sequence.finish)] += 1


def _try_to_choose(sequence: Sequence, logits: Tensor) -> int | HymbaError:
    try:
        return Choice(sample(logits, [sequence.state])).read()[0]
    except HymbaError as error:
        return error
