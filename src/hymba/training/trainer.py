"""transformers' Trainer with our schedule and data order, whole checkpoints, and a clean stop."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset, default_collate
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hymba.errors import HymbaError
from hymba.training.checkpoint import is_finite, publish, remove_old
from hymba.training.curve import draw_curve
from hymba.training.divergence import DivergenceError
from hymba.training.journal import Journal
from hymba.training.optimizer import build_optimizer
from hymba.training.packing import IGNORED, PackedRows
from hymba.training.recipe import Recipe
from hymba.training.schedule import WarmupStableDecay

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGING = "checkpoint.partial"
LOG_EVERY = 10  # steps; each line costs one wait for the device


class PretrainingTrainer(Trainer):
    """A Trainer for one run of a recipe, over one pass of `rows` from the first to the last."""

    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        rows: PackedRows,
        held_out: PackedRows | None,
        schedule: WarmupStableDecay,
        journal: Journal,
        out: Path,
    ) -> None:
        self.tokenizer, self.recipe, self.schedule, self.journal = tokenizer, recipe, schedule, journal
        self.stop = StopFlag()
        if recipe.gradient_checkpointing:  # here, since TrainingArguments' name for it changes between versions
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.first_bad_step = torch.zeros((), dtype=torch.int64)  # the first whose loss is not finite; 0: none
        self.last_inputs: dict[str, Any] | None = None
        optimizer = build_optimizer(model, recipe)
        self.rates = LambdaLR(optimizer, schedule)
        self.peak_rates = list(self.rates.base_lrs)
        super().__init__(
            model,
            _arguments(recipe, schedule.steps, held_out is not None, out),
            data_collator=default_collate,
            train_dataset=rows,
            eval_dataset=held_out,
            optimizers=(optimizer, self.rates),
            callbacks=[journal, Conductor(schedule, journal, self.stop, recipe.max_minutes)],
        )
        self.remove_callback(PrinterCallback)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: Trainer would walk over the model at each micro-batch."""
        return 0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        """Compute the loss alone; nobody here looks at logits."""
        return super().compute_loss(model, {**inputs, "skip_logits": True}, *rest, **options)

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Tensor:
        """Compute the gradients of a micro-batch, and note whether its loss is finite."""
        loss: Tensor = super().training_step(model, inputs, *rest, **options)
        self.last_inputs = inputs
        # On a GPU each look at a number waits for the device: there the first bad step is kept until one is due.
        bad = ~loss.isfinite() & (self.first_bad_step.to(loss.device) == 0)
        self.first_bad_step = torch.where(bad, self.state.global_step + 1, self.first_bad_step.to(loss.device))
        if loss.device.type == "cpu":
            self._refuse_bad_loss()
        return loss

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Log, unless there is something in it that is not finite."""
        self._refuse_bad_loss()
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            raise DivergenceError("the gradients are", self.state.global_step)
        super().log(logs, *rest)

    def _refuse_bad_loss(self) -> None:
        if step := int(self.first_bad_step):
            raise DivergenceError("the loss is", step)

    def _refuse_divergence(self) -> None:
        """Make sure that training can go on from here: finite weights and state, which give a finite loss."""
        self._refuse_bad_loss()
        if not is_finite(self.model, self.optimizer):
            raise DivergenceError("the weights or the optimizer's state are", self.state.global_step)
        if self.last_inputs is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(self.model, self._prepare_inputs(self.last_inputs))
            if not loss.isfinite():
                raise DivergenceError("the loss is", self.state.global_step + 1)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure on some rows of the held-out files, spread evenly."""
        assert isinstance(self.eval_dataset, PackedRows)
        count = min(self.recipe.eval_rows, len(self.eval_dataset))
        chosen = [i * len(self.eval_dataset) // count for i in range(count)]
        metrics = {"eval_bits_per_byte": self.bits_per_byte(self.eval_dataset, chosen)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def bits_per_byte(self, rows: PackedRows, chosen: list[int] | None = None) -> float:
        """Return the bits that the model needs for a byte of text, over all rows or the `chosen` ones.

        Each row is read on its own: a token has half of `seq_length` tokens before it on average.
        """
        self.model.eval()
        chosen = list(range(len(rows))) if chosen is None else chosen
        loader = DataLoader(Subset(rows, chosen), self.recipe.rows_at_once)
        nats, targets = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        for batch in loader:
            batch = {name: values.to(self.args.device) for name, values in batch.items()}
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            nats += self.model(**batch, skip_logits=True).loss.double() * count
            targets += count
        if not nats.isfinite():
            raise DivergenceError("the loss on the held-out files is", self.state.global_step)
        return float(nats) / targets / math.log(2) * rows.corpus.tokens_per_byte

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under another name and rename it: what has its name is whole. Draw the curve.

        Raises:
            DivergenceError: there are numbers in it that are not finite, or they lead to a loss that is not.
            HymbaError: it cannot be written.
        """
        self._refuse_divergence()
        out = Path(self.args.output_dir)
        staging = out / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        name = f"checkpoint-{self.state.global_step}"
        try:
            self.args.output_dir = str(staging)
            super()._save_checkpoint(model, trial)
            publish(staging / name, out / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is any of them, by the file
            problem = f"cannot write {out / name}: {_reason(error)}"
            raise HymbaError(f"{problem}; earlier checkpoints are whole: make room and run again") from error
        finally:
            self.args.output_dir = str(out)
            shutil.rmtree(staging, ignore_errors=True)
        draw_curve(self.journal.log, out / "curve.png")
        remove_old(out, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model as a directory that `--model` takes: weights in safetensors, config, tokenizer."""
        directory = output_dir or self.args.output_dir
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights with the model's own method, which knows the stored names."""
        stored = type(self.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        self.model.load_state_dict(stored.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state of both, but keep the recipe's learning rates: they may be lower than those stored."""
        super()._load_optimizer_and_scheduler(checkpoint)
        self.schedule.floor = self.recipe.min_lr / self.recipe.peak_lr
        self.rates.base_lrs = self.peak_rates
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["initial_lr"], group["lr"] = peak, peak * self.schedule(self.rates.last_epoch)


class StopFlag:
    """Raised by Ctrl-C or SIGTERM; training looks at it between steps. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.raised = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM while the block runs. Only the main thread may: elsewhere do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, self._raise) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
        os.write(2, b"\nfinishing this step and saving; Ctrl-C again stops at once\n")


class Conductor(TrainerCallback):
    """Ends a run: at its last step, when asked to stop, or with the decay fitted into its minutes."""

    def __init__(
        self, schedule: WarmupStableDecay, journal: Journal, stop: StopFlag, max_minutes: float | None
    ) -> None:
        self.schedule, self.journal, self.stop = schedule, journal, stop
        stable_share = 1 - schedule.decay_steps / schedule.steps
        self.stable_seconds = math.inf if max_minutes is None else max_minutes * 60 * stable_share

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin the decay when the stable phase has had its time; save and stop when asked to."""
        step, schedule = state.global_step, self.schedule
        if self.journal.seconds > self.stable_seconds and step < schedule.decay_start:
            schedule.decay_from(step)
            state.max_steps = schedule.steps
        if self.stop.raised or step >= schedule.steps:
            control.should_log = control.should_save = control.should_training_stop = True


def _arguments(recipe: Recipe, steps: int, measure: bool, out: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=recipe.rows_at_once,
        gradient_accumulation_steps=recipe.batch_rows // recipe.rows_at_once,
        max_grad_norm=recipe.grad_clip,
        bf16=recipe.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        train_sampling_strategy="sequential",  # the rows are in the run's order already
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=LOG_EVERY,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_every,
        eval_strategy="steps" if measure else "no",
        eval_steps=recipe.eval_every,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


def _reason(error: Exception) -> str:
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return " ".join(text.split())[:200]
