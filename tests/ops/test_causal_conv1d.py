"""The convolution: against torch's own, in chunks, ragged and packed."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hymba.ops.causal_conv1d import cpu, reference

IMPLEMENTATIONS = (reference.causal_conv1d, cpu.causal_conv1d)
CHANNELS, TAPS = 5, 4


def inputs(seed: int, rows: int, steps: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((rows, steps, CHANNELS), (CHANNELS, TAPS), (CHANNELS,), (rows, CHANNELS, TAPS - 1))
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)


def test_equals_a_padded_convolution():
    u, weight, bias, _ = inputs(0, 2, 9)
    wanted = F.silu(F.conv1d(F.pad(u.mT, (TAPS - 1, 0)), weight[:, None], bias, groups=CHANNELS)).mT
    for conv in IMPLEMENTATIONS:
        out, state = conv(u, weight, bias)
        torch.testing.assert_close(out, wanted)
        assert torch.equal(state, u[:, -3:].mT)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_chunks_equal_the_whole(seed, chunks):
    u, weight, bias, initial = inputs(seed, 2, sum(chunks))
    for conv in IMPLEMENTATIONS:
        whole, final = conv(u, weight, bias, initial_state=initial)
        state, outputs = initial, []
        for piece in u.split(chunks, dim=1):
            out, state = conv(piece, weight, bias, initial_state=state)
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
        assert torch.equal(state, final)


@given(st.integers(0, 2**31), st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_lengths_decide_the_final_state(seed, lengths):
    u, weight, bias, initial = inputs(seed, len(lengths), 8)
    for conv in IMPLEMENTATIONS:
        _, states = conv(u, weight, bias, initial_state=initial, lengths=torch.tensor(lengths))
        for row, length in enumerate(lengths):
            history = torch.cat((initial[row], u[row, :length].T), dim=1)
            assert torch.equal(states[row], history[:, -3:])


@given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_documents_restart_from_the_initial_state(seed, sizes):
    u, weight, bias, initial = inputs(seed, 2, sum(sizes))
    offsets = torch.cat([torch.arange(size) for size in sizes]).expand(2, -1)
    for conv in IMPLEMENTATIONS:
        packed, _ = conv(u, weight, bias, initial_state=initial, document_offsets=offsets)
        alone = [conv(piece, weight, bias, initial_state=initial)[0] for piece in u.split(sizes, dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_gradients_agree():
    u, weight, bias, initial = inputs(3, 2, 7)
    grads = []
    for conv in IMPLEMENTATIONS:
        leaves = [x.clone().requires_grad_() for x in (u, weight, bias, initial)]
        out, state = conv(*leaves[:3], initial_state=leaves[3])
        (out.square().sum() + (state**3).sum()).backward()
        grads.append([x.grad for x in leaves])
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_the_final_state_goes_where_it_is_told():
    u, weight, bias, initial = inputs(0, 2, 3)
    for conv in IMPLEMENTATIONS:
        out, expected = conv(u, weight, bias, initial_state=initial)
        place = torch.zeros(2, 3, u.shape[2], dtype=torch.float64).transpose(1, 2)
        result = conv(u, weight, bias, initial_state=initial, final_state=place)
        assert result[1] is place
        assert torch.equal(result[0], out)
        assert torch.equal(place.to(u.dtype), expected)
