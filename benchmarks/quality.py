"""What quantising costs in quality: `python -m benchmarks.quality --data FILE`, see docs/quantization.md.

A model reads a text as it is stored, then with its weights in 8 and in 4 bits, then with its keys and values in 8.
Beside bits per byte stand the errors of each weight, and of what it makes of a real input.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from benchmarks.command import Json, Out, Threads, bar, finish, main, use_threads
from hymba.evaluation import default_context, read_text, score_text
from hymba.inference import load_model
from hymba.model import Hymba, Rounding, quantize


class Variant(NamedTuple):
    """A way to keep a model in memory. weights: bits, None as stored. cache: bits of keys and values, None likewise."""

    name: str
    weights: int | None
    cache: int | None


VARIANTS = (
    Variant("bf16", None, None),
    Variant("int8", 8, None),
    Variant("int4", 4, None),
    Variant("bf16, int8 cache", None, 8),
    Variant("int4, int8 cache", 4, 8),
)


def quality(
    data: Annotated[Path, typer.Option(help="UTF-8 text that the model was not trained on.", show_default=False)],
    model: Annotated[str, typer.Option(metavar="MODEL", help="'tiny', a directory, or a hub id.")] = "tiny",
    characters: Annotated[
        int | None, typer.Option(min=1, help="Read only so many of the text.", show_default=False)
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    out: Out = None,
) -> None:
    """Measure bits per byte and errors of a model's weights and outputs, by how its weights and cache are kept."""
    use_threads(threads)
    text = read_text(data)[:characters]
    scores: dict[str, float] = {}
    layers: dict[str, list[dict[str, Any]]] = {}
    with bar("quality", len(VARIANTS)) as step:
        for variant in VARIANTS:
            loaded, tokenizer = load_model(model, "bfloat16", "cpu")
            if variant.weights is not None and variant.cache is None:
                layers[variant.name] = measure_layers(loaded, tokenizer, text, variant.weights)
            elif variant.weights is not None:
                quantize(loaded, variant.weights)
            context = default_context(loaded.config)
            score = score_text(loaded, tokenizer, text, context, context // 2, cache_bits=variant.cache)
            scores[variant.name] = score.bits_per_byte
            step()
    plain = scores[VARIANTS[0].name]
    result = {
        "bits_per_byte": {name: round(bits, 5) for name, bits in scores.items()},
        "rise_percent": {name: round(100 * (bits / plain - 1), 3) for name, bits in scores.items()},
        "layers": layers,
    }
    settings = {"model": Path(model).name, "data": data.name, "characters": characters, "context": context}
    finish(f"quality-{Path(model).name}", settings, result, _lines(result), as_json, out)


@torch.no_grad()
def measure_layers(model: Hymba, tokenizer: PreTrainedTokenizerBase, text: str, bits: int) -> list[dict[str, Any]]:
    """Quantise `model` in place; return, weight by weight, its error and that of its output where a text begins."""
    tokens = torch.tensor([tokenizer(text[: 1 << 14])["input_ids"][: default_context(model.config)]])
    plain = dict(model.named_modules())
    roundings: list[Rounding] = []
    quantize(model, bits, roundings.append)
    names = [rounding.name.removesuffix(".weight") for rounding in roundings]
    errors: dict[str, float] = {}

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            wanted = plain[name](*inputs)
            errors[name] = float((output.float() - wanted.float()).norm() / wanted.float().norm())
            return wanted.to(output.dtype)  # so that errors of one layer do not reach the next

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return [
        {"weight": name, "bits": rounding.bits, "error": rounding.error, "output_error": errors.get(name)}
        for name, rounding in zip(names, roundings, strict=True)
    ]


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{'':20} bits per byte"]
    for name, bits in result["bits_per_byte"].items():
        lines.append(f"{name:20} {bits:.4f}  {result['rise_percent'][name]:+.2f}%")
    for name, rows in result["layers"].items():
        lines += ["", f"{name:20} error, median and worst    of the output, median and worst"]
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            kinds.setdefault(row["weight"].rpartition(".")[2], []).append(row)
        for kind, members in kinds.items():
            told = (_middle_and_worst([row[key] for row in members]) for key in ("error", "output_error"))
            lines.append(f"  {kind:12} {members[0]['bits']} bits   " + "          ".join(told))
    return lines


def _middle_and_worst(errors: list[float | None]) -> str:
    known = sorted(x for x in errors if x is not None)
    return f"{known[len(known) // 2]:8.3%} {known[-1]:8.3%}" if known else ""


if __name__ == "__main__":
    main(quality)
