"""The released tensor names as transformers' renamings, applied when it loads and reversed when it saves."""

from __future__ import annotations

import re

from transformers.core_model_loading import WeightRenaming

from hymba.model import RELEASED_NAMES

# Where the core model sits inside `HymbaModel`.
CORE = "core"


def renamings() -> list[WeightRenaming]:
    """Return one renaming a row of `hymba.model.RELEASED_NAMES`; none touches a name already renamed."""
    rows = []
    for ours, released in RELEASED_NAMES.items():
        if ours == released:  # the head sits beside the core, under its released name
            continue
        source = re.escape(released.removeprefix("model.")).replace(r"\{\}", r"(\d+)")
        if source.startswith(re.escape(ours)):
            source = rf"(?<!{CORE}\.)" + source
        rows.append(WeightRenaming(source, f"{CORE}.{ours}".replace("{}", r"\1")))
    return rows
