"""`hymba info`: a model's size, shape and cache, and what runs it here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hymba.cli.options import DeviceOption, JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from hymba.model import HymbaConfig

OPS = (
    "attention",
    "selective_scan",
    "causal_conv1d",
    "linear",
    "projection",
    "rms_norm",
    "gated",
    "rotary",
    "cross_entropy",
    "draw",
)
THOUSANDS = (1, 2, 4, 8, 16, 32)  # of tokens


def info(
    model: Annotated[
        str,
        typer.Argument(help="'tiny', a directory (config.json is enough), or a hub id such as owner/name."),
    ] = "tiny",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Tell a model's size, shape and cache, and what runs it here and why."""
    from hymba.inference import find_model, parse_device
    from hymba.model import HymbaConfig
    from hymba.ops.backend import missing

    directory = find_model(model, weights=False)
    config = HymbaConfig.from_directory(directory)
    told = {
        "model": model,
        **_describe_weights(directory, config),
        **_describe_shape(config),
        "cache": _describe_cache(config),
        "device": (place := parse_device(device).type),
        "ops": [_describe_op(name, place) for name in OPS],
        "missing": missing(),
    }
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        _print_tables(told)


def _describe_weights(directory: Path, config: HymbaConfig) -> dict[str, Any]:
    """Count the tensors that the config asks for, and the bytes on disk."""
    from hymba.model import Scheme, count_parameters, skeleton
    from hymba.model.config import read_config
    from hymba.model.quantize import hollow

    scheme = Scheme.from_released(read_config(directory))
    model = skeleton(config)
    if scheme is not None:
        hollow(model, scheme)
    files = list(directory.glob("*.safetensors"))
    held = {"weight_files": len(files), "weight_bytes": sum(file.stat().st_size for file in files)}
    size = {"parameters": count_parameters(model), "tensors": len(model.state_dict())}
    return size | {"quantized_bits": scheme.bits if scheme else None} | held


def _describe_shape(c: HymbaConfig) -> dict[str, Any]:
    return {
        "layers": c.num_hidden_layers,
        "hidden_size": c.hidden_size,
        "query_heads": c.num_attention_heads,
        "kv_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "v_head_dim": c.v_head_dim,
        "intermediate_size": c.intermediate_size,
        "d_inner": c.d_inner,
        "d_state": c.d_state,
        "meta_tokens": c.num_meta_tokens,
        "sliding_window": c.sliding_window,
        "global_layers": list(c.global_layers),
        "layers_with_own_kv": len(set(c.owners)),
        "vocabulary": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
    }


def _describe_cache(config: HymbaConfig) -> list[dict[str, int]]:
    from hymba.model import cache_nbytes, paper_cache_nbytes

    return [
        {
            "tokens": n,
            "held_bytes": cache_nbytes(config, n),
            "int8_bytes": cache_nbytes(config, n, bits=8),
            "paper_bytes": paper_cache_nbytes(config, n),
        }
        for n in (1000 * k for k in THOUSANDS)
    ]


def _describe_op(name: str, device: str) -> dict[str, Any]:
    """Tell which implementation of an op runs on a device, and why."""
    from importlib import import_module

    from hymba.ops.backend import explain, selected

    implementations = import_module(f"hymba.ops.{name}").IMPLEMENTATIONS
    chosen, why = selected(implementations, device), explain(implementations, device)
    return {"op": name, "in_use": chosen, "why": why, "others": [x for x in implementations if x != chosen]}


def _print_tables(told: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    size = f"[bold]{told['parameters']:,}[/] parameters, {told['tensors']} tensors"
    console.print(f"\n[bold]{escape(told['model'])}[/]: {size}", soft_wrap=True)
    for table in (_facts(told), _cache_table(told["cache"]), _ops_table(told)):
        console.print()
        console.print(table)
    console.print()


def _facts(told: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    stored = f"{told['weight_bytes'] / 1e6:,.1f} MB in {told['weight_files']} file(s)"
    stored += f", quantised to {told['quantized_bits']} bits" if told["quantized_bits"] else ""
    owners, sliding = told["layers_with_own_kv"], told["layers"] - len(told["global_layers"])
    for name, text in (
        ("weights here", stored if told["weight_files"] else "none, only the config"),
        ("layers", f"{told['layers']} of width {told['hidden_size']}, MLP {told['intermediate_size']}"),
        (
            "attention",
            f"{told['query_heads']} query and {told['kv_heads']} KV heads, "
            f"keys {told['head_dim']} and values {told['v_head_dim']} wide",
        ),
        ("global layers", ", ".join(map(str, told["global_layers"]))),
        ("sliding layers", f"{sliding}, window {told['sliding_window']:,}"),
        (
            "own K/V",
            f"{owners} layers, {told['layers'] - owners} share another's",
        ),
        ("state space", f"{told['d_inner']} channels, {told['d_state']} states each"),
        ("meta tokens", str(told["meta_tokens"])),
        ("vocabulary", f"{told['vocabulary']:,}"),
        ("positions", f"{told['max_position_embeddings']:,}"),
    ):
        table.add_row(f"[dim]{name}[/]", text)
    return table


def _cache_table(cache: list[dict[str, int]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    caption = "K = 1000 tokens, MB = 10⁶ bytes. Held: bfloat16 K/V, float32 SSM state, meta tokens, whole windows."
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
    table.title, table.title_justify, table.title_style = "Cache of one sequence", "left", "bold"
    for heading in ("tokens", "held", "K/V in int8", "by the paper's counting"):
        table.add_column(heading, justify="right")
    for row in cache:
        sizes = (f"{row[key] / 1e6:,.1f} MB" for key in ("held_bytes", "int8_bytes", "paper_bytes"))
        table.add_row(f"{row['tokens'] // 1000}K", *sizes)
    return table


def _ops_table(told: dict[str, Any]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("op", "in use", "why", "others", box=SIMPLE_HEAD, pad_edge=False)
    table.title, table.title_justify, table.title_style = (
        f"Implementations on {told['device']}",
        "left",
        "bold",
    )
    for op in told["ops"]:
        table.add_row(op["op"], f"[bold]{op['in_use']}[/]", op["why"], ", ".join(op["others"]))
    table.caption, table.caption_justify = (
        "\n".join(f"Not here: {name}, because {reason}." for name, reason in told["missing"].items()) or None,
        "left",
    )
    return table
