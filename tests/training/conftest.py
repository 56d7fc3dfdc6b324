"""A micro Hymba and a little text to train it on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hymba.text import train_tokenizer
from hymba.training import Recipe

torch.set_num_threads(1)  # tensors this small only make threads wait for one another

MODEL = {
    "size": "tiny",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 32,
    "d_inner": 32,
    "d_state": 4,
    "dt_rank": 2,
    "num_meta_tokens": 2,
    "sliding_window": 8,
    "global_layers": (0,),
    "kv_groups": ((1, 2),),
}


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """A directory of two texts, the second to hold out."""
    directory = tmp_path / "books"
    directory.mkdir()
    for name, animal in (("cats.txt", "cat"), ("dogs.txt", "dog")):
        lines = [f"Chapter {n}. The {animal} sat on mat {n * n % 97}, “quite still”.\n" for n in range(60)]
        (directory / name).write_text("".join(lines), encoding="utf-8")
    return directory


@pytest.fixture
def micro() -> dict[str, Any]:
    """The fields of a recipe that trains in a second."""
    return {
        "model": dict(MODEL),
        "tokenizer": 300,
        "seq_length": 24,
        "batch_rows": 4,
        "steps": 8,
        "peak_lr": 1e-2,
        "held_out": ["dogs.txt"],
        "eval_every": 4,
        "eval_rows": 4,
        "save_every": 4,
        "warmup": 0.2,
        "bf16": False,
        "save_dtype": "float32",
    }


@pytest.fixture
def recipe(micro: dict[str, Any]) -> Recipe:
    return Recipe(**micro)


@pytest.fixture
def tokenizer(books: Path, tmp_path: Path) -> Any:
    return train_tokenizer([books / "cats.txt"], 300, tmp_path / "tokenizer")
