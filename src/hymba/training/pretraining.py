"""Pretraining, from a recipe and text files to a model directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from hymba.errors import HymbaError
from hymba.files import new_file_mode, replace_directory
from hymba.model import HymbaConfig
from hymba.text import end_at_spaces, load_tokenizer, train_tokenizer_from_iterator
from hymba.training.data import Corpus, find_files, split_held_out, stream_documents, tokenise
from hymba.training.recipe import Recipe, fit, suggest
from hymba.training.run import MODEL, REPORT, RUN, DataFiles, claim, read_json, refuse_other_tokenizer, write_json
from hymba.training.schedule import WarmupStableDecay

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hymba.training.packing import PackedRows
    from hymba.training.trainer import PretrainingTrainer

INTERRUPTED = 130  # what a shell reports of a command ended by Ctrl-C


def pretrain(
    recipe: Recipe, data: Sequence[str | Path], out: str | Path, console: Console | None = None
) -> dict[str, Any]:
    """Train a new model by `recipe` on the text files and directories in `data`, and return the report.

    `out` receives model/ (released layout, with the tokenizer), report.json, log.jsonl, curve.png, the last
    two checkpoints, and the tokenizer and tokens of the run. The same call again resumes from the last whole
    checkpoint, step for step as if it had never stopped; once finished, it returns the report. Progress goes
    to `console`, by default on stderr.

    Raises:
        HymbaError: bad recipe or data; `out` cannot be written, or was started with a different recipe, different
            data or a different tokenizer; none of its checkpoints is whole; training diverged.
        SystemExit: with 130, after Ctrl-C or SIGTERM: a checkpoint is saved, and a line says how to go on.
    """
    from rich.console import Console

    out, console = Path(out), console or Console(stderr=True, highlight=False, soft_wrap=True)
    paths = split_held_out(find_files([Path(path) for path in data]), recipe.held_out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        train, held_out = claim(out, recipe, *map(DataFiles.of, paths))
        tokenizer = _tokenizer(recipe, train.paths, out, console)
        refuse_other_tokenizer(out, tokenizer)
        if (report := read_json(out / REPORT)) is not None:
            console.print(f"this run is finished: its model is in {out / MODEL}")
            return report
        corpus = _tokens(train, "train", tokenizer, out, console)
        measured = _tokens(held_out, "held_out", tokenizer, out, console) if held_out.paths else None
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


def _tokenizer(recipe: Recipe, files: Sequence[Path], out: Path, console: Console) -> PreTrainedTokenizerBase:
    """Load the recipe's tokenizer, or train one on the training files."""
    home = Path(recipe.tokenizer) if isinstance(recipe.tokenizer, str) else out / "tokenizer"
    if isinstance(recipe.tokenizer, int) and not (home / "tokenizer_config.json").is_file():
        documents = (document for file in files for document in stream_documents(file))
        texts = (text for document in documents for text in end_at_spaces(document))
        with console.status(f"training a tokenizer of {recipe.tokenizer} tokens"):
            train_tokenizer_from_iterator(texts, recipe.tokenizer, home)
    tokenizer = load_tokenizer(home)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise HymbaError(f"the tokenizer in {home} lacks BOS or EOS, with which documents begin and end")
    return tokenizer


def _tokens(files: DataFiles, name: str, tokenizer: PreTrainedTokenizerBase, out: Path, console: Console) -> Corpus:
    """Tokenize `files` into out/tokens/`name`, under a progress bar."""
    from hymba.training.journal import progress_bar

    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("tokenizing", total=sum(file.stat().st_size for file in files.paths), note=name)
        directory = out / "tokens" / name
        return tokenise(files.paths, tokenizer, directory, lambda size: bar.advance(task, size), files.digests)


def _train(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    measured: Corpus | None,
    out: Path,
    console: Console,
) -> dict[str, Any]:
    """Train to the end or to an interruption; write the model and the report."""
    from hymba.training.checkpoint import find_whole_checkpoint, planned_steps
    from hymba.training.divergence import DivergenceError, explain
    from hymba.training.journal import Journal
    from hymba.training.packing import PackedRows
    from hymba.training.trainer import PretrainingTrainer

    special = {"bos": tokenizer.bos_token_id, "pad": tokenizer.eos_token_id}
    rows = PackedRows(corpus, recipe.seq_length, **special, seed=recipe.seed)
    held_out = None if measured is None else PackedRows(measured, recipe.seq_length, **special)
    checkpoint = find_whole_checkpoint(out, console.print)
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
        _refuse_other_model(checkpoint, build_config(recipe, tokenizer))
        console.print(f"resuming from {checkpoint}")
    try:
        with trainer.stop.listening(), journal.bar:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.state.global_step < schedule.steps:
            console.print(f"saved at step {trainer.state.global_step}: run the same command again to go on")
            raise SystemExit(INTERRUPTED)
        report = _report(trainer, out, corpus, held_out)
    except DivergenceError as error:
        raise explain(error, recipe, out) from error
    _save_model(trainer, tokenizer, report, out)
    write_json(out / REPORT, report)
    console.print(f"the model is in {out / MODEL}, its report and learning curve beside it")
    return report


def _refuse_other_model(checkpoint: Path, config: HymbaConfig) -> None:
    from hymba.training.checkpoint import read_config

    stored = asdict(read_config(checkpoint))
    for name, value in asdict(config).items():
        if stored[name] != value:
            problem = f"{checkpoint} is of a different model: its {name} is {stored[name]}, not {value}"
            raise HymbaError(f"{problem}; choose another --out, or delete the checkpoint")


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
        "run": read_json(out / RUN),
    }


def _save_model(
    trainer: PretrainingTrainer, tokenizer: PreTrainedTokenizerBase, report: dict[str, Any], out: Path
) -> None:
    """Write the final model, its tokenizer and its card, complete or not at all."""
    import torch

    from hymba.training.card import write_card

    partial = out / f"{MODEL}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    dtype = trainer.recipe.save_dtype
    trainer.model.to(getattr(torch, dtype))
    if not all(bool(p.isfinite().all()) for p in trainer.model.parameters()):
        raise HymbaError(f"the weights are too large for {dtype}: set save_dtype to float32 and run again")
    trainer.model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():  # safetensors writes for the owner's eyes only
        file.chmod(new_file_mode())
    write_card(partial, trainer.model.config.core(), trainer.recipe, report, out / "curve.png")
    replace_directory(partial, out / MODEL)
