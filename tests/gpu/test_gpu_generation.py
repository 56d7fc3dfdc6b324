"""Texts on the GPU: the plain loop equals recomputing everything; the engine and transformers' door equal it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint import write_checkpoint
from kernels import DEVICE
from micro import micro_model

from hymba.hf import HymbaForCausalLM
from hymba.inference import Engine, EngineOptions, SamplingParams, Sequence, generate
from hymba.model import Hymba, load
from hymba.text import load_tokenizer

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)
PARAMS = [
    GREEDY,
    SamplingParams(14, temperature=0.7, top_k=20, top_p=0.9, seed=2),
    SamplingParams(10, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, seed=3),
    SamplingParams(8, temperature=0, logit_bias=((5, 3.0), (7, -100.0))),
]
PROMPT = [1, 5, 44, 30, 9, 17, 2, 60, 33, 21]


@pytest.mark.parametrize("prompt", ["greedy_P5", "greedy_P20"])
def test_equals_the_official_greedy_text(
    backend: str, prompt: str, tiny_a: Path, expected: dict[str, torch.Tensor]
) -> None:
    tokens = expected[f"{prompt}.tokens"][0].tolist()
    params = SamplingParams(max_new_tokens=len(tokens), temperature=0)
    made = list(generate(load(tiny_a, torch.float32).to(DEVICE), expected[f"{prompt}.prompt"][0], params))
    assert made == tokens[: len(made)]
    assert len(made) == len(tokens) or made[-1] == 2


def test_equals_full_recompute() -> None:
    model = micro_model(eos_token_id=None).to(DEVICE).requires_grad_(False)
    text = list(PROMPT)
    for _ in range(12):
        with torch.no_grad():
            text.append(int(model.logits(model(torch.tensor([text], device=DEVICE)).hidden[0, -1]).argmax()))
    assert list(generate(model, PROMPT, GREEDY)) == text[-12:]


def test_a_seed_gives_the_same_text_again() -> None:
    model = micro_model(eos_token_id=None).to(DEVICE).requires_grad_(False)
    params = SamplingParams(30, temperature=0.9, top_k=20, top_p=0.95, seed=11)
    first = list(generate(model, PROMPT, params))
    assert list(generate(model, PROMPT, params)) == first
    assert list(generate(model, PROMPT, replace(params, seed=12))) != first


@pytest.mark.parametrize("options", [{}, {"prefill_tokens": 3}, {"prefix_cache_bytes": 0, "speculate": False}])
def test_the_engines_texts_are_what_they_are_alone(options: dict[str, int], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_checkpoint(tmp_path / "micro"))
    model: Hymba = micro_model(vocab_size=len(tokenizer), max_position_embeddings=80).to(DEVICE).requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 25, (9,), generator=draw).tolist()
    prompts = [torch.randint(60, (length,), generator=draw).tolist() for length in lengths]
    sequences = [Sequence(prompt, PARAMS[i % len(PARAMS)]) for i, prompt in enumerate(prompts)]
    engine = Engine(model, tokenizer, EngineOptions(**({"max_rows": 3} | options)))
    for sequence in sequences:
        engine.submit(sequence)
    while engine.step():
        pass
    assert [s.tokens for s in sequences] == [list(generate(model, s.prompt, s.params)) for s in sequences]


def test_transformers_generates_the_same(tiny_a: Path, expected: dict[str, torch.Tensor]) -> None:
    model = HymbaForCausalLM.from_pretrained(tiny_a, dtype=torch.float32).to(DEVICE)
    prompt, tokens = (expected[f"greedy_P5.{name}"] for name in ("prompt", "tokens"))
    made = model.generate(prompt.to(DEVICE), max_new_tokens=tokens.shape[1], do_sample=False, pad_token_id=0)
    new = made[0, prompt.shape[1] :].tolist()
    assert new == tokens[0, : len(new)].tolist()
