"""From text to token ids and back: tokenizers, streamed decoding and chat prompts."""

from hymba.text.chat import STOP_STRINGS, StopCutter, render
from hymba.text.pieces import encode_documents, encode_text, end_at_spaces, split_blocks
from hymba.text.tokenizer import TextStream, load_tokenizer, train_tokenizer, train_tokenizer_from_iterator

__all__ = [
    "STOP_STRINGS",
    "StopCutter",
    "TextStream",
    "encode_documents",
    "encode_text",
    "end_at_spaces",
    "load_tokenizer",
    "render",
    "split_blocks",
    "train_tokenizer",
    "train_tokenizer_from_iterator",
]
