"""A micro checkpoint on disk: a random model with a tokenizer trained on one paragraph."""

from pathlib import Path

from micro import micro_model

from hymba.model import save
from hymba.text import train_tokenizer

STORY = (
    "The keeper of the lighthouse climbed the stairs each night, and each night the stairs were longer. "
    "“Who is there?” he said. Nobody answered; the sea went on with its work.\n\n" * 4
)


def write_checkpoint(directory: Path, **changes: object) -> Path:
    """Write the micro model, with fields of its config replaced by `changes`, and return `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    story = directory.with_suffix(".txt")
    story.write_text(STORY, encoding="utf-8")
    tokenizer = train_tokenizer([story], 290, directory)
    save(micro_model(vocab_size=len(tokenizer), **changes), directory)
    return directory
