"""Training through the door: loss, checkpointing, initialisation, tied and resized embeddings."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hymba.hf import HymbaForCausalLM

IDS = torch.randint(3, 61, (2, 14), generator=torch.Generator().manual_seed(0))


def gradients(model: HymbaForCausalLM, mask: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    predicted = F.pad(mask[:, :-1], (1, 0)) * mask  # nothing predicts the first token behind padding
    model(IDS, attention_mask=mask, labels=IDS.masked_fill(predicted == 0, -100)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_loss_is_the_shifted_cross_entropy(model: HymbaForCausalLM) -> None:
    labels = IDS.clone()
    labels[0, :6] = -100
    with torch.no_grad():
        output = model(IDS, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(build: Callable[..., HymbaForCausalLM], reentrant: bool) -> None:
    model = build().train()
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    plain = gradients(model, mask)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # its name in every transformers 5
    checkpointed = gradients(model, mask)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def test_padding_gives_no_gradient(build: Callable[..., HymbaForCausalLM]) -> None:
    model = build().train()
    mask = torch.ones_like(IDS)
    mask[:, :5] = 0
    left = gradients(model, mask)
    model.zero_grad()
    model(IDS[:, 5:], labels=IDS[:, 5:]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(left[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_missing_tensor_is_initialised_and_the_others_are_kept(model: HymbaForCausalLM) -> None:
    state = dict(model.state_dict())
    name = "model.core.layers.1.mixer.A_log"
    del state[name]
    loaded = HymbaForCausalLM.from_pretrained(None, config=model.config, state_dict=state).state_dict()
    torch.testing.assert_close(loaded[name][0].exp(), torch.arange(1.0, 5.0))
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_untied_and_resized_embeddings(build: Callable[..., HymbaForCausalLM], tmp_path: Path) -> None:
    model = build(tie_word_embeddings=False).eval()
    model.resize_token_embeddings(70)
    assert model(IDS).logits.shape[-1] == 70
    assert model(torch.full_like(IDS, 69), labels=torch.full_like(IDS, 69)).loss.isfinite()
    model.save_pretrained(tmp_path)
    again = HymbaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert again.lm_head.weight.data_ptr() != again.get_input_embeddings().weight.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("count", [None, 7, torch.tensor(7)])
def test_a_loss_without_logits_is_the_same_loss(
    build: Callable[..., HymbaForCausalLM], count: int | Tensor | None
) -> None:
    labels = IDS.clone()
    labels[0, :6] = -100
    results = []
    for skip in (False, True):
        model = build().train()
        output = model(IDS, labels=labels, skip_logits=skip, num_items_in_batch=count)
        output.loss.backward()
        results.append((output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        assert (output.logits is None) == skip
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


def losses(model: HymbaForCausalLM, **options: object) -> list[Tensor]:
    """The loss with and without logits."""
    with torch.no_grad():
        return [model(IDS, skip_logits=skip, **options).loss for skip in (False, True)]


@pytest.mark.parametrize("labels", [None, torch.zeros_like(IDS)], ids=["alone", "beside labels"])
def test_shifted_labels_are_the_targets(model: HymbaForCausalLM, labels: Tensor | None) -> None:
    targets = torch.randint(0, 61, IDS.shape, generator=torch.Generator().manual_seed(1))
    targets[1, 5:] = -100
    with torch.no_grad():
        logits = model(IDS).logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for loss in losses(model, labels=labels, shift_labels=targets):
        torch.testing.assert_close(loss, expected)
    for loss in losses(model, labels=labels, shift_labels=targets, num_items_in_batch=torch.tensor(5)):
        torch.testing.assert_close(loss, expected * (targets >= 0).sum() / 5)


def test_another_index_may_be_ignored(model: HymbaForCausalLM) -> None:
    one, other = losses(model, labels=IDS, ignore_index=int(IDS[0, 4]))
    torch.testing.assert_close(one, other)
    assert one != losses(model, labels=IDS)[0]


def test_labels_that_are_all_ignored(model: HymbaForCausalLM) -> None:
    labels = torch.full_like(IDS, -100)
    assert all(loss.isnan() for loss in losses(model, labels=labels))  # a mean over no token, as in transformers
    assert all(loss == 0 for loss in losses(model, labels=labels, num_items_in_batch=3))


@pytest.mark.parametrize("kept", [3, torch.tensor([0, 2, 7, 13]), torch.tensor([5])], ids=str)
def test_the_loss_of_the_kept_columns(model: HymbaForCausalLM, kept: int | Tensor) -> None:
    columns = torch.arange(IDS.shape[1])[-kept:] if isinstance(kept, int) else kept
    with torch.no_grad():
        logits = model(IDS).logits[:, columns]
    targets = F.pad(IDS[:, 1:], (0, 1), value=-100)[:, columns]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    for options in ({"labels": IDS}, {"shift_labels": targets}):
        for loss in losses(model, logits_to_keep=kept, **options):
            torch.testing.assert_close(loss, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, logits_to_keep=kept).logits, logits)


def test_a_hook_on_the_head_runs_without_logits(build: Callable[..., HymbaForCausalLM]) -> None:
    model = build().eval()
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(*losses(model, labels=IDS))
