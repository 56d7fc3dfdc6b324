import pytest
from hypothesis import given
from hypothesis import strategies as st

from hymba.training.schedule import WarmupStableDecay

FRACTIONS = st.floats(0, 0.5)


@pytest.mark.parametrize("shape", ["linear", "sqrt"])
@given(steps=st.integers(10, 3000), warmup=FRACTIONS, decay=FRACTIONS, floor=st.floats(0, 1))
def test_rises_stays_and_falls_to_the_floor(shape: str, steps: int, warmup: float, decay: float, floor: float) -> None:
    schedule = WarmupStableDecay.of(steps, warmup=warmup, decay=decay, floor=floor, shape=shape)
    factors = [schedule(step) for step in range(steps)]
    top = schedule.warmup_steps
    assert factors[:top] == sorted(factors[:top])
    assert factors[top - 1] == pytest.approx(1) or schedule.decay_start < top
    assert all(factor == 1 for factor in factors[top : schedule.decay_start])
    assert factors[schedule.decay_start :] == sorted(factors[schedule.decay_start :], reverse=True)
    if schedule.decay_steps and top <= schedule.decay_start:
        assert factors[-1] == pytest.approx(floor)
    assert schedule(steps + 5) == pytest.approx(factors[-1])


def test_the_published_fractions() -> None:
    schedule = WarmupStableDecay.of(1000, warmup=0.01, decay=0.2, floor=1e-5 / 3e-3, shape="linear")
    assert (schedule.warmup_steps, schedule.decay_start) == (10, 800)
    assert [schedule(step) for step in (4, 9, 799)] == [0.5, 1, 1]
    assert schedule(899) == pytest.approx(0.5, abs=2e-3)
    assert schedule(999) * 3e-3 == pytest.approx(1e-5)


def test_sqrt_falls_faster_at_first() -> None:
    linear, sqrt = (WarmupStableDecay.of(100, warmup=0, decay=0.5, floor=0, shape=s) for s in ("linear", "sqrt"))
    assert all(sqrt(step) < linear(step) for step in range(50, 99))


@given(step=st.integers(1, 700), decay=st.floats(0.05, 0.3))
def test_an_early_decay_keeps_its_share(step: int, decay: float) -> None:
    schedule = WarmupStableDecay.of(1000, warmup=0, decay=decay, floor=0.1, shape="linear")
    planned = schedule.decay_steps / schedule.steps
    schedule.decay_from(step)
    assert schedule.decay_start == step
    assert schedule.steps <= 1000
    assert schedule.decay_steps == pytest.approx(planned * schedule.steps, abs=1.01)
    assert schedule(schedule.steps - 1) == pytest.approx(0.1)
