"""What a run tells: a log in JSON lines, a progress bar, and the time it took over all sittings."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from hymba.files import replacing

LOG = "log.jsonl"


def progress_bar(console: Console, transient: bool = False) -> Progress:
    """Return a bar that shows what is done, a note, and the time left; outside a terminal it stays silent."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


class Journal(TrainerCallback, ExportableState):
    """Writes `log.jsonl` and moves the bar. Its seconds travel in the checkpoints' trainer_state.json.

    A line holds step, tokens (slots of the rows so far), seconds, and either held_out_bits_per_byte or these:
    loss (nats a token) and bits_per_byte, means since the line before; learning_rate of matrices; grad_norm.
    """

    def __init__(
        self,
        out: Path,
        tokens_per_step: int,
        tokens_per_byte: float,
        max_minutes: float | None,
        console: Console,
    ) -> None:
        self.log, self.tokens_per_step, self.tokens_per_byte = out / LOG, tokens_per_step, tokens_per_byte
        self.max_seconds = math.inf if max_minutes is None else max_minutes * 60
        self.console = console
        self.bar = progress_bar(console)
        self.task: TaskID | None = None
        self.before = 0.0  # seconds of earlier sittings
        self.begun = time.monotonic()
        self.held_out = ""

    @property
    def seconds(self) -> float:
        """Seconds of training over all sittings."""
        return self.before + time.monotonic() - self.begun

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Pick up the clock and the log where the checkpoint left them."""
        saved = (state.stateful_callbacks or {}).get(type(self).__name__, {})
        self.before = saved["attributes"]["seconds"] if state.global_step else 0.0
        self.begun = time.monotonic()
        self._forget_after(state.global_step)
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        assert self.task is not None
        self.bar.update(self.task, completed=state.global_step, total=self._steps(state))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Add a line to the log."""
        logs = logs or {}
        if "loss" in logs:
            rate = logs["loss"] / math.log(2) * self.tokens_per_byte
            self._write(
                state.global_step,
                loss=logs["loss"],
                bits_per_byte=rate,
                learning_rate=logs["learning_rate"],
                grad_norm=logs["grad_norm"],
            )
            speed = state.global_step * self.tokens_per_step / self.seconds
            self._show(state, f"{rate:.3f} bits/byte{self.held_out} · {speed:,.0f} tokens/s")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        """Note a measurement on the held-out files; without a terminal's bar, say it."""
        rate = metrics["eval_bits_per_byte"]
        self.held_out = f" · held out {rate:.3f}"
        self._write(state.global_step, held_out_bits_per_byte=rate)
        if not self.console.is_terminal:
            place = f"step {state.global_step} of {self._steps(state)}, {self.seconds / 60:.1f} minutes"
            self.console.print(f"{place}: held-out text takes {rate:.3f} bits a byte")

    def _steps(self, state: TrainerState) -> int:
        """Return how many steps the run will have: those planned, or those that its minutes will allow."""
        return round(min(state.max_steps, state.global_step * max(1.0, self.max_seconds / self.seconds)))

    def _show(self, state: TrainerState, note: str) -> None:
        if self.task is not None:
            self.bar.update(self.task, note=f"step {state.global_step} of {self._steps(state)} · {note}")

    def _write(self, step: int, **values: float) -> None:
        tokens, seconds = step * self.tokens_per_step, round(self.seconds, 3)
        line = {"step": step, "tokens": tokens, "seconds": seconds, **values}
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def _forget_after(self, step: int) -> None:
        """Drop the lines after the checkpoint that training resumes from: those steps will be run again."""
        kept = [line for line in read_log(self.log) if line["step"] <= step]
        with replacing(self.log) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_log(log: Path) -> list[dict[str, float]]:
    """Return the lines of a log up to the first that a crash has damaged or cut short."""
    lines: list[dict[str, float]] = []
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or not {"step", "tokens"} <= line.keys():
            break
        lines.append(line)
    return lines
