"""Answers held to a grammar: JSON of a schema, any JSON object, or a regular expression.

llguidance reads a text byte by byte with an Earley parser over a lazily built lexer and says which tokens may follow.
It takes the tokenizer as it is: byte-level, or SentencePiece with its byte tokens and its sign for a space.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from threading import Lock
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hymba.errors import HymbaError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

KEPT = 64  # constraints kept for each tokenizer, those used last
# JSON in one line. Where blanks are free a weak model loses its way in them, and any model writes more tokens.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# Left to itself, llguidance replaces text that is certain by the tokenizer's tokens of it: special ones, for "<s>".
_OPTIONS = '%llguidance {"no_forcing": true}'


class Constraint:
    """A grammar compiled for one tokenizer. It never changes: any number of texts and threads may share it.

    Made by one of the three methods below, which remember what they made: the same schema is compiled once.
    """

    def __init__(self, start: LLMatcher, view: LLTokenizer) -> None:
        self._start, self._view = start, view

    @staticmethod
    def json_schema(tokenizer: PreTrainedTokenizerBase, schema: dict[str, Any] | str) -> Constraint:
        """JSON that a JSON Schema (draft 2020-12) accepts, in one line, properties in the order in which it names them.

        Raises:
            HymbaError: it is no JSON object, is no schema, says something that cannot be held to, or that
                nothing can satisfy.
        """
        return _vocabulary(tokenizer).compile("JSON schema", f"%json {_schema_text(schema)}")

    @staticmethod
    def json_object(tokenizer: PreTrainedTokenizerBase) -> Constraint:
        """Any JSON object, in one line."""
        return Constraint.json_schema(tokenizer, {"type": "object"})

    @staticmethod
    def regex(tokenizer: PreTrainedTokenizerBase, pattern: str) -> Constraint:
        r"""Text that a regular expression matches as a whole.

        Its syntax is that of Rust's `regex`, which has no look-around; `\d`, `\w` and `\s` are of ASCII.

        Raises:
            HymbaError: it is no such expression, or nothing can match it.
        """
        return _vocabulary(tokenizer).compile("regex", f"/{_quoted(pattern)}/")

    def begin(self) -> Matcher:
        """Return the state of a text that has not begun."""
        return Matcher(self._start.deep_copy(), self._view)


class Matcher:
    """How far one text has come in its grammar. Not to be shared by threads."""

    def __init__(self, matcher: LLMatcher, view: LLTokenizer) -> None:
        self._matcher, self._vocab_size, self._end = matcher, view.vocab_size, view.eos_token
        self._bits = np.zeros((view.vocab_size + 31) // 32, dtype=np.uint32)

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the text may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, vocab_size: int) -> Tensor:
        """Return which tokens may follow: (vocab_size,) bool on the CPU, a new tensor each time.

        The end-of-text token is among them where the text may end. Never among them are other special tokens
        and ids past the tokenizer's, which a padded vocabulary has.

        Raises:
            HymbaError: nothing may follow, or too many readings of the text are open to follow them all.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._matcher.is_error():
            raise HymbaError(f"the answer's grammar leads nowhere: {_reason(self._matcher.get_error())}")
        allowed = np.unpackbits(self._bits.view(np.uint8), count=vocab_size, bitorder="little")
        return torch.from_numpy(allowed.view(np.bool_))

    def accept(self, token: int) -> None:
        """Take the next token of the text.

        Raises:
            HymbaError: the grammar forbids it; the state stays as it was.
        """
        if not self._allows(token) or not self._matcher.consume_token(token):
            raise HymbaError(f"token {token} is not what the answer's grammar allows here")

    def _allows(self, token: int) -> bool:
        if token == self._end:
            return bool(self.finished or self._matcher.is_accepting())
        return 0 <= token < self._vocab_size and bool(self._matcher.validate_tokens([token]) == 1)


class _Vocabulary:
    """A tokenizer as grammars see it, and the constraints last compiled for it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._library, end = _llguidance(), tokenizer.eos_token_id
        if end is None:
            raise HymbaError("the tokenizer names no end-of-text token, which tells where a constrained answer ends")
        self._view = self._library.LLTokenizer(tokenizer.backend_tokenizer.to_str(), eos_token=end)
        self.compile = lru_cache(KEPT)(self._compile)

    def _compile(self, kind: str, rule: str) -> Constraint:
        """Compile a rule of llguidance's grammar language, which says that it comes from a regex or a schema."""
        start = self._library.LLMatcher(self._view, f"{_OPTIONS}\nstart: {rule}", log_level=0)
        start.compute_bitmask()  # which finds out whether any text follows the rule
        if start.is_error():
            raise HymbaError(f"this {kind} cannot be followed: {_reason(start.get_error())}")
        return Constraint(start, self._view)


_vocabularies: WeakKeyDictionary[PreTrainedTokenizerBase, _Vocabulary] = WeakKeyDictionary()
_lock = Lock()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    """Return the view of a tokenizer, which is made the first time it is asked for."""
    with _lock:
        if tokenizer not in _vocabularies:
            _vocabularies[tokenizer] = _Vocabulary(tokenizer)
        return _vocabularies[tokenizer]


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise HymbaError("constrained answers need llguidance: pip install 'hymba[serve]'") from error
    return llguidance


def _schema_text(schema: dict[str, Any] | str) -> str:
    """Return a schema as JSON, always written the same way, with our style under llguidance's own key."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(parsed, dict):
            raise HymbaError(f"a JSON schema is an object, not {json.dumps(parsed)[:40]}")
        return json.dumps(parsed | {"x-guidance": _STYLE}, allow_nan=False)
    except HymbaError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise HymbaError(f"the JSON schema is not JSON: {error}") from error


def _quoted(pattern: str) -> str:
    """Return a regex as it stands between slashes. llguidance drops an escape that is cut short."""
    if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
        raise HymbaError("this regex cannot be followed: it ends with a single backslash")
    return str(_llguidance().regex_to_lark(pattern, "dws"))


def _reason(message: str) -> str:
    """Return the one line of llguidance's that says what was wrong, and the pattern if it is about one."""
    lines = [line.strip() for line in message.splitlines()]
    for head, pattern, line in zip(lines, lines[1:], lines[3:], strict=False):
        if head.endswith("regex parse error:") and line.startswith("error: "):
            return f"{line.removeprefix('error: ')} in {pattern[:60]}"
    found = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", lines[0])[:200]
    return "no text satisfies it" if found == "NoExtensionBias" else found
