"""Outputs follow the weights of the moment, and padding has no effect, through transformers' classes."""

from __future__ import annotations

import pytest
import torch

from hymba.hf import HymbaForCausalLM

IDS = torch.tensor([[1, 40, 50, 6, 7]])


def evaluate(model: HymbaForCausalLM, use_cache: bool = False) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=use_cache).logits


def with_gradients(model: HymbaForCausalLM) -> torch.Tensor:
    """What a call that builds a graph returns: it always runs the meta tokens."""
    return model(input_ids=IDS, use_cache=False).logits.detach()


@pytest.mark.parametrize("use_cache", [False, True])
def test_evaluation_between_steps_of_training(build, use_cache: bool) -> None:
    model = build().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for _ in range(2):
        before = evaluate(model, use_cache)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        after = evaluate(model, use_cache)
        torch.testing.assert_close(after, with_gradients(model), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(before, after, atol=1e-2)


def test_adapters_are_switched(build) -> None:
    peft = pytest.importorskip("peft")
    model = build().eval()
    base = evaluate(model)
    lora = peft.LoraConfig(r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora, adapter_name="first").eval()
    adapted.add_adapter("second", lora)
    outputs = {}
    for name in ("first", "second"):
        adapted.set_adapter(name)
        outputs[name] = evaluate(adapted)
        torch.testing.assert_close(outputs[name], with_gradients(adapted), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(outputs["first"], outputs["second"], atol=1e-2)
    with adapted.disable_adapter():
        torch.testing.assert_close(evaluate(adapted), base, atol=1e-4, rtol=1e-4)
    adapted.set_adapter("first")
    torch.testing.assert_close(evaluate(adapted), outputs["first"])


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    "mask", [[[0, 0, 1, 1], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 0, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 1]]]
)
def test_masked_embeddings_that_are_no_numbers(model, use_cache: bool, mask: list[list[int]]) -> None:
    masked = torch.tensor(mask)
    clean = model.get_input_embeddings()(torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])).detach()
    dirty = clean.masked_fill(masked[..., None] == 0, float("nan"))
    wanted, found = (
        model(inputs_embeds=x, attention_mask=masked, use_cache=use_cache, output_hidden_states=True)
        for x in (clean, dirty)
    )
    assert torch.equal(found.logits, wanted.logits)
    assert all(map(torch.equal, found.hidden_states, wanted.hidden_states))


def test_no_gradient_of_masked_embeddings(build) -> None:
    model, masked = build(), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    x = torch.randn(2, 4, 24).masked_fill(masked[..., None] == 0, float("nan")).requires_grad_()
    labels = torch.tensor([[-100, 1, 2, 3], [4, 5, -100, -100]])
    for skip_logits in (False, True):
        model.zero_grad()
        loss = model(inputs_embeds=x, attention_mask=masked, labels=labels, skip_logits=skip_logits).loss
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        assert not grad[masked == 0].any()
        assert grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", [(2, 0), (0, 3)])
def test_empty_batches(model, size: tuple[int, int]) -> None:
    empty = torch.zeros(size, dtype=torch.int64)
    for more in ({}, {"attention_mask": empty}, {"position_ids": empty}, {"output_attentions": True}):
        assert model(input_ids=empty, use_cache=False, **more).logits.shape == (*size, 61)
