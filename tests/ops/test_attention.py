"""The attention op: the mask spelled out key by key, and the fused path against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba.errors import HymbaError
from hymba.ops import gpu, native
from hymba.ops.attention import IMPLEMENTATIONS, attention, cpu, reference, visible
from hymba.ops.backend import selected, usable, use_backend


def spelled_out(i: int, j: int, window: int | None, num_meta: int, same_document: bool) -> bool:
    """The rule in one key's words."""
    if j < 0 or i < 0 or j > i:
        return False
    if j < num_meta:
        return True
    return same_document and (window is None or i - j <= window)


@given(st.integers(1, 12), st.integers(0, 4), st.one_of(st.none(), st.integers(1, 6)), st.data())
def test_mask_is_the_rule_for_every_pair(steps, num_meta, window, data):
    documents = sorted(data.draw(st.lists(st.integers(0, 2), min_size=steps, max_size=steps)))
    offsets = [t - documents.index(documents[t]) for t in range(steps)]
    queries = [num_meta + offset for offset in offsets]
    keys = [*range(num_meta), *queries, -1]
    key_documents = [-1] * num_meta + documents + [-1]
    seen = visible(
        torch.tensor([queries]),
        torch.tensor([keys]),
        window=window,
        num_meta=num_meta,
        query_documents=torch.tensor([documents]),
        key_documents=torch.tensor([key_documents]),
    )
    for t, i in enumerate(queries):
        for s, j in enumerate(keys):
            wanted = spelled_out(i, j, window, num_meta, documents[t] == key_documents[s])
            assert bool(seen[0, t, s]) == wanted, (i, j)


def problem(seed: int, rows: int, steps: int, stored: int, num_meta: int, dtype: torch.dtype) -> dict:
    """Random heads; ragged rows; stored keys in scrambled order with empty slots, as a ring leaves them."""
    g = torch.Generator().manual_seed(seed)
    key_count = num_meta + stored + steps
    lengths = torch.randint(0, steps + 1, (rows,), generator=g)
    past = torch.randint(0, stored + 1, (rows,), generator=g)
    text = torch.arange(steps).expand(rows, -1) + past[:, None] + num_meta
    queries = torch.where(torch.arange(steps) < lengths[:, None], text, -1)
    held = torch.where(torch.arange(stored) < past[:, None], torch.arange(stored) + num_meta, -1)
    held = held[:, torch.randperm(stored, generator=g)]
    keys = torch.cat((torch.arange(num_meta).expand(rows, -1), held, queries), dim=1)
    heads = [
        torch.randn(rows, count, heads, width, generator=g, dtype=torch.float64).to(dtype)
        for count, heads, width in ((steps, 4, 6), (key_count, 2, 6), (key_count, 2, 10))
    ]
    return {"heads": heads, "query_positions": queries, "key_positions": keys, "num_meta": num_meta}


@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(0, 20),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 12)),
)
def test_fused_path_equals_reference_with_gradients(seed, rows, steps, stored, num_meta, window):
    arguments = problem(seed, rows, steps, stored, num_meta, torch.float64)
    heads = arguments.pop("heads")
    results = []
    for implementation in (reference.attention, cpu.attention):
        leaves = [x.clone().requires_grad_() for x in heads]
        out = implementation(*leaves, window=window, **arguments)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for ours, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("window", [None, 100, 300])
def test_fused_path_over_several_blocks(window):
    arguments = problem(0, 2, 700, 50, 3, torch.float64)
    heads = arguments.pop("heads")
    wanted = reference.attention(*heads, window=window, **arguments)
    torch.testing.assert_close(cpu.attention(*heads, window=window, **arguments), wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", usable(IMPLEMENTATIONS))
def test_bfloat16_keeps_its_dtype_and_padding_is_zero(name):
    arguments = problem(1, 3, 17, 5, 2, torch.bfloat16)
    heads = arguments.pop("heads")
    with use_backend(name):
        out = attention(*heads, window=4, **arguments)
    wide = reference.attention(*(x.double() for x in heads), window=4, **arguments)
    assert out.dtype == torch.bfloat16
    assert not out[arguments["query_positions"] < 0].any()
    torch.testing.assert_close(out.double(), wide, atol=0.03, rtol=0.03)


def test_empty_slots_may_hold_anything_finite():
    arguments = problem(2, 2, 5, 8, 2, torch.float64)
    q, k, v = arguments.pop("heads")
    wanted = cpu.attention(q, k, v, window=4, **arguments)
    empty = (arguments["key_positions"] < 0)[:, :, None, None]
    poisoned = [torch.where(empty, 1e30, x) for x in (k, v)]
    torch.testing.assert_close(cpu.attention(q, *poisoned, window=4, **arguments), wanted)


def test_backend_choice(monkeypatch):
    monkeypatch.delenv("HYMBA_BACKEND", raising=False)
    assert selected(IMPLEMENTATIONS, "cpu") == ("native" if native.library() else "cpu")
    assert selected(IMPLEMENTATIONS, "cuda") == ("cpu" if gpu.why_not() else "triton")
    with use_backend("reference"):
        assert selected(IMPLEMENTATIONS, "cpu") == "reference"
    monkeypatch.setenv("HYMBA_BACKEND", "reference")
    assert selected(IMPLEMENTATIONS, "cpu") == "reference"
    monkeypatch.setenv("HYMBA_BACKEND", "nonsense")
    with pytest.raises(HymbaError, match="unknown backend 'nonsense'"):
        selected(IMPLEMENTATIONS, "cpu")
    with pytest.raises(HymbaError, match="unknown backend"), use_backend("quantum"):
        pass
