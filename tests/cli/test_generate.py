"""`hymba generate`: streams, repeats itself by seed, and tells what is wrong in one line."""

import json
import shutil
from pathlib import Path

import pytest
from checkpoint import write_checkpoint
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hymba.cli import app
from hymba.inference import load_model


def run(*arguments: str, stdin: str | bytes | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(app, arguments, input=stdin)
    return result.exit_code, result.stdout, result.stderr


def generate(checkpoint: Path, *arguments: str, stdin: str | bytes | None = None) -> tuple[int, str, str]:
    return run("generate", "--model", str(checkpoint), "--max-new-tokens", "12", *arguments, stdin=stdin)


def test_a_seed_repeats_the_text(checkpoint: Path) -> None:
    first, second, other = (generate(checkpoint, "--seed", seed, "The sea") for seed in ("5", "5", "6"))
    assert first == second != other
    assert first[0] == 0
    assert first[1].strip()


def test_json_tells_text_and_counts(checkpoint: Path) -> None:
    code, out, _ = generate(checkpoint, "--seed", "5", "--json", "The sea")
    told = json.loads(out)
    assert code == 0
    assert told["text"] + "\n" == generate(checkpoint, "--seed", "5", "The sea")[1]
    tokenizer = load_model(str(checkpoint))[1]
    assert told["prompt_tokens"] == len(tokenizer("The sea")["input_ids"])
    assert (told["prompt"], told["new_tokens"], told["finish_reason"]) == ("The sea", 12, "length")
    assert told["tokens_per_second"] > 0


def test_stdin_is_the_prompt(checkpoint: Path) -> None:
    piped = generate(checkpoint, "--seed", "5", stdin="The sea\n")
    assert piped == generate(checkpoint, "--seed", "5", "The sea")


@pytest.mark.parametrize(
    ("arguments", "stdin", "problem"),
    [
        (["--dtype", "int3", "x"], None, "unknown dtype 'int3': use one of float32, bfloat16, float16"),
        (["--device", "tpu9", "x"], None, "no device 'tpu9' here"),
        ([""], None, "the prompt is empty"),
        ([], "", "the prompt is empty"),
        ([], b"\xff", "the text piped in is not UTF-8"),
        (["--max-prompt-tokens", "5", "The keeper of the lighthouse"], None, "tokens and the limit is 5"),
        (["sea " * 2100], None, "tokens and the limit is 2048"),
        (["--temperature", "-1", "x"], None, "temperature must be 0 or more"),
    ],
)
def test_bad_input_is_one_line(checkpoint: Path, arguments: list[str], stdin: str | bytes | None, problem: str) -> None:
    code, out, err = generate(checkpoint, *arguments, stdin=stdin)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert problem in err
    assert err.count("\n") == 1


def damage_nothing_left(directory: Path) -> None:
    shutil.rmtree(directory)


def damage_truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_tensor_gone(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.memory_tokens"]
    save_file(tensors, directory / "model.safetensors")


def damage_other_shapes(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 41}))


def damage_no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (damage_nothing_left, "no such directory"),
        (damage_truncated, "model.safetensors is truncated or corrupt"),
        (damage_tensor_gone, "lacks the tensor 'model.memory_tokens'"),
        (damage_other_shapes, "but the config says (24, 41)"),
        (damage_no_tokenizer, "neither tokenizer.json nor tokenizer.model"),
    ],
)
def test_a_damaged_model_is_one_line(tmp_path: Path, damage: object, problem: str) -> None:
    directory = write_checkpoint(tmp_path / "model")
    damage(directory)
    code, out, err = generate(directory, "The sea")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert problem in err
    assert err.count("\n") == 1
