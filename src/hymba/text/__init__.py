"""From text to token ids and back: tokenizers, streamed decoding and chat prompts."""

from hymba.text.chat import STOP_STRINGS, StopCutter, render
from hymba.text.tokenizer import TextStream, load_tokenizer, train_tokenizer

__all__ = ["STOP_STRINGS", "StopCutter", "TextStream", "load_tokenizer", "render", "train_tokenizer"]
