"""The bundled model: small, whole, and able to read a novel that it was not trained on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hymba.evaluation import score_text
from hymba.inference import Continuation, SamplingParams, encode_prompt, find_model, load_model

# The first letter of Mary Shelley's "Frankenstein" (1818), which is not in the training data.
UNSEEN = """\
You will rejoice to hear that no disaster has accompanied the
commencement of an enterprise which you have regarded with such evil
forebodings. I arrived here yesterday, and my first task is to assure
my dear sister of my welfare and increasing confidence in the success
of my undertaking.

I am already far north of London, and as I walk in the streets of
Petersburgh, I feel a cold northern breeze play upon my cheeks, which
braces my nerves and fills me with delight. Do you understand this
feeling? This breeze, which has travelled from the regions towards
which I am advancing, gives me a foretaste of those icy climes.
Inspirited by this wind of promise, my daydreams become more fervent
and vivid. I try in vain to be persuaded that the pole is the seat of
frost and desolation; it ever presents itself to my imagination as the
region of beauty and delight.
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_is_small_and_has_every_part() -> None:
    directory = find_model("tiny")
    assert sum(file.stat().st_size for file in Path(directory).iterdir()) <= 8_000_000
    model, tokenizer = load_model("tiny")
    config = model.config
    sliding = [layer for layer in range(config.num_hidden_layers) if config.window(layer) is not None]
    assert config.global_layers
    assert sliding
    assert config.num_meta_tokens > 0
    assert len(set(config.owners)) < config.num_hidden_layers
    assert len(tokenizer) == config.vocab_size


def test_it_reads_a_novel_it_never_saw() -> None:
    model, tokenizer = load_model("tiny")
    assert score_text(model, tokenizer, UNSEEN, context=512, stride=256).bits_per_byte < 2.2


def test_it_writes_words() -> None:
    model, tokenizer = load_model("tiny")
    params = SamplingParams(max_new_tokens=60, temperature=0.8, top_p=0.95, seed=0)
    text = "".join(Continuation(model, tokenizer, encode_prompt(tokenizer, "It was a cold morning, and"), params))
    words = text.split()
    assert len(words) > 25
    assert 2.5 < sum(map(len, words)) / len(words) < 8
