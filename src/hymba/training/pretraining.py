"""Pretraining, from a recipe and text files to a model directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from hymba.errors import HymbaError
from hymba.files import new_file_mode, replacing
from hymba.model import HymbaConfig
from hymba.text import load_tokenizer, train_tokenizer
from hymba.training.data import Corpus, find_files, read_documents, split_held_out, tokenise
from hymba.training.recipe import Recipe, fit, suggest
from hymba.training.schedule import WarmupStableDecay

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hymba.training.packing import PackedRows
    from hymba.training.trainer import PretrainingTrainer

INTERRUPTED = 130  # what a shell reports of a command ended by Ctrl-C
# These change nothing in what is learnt, so a run may go on with other values.
FREE_TO_CHANGE = ("max_minutes", "save_every", "eval_every", "eval_rows", "micro_rows", "save_dtype")


def pretrain(
    recipe: Recipe, data: Sequence[str | Path], out: str | Path, console: Console | None = None
) -> dict[str, Any]:
    """Train a new model by `recipe` on the text files and directories in `data`, and return the report.

    `out` receives model/ (released layout, with the tokenizer), report.json, log.jsonl, curve.png, the last
    two checkpoints, and the tokenizer and tokens of the run. The same call again goes on from the last
    checkpoint, step for step as if it had never stopped; once finished, it returns the report. Progress goes
    to `console`, by default on stderr.

    Raises:
        HymbaError: bad recipe or data; `out` cannot be written or holds another run.
        SystemExit: with 130, after Ctrl-C or SIGTERM: a checkpoint is saved, and a line says how to go on.
    """
    from rich.console import Console

    out, console = Path(out), console or Console(stderr=True, highlight=False, soft_wrap=True)
    train, held_out = split_held_out(find_files([Path(path) for path in data]), recipe.held_out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, recipe, [*train, *held_out])
        if (out / "report.json").is_file():
            console.print(f"this run is finished: its model is in {out / 'model'}")
            return dict(json.loads((out / "report.json").read_text(encoding="utf-8")))
        tokenizer = _tokenizer(recipe, train, out, console)
        corpus = _tokens(train, "train", tokenizer, out, console)
        measured = _tokens(held_out, "held_out", tokenizer, out, console) if held_out else None
        with _one_bar():
            return _train(recipe, tokenizer, corpus, measured, out, console)
    except KeyboardInterrupt:
        console.print("interrupted: run the same command again to go on from the last checkpoint")
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        problem = f"cannot write {error.filename or out}: {error.strerror or error}"
        raise HymbaError(f"{problem}; make room or choose another --out") from error


@contextmanager
def _one_bar() -> Iterator[None]:
    """Keep transformers from drawing bars of its own while files are saved and loaded."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _claim(out: Path, recipe: Recipe, files: Sequence[Path]) -> None:
    """Write down which run `out` belongs to, or make sure that it is this one."""
    data = [f"{file.name}, {file.stat().st_size} bytes" for file in files]
    now = json.loads(json.dumps(recipe.to_mapping() | {"data": data}))
    path = out / "run.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else now
    differing = {key for key in now | before if now.get(key) != before.get(key)} - set(FREE_TO_CHANGE)
    if differing and any(out.glob("checkpoint-*")):
        another = ", ".join(sorted(differing))
        raise HymbaError(f"{out} holds a run with another {another}: choose another --out or delete it")
    if differing:  # that run never came to a checkpoint: nothing of it is needed
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _tokenizer(recipe: Recipe, files: Sequence[Path], out: Path, console: Console) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, or train one on the training files."""
    home = Path(recipe.tokenizer) if isinstance(recipe.tokenizer, str) else out / "tokenizer"
    if isinstance(recipe.tokenizer, int) and not (home / "tokenizer_config.json").is_file():
        plain = out / "plain_text.partial"
        with console.status(f"training a tokenizer of {recipe.tokenizer} tokens"):
            train_tokenizer([_plain_text(file, plain) for file in files], recipe.tokenizer, home)
        shutil.rmtree(plain, ignore_errors=True)
    tokenizer = load_tokenizer(home)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise HymbaError(f"the tokenizer in {home} lacks BOS or EOS, with which documents begin and end")
    return tokenizer


def _plain_text(file: Path, directory: Path) -> Path:
    """Return a file with the text alone: `file` itself, or what the lines of a .jsonl hold."""
    if file.suffix != ".jsonl":
        return file
    directory.mkdir(parents=True, exist_ok=True)
    plain = directory / f"{len(list(directory.iterdir()))}.txt"
    with plain.open("w", encoding="utf-8", newline="") as out:
        out.writelines(text + "\n" for text in read_documents(file))
    return plain


def _tokens(
    files: Sequence[Path], name: str, tokenizer: PreTrainedTokenizerBase, out: Path, console: Console
) -> Corpus:
    """Tokenise `files` into out/tokens/`name`, under a progress bar."""
    from hymba.training.journal import progress_bar

    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("tokenising", total=sum(file.stat().st_size for file in files), note=name)
        return tokenise(files, tokenizer, out / "tokens" / name, lambda size: bar.advance(task, size))


def _train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    measured: Corpus | None,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Train to the end or to an interruption; write the model and the report."""
    from hymba.training.journal import Journal
    from hymba.training.packing import PackedRows
    from hymba.training.trainer import PretrainingTrainer, last_checkpoint, planned_steps

    special = {"bos": tokenizer.bos_token_id, "pad": tokenizer.eos_token_id}
    rows = PackedRows(corpus, recipe.seq_length, **special, seed=recipe.seed)
    held_out = None if measured is None else PackedRows(measured, recipe.seq_length, **special)
    checkpoint = last_checkpoint(out)
    steps = count_steps(recipe, rows) if checkpoint is None else planned_steps(checkpoint)
    rows.length = steps * recipe.batch_rows
    schedule = WarmupStableDecay.of(
        steps,
        warmup=recipe.warmup,
        decay=recipe.decay,
        floor=recipe.min_lr / recipe.peak_lr,
        shape=recipe.decay_shape,
    )
    tokens_per_step = recipe.batch_rows * recipe.seq_length
    journal = Journal(out, tokens_per_step, corpus.tokens_per_byte, recipe.max_minutes, console)
    model = build_model(recipe, tokenizer)
    trainer = PretrainingTrainer(model, tokenizer, recipe, rows, held_out, schedule, journal, out)
    if checkpoint is not None:
        console.print(f"going on from {checkpoint}")
    with trainer.stop.listening(), journal.bar:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step < schedule.steps:
        console.print(f"saved at step {trainer.state.global_step}: run the same command again to go on")
        raise SystemExit(INTERRUPTED)
    report = _report(trainer, out, corpus, held_out)
    _save_model(trainer, tokenizer, report, out)
    with replacing(out / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    console.print(f"the model is in {out / 'model'}, its report and learning curve beside it")
    return report


def count_steps(recipe: Recipe, rows: PackedRows) -> int:
    """Return the steps of a run: as given, or as many as take the recipe's tokens or epochs; at least one."""
    if recipe.steps is not None:
        return recipe.steps
    if recipe.tokens is not None:
        return max(1, round(recipe.tokens / (recipe.batch_rows * recipe.seq_length)))
    assert recipe.epochs is not None
    return max(1, round(rows.rows_until(recipe.epochs) / recipe.batch_rows))


def build_config(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> HymbaConfig:
    """Return the shape of the recipe's model, its vocabulary taken from the tokenizer.

    Raises:
        HymbaError: the recipe names a field that there is not, or the numbers contradict one another.
    """
    kinds = get_type_hints(HymbaConfig)
    known = {field.name: kinds[field.name] for field in fields(HymbaConfig)}
    changes = {}
    for key, value in recipe.model_changes.items():
        if key not in known:
            raise HymbaError(f"recipe: unknown key {key!r} in model{suggest(key, known)}")
        changes[key] = fit(f"model.{key}", value, known[key])
    vocabulary = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return HymbaConfig.named(recipe.size, **changes | vocabulary)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the recipe's model in float32, initialised from its seed."""
    import torch

    from hymba.hf import HymbaConfig as ReleasedConfig
    from hymba.hf import HymbaForCausalLM

    config = ReleasedConfig.from_dict(build_config(recipe, tokenizer).to_released())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return HymbaForCausalLM(config)


def _report(trainer: PretrainingTrainer, out: Path, corpus: Corpus, held_out: PackedRows | None) -> dict[str, Any]:
    """Gather what is worth knowing about a finished run, measured on all of the held-out text."""
    import torch
    import transformers

    from hymba.training.journal import LOG, read_log

    seconds, steps = trainer.journal.seconds, trainer.state.global_step
    tokens = steps * trainer.journal.tokens_per_step
    losses = [line for line in read_log(out / LOG) if "loss" in line]
    threads = torch.get_num_threads()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "held_out_bits_per_byte": None if held_out is None else round(trainer.bits_per_byte(held_out), 4),
        "held_out_bytes": None if held_out is None else held_out.corpus.num_bytes,
        "train_bits_per_byte": round(losses[-1]["bits_per_byte"], 4) if losses else None,
        "train_loss": round(losses[-1]["loss"], 4) if losses else None,
        "steps": steps,
        "tokens": tokens,
        "epochs": round(tokens / len(corpus.tokens), 2),
        "train_bytes": corpus.num_bytes,
        "train_tokens": len(corpus.tokens),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {threads} threads",
        "versions": versions,
        "run": json.loads((out / "run.json").read_text(encoding="utf-8")),
    }


def _save_model(
    trainer: PretrainingTrainer, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any], out: Path
) -> None:
    """Write the final model, its tokenizer and its card, complete or not at all."""
    import torch

    from hymba.training.card import write_card

    directory, partial = out / "model", out / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.to(getattr(torch, trainer.recipe.save_dtype)).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():  # safetensors writes for the owner's eyes only
        file.chmod(new_file_mode())
    write_card(partial, trainer.model.config.core(), trainer.recipe, report, out / "curve.png")
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
