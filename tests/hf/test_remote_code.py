"""Saved models that load with trust_remote_code=True in programs that know nothing of hymba."""

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import hymba
from hymba.cli import app
from hymba.hf import HymbaConfig, HymbaForCausalLM, HymbaModel
from hymba.model import load, quantize, save

TINY = Path(hymba.__file__).parent / "assets/tiny"
FILES = ("configuration_hymba.py", "modeling_hymba.py")
TASK = """\
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


def convert(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, arguments), "--remote-code"])
    return result.stderr if result.exit_code else ""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with the files that import hymba."""
    out = tmp_path_factory.mktemp("remote") / "tiny"
    assert convert("tiny", "--out", out) == ""
    return out


def environment(tmp_path: Path) -> dict[str, str]:
    """No network, caches of its own, and hymba importable but not imported."""
    caches = {"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    return os.environ | caches | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(hymba.__file__).parents[1])}


def test_convert_adds_two_imports_and_their_names(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("auto_map")["AutoModelForCausalLM"] == "modeling_hymba.HymbaForCausalLM"
    assert config == json.loads((TINY / "config.json").read_text())
    assert runpy.run_path(str(directory / FILES[0]))["HymbaConfig"] is HymbaConfig
    models = runpy.run_path(str(directory / FILES[1]))
    assert models["HymbaForCausalLM"] is HymbaForCausalLM
    assert models["HymbaModel"] is HymbaModel


@pytest.mark.parametrize("name", FILES)
def test_without_hymba_the_error_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delitem(sys.modules, "hymba.hf")
    monkeypatch.setitem(sys.modules, "hymba", None)
    with pytest.raises(ImportError, match=r"^this model needs the package hymba: pip install hymba$"):
        runpy.run_path(str(directory / name))


def test_what_convert_refuses(directory: Path, tmp_path: Path) -> None:
    save(quantize(load(TINY), 8), tmp_path / "int8")
    assert "no quantized checkpoint" in convert(tmp_path / "int8", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / FILES[1]).write_text("print()")
    assert "with other code" in convert("tiny", "--out", tmp_path / "b")
    assert (tmp_path / "b" / FILES[1]).read_text() == "print()"


@pytest.mark.parametrize("trust", [None, False, True])
def test_code_beside_a_released_model_is_not_run(tmp_path: Path, trust: bool | None) -> None:
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    released = {
        "AutoConfig": "configuration_hymba.HymbaConfig",
        "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
    }
    config = json.loads((TINY / "config.json").read_text()) | {"auto_map": released}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in FILES:
        (tmp_path / name).write_text("raise SystemExit('remote code ran')")
    assert type(AutoConfig.from_pretrained(tmp_path, trust_remote_code=trust)) is HymbaConfig
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(model) is HymbaForCausalLM
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == released
    assert all("remote code ran" in (tmp_path / name).read_text() for name in FILES)


def test_saving_again_keeps_the_files_and_copies_no_sources(directory: Path, tmp_path: Path) -> None:
    HymbaForCausalLM.from_pretrained(TINY).save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    model = AutoModelForCausalLM.from_pretrained(directory)
    HymbaConfig.register_for_auto_class()
    HymbaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_text() == (directory / name).read_text()


@pytest.mark.slow
def test_lm_eval_loads_it(directory: Path, tmp_path: Path) -> None:
    rows = [("It was a cold winter", [" morning", " purple"], 0), ("She looked at him and", [" of", " said"], 1)]
    lines = [json.dumps({"text": text, "choices": choices, "answer": answer}) for text, choices, answer in rows]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "say_how", "--include_path", str(tmp_path)]
    command += ["--model_args", f"pretrained={directory},trust_remote_code=True,dtype=float32", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--batch_size", "2"]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [results] = (tmp_path / "out").rglob("results*.json")
    assert json.loads(results.read_text())["results"]["say_how"]["acc,none"] == 1.0


@contextmanager
def served(tmp_path: Path, *options: str) -> Iterator[str]:
    """Run `transformers serve`, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "import sys; sys.argv[0] = 'transformers'; from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, *options], env=environment(tmp_path), stdout=log, stderr=log)
    try:
        while server.poll() is None:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--continuous-batching",)])
def test_transformers_serve_answers_from_it(directory: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    request = {"model": str(directory), "messages": [{"role": "user", "content": "Who is there?"}]}
    request |= {"max_tokens": 6, "temperature": 0.0, "stream": False}
    with served(tmp_path, "--trust-remote-code", *options) as address:
        response = httpx.post(f"{address}/v1/chat/completions", json=request, timeout=300)
    assert response.status_code == 200, (tmp_path / "log").read_text()
    answer = response.json()
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.slow
def test_auto_classes_load_it_in_a_fresh_process(directory: Path, tmp_path: Path) -> None:
    program = f"""
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained({str(directory)!r}, trust_remote_code=True)
bare = AutoModel.from_pretrained({str(directory)!r}, trust_remote_code=True)
ids = tokenizer("The sea", return_tensors="pt").input_ids
print(type(bare).__module__, model(ids).logits.sum().item())
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module, total = done.stdout.split()
    assert module == HymbaModel.__module__
    model = HymbaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(TINY)("The sea", return_tensors="pt").input_ids
    with torch.no_grad():
        assert float(total) == pytest.approx(model(ids).logits.sum().item(), rel=1e-4)
