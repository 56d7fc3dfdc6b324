"""Training on the GPU: gradients of the kernels are those of the torch path, and a loss falls."""

import pytest
import torch
from kernels import DEVICE
from micro import micro_config

from hymba.hf import HymbaConfig, HymbaForCausalLM
from hymba.ops import use_backend


def made(checkpointing: bool = False) -> HymbaForCausalLM:
    torch.manual_seed(0)
    model = HymbaForCausalLM(HymbaConfig.from_dict(micro_config().to_released())).to(DEVICE).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batch() -> dict[str, torch.Tensor]:
    """Two rows of two packed documents."""
    tokens = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(5)).to(DEVICE)
    positions = torch.cat((torch.arange(10), torch.arange(14))).repeat(2, 1).to(DEVICE)
    return {"input_ids": tokens, "position_ids": positions, "labels": tokens}


def gradients(backend: str, autocast: bool, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    model = made(checkpointing)
    with use_backend(backend), torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        loss = model(**batch(), use_cache=False).loss
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found | {"loss": loss.detach()}


def distances(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((found[name] - x).norm() / x.norm().clamp(min=1e-6)) for name, x in truth.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_kernels_are_those_of_the_torch_path(checkpointing: bool) -> None:
    found = distances(gradients("triton", False, checkpointing), gradients("cpu", False))
    assert {name: far for name, far in found.items() if not far < 1e-3} == {}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_bfloat16_they_are_as_near_to_the_truth(checkpointing: bool) -> None:
    truth = gradients("cpu", False)
    theirs, ours = (distances(gradients(name, True, checkpointing), truth) for name in ("cpu", "triton"))
    assert {name: far for name, far in ours.items() if not far < 2 * theirs[name] + 0.03} == {}


def test_a_loss_falls() -> None:
    model = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(**batch(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
