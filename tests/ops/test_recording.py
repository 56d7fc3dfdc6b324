"""A recording repeats what was computed, on what its tensors hold now."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hymba.errors import HymbaError
from hymba.ops import native
from hymba.ops.causal_conv1d import causal_conv1d
from hymba.ops.recording import Recording


def accumulate(x: Tensor, y: Tensor) -> Tensor:
    y += x
    y[:, 0] = x.sum(1)
    return y * 2


def scatter(x: Tensor, y: Tensor) -> Tensor:
    index = torch.arange(4)[:, None] * (x > 0).long()
    y[index, torch.zeros_like(index)] = x
    return y.gather(1, (x.abs() * 2).long().clamp(max=2)) + y[index, 1]


def assign(x: Tensor, y: Tensor) -> Tensor:
    """As a cache is written."""
    places, buffer = (x[:, :2] > y[:, :2]).long(), x.new_zeros(4, 5, 3)
    rows = torch.arange(4)[:, None].expand(4, 2).contiguous()
    buffer[rows, torch.arange(2) * 2 - places] = y[:, None] * x.new_ones(2, 1)
    buffer[rows[:, 0], places[:, 1]] = x
    buffer[rows[:, :1], places[:, :1]] += 1
    buffer[rows[:, :1], places[:, 1:].contiguous()] = torch.cat((x, y), dim=1)[:, None, 2:5]
    return buffer.clone()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda x, y: torch.where(x > y, x.exp(), (x - 1).pow(2).mean(1, keepdim=True)) / (y.abs() + 1),
    "views": lambda x, y: torch.cat([*x.split([1, 2], dim=1), y.t().reshape(4, 3)], dim=1).unflatten(1, (2, 3)),
    "dtypes": lambda x, y: (x.bfloat16() @ y.bfloat16().t()).double().contiguous(),
    "in place": accumulate,
    "indices": scatter,
    "fresh memory": lambda x, y: x.new_zeros(4, 3).copy_(y).add_(x),
    "several results": lambda x, y: torch.stack([x.sort(dim=1)[0], x.topk(3, dim=1)[0] + y]),
    "sums": lambda x, y: (x + y).float() + (y.float() + x.float())[:2].repeat(2, 1) + x.bfloat16()[:, :1],
    "sums of other shapes": lambda x, y: torch.add(x, y, alpha=2) + y[0] + x.t().contiguous().t() + 1,
    "assignments": assign,
    "a kernel": lambda x, y: causal_conv1d(x[None], y[:3].double(), x[0].double())[0] * 2,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replaying_is_computing_again(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    with torch.no_grad(), Recording() as recording:
        out = FUNCTIONS[name](x, y)
    for _ in range(3):
        new = [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(2)]
        expected_y = new[1].clone()
        expected = FUNCTIONS[name](new[0].clone(), expected_y)
        x.copy_(new[0])
        y.copy_(new[1])
        out.fill_(torch.nan)
        recording.replay()
        assert torch.equal(out, expected)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("level", native.available())
def test_an_assignment_outside_is_refused_in_a_replay_too(level: str) -> None:
    buffer, place, row = torch.zeros(2, 3, 4), torch.tensor([2]), torch.tensor([1])
    with native.use_level(level):
        with Recording() as recording:
            buffer[row, place] = torch.ones(1, 4)
        place.fill_(3)
        with pytest.raises(HymbaError, match=r"outside \(2, 3, 4\)"):
            recording.replay()
    assert buffer.sum() == 4


def test_memory_of_the_recorded_code_stays() -> None:
    x = torch.ones(1000)
    with Recording() as recording:
        out = (x + 1).mul(3).sub(1).clone()
    others = [torch.full((1000,), torch.nan) for _ in range(50)]  # would take memory that had been let go
    recording.replay()
    assert torch.equal(out, torch.full((1000,), 5.0))
    assert all(x.isnan().all() for x in others)


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: x[x > 0]])
def test_what_depends_on_values_is_refused(read: Callable) -> None:
    with pytest.raises(HymbaError, match="cannot be recorded"), Recording():
        read(torch.ones(3))
    with torch.no_grad():
        assert not causal_conv1d(torch.zeros(1, 2, 4), torch.ones(4, 2), torch.zeros(4))[0].any()  # nobody listens


@pytest.mark.parametrize("level", native.available())
def test_other_threads_are_not_heard(level: str) -> None:
    from threading import Thread

    x, library = torch.ones(100), native.load(level)
    heard: list[tuple] = []

    def read(threads: int) -> None:
        library.hymba_read_bandwidth(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(100), threads)

    native.listen(lambda _, arguments: heard.append(arguments))
    thread = Thread(target=read, args=(2,))
    thread.start()
    thread.join()
    read(1)
    native.listen(None)
    read(3)
    assert [arguments[2] for arguments in heard] == [1]
