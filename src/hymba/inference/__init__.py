"""From a checkpoint to text: loading, sampling, the plain generation loop, conversations, and the engine."""

from hymba.inference.bounds import EngineDeadError, EngineOptions, EngineStats, PromptTooLongError, QueueFullError
from hymba.inference.checkpoint import (
    check_vacant,
    find_model,
    load_model,
    parse_cache,
    parse_device,
    parse_dtype,
    parse_format,
    write_model,
)
from hymba.inference.conversation import Conversation
from hymba.inference.engine import Engine
from hymba.inference.generate import Continuation, encode_prompt, generate
from hymba.inference.sampling import Choice, SamplingParams, SamplingState, sample
from hymba.inference.sequence import Sequence, TokenLogprob, Update

__all__ = [
    "Choice",
    "Continuation",
    "Conversation",
    "Engine",
    "EngineDeadError",
    "EngineOptions",
    "EngineStats",
    "PromptTooLongError",
    "QueueFullError",
    "SamplingParams",
    "SamplingState",
    "Sequence",
    "TokenLogprob",
    "Update",
    "check_vacant",
    "encode_prompt",
    "find_model",
    "generate",
    "load_model",
    "parse_cache",
    "parse_device",
    "parse_dtype",
    "parse_format",
    "sample",
    "write_model",
]
