"""The model equals NVIDIA's: outputs of the official code on random weights (see tests/fixtures)."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hymba.model import load, released_name
from hymba.ops import use_backend

CASES = ["b1_L1", "b1_L4", "b1_L5", "b1_L8", "b1_L9", "b1_L13", "b1_L40", "b3_L5", "b3_L40"]


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("case", CASES)
def test_logits_in_float32(backend, case, tiny_a, expected):
    model = load(tiny_a, dtype=torch.float32)
    with torch.no_grad():
        logits = model.logits(model(expected[f"{case}.input_ids"]).hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected[f"{case}.logits"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("case", [c for c in CASES if c.startswith("b1")])
def test_logits_in_float64(backend, case, tiny_a, expected):
    model = load(tiny_a, dtype=torch.float64)
    with torch.no_grad():
        logits = model.logits(model(expected[f"{case}.input_ids"]).hidden)
    torch.testing.assert_close(logits, expected[f"{case}.logits_f64"], atol=1e-9, rtol=0)


def test_hidden_states_of_meta_and_text_tokens(backend, tiny_a, expected):
    model = load(tiny_a, dtype=torch.float32)
    with torch.no_grad():
        text = model(expected["b1_L40.input_ids"], output_hidden_states=True).hidden_states
        meta = model.run_meta_tokens(output_hidden_states=True)[1].hidden_states
    states = torch.stack([torch.cat(pair, dim=1)[0] for pair in zip(meta, text, strict=True)])
    torch.testing.assert_close(states, expected["b1_L40.hidden_states"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("prompt", ["greedy_P5", "greedy_P20"])
def test_greedy_decoding_with_cache(backend, prompt, tiny_a, expected):
    model = load(tiny_a, dtype=torch.float32)
    cache = model.allocate_cache(rows=1, max_length=64)
    tokens, chosen, step_logits = expected[f"{prompt}.prompt"], [], []
    with torch.no_grad():
        for _ in range(24):
            logits = model.logits(model(tokens, cache=cache).hidden[:, -1])
            tokens = logits.argmax(-1, keepdim=True)
            chosen.append(tokens)
            step_logits.append(logits[0])
    assert torch.equal(torch.cat(chosen, dim=1), expected[f"{prompt}.tokens"])
    torch.testing.assert_close(torch.stack(step_logits), expected[f"{prompt}.step_logits"], atol=5e-4, rtol=0)


def test_loss_and_gradients(backend, tiny_a, expected):
    grads = load_file(tiny_a / "grads_b3_L40.safetensors")
    norms = dict(zip(json.loads((tiny_a / "grad_names.json").read_text()), grads["grad_norms"].tolist(), strict=True))
    model = load(tiny_a, dtype=torch.float32)
    tokens = expected["b3_L40.input_ids"]
    logits = model.logits(model(tokens).hidden)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    torch.testing.assert_close(loss.detach(), grads["loss"][0], rtol=1e-3, atol=0)
    for name, parameter in model.named_parameters():
        theirs = released_name(name)
        assert parameter.grad.norm().item() == pytest.approx(norms[theirs], rel=1e-3), theirs
        if f"grad.{theirs}" in grads:
            whole = grads[f"grad.{theirs}"]
            torch.testing.assert_close(parameter.grad, whole, rtol=1e-3, atol=1e-3 * whole.abs().max().item())


def test_a_model_without_attention_to_meta_tokens_is_not_matched(tiny_a):
    wrong = load_file(tiny_a / "expected_sdpa.safetensors")
    model = load(tiny_a, dtype=torch.float32)
    with torch.no_grad():
        logits = model.logits(model(wrong["b1_L40.input_ids"]).hidden)
    assert (logits - wrong["b1_L40.logits_nosink"]).abs().max() > 1


def test_bfloat16_stays_close_to_float32(tiny_a, expected):
    model = load(tiny_a)
    assert model.meta_tokens.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model.logits(model(expected["b1_L40.input_ids"]).hidden)
    assert logits.dtype == torch.float32
    error = (logits - expected["b1_L40.logits"]).square().mean().sqrt()
    assert error < 0.05 * expected["b1_L40.logits"].square().mean().sqrt()
