"""lm-evaluation-harness scores and generates through the server as it would through the model itself."""

import json
from pathlib import Path

import pytest
import torch
from live import LiveServer
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from hymba.inference import Engine

CHOICES = [
    ("The keeper of the lighthouse climbed the", [" stairs", " banana"], 0),
    ("It was a cold winter", [" morning", " purple"], 0),
    ("She looked at him and", [" said", " of"], 0),
]
SCORE = """\
task: say_how
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WRITE = """\
task: say_on
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "x"
generation_kwargs: {{until: ["."], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.mark.slow
def test_a_task_is_scored_as_by_the_model(
    live: LiveServer, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [{"text": text, "choices": choices, "answer": answer} for text, choices, answer in CHOICES]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in (("score", SCORE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data))
    engine.tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = {
        "model": "tiny",
        "base_url": f"{live.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(tmp_path / "tokenizer"),
        "max_length": 600,
        "batch_size": 2,
        "add_bos_token": True,
    }
    found = simple_evaluate(
        model="local-completions",
        model_args=arguments,
        tasks=["say_how", "say_on"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    scores = [[choice[0] for choice in sample["filtered_resps"]] for sample in found["samples"]["say_how"]]
    expected = [[score(engine, text, choice) for choice in choices] for text, choices, _ in CHOICES]
    for got, wanted in zip(scores, expected, strict=True):
        assert [float(value) for value in got] == pytest.approx(wanted, abs=1e-3)
    right = [wanted.index(max(wanted)) == answer for wanted, (*_, answer) in zip(expected, CHOICES, strict=True)]
    assert found["results"]["say_how"]["acc,none"] == pytest.approx(sum(right) / len(right))
    written = {sample["doc"]["text"]: sample["filtered_resps"][0] for sample in found["samples"]["say_on"]}
    for text, *_ in CHOICES:
        told = live.complete(text, max_tokens=8, temperature=0, stop=["."]).json()["choices"][0]["text"]
        assert written[text] == told


@torch.no_grad()
def score(engine: Engine, text: str, choice: str) -> float:
    """The log-probability of `choice` behind `text`, by the model alone."""
    tokens = engine.tokenizer(text + choice)["input_ids"]
    behind = len(tokens) - len(engine.tokenizer(text)["input_ids"])
    ids = torch.tensor([tokens])
    logprobs = engine.model.logits(engine.model(ids).hidden)[0, :-1].log_softmax(-1)
    return float(logprobs.gather(-1, ids[0, 1:, None])[-behind:].sum())
