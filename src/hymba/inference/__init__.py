"""From a checkpoint to text: loading, sampling, the plain generation loop, and conversations."""

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
from hymba.inference.generate import Continuation, encode_prompt, generate
from hymba.inference.sampling import SamplingParams, sample

__all__ = [
    "Continuation",
    "Conversation",
    "SamplingParams",
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
