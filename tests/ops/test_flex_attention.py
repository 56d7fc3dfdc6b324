"""Attention by FlexAttention: uncompiled on the CPU, as it is on a GPU."""

import sys
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE, assert_close
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from hymba.ops.attention import IMPLEMENTATIONS, Plan, flex, reference, visible

B = flex.BLOCK


def uncompiled(*arguments: Any, **keywords: Any) -> Tensor:
    """Call flex_attention as plain operations, on the CPU too, where torch refuses gradients though it has them."""
    module = sys.modules[flex_attention.__module__]
    with (
        mock.patch.object(module, "_validate_device", return_value=None),
        mock.patch.object(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, create=True),
    ):
        return flex_attention(*arguments, **keywords)


def problem(seed: int, steps: int, stored: int, meta: int, packed: bool) -> dict:
    """Ragged rows, or rows of packed documents; stored keys in scrambled order with empty slots, as a ring has them."""
    g, rows = torch.Generator().manual_seed(seed), 2
    metas = torch.arange(meta).expand(rows, -1)
    if packed:
        documents = torch.randint(0, 4, (rows, steps), generator=g).sort(dim=1).values
        starts = torch.searchsorted(documents, documents)
        queries = torch.arange(steps) - starts + meta
        keys, key_documents = torch.cat((metas, queries), 1), torch.cat((torch.full_like(metas, -1), documents), 1)
        mask = {"query_positions": queries, "key_positions": keys}
        return mask | {"query_documents": documents, "key_documents": key_documents, "num_meta": meta}
    past, lengths = (torch.randint(0, n + 1, (rows, 1), generator=g) for n in (stored, steps))
    queries = torch.where(torch.arange(steps) < lengths, torch.arange(steps) + past + meta, -1)
    held = torch.where(torch.arange(stored) < past, torch.arange(stored) + meta, -1)
    held = held[:, torch.randperm(stored, generator=g)]
    return {"query_positions": queries, "key_positions": torch.cat((metas, held, queries), 1), "num_meta": meta}


def heads(seed: int, mask: dict, dtype: torch.dtype, sizes: tuple[int, int] = (4, 2)) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    rows, steps = mask["query_positions"].shape
    shapes = ((steps, sizes[0], 16), *((mask["key_positions"].shape[1], sizes[1], width) for width in (16, 32)))
    return [torch.randn(rows, *shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


MASKS = (
    st.integers(0, 2**31),
    st.sampled_from([1, 100, B, B + 1, 2 * B + 40]),
    st.sampled_from([0, 30, B]),
    st.sampled_from([0, 3, B]),
    st.booleans(),
    st.sampled_from([None, 5, B, 200]),
)


@settings(max_examples=12)
@given(*MASKS)
def test_uncompiled_equals_the_reference_with_gradients(seed, steps, stored, meta, packed, window):
    mask = problem(seed, steps, stored, meta, packed) | {"window": window}
    results = []
    for function in (reference.attention, lambda q, k, v, **m: flex.attend(q, k, v, m, uncompiled)):
        leaves = [x.requires_grad_() for x in heads(seed, mask, torch.float32)]
        out = function(*leaves, **mask)
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        results.append(dict(zip("oqkv", (out, *(x.grad for x in leaves)), strict=True)))
    assert_close(results[1], results[0], 1e-5)
    assert not results[1]["o"][mask["query_positions"] < 0].any()


@settings(max_examples=30)
@given(*MASKS)
def test_blocks_are_those_of_the_mask(seed, steps, stored, meta, packed, window):
    mask = problem(seed, steps, stored, meta, packed) | {"window": window}
    seen = visible(**mask)
    rows, steps, slots = seen.shape
    padded = torch.nn.functional.pad(seen, (0, -slots % B, 0, -steps % B))
    found = flex.blocks(mask, rows)
    assert found.shape == (rows, 1, *padded.shape[1:])
    assert torch.equal(create_mask(found.mask_mod, rows, None, *padded.shape[1:], device="cpu")[:, 0], padded)
    tiles = padded.unflatten(2, (-1, B)).unflatten(1, (-1, B)).transpose(2, 3).flatten(3)
    some, full = tiles.any(3), tiles.all(3)
    listed = {}
    for name, counts, order in (
        ("part", found.kv_num_blocks, found.kv_indices),
        ("full", found.full_kv_num_blocks, found.full_kv_indices),
    ):
        places = torch.arange(order.shape[3]) < counts[..., None]
        listed[name] = torch.zeros_like(some).scatter(2, order[:, 0].long(), places[:, 0])
    assert not (listed["part"] & listed["full"]).any()
    assert not (some & ~(listed["part"] | listed["full"])).any()  # nothing that is seen is left out
    assert not (listed["full"] & ~full).any()
    if not packed and stored == 0:  # in order, nothing is taken in vain
        assert torch.equal(listed["full"], full)
        assert torch.equal(listed["part"], some & ~full)


def in_order(steps: int, meta: int, rows: int) -> dict:
    keys = torch.arange(meta + steps).expand(rows, -1)
    plan = Plan(("in order", steps, meta + steps))
    return {"query_positions": keys[:, meta:], "key_positions": keys, "num_meta": meta, "window": 50, "plan": plan}


def test_a_mask_is_worked_out_once_for_a_call_and_for_all_of_its_sizes(monkeypatch):
    monkeypatch.setattr(flex, "_kept_masks", type(flex._kept_masks)())
    made = []
    monkeypatch.setattr(flex, "blocks", lambda *x, real=flex.blocks: made.append(1) or real(*x))
    with torch.inference_mode():
        first, other = in_order(200, 3, 2), in_order(200, 3, 4)
        found = flex.planned(first)
        assert flex.planned(first) is found
        assert flex.planned(other) is found
    assert made == [1]
    wanted = reference.attention(*heads(0, other, torch.float32), **other)
    leaves = [x.requires_grad_() for x in heads(0, other, torch.float32)]
    out = flex.attend(*leaves, other, uncompiled)  # with gradients, though it was made without
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    out.sum().backward()
    ragged = first | {"plan": Plan()}
    assert flex.planned(ragged) is flex.planned(ragged) is not found
    for steps in range(1, 40):
        flex.planned(in_order(steps, 3, 1))
    assert len(flex._kept_masks) == flex._KEPT_MASKS


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_one_graph_serves_all_lengths(packed):
    """Without a GPU the graph is run by torch's operations: for the CPU, inductor's template takes one length only."""
    made = []

    def count(graph: Any, inputs: Any) -> Any:
        made.append(1)
        return torch._dynamo.lookup_backend("inductor" if DEVICE.type == "cuda" else "eager")(graph, inputs)

    kernel = flex._compiled(True, count)
    for seed, steps in ((0, 150), (1, 400), (2, 130), (3, 1000)):
        mask = problem(seed, steps, 60, 3, packed) | {"window": 100}
        moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in mask.items()}
        q, k, v = heads(seed, mask, torch.float32, (5, 1))
        with torch.no_grad():
            out = flex.attend(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), moved, kernel)
        assert_close({"out": out}, {"out": reference.attention(q, k, v, **mask)}, 1e-5)
    assert len(made) <= 2  # one more where queries and keys fill equally many blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gpu_path_trains(packed, dtype):
    """On a GPU compiled, forward and backward; elsewhere what serves in its place."""
    mask = problem(5, 300, 20, 16, packed) | {"window": 100}
    moved = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in mask.items()}
    wide = heads(5, mask, dtype, (5, 1))
    results = []
    for function, leaves in (
        (lambda q, k, v: reference.attention(q, k, v, **mask), [x.double() for x in wide]),
        (lambda q, k, v: IMPLEMENTATIONS["triton"](q, k, v, **moved), [x.to(DEVICE) for x in wide]),
    ):
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = function(*leaves)
        out.float().square().sum().backward()
        results.append(dict(zip("oqkv", (out, *(x.grad for x in leaves)), strict=True)))
    assert_close(results[1], results[0], 1e-4 if dtype == torch.float32 else 3e-2)
    assert not flex._broken


def test_recomputed_layers_share_the_mask_too():
    """Gradient checkpointing runs layers again in the backward pass, under the plan of the first time."""
    mask = problem(7, 200, 0, 3, False) | {"window": 50, "plan": Plan()}
    gradients = []
    for again in (False, True):
        q, k, v = (x.requires_grad_() for x in heads(7, mask, torch.float32))

        def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = flex.attend(q, k, v, mask, uncompiled)
            return flex.attend(q + out[..., :16], k, v, mask, uncompiled)

        out = checkpoint(layers, q, k, v, use_reentrant=False) if again else layers(q, k, v)
        out.square().sum().backward()
        gradients.append([x.grad for x in (q, k, v)])
    assert all(map(torch.equal, *gradients))


def test_a_failure_is_told_once_and_torch_serves(monkeypatch, caplog):
    def fail(*arguments, **keywords):
        raise RuntimeError("no such kernel\nand much more")

    monkeypatch.setattr(flex, "_broken", False)
    monkeypatch.setattr(flex, "why_unfit", lambda q, k, v: "")
    monkeypatch.setattr(flex, "_kernel", lambda q, k, v: fail)
    mask = problem(0, 130, 0, 3, False) | {"window": 5}
    q, k, v = heads(0, mask, torch.float32)
    for _ in range(2):
        torch.testing.assert_close(flex.attention(q, k, v, **mask), reference.attention(q, k, v, **mask))
    assert [record.getMessage() for record in caplog.records] == [
        "FlexAttention does not work here, torch's slower kernels serve: no such kernel"
    ]
