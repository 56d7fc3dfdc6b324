"""What requests may say. A field that is not here is refused by its name; null means that a field is absent."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_DEPTH = 64  # of JSON inside a request


def _check_json(value: Any, depth: int = 0) -> Any:
    """Refuse JSON that could not be written again."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(key)
            _check_json(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, depth + 1)
    elif isinstance(value, str):
        _check_text(value)
    return value


def _check_text(text: str) -> str:
    """Refuse half a character (JSON can spell one), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate is no Unicode text") from error
    return text


def _check_arguments(text: str) -> str:
    try:
        if isinstance(json.loads(text), dict):
            return text
    except (ValueError, RecursionError):
        pass
    raise ValueError("must be a JSON object, written as text")


def _check_bias(bias: dict[str, float]) -> dict[str, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"{key!r} is no token id")
    return bias


Json = Annotated[dict[str, Any], AfterValidator(_check_json)]
Text = Annotated[str, AfterValidator(_check_text)]
NonEmpty = Annotated[Text, Field(min_length=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# Lists stop at their first mistake: one error for each of a million entries would take seconds to write.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[Text], Field(fail_fast=True)]


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def drop_nulls(cls, value: Any) -> Any:
        """Leave fields out that are null."""
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class StreamOptions(Body):
    """`include_usage`: a last event tells the tokens."""

    include_usage: bool = False


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Body):
    """A JSON schema. It is always kept to, whatever `strict` says."""

    name: str
    schema_: Json = Field(alias="schema")
    description: str | None = None
    strict: bool = True


class JsonSchemaFormat(Body):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Body):
    """A regular expression or a JSON schema that the whole answer keeps to."""

    regex: NonEmpty | None = None
    json_: Json | None = Field(None, alias="json")

    @model_validator(mode="after")
    def check_one(self) -> StructuredOutputs:
        """Refuse none, and both."""
        if (self.regex is None) == (self.json_ is None):
            raise ValueError("give either 'regex' or 'json'")
        return self


class Generation(Body):
    """What both kinds of completion share: OpenAI's fields, then those that vLLM adds."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: NonEmpty | Annotated[list[NonEmpty], Field(max_length=MAX_STOPS, fail_fast=True)] = Field(
        default_factory=list
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[dict[str, Bias], AfterValidator(_check_bias)] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    user: str | None = None  # names who asks; changes nothing

    top_k: int = Field(-1, ge=-1, lt=1 << 31)  # -1 and 0: all
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    min_tokens: int = Field(0, ge=0, lt=1 << 31)
    stop_token_ids: TokenIds = Field(default_factory=list)
    ignore_eos: bool = False
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def check_agreement(self) -> Generation:
        """Refuse fields that make no sense together."""
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise ValueError("give either response_format or structured_outputs")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, of one or of several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends by telling the tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Generation):
    """Continue a text, or several."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    max_tokens: int = Field(16, ge=0, lt=1 << 31)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def check_tokens(self) -> CompletionRequest:
        """Refuse more tokens at least than at most."""
        if self.min_tokens > self.max_tokens:
            raise ValueError("min_tokens is more than max_tokens")
        return self


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[TextPart], Field(fail_fast=True)]


class SystemMessage(Body):
    """What the assistant is told first."""

    role: Literal["system", "developer"]
    content: Content


class UserMessage(Body):
    """A question."""

    role: Literal["user"]
    content: Content


class FunctionCall(Body):
    """A call that the assistant made."""

    name: Text
    arguments: Annotated[Text, AfterValidator(_check_arguments)]


class ToolCall(Body):
    """A call that the assistant made, with its name."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Body):
    """An earlier answer."""

    role: Literal["assistant"]
    content: Content = ""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] = Field(default_factory=list)


class ToolMessage(Body):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class Function(Body):
    """A function that the assistant may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: Json | None = None


class Tool(Body):
    """A tool that the assistant may use."""

    type: Literal["function"]
    function: Function


class ChatRequest(Generation):
    """Answer a conversation."""

    messages: Messages
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(fail_fast=True)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] = "auto"
    contexts: Texts = Field(default_factory=list)

    @model_validator(mode="after")
    def check_chat(self) -> ChatRequest:
        """Refuse fields that make no sense together."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        if self.limit and self.min_tokens > self.limit:
            raise ValueError("min_tokens is more than max_tokens")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer, by either name."""
        return self.max_tokens or self.max_completion_tokens

    @property
    def offered(self) -> list[Tool]:
        """The tools that may be called."""
        return self.tools if self.tool_choice == "auto" else []


class TokenizeRequest(Body):
    """A text, or a conversation, whose tokens are asked for."""

    model: str | None = None
    prompt: Text | None = None
    add_special_tokens: bool = True
    messages: Messages | None = None

    @model_validator(mode="after")
    def check_one(self) -> TokenizeRequest:
        """Refuse none, and both."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        return self


class DetokenizeRequest(Body):
    """Tokens whose text is asked for."""

    model: str | None = None
    tokens: TokenIds


class ErrorDetail(BaseModel):
    """What went wrong: in words, by kind, by field and by code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error."""

    error: ErrorDetail
