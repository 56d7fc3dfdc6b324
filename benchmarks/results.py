"""Recorded results: which there are, and the newest of each name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hymba.errors import HymbaError

RESULTS = Path(__file__).parent / "results"
MISSING = "not yet measured"

Record = Mapping[str, Any]


def devices(directory: Path = RESULTS) -> dict[str, dict[str, Record]]:
    """Return, by device, the newest record of each name; the device with the newest record comes first.

    Raises:
        HymbaError: a file is no record.
    """
    found: dict[str, dict[str, Record]] = {}
    for path in sorted(directory.glob("*/*.json")):
        record = _read(path)
        held = found.setdefault(path.parent.name, {})
        if record["name"] not in held or held[record["name"]]["date"] <= record["date"]:
            held[record["name"]] = record
    return dict(sorted(found.items(), key=lambda item: max(r["date"] for r in item[1].values()), reverse=True))


def _read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        if {"name", "date", "commit", "command", "machine"} <= record.keys():
            return record
    except (ValueError, AttributeError) as error:
        raise HymbaError(f"{path} is no benchmark's result: {error}") from error
    raise HymbaError(f"{path} is no benchmark's result: it lacks a name, date, commit, command or machine")
