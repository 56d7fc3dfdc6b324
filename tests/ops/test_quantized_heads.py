"""Keys and values in 8 bits: what rounding costs, and attention to them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba.errors import HymbaError
from hymba.ops.attention import IMPLEMENTATIONS, QuantizedHeads, attention, reference, round_heads
from hymba.ops.backend import usable, use_backend


@given(st.integers(0, 2**31), st.sampled_from([1, 7, 64, 128]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rounding_is_off_by_half_a_step_at_most(seed, width, dtype):
    g = torch.Generator().manual_seed(seed)
    size = torch.randint(-30, 30, (2, 3, 2, 1), generator=g).float().exp2()
    x = (torch.randn(2, 3, 2, width, generator=g) * size).to(dtype)
    rounded = round_heads(x)
    step = rounded.scales.double()[..., None]
    assert rounded.values.dtype == torch.int8
    assert rounded.scales.dtype == torch.bfloat16
    assert bool(((rounded.dequantize(torch.float64) - x.double()).abs() <= 0.5001 * step).all())


def test_zeros_stay_zeros_and_the_largest_becomes_127():
    x = torch.zeros(1, 2, 1, 4)
    x[0, 1] = torch.tensor([1.0, -2.0, 0.5, 0.0])
    rounded = round_heads(x)
    assert rounded.values[0, 0].tolist() == [[0, 0, 0, 0]]
    assert rounded.values[0, 1].tolist() == [[64, -127, 32, 0]]
    assert not rounded.dequantize(torch.float32)[0, 0].any()


def test_slots_share_memory():
    rounded = round_heads(torch.randn(2, 5, 3, 4))
    part = rounded.slots(1, 4)
    assert part.shape == (2, 3, 3, 4)
    assert part.values.data_ptr() == rounded.values[:, 1].data_ptr()
    assert torch.equal(part.scales, rounded.scales[:, 1:4])


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        (torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1).bfloat16()),
        (torch.zeros(1, 2, 1, 4, dtype=torch.int8), torch.zeros(1, 2, 1)),
        (torch.zeros(1, 2, 1, 4, dtype=torch.int8), torch.zeros(1, 2).bfloat16()),
    ],
)
def test_other_dtypes_and_shapes_are_refused(values, scales):
    with pytest.raises(HymbaError, match="not quantised heads"):
        QuantizedHeads(values, scales)


@pytest.mark.parametrize("name", usable(IMPLEMENTATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("steps", [1, 9])
def test_attention_to_quantised_heads_is_attention_to_what_they_stand_for(name, dtype, steps):
    g = torch.Generator().manual_seed(steps)
    q = torch.randn(2, steps, 10, 16, generator=g).to(dtype)
    k, v = (round_heads(torch.randn(2, 150, 2, width, generator=g)) for width in (16, 24))
    keys = torch.arange(150).expand(2, -1)
    mask = {"query_positions": keys[:, -steps:], "key_positions": keys, "window": 40, "num_meta": 3}
    with use_backend(name):
        out = attention(q, k, v, **mask)
    wanted = reference.attention(q.double(), k.dequantize(torch.float64), v.dequantize(torch.float64), **mask)
    assert out.dtype == dtype
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.double(), wanted, atol=tolerance, rtol=tolerance)
