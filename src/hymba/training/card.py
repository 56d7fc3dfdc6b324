"""The model card: what a model was trained on, how, and how well it does."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from hymba.files import replacing
from hymba.model import HymbaConfig
from hymba.training.recipe import Recipe

CARD, CURVE = "README.md", "curve.png"
# Of the recipe, what says how the model was trained; the rest is how the run was cut up and watched.
TOLD = (
    *("optimizer", "peak_lr", "matrix_lr", "min_lr", "warmup", "decay", "decay_shape", "weight_decay"),
    *("grad_clip", "seq_length", "batch_rows", "bf16", "seed"),
)


def write_card(directory: Path, config: HymbaConfig, recipe: Recipe, report: dict[str, Any], curve: Path) -> None:
    """Write the card of the model in `directory`, and the picture `curve` beside it if there is one.

    Args:
        report: what :func:`hymba.training.pretrain` returns.
    """
    data, settings = report["run"]["data"], asdict(recipe)
    held_out = [line for line in data if line.rpartition(", ")[0] in recipe.held_out]
    sections = [
        "---\nlibrary_name: hymba\npipeline_tag: text-generation\ntags:\n- hymba\n---",
        "# A Hymba",
        _describe(config, report),
        "## Data\n\n" + _list([line for line in data if line not in held_out]),
        "Held out, never trained on:\n\n" + _list(held_out) if held_out else "",
        "## Training\n\n" + _tell_training(recipe, report),
        f"![bits per byte over the tokens of training]({CURVE})" if curve.is_file() else "",
        "Recipe:\n\n```yaml\n" + yaml.safe_dump({key: settings[key] for key in TOLD}, sort_keys=False) + "```",
    ]
    if curve.is_file():
        shutil.copyfile(curve, directory / CURVE)
    with replacing(directory / CARD) as partial:
        partial.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")


def _describe(config: HymbaConfig, report: dict[str, Any]) -> str:
    layers, globals_ = config.num_hidden_layers, len(config.global_layers)
    shared = layers - len(set(config.owners))
    return (
        f"A Hymba ([arXiv 2411.13676](https://arxiv.org/abs/2411.13676)) of {report['parameters']:,} parameters: "
        f"{layers} layers of width {config.hidden_size}, {globals_} of them with global attention and "
        f"{layers - globals_} with a window of {config.sliding_window}; {shared} that read another's K/V; "
        f"{config.num_meta_tokens} meta tokens; {config.vocab_size:,} tokens of byte-level BPE."
    )


def _tell_training(recipe: Recipe, report: dict[str, Any]) -> str:
    lines = [
        f"- {report['tokens']:,} tokens in {report['steps']:,} steps, {report['epochs']} epochs of "
        f"{report['train_bytes']:,} bytes",
        f"- {report['seconds'] / 60:.0f} minutes on {report['device']}: "
        f"{report['tokens_per_second']:,} tokens a second",
        f"- bits per byte at the end, on the training text: {report['train_bits_per_byte']}",
    ]
    if report["held_out_bits_per_byte"] is not None:
        lines.append(
            f"- bits per byte on the {report['held_out_bytes']:,} held-out bytes, in windows of "
            f"{recipe.seq_length} tokens side by side: {report['held_out_bits_per_byte']}"
        )
    return "\n".join(lines)


def _list(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
