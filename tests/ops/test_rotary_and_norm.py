"""Rotary embedding and RMSNorm: their defining properties."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hymba.ops.rms_norm import rms_norm
from hymba.ops.rotary import apply_rotary, ntk_base, rotary_tables


def test_the_released_base():
    assert ntk_base(10000.0, 8192, 2048, 64) == pytest.approx(74_534.83, abs=0.01)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_scores_depend_on_distance_alone(i, j, shift):
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8, generator=g, dtype=torch.float64) for _ in range(2))

    def score(query: int, key: int) -> torch.Tensor:
        tables = [rotary_tables(torch.tensor([[p]]), 8, 10000.0, torch.float64) for p in (query, key)]
        return (apply_rotary(q, *tables[0]) * apply_rotary(k, *tables[1])).sum()

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift))


def test_rotation_is_a_complex_product_of_the_two_halves():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    positions = torch.tensor([[0, 5, 9], [2, 3, 4]])
    cos, sin = rotary_tables(positions, 6, 100.0, torch.float64)
    angles = positions[..., None] * 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    wanted = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    torch.testing.assert_close(apply_rotary(x, cos, sin), torch.cat((wanted.real, wanted.imag), dim=-1))


def test_tables_are_cast_from_float32():
    cos, _ = rotary_tables(torch.tensor([[100_003]]), 8, 10000.0, torch.bfloat16)
    wide, _ = rotary_tables(torch.tensor([[100_003]]), 8, 10000.0, torch.float32)
    assert torch.equal(cos, wide.to(torch.bfloat16))


def test_rms_norm():
    x, weight = torch.randn(4, 16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    wanted = torch.nn.functional.rms_norm(x, (16,), weight, eps=1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), wanted)


def test_rms_norm_casts_back_before_its_weight():
    x, weight = torch.randn(64).bfloat16(), (1 + torch.rand(64)).bfloat16()
    normed = torch.nn.functional.rms_norm(x.float(), (64,), eps=1e-6).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), normed * weight)
