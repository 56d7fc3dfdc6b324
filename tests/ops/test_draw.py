"""Drawing in C++ against the definition, and the definition against what is known of it."""

import math

import pytest
import torch
from drawing import ROWS, SETTINGS, chi_square, near, settings
from hypothesis import given
from hypothesis import strategies as st

from hymba.errors import HymbaError
from hymba.ops import native
from hymba.ops.draw import draw_tokens, reference
from hymba.ops.draw import native as ours

WIDTHS = (1, 2, 15, 16, 17, 63, 64, 65, 600, 5000)
RUNS = {"reference": reference.draw_tokens, "native": ours.draw_tokens}


@pytest.mark.parametrize("level", native.available())
@given(st.lists(ROWS, min_size=1, max_size=5), st.sampled_from(WIDTHS), st.integers(0, 999), st.booleans())
def test_native_equals_the_definition(level: str, rows: list[SETTINGS], width: int, seed: int, coarse: bool) -> None:
    logits = 4 * torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if coarse else logits  # with many equals
    logits[:, 1::5] = -torch.inf
    with native.use_level(level):
        made = ours.draw_tokens(logits, *settings(rows))
    expected = reference.draw_tokens(logits, *settings(rows))
    for i in (made != expected).nonzero()[:, 0].tolist():
        assert int(made[i]) in near(logits[i : i + 1], rows[i])


@pytest.mark.parametrize("level", native.available())
def test_native_takes_the_definitions_noise(level: str) -> None:
    """Without cuts nothing can differ."""
    draw = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.1, 3.0):
        logits = scale * torch.randn(200, 3001, generator=draw)
        rows = settings([(1.0, 10**9, 1.0, 0.0, seed * 10**16, seed) for seed in range(200)])
        with native.use_level(level):
            assert torch.equal(ours.draw_tokens(logits, *rows), reference.draw_tokens(logits, *rows))


@pytest.mark.parametrize("level", native.available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_other_rows_change_nothing(level: str, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(6, 3001, generator=torch.Generator().manual_seed(0))).to(dtype)
    rows = [(0.9, 50, 0.95, 0.01, seed, 7 * seed) for seed in range(6)]
    before, found = torch.get_num_threads(), []
    with native.use_level(level):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(ours.draw_tokens(logits, *settings(rows)))
        torch.set_num_threads(before)
        alone = [ours.draw_tokens(logits[i : i + 1], *settings(rows[i : i + 1])) for i in range(6)]
        backwards = ours.draw_tokens(logits.flip(0), *settings(rows[::-1]))
    assert torch.equal(*found)
    assert torch.equal(found[0], torch.cat(alone))
    assert torch.equal(found[0], backwards.flip(0))


@pytest.mark.parametrize("backend", RUNS)
def test_forbidden_tokens_are_never_drawn(backend: str) -> None:
    logits = torch.full((4, 40), -torch.inf)
    logits[0, 7], logits[1, 30], logits[1, 31], logits[2, 5] = 1.0, 2.0, 2.0, torch.nan
    seen = set()
    for seed in range(20):
        for top_p in (1.0, 0.9):
            chosen = RUNS[backend](logits, *settings([(1.0, 40, top_p, 0.0, seed, 0)] * 4)).tolist()
            assert (chosen[0], *chosen[2:]) == (7, -1, -2)
            seen.add(chosen[1])
    assert seen == {30, 31}
    assert RUNS[backend](logits, *settings([(0.0, 40, 1.0, 0.0, 1, 0)] * 4)).tolist() == [7, 30, -1, -2]


@pytest.mark.parametrize("backend", RUNS)
def test_the_first_of_equals_stays_in_a_cut(backend: str) -> None:
    rows = settings([(1.0, 3, 1.0, 0.0, seed, 0) for seed in range(3000)])
    counts = torch.bincount(RUNS[backend](torch.zeros(3000, 9), *rows), minlength=9)
    assert counts[3:].tolist() == [0] * 6
    assert chi_square(counts[:3], torch.ones(3) / 3) < 13.8  # 2 degrees: 0.1%


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("counted", ["seeds", "indices"])
def test_draws_follow_the_softmax(backend: str, counted: str) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.0, -2.0, -2.5, -3.0])
    for temperature in (0.7, 1.0, 2.0):
        rows = settings(
            [
                (temperature, 12, 1.0, 0.0, i if counted == "seeds" else 5, i * (counted != "seeds"))
                for i in range(20000)
            ]
        )
        counts = torch.bincount(RUNS[backend](logits.expand(20000, -1), *rows), minlength=12)
        assert chi_square(counts, (logits / temperature).softmax(-1)) < 31.3  # 11 degrees: 0.1%


def test_draws_of_neighboring_seeds_and_indices_are_independent() -> None:
    numbers = [(1.0, 4, 1.0, 0.0, seed, index) for seed in range(100) for index in range(100)]
    drawn = reference.draw_tokens(torch.zeros(10000, 4), *settings(numbers)).view(100, 100)
    for a, b in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        pairs = torch.bincount((4 * a + b).flatten(), minlength=16)
        assert chi_square(pairs, torch.ones(16) / 16) < 37.7  # 15 degrees: 0.1%


@pytest.mark.parametrize("backend", RUNS)
def test_rounding_changes_a_draw_about_as_often_as_the_distribution(backend: str) -> None:
    draw, changed, variation = torch.Generator().manual_seed(0), 0.0, 0.0
    for seed in range(8):
        logits = 2.5 * torch.randn(1, 3000, generator=draw)
        rounded = logits + 0.05 * torch.randn(1, 3000, generator=draw)
        rows = settings([(0.8, 10**9, 1.0, 0.0, 1000 * seed + i, i) for i in range(250)])
        drawn = [RUNS[backend](x.expand(250, -1), *rows) for x in (logits, rounded)]
        changed += float((drawn[0] != drawn[1]).double().mean()) / 8
        p, q = ((x.double() / 0.8).softmax(-1) for x in (logits, rounded))
        variation += float((p - q).abs().sum()) / 16
    assert 0 < changed < 2.5 * variation  # from cumulative probabilities: 10 times and more


@pytest.mark.parametrize("backend", RUNS)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_temperatures_beyond_float32(backend: str, top_p: float) -> None:
    logits = torch.randn(50, 3072, generator=torch.Generator().manual_seed(0))
    for temperature in (5e-324, 1e-320, 1e-46, 1e-30):
        rows = settings([(temperature, 10**9, top_p, 0.0, seed, 0) for seed in range(50)])
        assert torch.equal(RUNS[backend](logits, *rows), logits.argmax(-1))
    logits[:, 64:] = -torch.inf
    for temperature in (1e30, 1e39, 1.7e308):
        rows = settings([(temperature, 10**9, top_p, 0.0, seed, 0) for seed in range(50)])
        chosen = RUNS[backend](logits, *rows)
        assert 0 <= int(chosen.min()) <= int(chosen.max()) < 64
        assert len(set(chosen.tolist())) > 20


@pytest.mark.parametrize("backend", RUNS)
def test_infinite_logits_are_the_likeliest(backend: str) -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = logits[:, 200] = torch.inf
    for more in ((10**9, 1.0, 0.0), (10**9, 0.9, 0.0), (50, 1.0, 0.0), (50, 0.5, 0.1), (0, 1.0, 0.0)):
        chosen = RUNS[backend](logits, *settings([(1.0, *more, seed, 0) for seed in range(40)]))
        assert set(chosen.tolist()) == ({7, 200} if more[0] and more[1] > 0.5 else {7})
    assert RUNS[backend](logits, *settings([(0.0, 10**9, 1.0, 0.0, 0, 0)] * 40)).tolist() == [7] * 40


def test_noise_is_that_of_its_docstring() -> None:
    """Seeds keep their texts: these numbers must not change."""

    def mix(state: int, n: int) -> int:
        x = (state + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    def noise(seed: int, index: int, token: int) -> float:
        state = mix(seed, index)
        first = mix(state, token // 2) >> (32 if token % 2 else 0) & 0xFFFFFFFF
        v = (first << 21 | mix(state, token + 2**32) >> 43 | 1) / 2**53
        return -math.log(-math.log1p(-v))

    assert mix(1234567, 0) == 6457827717110365317  # of the generator's authors
    for seed, index in ((0, 0), (1, 0), (0, 1), (2**63 - 1, 10**6)):
        found = reference.gumbel(torch.tensor(seed), torch.tensor(index), torch.arange(50)).tolist()
        assert found == pytest.approx([noise(seed, index, token) for token in range(50)], rel=1e-14, abs=1e-14)


def test_noise_is_finite_at_both_ends() -> None:
    ends = reference._noise(torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([-math.log(53 * math.log(2)), 53 * math.log(2)], rel=1e-15)


def test_logits_of_other_dimensions_are_refused():
    numbers, counts = torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int64)
    with pytest.raises(HymbaError, match="logits must be"):
        draw_tokens(torch.zeros(5), numbers, counts, numbers, numbers, counts, counts)
