"""What is computed for a token does not depend on the tokens that are computed with it, bit for bit."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hymba.inference.step import DecodeStep
from hymba.model import Cache, Hymba, HymbaConfig, init_weights, quantize
from hymba.ops import native

FORMATS = {"float32": (torch.float32, None), "bfloat16": (torch.bfloat16, None)}
FORMATS |= {"int8": (torch.bfloat16, 8), "int4": (torch.bfloat16, 4), "int8 in float32": (torch.float32, 8)}
LENGTH = 150  # past the window, so that the ring turns over
CONFIG = HymbaConfig.named(
    "tiny",
    vocab_size=512,
    num_hidden_layers=4,
    global_layers=(0, 3),
    kv_groups=((1, 2),),
    sliding_window=48,
)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    if native.library() is None:
        pytest.skip(native.why_not())


@functools.cache
def model_in(name: str) -> Hymba:
    dtype, bits = FORMATS[name]
    model = init_weights(Hymba(CONFIG), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # outputs that depend on every token
                parameter.mul_(3)
    model = model.to(dtype).requires_grad_(False)
    return model if bits is None else quantize(model, bits)


@functools.cache
def text() -> Tensor:
    return torch.randint(512, (8, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model: Hymba, tokens: Tensor, cuts: list[int], bits: int | None) -> tuple[Tensor, Cache]:
    """Run a row in pieces that end at `cuts`; return the logits of every token, and the cache."""
    cache = model.allocate_cache(1, LENGTH, bits)
    pieces = [tokens[:, first:last] for first, last in zip([0, *cuts], [*cuts, tokens.shape[1]], strict=True)]
    return torch.cat([model.logits(model(piece, cache=cache).hidden) for piece in pieces], dim=1), cache


@functools.cache
def whole(name: str, row: int, bits: int | None) -> tuple[Tensor, Cache]:
    return run(model_in(name), text()[row : row + 1], [], bits)


def skip_unless_invariant(name: str) -> None:
    dtype, bits = FORMATS[name]
    if not native.is_batch_invariant(dtype, bits is not None):
        pytest.skip("torch multiplies prompts here, in an order that depends on their length")


@pytest.mark.parametrize("cache_bits", [None, 8])
@pytest.mark.parametrize("name", FORMATS)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=6))
@settings(deadline=None, max_examples=8)
def test_a_prompt_cut_anywhere_equals_the_whole(name, cache_bits, cuts):
    skip_unless_invariant(name)
    wanted, cache = whole(name, 0, cache_bits)
    logits, other = run(model_in(name), text()[:1], sorted(cuts), cache_bits)
    assert torch.equal(logits, wanted)
    assert torch.equal(other.ssm_state, cache.ssm_state)
    assert torch.equal(other.conv_state, cache.conv_state)


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_read_token_by_token_equals_the_whole(name):
    skip_unless_invariant(name)
    logits, _ = run(model_in(name), text()[:1], list(range(1, LENGTH)), None)
    assert torch.equal(logits, whole(name, 0, None)[0])


@pytest.mark.parametrize("cache_bits", [None, 8])
@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_a_row_is_decoded_alike_alone_and_beside_others(name, cache_bits):
    """In caches of different sizes, too, called plainly and in recorded steps."""
    model, steps = model_in(name), 60
    alone = model.allocate_cache(1, 70, cache_bits)
    wanted = [model.logits(model(text()[2:3, i : i + 1], cache=alone).hidden)[0, 0] for i in range(steps)]
    for rows, room, recorded in ((8, 1000, True), (3, 70, True), (5, 300, False), (8, 70, False)):
        cache = model.allocate_cache(rows, room, cache_bits)
        step = (
            DecodeStep(model, cache)
            if recorded
            else lambda t, c=cache: model.logits(model(t[:, None], cache=c).hidden)[:, 0]
        )
        for i in range(steps):
            assert torch.equal(step(text()[:rows, i])[2], wanted[i]), (rows, room, recorded, i)


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_padding_and_other_rows_change_nothing_in_prefill(name):
    skip_unless_invariant(name)
    model, lengths = model_in(name), torch.tensor([LENGTH, 1, 77, 16])
    cache = model.allocate_cache(4, LENGTH)
    logits = model.logits(model(text()[:4], cache=cache, lengths=lengths).hidden)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(logits[row, :length], whole(name, row, None)[0][0, :length])


@pytest.mark.parametrize("level", native.available())
@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_many_rows_are_decoded_alike_at_every_level(name, level):
    model, steps, rows = model_in(name), 4, 40
    tokens = text().repeat(rows // 8, 1)[:, :steps]
    with native.use_level(level):
        alone, together = model.allocate_cache(1, steps), model.allocate_cache(rows, steps)
        single, several = DecodeStep(model, alone), DecodeStep(model, together)
        for i in range(steps):
            wanted, logits = single(tokens[3:4, i]), several(tokens[:, i])
            assert torch.equal(logits[3], wanted[0])
            assert torch.equal(logits[rows - 5], wanted[0])


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_threads_change_nothing(name):
    skip_unless_invariant(name)
    wanted, threads = whole(name, 0, None)[0], torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(run(model_in(name), text()[:1], [100], None)[0], wanted)
    finally:
        torch.set_num_threads(threads)
