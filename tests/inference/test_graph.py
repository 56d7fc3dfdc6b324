"""Steps captured as CUDA graphs and run in buckets of rows: the bookkeeping, with a recording in the graph's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from micro import micro_model
from torch import Tensor

from hymba.errors import HymbaError
from hymba.inference import SamplingParams, generate, step
from hymba.inference.generate import _run
from hymba.inference.runner import Runner
from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba
from hymba.model.rows import save_row
from hymba.ops.recording import Recording

STEPS = 13  # more than the window: rings go round


class Captured(Recording):
    """A recording that, as a CUDA graph, leaves everything as it was when it was made."""

    cache: Cache

    def __enter__(self) -> Captured:
        self._before = [x.clone() for x in tensors(self.cache)]
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for x, before in zip(tensors(self.cache), self._before, strict=True):
            x.copy_(before)


def tensors(cache: Cache) -> list[Tensor]:
    return [*cache.keys.values(), *cache.values.values(), cache.conv_state, cache.ssm_state, cache.lengths]


def capturing(model: Hymba, cache: Cache, monkeypatch: pytest.MonkeyPatch, **options: Any) -> DecodeStep:
    monkeypatch.setattr(step, "Graph", lambda pool: Captured())
    monkeypatch.setattr(Captured, "cache", cache, raising=False)
    captured = DecodeStep(model, cache, **options)
    captured._records, captured._captures = False, True
    return captured


@pytest.fixture(scope="module")
def model() -> Hymba:
    return micro_model().requires_grad_(False)


@pytest.mark.parametrize("head", [True, False])
def test_captured_steps_equal_the_model(model: Hymba, monkeypatch: pytest.MonkeyPatch, head: bool) -> None:
    ours, theirs = (model.allocate_cache(2, 30) for _ in range(2))
    captured = capturing(model, ours, monkeypatch, head=head)
    for tokens in torch.randint(61, (STEPS, 2), generator=torch.Generator().manual_seed(0)):
        with torch.no_grad():
            expected = model(tokens[:, None], cache=theirs).hidden[:, -1]
            expected = model.logits(expected) if head else expected
        torch.testing.assert_close(captured(tokens), expected, atol=1e-5, rtol=1e-5)
        assert (ours.longest, ours.lengths.tolist()) == (theirs.longest, theirs.lengths.tolist())
    assert isinstance(captured._recording, Captured)


def test_nothing_is_captured_where_the_lengths_must_be_asked_for(model: Hymba, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = (model.allocate_cache(1, 9) for _ in range(2))
    with torch.no_grad():
        for cache in (ours, theirs):
            model(torch.tensor([[3, 4, 5, 6]]), cache=cache)
    captured = capturing(model, ours, monkeypatch, steps=8)
    drafted, one = torch.arange(8)[None], torch.tensor([1])
    for _ in range(5):  # eight columns do not fit, but the one token in them does
        with torch.no_grad():
            expected = model.logits(model(drafted, cache=theirs, lengths=one).hidden)[:, 0]
        torch.testing.assert_close(captured(drafted, one)[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert captured._recording is None
    with pytest.raises(HymbaError, match="the cache holds 9 tokens a row"):
        captured(drafted, one)


@pytest.mark.parametrize(("running", "run"), [(1, 1), (3, 4), (4, 4), (5, 8), (9, 11)])
def test_rows_beyond_those_that_run_stand_still(model: Hymba, running: int, run: int) -> None:
    runner, plain = (Runner(model, 11, 40) for _ in range(2))
    runner._pool = object()  # as on a GPU
    for row in range(11):
        for each in (runner, plain):
            each.prefill(row, 0, list(range(3, 6 + row)))
    before = [save_row(runner.cache, row, 3 + row) for row in range(running, 11)]
    tokens = list(range(7, 7 + running))
    for _ in range(3):
        torch.testing.assert_close(runner.decode(tokens, 20), plain.decode(tokens, 20), atol=1e-5, rtol=1e-5)
        drafts = [[token, 5, 9][: 1 + token % 3] for token in tokens]
        ours, theirs = runner.check(drafts, 20), plain.check(drafts, 20)
        for row, draft in enumerate(drafts):
            torch.testing.assert_close(ours[row, : len(draft)], theirs[row, : len(draft)], atol=1e-5, rtol=1e-5)
    assert {rows for rows, _ in runner._steps} == {run}
    for row, was in zip(range(running, 11), before, strict=True):
        now = save_row(runner.cache, row, 3 + row)
        assert all(torch.equal(x, y) for x, y in zip(now.heads, was.heads, strict=True))
        assert torch.equal(now.ssm_state, was.ssm_state)
        assert torch.equal(now.conv_state, was.conv_state)


def test_warming_up_leaves_no_trace(model: Hymba) -> None:
    warmed, fresh = (Runner(model, 2, 12) for _ in range(2))
    warmed._pool = object()  # as on a GPU
    warmed.warm()
    assert set(warmed._steps) == {(1, 1)}
    assert torch.equal(warmed.prefill(0, 0, [5, 6, 7]), fresh.prefill(0, 0, [5, 6, 7]))
    torch.testing.assert_close(warmed.decode([8], 3), fresh.decode([8], 3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 4, "repetition_penalty": 1.3}])
def test_running_ahead_of_what_is_read_changes_nothing(model: Hymba, options: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=9, ignore_eos=True, **options)
    prompt = torch.tensor([3, 4, 5])
    ahead = list(_run(model, prompt, params, model.allocate_cache(1, 11), 9, ahead=True))
    assert ahead == list(generate(model, prompt, params))
    stop = SamplingParams(max_new_tokens=9, stop_ids=(ahead[4],), ignore_eos=True, **options)
    stopped = list(_run(model, prompt, stop, model.allocate_cache(1, 11), 9, ahead=True))
    assert stopped == ahead[: ahead.index(ahead[4]) + 1]
