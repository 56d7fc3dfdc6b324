"""Perplexity: every token scored once, in the window that the definition gives it, every byte counted."""

import math
from pathlib import Path

import pytest
import torch
from checkpoint import STORY
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import micro_model

from hymba.errors import HymbaError
from hymba.evaluation import Score, default_context, read_text, score_text, score_tokens
from hymba.inference import load_model

BOS = 1
TOKENS = torch.randint(3, 61, (80,), generator=torch.Generator().manual_seed(0)).tolist()
MODEL = micro_model().requires_grad_(False)


def nats_of(tokens: list[int], context: int, stride: int) -> float:
    """Score by the definition, one token at a time: the first window that reaches a token tells it."""
    text, width, total = [BOS, *tokens], min(context, len(tokens)), 0.0
    for i in range(1, len(text)):
        late = math.ceil(max(0, i - width) / stride)  # windows behind the first
        start = min(len(tokens), width + late * stride) - width
        logits = MODEL.logits(MODEL(torch.tensor([[BOS, *text[start + 1 : i]]])).hidden[0, -1])
        total -= float(logits.log_softmax(-1)[text[i]])
    return total


@settings(max_examples=12)
@given(st.integers(1, 40), st.integers(2, 24), st.data())
def test_equals_the_definition(count: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    seen: list[tuple[int, int]] = []
    nats = score_tokens(MODEL, BOS, TOKENS[:count], context, stride, lambda *step: seen.append(step))
    assert nats == pytest.approx(nats_of(TOKENS[:count], context, stride), rel=1e-5)
    assert seen[-1] == (count, count)


def test_many_windows_and_many_batches_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score_tokens(MODEL, BOS, TOKENS, 16, 5)
    monkeypatch.setattr("hymba.evaluation.perplexity.BATCH_TOKENS", 1)
    monkeypatch.setattr("hymba.evaluation.perplexity.LOGIT_ROWS", 3)
    assert score_tokens(MODEL, BOS, TOKENS, 16, 5) == pytest.approx(whole, rel=1e-6)


def test_a_model_that_knows_nothing_needs_the_log_of_its_vocabulary(checkpoint: Path) -> None:
    model, tokenizer = load_model(str(checkpoint))
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    text = "“Who is there?” </s> é\r\n"
    score = score_text(model, tokenizer, text, 8, 4)
    assert score.num_bytes == len(text.encode())
    assert score.tokens == len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    assert score.loss == pytest.approx(math.log(len(tokenizer)))
    assert score.perplexity == pytest.approx(len(tokenizer))
    assert score.bits_per_byte == pytest.approx(score.tokens * math.log2(len(tokenizer)) / score.num_bytes)


def test_bfloat16_is_near_float32(checkpoint: Path) -> None:
    exact, rough = (
        score_text(*load_model(str(checkpoint), dtype), STORY, 64, 32).bits_per_byte
        for dtype in ("float32", "bfloat16")
    )
    assert rough == pytest.approx(exact, rel=0.02)


def test_scores_add_up() -> None:
    assert Score(1.0, 2, 3) + Score(4.0, 5, 6) == Score(5.0, 7, 9)
    assert Score(1e6, 2, 3).perplexity == math.inf


def test_the_default_context_is_that_of_training() -> None:
    assert default_context(micro_model(orig_max_position_embeddings=512).config) == 512
    assert default_context(micro_model(orig_max_position_embeddings=8192).config) == 2048


def test_text_is_read_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("\ufeffa\r\nb".encode())
    assert read_text(tmp_path / "text") == "\ufeffa\r\nb"


@pytest.mark.parametrize(("content", "problem"), [(b"ok \xff", "not UTF-8 text, from its byte 3"), (b"", "is empty")])
def test_a_file_without_text_is_told(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(HymbaError, match=f"bad.txt .*{problem}"):
        read_text(tmp_path / "bad.txt")


def test_an_unreadable_file_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(HymbaError, match=f"cannot read {path}: "):
            read_text(path)


@pytest.mark.parametrize(
    ("tokens", "context", "stride", "problem"),
    [
        ([], 8, 4, "no tokens"),
        ([3], 1, 1, "context must be 2 to 2048 tokens, not 1"),
        ([3], 4096, 1, "context must be 2 to 2048 tokens, not 4096"),
        ([3], 8, 0, "stride must be 1 to the context"),
        ([3], 8, 9, "stride must be 1 to the context"),
    ],
)
def test_windows_out_of_range_are_told(tokens: list[int], context: int, stride: int, problem: str) -> None:
    with pytest.raises(HymbaError, match=problem):
        score_tokens(MODEL, BOS, tokens, context, stride)
