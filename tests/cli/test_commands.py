"""Every other command, and what is common to all."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from checkpoint import STORY
from typer.testing import CliRunner

import hymba
from hymba.cli import app
from hymba.inference import load_model
from hymba.model import cache_nbytes, load
from hymba.ops import native

PROGRAM = "from hymba.cli import main; main()"


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


def test_help_names_every_command_and_is_light() -> None:
    program = f"import sys; sys.argv[1:] = ['--help']\ntry:\n  {PROGRAM}\nfinally:\n  assert 'torch' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for command in ("generate", "chat", "perplexity", "info", "pretrain", "init", "convert", "quantize"):
        assert f" {command} " in finished.stdout


def test_no_command_has_more_than_twelve_options() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        assert len(command.params) <= 13, name  # --help and one argument aside
        assert command.help, name


def test_version() -> None:
    assert run("--version") == (0, f"hymba {hymba.__version__}\n", "")


def test_chat_answers_line_by_line(checkpoint: Path) -> None:
    options = ("--model", checkpoint, "--max-new-tokens", 6, "--seed", 3, "--system", "Be brief.")
    code, out, err = run("chat", *options, stdin="Who is there?\n\nWhy?\n/reset\nWho is there?\n/exit\nnot read\n")
    answers = out.split("\n")
    assert code == 0
    assert "/reset starts anew" in err
    assert "a new conversation" in err
    assert out.count("\n") >= 3
    first = run("chat", *options, stdin="Who is there?\n")[1]
    assert out.startswith(first)
    assert out.endswith(first)
    assert len(answers) > 3


def test_chat_goes_on_after_a_question_too_long(checkpoint: Path) -> None:
    questions = f"{'why ' * 2100}\nWho is there?\n"
    code, out, err = run("chat", "--model", checkpoint, "--max-new-tokens", 3, stdin=questions)
    assert code == 0
    assert "the limit is 2048" in err
    assert out.strip()


def test_chat_stops_an_answer_and_goes_on(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*_: object) -> Iterator[str]:
        yield "begun"
        signal.raise_signal(signal.SIGINT)
        yield " and broken off"
        yield " and never finished"

    monkeypatch.setattr("hymba.inference.Conversation.ask", answer)
    before = signal.getsignal(signal.SIGINT)
    code, out, _ = run("chat", "--model", checkpoint, stdin="One?\nTwo?\n")
    assert (code, out) == (0, "begun and broken off …\n" * 2)
    assert signal.getsignal(signal.SIGINT) is before


def test_perplexity_of_files_and_of_all(checkpoint: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, text in zip(files, (STORY, "Nobody.\r\n"), strict=True):
        file.write_bytes(text.encode())
    code, out, _ = run("perplexity", *files, "--model", checkpoint, "--context", 64, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["context"], told["stride"], told["dtype"]) == (64, 32, "float32")
    assert [row["bytes"] for row in told["files"]] == [file.stat().st_size for file in files]
    assert told["total"]["tokens"] == sum(row["tokens"] for row in told["files"])
    table = run("perplexity", *files, "--model", checkpoint, "--context", 64)[1]
    assert f"{told['total']['bits_per_byte']:.4f}" in table
    assert "context 64, stride 32: each token scored once" in table


def test_perplexity_tells_what_is_wrong(checkpoint: Path, tmp_path: Path) -> None:
    assert "cannot read" in fail("perplexity", tmp_path / "missing.txt", "--model", checkpoint)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert "not UTF-8 text" in fail("perplexity", tmp_path / "picture.png", "--model", checkpoint)
    (tmp_path / "a.txt").write_text("a")
    assert "stride must be" in fail("perplexity", tmp_path / "a.txt", "--model", checkpoint, "--stride", 0)


def test_info_of_a_config_alone(tmp_path: Path) -> None:
    config = hymba.HymbaConfig.named("1.5b")
    (tmp_path / "config.json").write_text(json.dumps(config.to_released()))
    code, out, _ = run("info", tmp_path, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["parameters"], told["tensors"], told["weight_files"]) == (1_522_797_824, 611, 0)
    at_8k = next(row for row in told["cache"] if row["tokens"] == 8000)
    assert round(at_8k["paper_bytes"] / 1e6, 1) == 78.6
    assert at_8k["held_bytes"] == cache_nbytes(config, 8000)
    text = run("info", tmp_path)[1]
    for words in ("1,522,797,824 parameters", "78.6 MB", "none, only the config", "selective_scan"):
        assert words in text


def test_info_tells_which_implementation_and_why(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = json.loads(run("info", checkpoint, "--device", "cpu", "--json")[1])["ops"]
    assert {op["op"]: op["in_use"] for op in ops}["attention"] == ("native" if native.library() else "cpu")
    monkeypatch.setenv("HYMBA_BACKEND", "reference")
    for op in json.loads(run("info", checkpoint, "--json")[1])["ops"]:
        assert (op["in_use"], op["why"]) == ("reference", "HYMBA_BACKEND asks for it")
    monkeypatch.setenv("HYMBA_BACKEND", "abacus")
    assert "unknown backend 'abacus'" in fail("info", checkpoint)


def test_init_is_decided_by_its_seed(checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, out, _ = run("init", checkpoint, "--out", tmp_path / name, "--seed", seed)
        assert (code, "random parameters in bfloat16" in out) == (0, True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    model, tokenizer = load_model(str(tmp_path / "a"))
    assert (str(model.meta_tokens.dtype), len(tokenizer)) == ("torch.bfloat16", model.config.vocab_size)
    assert "already holds a model" in fail("init", checkpoint, "--out", tmp_path / "a")
    assert "no config.json" in fail("init", tmp_path, "--out", tmp_path / "d")


def test_convert_and_back(checkpoint: Path, tmp_path: Path) -> None:
    double = ("convert", checkpoint, "--out", tmp_path / "shards", "--max-shard-size", "20KB")
    assert "files" in run(*double)[1]
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert run("convert", tmp_path / "shards", "--out", tmp_path / "one")[0] == 0
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert run("convert", checkpoint, "--out", tmp_path / "half", "--dtype", "float16")[0] == 0
    assert str(load(tmp_path / "half").meta_tokens.dtype) == "torch.float16"
    assert "already holds a model" in fail("convert", checkpoint, "--out", checkpoint)
    assert "is no size" in fail("convert", checkpoint, "--out", tmp_path / "x", "--max-shard-size", "much")


def test_pretrain_passes_recipe_and_data_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("hymba.training.pretrain", lambda *arguments: seen.append(arguments))
    (tmp_path / "recipe.yaml").write_text("peak_lr: 1e-3\nsteps: 5\n")
    command = ("pretrain", tmp_path / "recipe.yaml", "--data", "a", "--data", "b", "--out", tmp_path / "run")
    assert run(*command, "--set", "steps=7")[0] == 0
    [(recipe, data, out)] = seen
    assert (recipe.peak_lr, recipe.steps, data, out) == (1e-3, 7, [Path("a"), Path("b")], tmp_path / "run")


def test_pretrain_tells_what_is_wrong(tmp_path: Path) -> None:
    recipe, data = tmp_path / "recipe.yaml", tmp_path / "data.txt"
    rest = ("--data", data, "--out", tmp_path / "run")
    assert "cannot read recipe" in fail("pretrain", recipe, *rest)
    recipe.write_text("peak_lr: 1e-3\nstesp: 5\n")
    assert "did you mean 'steps'" in fail("pretrain", recipe, *rest)
    recipe.write_text("peak_lr: 1e-3\nsteps: 5\n")
    assert "no data at" in fail("pretrain", recipe, *rest)


def test_interruption_leaves_with_130(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hymba.inference.load_model", interrupt)
    code, _, err = run("generate", "--model", checkpoint, "x")
    assert (code, err) == (130, "\n")


def test_a_full_disk_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise OSError(28, "No space left on device", "weights")

    monkeypatch.setattr("hymba.inference.load_model", fill)
    assert fail("generate", "--model", checkpoint, "x") == "error: weights: No space left on device\n"


@pytest.mark.slow
def test_a_closed_pipe_ends_quietly(checkpoint: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "generate", "--model", str(checkpoint), "The sea"]
    reading, writing = os.pipe()
    os.close(reading)
    finished = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (finished.returncode, finished.stderr) == (1, "")
