"""Where models come from and how they are written: one clear line for whatever is wrong."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

from hymba.errors import HymbaError
from hymba.inference import find_model, load_model, parse_device, parse_dtype, write_model


def test_a_directory_and_the_bundled_model_are_found(checkpoint: Path) -> None:
    assert find_model(str(checkpoint)) == checkpoint
    assert find_model("tiny").parts[-3:] == ("hymba", "assets", "tiny")


def test_loading_sets_dtype_and_freezes(checkpoint: Path) -> None:
    model, tokenizer = load_model(str(checkpoint), "bfloat16", "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such/model"])
def test_a_missing_directory_is_told(name: str) -> None:
    with pytest.raises(HymbaError, match=f"no such directory: {name}"):
        find_model(name)


def test_a_misspelt_directory_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HymbaError, match="no such directory: runs/tiney"):
        find_model("runs/tiney")


def test_a_file_is_no_model(checkpoint: Path) -> None:
    with pytest.raises(HymbaError, match="is a file: give the directory"):
        find_model(str(checkpoint / "config.json"))


def test_a_hub_id_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("owner/name") == find_model("owner/name", weights=False) == tmp_path
    assert asked == [("owner/name", True), ("owner/name", False)]


def test_a_hub_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(HymbaError, match=r"owner/name .* the hub does not give it \(no route\): check"):
        find_model("owner/name")


def test_unknown_dtypes_and_devices_are_told() -> None:
    assert parse_dtype(None) is None
    with pytest.raises(HymbaError, match="unknown dtype 'int3': use one of float32, bfloat16, float16"):
        parse_dtype("int3")
    for name in ("tpu9", "cuda:99"):
        with pytest.raises(HymbaError, match=f"no device '{name}' here"):
            parse_device(name)


def test_writing_keeps_the_config_and_the_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"of_another_age": [1, 2]}
    (source / "config.json").write_text(json.dumps(config))
    model, tokenizer = load_model(str(source), "bfloat16")
    write_model(model, source, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == config | {"torch_dtype": "bfloat16"}
    again, same = load_model(str(tmp_path / "out"))
    assert all(a.equal(b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert same.get_vocab() == tokenizer.get_vocab()


def test_writing_refuses_what_it_cannot_do(checkpoint: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(checkpoint))
    with pytest.raises(HymbaError, match="already holds a model"):
        write_model(model, checkpoint, checkpoint)
    with pytest.raises(HymbaError, match="'much' is no size"):
        write_model(model, checkpoint, tmp_path / "out", max_shard_size="much")
    (tmp_path / "taken").write_text("")
    with pytest.raises(HymbaError, match="cannot write the model to"):
        write_model(model, checkpoint, tmp_path / "taken")
