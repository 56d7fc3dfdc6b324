"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str, typer.Option(metavar="MODEL", help="'tiny' (bundled), a directory, or a hub id such as owner/name.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; the stored one unless given.", show_default=False),
]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")]
QuantizeOption = Annotated[
    str | None,
    typer.Option(help="int8 or int4 quantises the weights as they are read.", show_default=False),
]
CacheOption = Annotated[
    str | None,
    typer.Option(help="int8 keeps keys and values in 8 bits; in the model's dtype unless given.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
OutOption = Annotated[Path, typer.Option(help="The directory to write.", show_default=False)]

TemperatureOption = Annotated[float, typer.Option(help="How freely to choose; 0: always the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(help="Choose among the K likeliest tokens only.", show_default=False)]
TopPOption = Annotated[float, typer.Option(help="Choose among the likeliest tokens that hold this probability.")]
SeedOption = Annotated[
    int | None,
    typer.Option(help="The same seed, the same text; another each time unless given.", show_default=False),
]

# Kinder to a small model than its own distribution, which now and then picks a token from far down its list.
TEMPERATURE, TOP_P = 0.8, 0.95
