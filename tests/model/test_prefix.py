"""The meta tokens' state: current at every call, and computed once where the caller keeps it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from micro import micro_model

from hymba.errors import HymbaError
from hymba.evaluation.perplexity import score_tokens
from hymba.inference.runner import Runner
from hymba.model import Hymba, quantize

TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each run of the meta tokens, as they happen."""
    rows: list[int] = []
    original = Hymba.run_meta_tokens

    def counted(self, base=None, *args):
        rows.append(len(base) if isinstance(base, torch.Tensor) else 1)
        return original(self, base, *args)

    monkeypatch.setattr(Hymba, "run_meta_tokens", counted)
    return rows


def train_with_fused_adamw(model: Hymba) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    model(TOKENS).hidden.square().sum().backward()
    optimizer.step()


def scale_data(model: Hymba) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def put_a_hook_on(model: Hymba) -> None:
    model.layers[1].mixer.out_proj.register_forward_hook(lambda module, inputs, output: output * 0)


def load_other_weights(model: Hymba) -> None:
    model.load_state_dict(micro_model(seed=1).state_dict(), assign=True)


def edit_in_inference_mode(model: Hymba) -> None:
    with torch.inference_mode():
        model.meta_tokens.add_(1.0)


def edit_quantized_scales(model: Hymba) -> None:
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1.5)


CHANGES = [
    train_with_fused_adamw,
    scale_data,
    put_a_hook_on,
    load_other_weights,
    edit_in_inference_mode,
    edit_quantized_scales,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_of_the_weights_is_missed(change: Callable[[Hymba], None]) -> None:
    model = micro_model()
    if change is edit_quantized_scales:
        quantize(model.requires_grad_(False), 8)
    with torch.no_grad():
        before = model(TOKENS).hidden
    change(model)
    with torch.no_grad():
        after = model(TOKENS).hidden
        cached = model(TOKENS, cache=model.allocate_cache(2, 4)).hidden
    with torch.enable_grad():
        wanted = model(TOKENS).hidden.detach()  # with gradients nothing was ever kept
    torch.testing.assert_close(after, wanted)
    torch.testing.assert_close(cached, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before, after, atol=1e-3)


def test_a_batch_without_cache_runs_the_meta_tokens_once_as_one_row(runs: list[int]) -> None:
    micro_model()(TOKENS)
    assert runs == [1]


@torch.no_grad()
def test_a_prefix_that_is_passed_on_saves_the_run(runs: list[int]) -> None:
    model = micro_model()
    prefix = model.prefix()
    wanted = model(TOKENS).hidden
    assert runs == [1, 1]
    assert torch.equal(model(TOKENS, prefix=prefix).hidden, wanted)
    cache = model.allocate_cache(2, 4, prefix=prefix)
    torch.testing.assert_close(model(TOKENS, cache=cache).hidden, wanted, atol=1e-5, rtol=1e-4)
    assert runs == [1, 1]


def test_a_prefix_beside_a_cache_is_refused() -> None:
    model = micro_model().requires_grad_(False)
    with pytest.raises(HymbaError, match="either a cache or a prefix"):
        model(TOKENS, cache=model.allocate_cache(2, 4), prefix=model.prefix())


@pytest.mark.parametrize("cache_bits", [None, 8])
def test_evaluation_computes_it_once(runs: list[int], cache_bits: int | None) -> None:
    model = micro_model().requires_grad_(False)
    score_tokens(model, 1, list(range(2, 60)) * 60, context=32, stride=16, cache_bits=cache_bits)
    assert runs == [1]


def test_the_engine_computes_it_once(runs: list[int]) -> None:
    runner = Runner(micro_model().requires_grad_(False), rows=2, max_length=20)
    for row in (0, 1, 0):
        runner.clear(row)
        runner.prefill(row, 0, [1, 2, 3])
    assert runs == [1]
