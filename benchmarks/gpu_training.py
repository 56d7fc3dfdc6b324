"""A training step on the GPU: forward, loss, backward, clipping and AdamW over rows of 2048 tokens.

Weights are float32 and the arithmetic bfloat16 under autocast, as in the recipes. Operations counted for the share of
the matrix peak (MFU): three times those of a forward pass, which are two for each weight of a matrix and token, head
included, and two for each entry of the two products of each pair of a query and a key that the mask lets through. What
checkpointing computes twice is counted once; scan, convolution and norms are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu_decode import synchronize
from benchmarks.gpu_peers import halving
from benchmarks.gpu_timing import Part, device, kernel_times
from benchmarks.models import SEED
from benchmarks.prefill import prompt_flops
from hymba.model import HymbaConfig

LENGTH, TOY_LENGTH = 2048, 32
ROWS = {"350m": 16, "1.5b": 8, "tiny": 2}
STEPS = 5


def measure_training(part: Part, toy: bool) -> None:
    """Measure both sizes with and without gradient checkpointing; rows are halved while memory does not suffice."""

    def items() -> Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]:
        for size, checkpointing in (("tiny", False), ("tiny", True)) if toy else SIZES:
            title = f"{size}, {'with' if checkpointing else 'without'} checkpointing"
            yield (
                title,
                lambda s=size, c=checkpointing: halving(ROWS[s], lambda b: _steps(s, c, b, toy, part)),  # type: ignore[misc]
            )

        size, rows = ("tiny", 2) if toy else ("1.5b", ROWS["1.5b"] // 2)
        yield f"{size}, kernels", lambda: step_kernels(size, rows, TOY_LENGTH if toy else LENGTH)

    part.measure(items(), least=10)


SIZES = (("1.5b", False), ("1.5b", True), ("350m", False), ("350m", True))


def training_flops(config: HymbaConfig, rows: int, length: int) -> float:
    """Return the operations of one step, as the module's text counts them."""
    every_head = 2 * (length - 1) * config.hidden_size * config.vocab_size  # a prompt needs that of its last token only
    return 3.0 * rows * (prompt_flops(config, length) + every_head)


class Step:
    """A model in training, its optimiser, and one batch of random tokens."""

    def __init__(self, size: str, rows: int, length: int, checkpointing: bool) -> None:
        from hymba.hf import HymbaConfig as ReleasedConfig
        from hymba.hf import HymbaForCausalLM

        self.config = HymbaConfig.named(size)
        torch.manual_seed(SEED)
        with torch.device(device()):
            self.model = HymbaForCausalLM(ReleasedConfig.from_dict(self.config.to_released())).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.tokens = torch.randint(3, self.config.vocab_size, (rows, length), device=device())

    def __call__(self) -> None:
        """Take one step."""
        with torch.autocast(device().type, torch.bfloat16):
            loss = self.model(input_ids=self.tokens, labels=self.tokens, skip_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def step_kernels(size: str, rows: int, length: int) -> dict[str, Any]:
    """Look at the kernels of a step. Last of all: after the profiler, other times may be longer."""
    step = Step(size, rows, length, checkpointing=False)
    for _ in range(2):
        step()
    return {"kernels": kernel_times(step, 1)}


def _steps(size: str, checkpointing: bool, rows: int, toy: bool, part: Part) -> dict[str, Any]:
    length, count = (TOY_LENGTH, 2) if toy else (LENGTH, STEPS)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    step, times = Step(size, rows, length, checkpointing), []
    for turn in range(count + 2):
        synchronize()
        begun = time.perf_counter()
        step()
        synchronize()
        if turn >= 2:  # the first ones compile
            times.append(time.perf_counter() - begun)
    seconds = sorted(times)[len(times) // 2]
    flops = training_flops(step.config, rows, length)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "rows": rows,
        "length": length,
        "tokens_per_second": round(rows * length / seconds),
        "step_ms": round(seconds * 1e3, 2),
        "flops": flops,
        "mfu": round(flops / seconds / 1e12 / part.ceilings["matrix_tflops"], 3),
        "peak_memory_gb": round(peak / 1e9, 2),
    }
