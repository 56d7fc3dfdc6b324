"""Chat prompts in the format Hymba was instructed in, and the strings that end an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hymba.errors import HymbaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant", "tool")

# The model ends an answer by opening the next turn, or by the end-of-text token spelt out.
STOP_STRINGS = ("</s>", "<extra_id_1>")

# For checkpoints that ship no template: renders byte for byte what the released ones' own template renders.
# The <extra_id_*> marks are plain text, and neither <s> nor </s> is written.
RELEASED_TEMPLATE = """\
{{- '<extra_id_0>System' -}}
{%- for message in messages if message.role == 'system' -%}
    {{- '\\n' + message.content.strip() + ('\\n' if tools or contexts else '') -}}
{%- endfor -%}
{%- for tool in tools or [] -%}
    {{- '\\n<tool> ' + tool | tojson + ' </tool>' -}}
{%- endfor -%}
{{- '\\n' if tools and contexts else '' -}}
{%- for context in contexts or [] -%}
    {{- '\\n<context> ' + context.strip() + ' </context>' -}}
{%- endfor -%}
{{- '\\n\\n' -}}
{%- for message in messages if message.role in ('user', 'assistant', 'tool') -%}
    {{- '<extra_id_1>' + message.role.capitalize() + '\\n' + message.content.strip() + '\\n' -}}
{%- endfor -%}
{{- '<extra_id_1>Assistant\\n' if add_generation_prompt else '' -}}
"""


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] | None = None,
    contexts: Sequence[str] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Write a conversation as the prompt text that the checkpoint was trained on.

    Uses the chat template that `tokenizer` carries, or the released Hymba format if it has none.
    Encode the result with `add_special_tokens=False`: the released format has no `<s>`.

    Args:
        messages: `{"role": one of ROLES, "content": str}` each, oldest first.
        tools: JSON-like tool descriptions. contexts: retrieved passages. Both stand in the system turn.
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises:
        HymbaError: no messages, an unknown role, content that is not text, or a template that fails.
    """
    from jinja2 import TemplateError

    if not messages:
        raise HymbaError("a chat needs at least one message")
    for position, message in enumerate(messages, start=1):
        _check_message(position, message)
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            contexts=list(contexts) if contexts else None,
            chat_template=None if tokenizer.chat_template else RELEASED_TEMPLATE,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except TemplateError as error:
        raise HymbaError(f"the checkpoint's chat template refuses this conversation: {error}") from error
    return str(text)


def _check_message(position: int, message: Mapping[str, Any]) -> None:
    """Refuse what templates drop in silence (an unknown role) or crash on (content that is not text)."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise HymbaError(f"message {position} must be a mapping with the keys 'role' and 'content'")
    if message["role"] not in ROLES:
        raise HymbaError(f"message {position} has the role {message['role']!r}: use one of {', '.join(ROLES)}")
    if not isinstance(message["content"], str):
        raise HymbaError(f"message {position} has content of type {type(message['content']).__name__}: give text")


class StopCutter:
    """Cut streamed text at the first stop string, which may arrive split over several pieces.

    Text that could be the beginning of a stop string is held back until the next piece decides. The result
    does not depend on how the text was split: the stop string that is complete first wins, the longer one
    on a tie.
    """

    def __init__(self, stops: Sequence[str] = STOP_STRINGS) -> None:
        if isinstance(stops, str) or not all(stops):
            raise HymbaError("stop strings must be a list of texts, none of them empty")
        self.stopped = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """Take the next piece of text; return what is now certain to come before any stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The text has ended: return what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
