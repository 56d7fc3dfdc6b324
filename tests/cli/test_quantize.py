"""`hymba quantize`, and the commands that take what it writes."""

import json
from pathlib import Path

import pytest
from checkpoint import STORY
from typer.testing import CliRunner

from hymba.cli import app
from hymba.inference import load_model
from hymba.model import cache_nbytes, scheme_of


def run(*arguments: object, stdin: str | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def fail(*arguments: object) -> str:
    """The line that a command fails with."""
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture(scope="module")
def quantised(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro checkpoint in 4 bits."""
    directory = tmp_path_factory.mktemp("quantised") / "four"
    code, out, err = run("quantize", checkpoint, "--weights", "int4", "--out", directory)
    assert (code, err) == (0, "")
    for words in ("in_proj", "embed_tokens", "MB in int4", "worst"):
        assert words in out
    return directory


def test_json_tells_the_error_of_every_weight(checkpoint: Path, tmp_path: Path) -> None:
    code, out, _ = run("quantize", checkpoint, "--weights", "int8", "--out", tmp_path / "eight", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["weight_bytes"] == (tmp_path / "eight" / "model.safetensors").stat().st_size
    assert len(told["errors"]) == 1 + 5 * 7
    assert {row["bits"] for row in told["errors"]} == {8}
    assert 0 < max(row["error"] for row in told["errors"]) < 0.01
    model, tokenizer = load_model(str(tmp_path / "eight"))
    assert scheme_of(model).bits == 8
    assert len(tokenizer) == model.config.vocab_size


def test_quantised_weights_are_told_as_they_are(checkpoint: Path, quantised: Path) -> None:
    plain, told = (json.loads(run("info", directory, "--json")[1]) for directory in (checkpoint, quantised))
    assert (plain["quantized_bits"], told["quantized_bits"]) == (None, 4)
    assert told["parameters"] == plain["parameters"]
    assert told["tensors"] == plain["tensors"] + 1 + 5 * 7
    assert told["weight_bytes"] < plain["weight_bytes"] / 2
    assert "quantised to 4 bits" in run("info", quantised)[1]


def test_info_tells_the_cache_in_8_bits(checkpoint: Path) -> None:
    config = load_model(str(checkpoint))[0].config
    rows = json.loads(run("info", checkpoint, "--json")[1])["cache"]
    assert [row["int8_bytes"] for row in rows] == [cache_nbytes(config, row["tokens"], bits=8) for row in rows]


def test_a_quantised_model_continues_a_text(checkpoint: Path, quantised: Path) -> None:
    options = ("--max-new-tokens", 12, "--seed", 3, "--cache", "int8", "The sea")
    stored = run("generate", "--model", quantised, *options)
    made = run("generate", "--model", checkpoint, "--quantize", "int4", *options)
    assert stored[0] == made[0] == 0
    assert stored[1] == made[1]
    assert len(stored[1]) > 10
    answer = run("chat", "--model", quantised, "--max-new-tokens", 6, "--cache", "int8", stdin="Why?\nWhy?\n")
    assert answer[0] == 0
    assert answer[1].strip()


def test_perplexity_hardly_changes(checkpoint: Path, quantised: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)

    def bits_per_byte(*options: object) -> float:
        code, out, _ = run("perplexity", tmp_path / "story.txt", "--context", 64, "--json", *options)
        assert code == 0
        return json.loads(out)["total"]["bits_per_byte"]

    plain = bits_per_byte("--model", checkpoint)
    assert bits_per_byte("--model", checkpoint, "--quantize", "int8") == pytest.approx(plain, rel=5e-3)
    assert bits_per_byte("--model", checkpoint, "--cache", "int8") == pytest.approx(plain, rel=5e-3)
    assert bits_per_byte("--model", quantised) == bits_per_byte("--model", checkpoint, "--quantize", "int4")


def test_converting_keeps_the_weights(quantised: Path, tmp_path: Path) -> None:
    code, out, _ = run("convert", quantised, "--out", tmp_path / "shards", "--max-shard-size", "20KB")
    assert (code, "files" in out) == (0, True)
    assert run("convert", tmp_path / "shards", "--out", tmp_path / "one")[0] == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (quantised / name).read_bytes()


def test_bad_input_is_one_line(checkpoint: Path, quantised: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "unknown weight format 'int3'" in fail("quantize", checkpoint, "--weights", "int3", *out)
    assert "quantised already" in fail("quantize", quantised, "--weights", "int4", *out)
    assert "quantised to 4 bits already" in fail("quantize", quantised, "--weights", "int8", *out)
    assert "already holds a model" in fail("quantize", checkpoint, "--weights", "int8", "--out", quantised)
    assert "unknown cache format 'int4'" in fail("generate", "--model", checkpoint, "--cache", "int4", "x")
    assert "unknown weight format 'fp8'" in fail("generate", "--model", checkpoint, "--quantize", "fp8", "x")
