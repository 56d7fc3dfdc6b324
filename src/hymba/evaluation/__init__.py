"""How good a model is."""

from hymba.evaluation.perplexity import Score, default_context, read_text, score_text, score_tokens

__all__ = ["Score", "default_context", "read_text", "score_text", "score_tokens"]
