"""`hymba pretrain`: train a new model on text files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pretrain(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see recipes/.", show_default=False)],
    more_data: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[PATH]...", help="More data: `--data A B` is `--data A --data B`.", show_default=False),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A .txt or .jsonl file or a directory of them; may be repeated.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The directory to write; runs/ and the recipe's name unless given.", show_default=False),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; may be repeated."),
    ] = None,
) -> None:
    """Train a new model by a recipe.

    Ctrl-C saves and stops; the same command goes on from there.
    """
    from hymba.training import Recipe
    from hymba.training import pretrain as train

    paths = [*(data or []), *(more_data or [])]
    train(Recipe.load(recipe, change or []), paths, out or Path("runs") / recipe.stem)
