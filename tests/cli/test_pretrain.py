"""`hymba pretrain`, from a recipe to a model that `hymba generate` takes."""

import json

import pytest
from checkpoint import STORY
from typer.testing import CliRunner

from hymba.cli import app

RECIPE = """\
model: {size: tiny, hidden_size: 16, num_hidden_layers: 3, num_attention_heads: 2, head_dim: 8, v_head_dim: 16,
        intermediate_size: 32, d_inner: 32, d_state: 4, dt_rank: 2, num_meta_tokens: 2, sliding_window: 8,
        global_layers: [0], kv_groups: [[1, 2]]}
tokenizer: 290
seq_length: 32
batch_rows: 2
steps: 3
peak_lr: 1e-3
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "micro.yaml").write_text(RECIPE)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(STORY)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, arguments)


def test_from_recipe_to_text(workplace):
    result = run("pretrain", "micro.yaml", "--data", "a.txt", "b.txt")
    assert result.exit_code == 0, result.output
    report = json.loads((workplace / "runs" / "micro" / "report.json").read_text())
    assert report["steps"] == 3
    assert report["train_bytes"] == 2 * len(STORY.encode())
    told = run("generate", "The keeper", "--model", "runs/micro/model", "--max-new-tokens", "4", "--json")
    assert json.loads(told.stdout)["new_tokens"] <= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.yaml", "--data", "a.txt"), "cannot read recipe nowhere.yaml"),
        (("micro.yaml", "--data", "missing.txt"), "no data at missing.txt"),
        (("micro.yaml",), "no data: give"),
        (("micro.yaml", "--data", "a.txt", "--set", "stepz=3"), "unknown key 'stepz'"),
    ],
)
def test_bad_input_is_one_line(workplace, arguments, message):
    result = run("pretrain", *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_unreadable_data_is_one_line(workplace):
    (workplace / "a.txt").write_bytes(b"\xff\xfe\x00binary")
    result = run("pretrain", "micro.yaml", "--data", "a.txt")
    assert result.exit_code == 1
    assert "a.txt is not UTF-8 text" in result.stderr
