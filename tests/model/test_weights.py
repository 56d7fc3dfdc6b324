"""Checkpoints in the released layout, and what happens to broken ones."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from micro import micro_model
from safetensors.torch import load_file, save_file

from hymba.errors import HymbaError
from hymba.model import RELEASED_NAMES, HymbaConfig, load, save, skeleton


@pytest.fixture
def checkpoint(tmp_path):
    save(micro_model(dtype=torch.bfloat16), tmp_path)
    return tmp_path


def rewrite(checkpoint, change):
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def test_the_table_of_names_is_a_bijection():
    assert len(set(RELEASED_NAMES.values())) == len(RELEASED_NAMES)


def test_loading_and_saving_keeps_every_byte(tiny_a, tmp_path):
    save(load(tiny_a), tmp_path)
    before, after = load_file(tiny_a / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("tied", [True, False])
def test_shards_equal_one_file(tmp_path, tied):
    model = micro_model(tie_word_embeddings=tied)
    save(model, tmp_path / "one")
    save(model, tmp_path / "many", max_shard_size="20KB")
    assert not (tmp_path / "many" / "model.safetensors").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one, many = load(tmp_path / "one").state_dict(), load(tmp_path / "many").state_dict()
    assert one.keys() == many.keys() == model.state_dict().keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_the_released_model_has_611_tensors_and_its_parameters():
    parameters = dict(skeleton(HymbaConfig.named("1.5b")).named_parameters())
    assert len(parameters) == 611
    assert sum(p.numel() for p in parameters.values()) == 1_522_797_824


def test_dtype_on_load(checkpoint):
    assert load(checkpoint).meta_tokens.dtype == torch.bfloat16
    assert load(checkpoint, dtype=torch.float64).layers[0].mixer.A_log.dtype == torch.float64


def test_missing_tensor(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.mamba.D.0"))
    with pytest.raises(HymbaError, match=r"lacks the tensor 'model\.layers\.1\.mamba\.D\.0'"):
        load(checkpoint)


def test_unknown_tensor(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.layers.9.extra": torch.zeros(1)}))
    with pytest.raises(HymbaError, match=r"model\.layers\.9\.extra"):
        load(checkpoint)


def test_wrong_shape(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({"model.memory_tokens": torch.zeros(4, 24)}))
    with pytest.raises(HymbaError, match=r"model\.memory_tokens has shape \(4, 24\), but the config says \(3, 24\)"):
        load(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 1000, -10])
def test_truncated_file(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(HymbaError, match="truncated or corrupt"):
        load(checkpoint)


def test_missing_files(tmp_path, checkpoint):
    with pytest.raises(HymbaError, match=r"no config\.json"):
        load(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(HymbaError, match="safetensors only"):
        load(checkpoint)


def test_missing_shard_and_corrupt_index(tmp_path):
    save(micro_model(), tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(HymbaError, match="lacks the shard"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(HymbaError, match=r"index\.json is corrupt"):
        load(tmp_path)


def test_saving_over_a_file_in_the_way(tmp_path):
    (tmp_path / "taken").write_text("not a directory")
    with pytest.raises(HymbaError, match="cannot write the model"):
        save(micro_model(), tmp_path / "taken")


def test_a_failed_save_leaves_the_old_weights(checkpoint, monkeypatch):
    before = (checkpoint / "model.safetensors").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hymba.model.weights.save_file", full)
    with pytest.raises(HymbaError, match="No space left"):
        save(micro_model(1), checkpoint)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in checkpoint.iterdir()) == ["config.json", "model.safetensors"]


def test_saved_weights_are_as_readable_as_their_config(checkpoint):
    modes = {path.name: path.stat().st_mode & 0o777 for path in checkpoint.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_loading_holds_one_copy(tmp_path):
    save(micro_model(vocab_size=200_000), tmp_path)

    def mapped() -> int:
        """Bytes of files in memory that this process has mapped, as Linux tells."""
        if sys.platform != "linux":
            return 0
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    before = mapped()
    model = load(tmp_path)
    assert model.embed_tokens.weight.nbytes > 8e6
    assert mapped() - before < model.embed_tokens.weight.nbytes / 4
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())


def test_more_weights_than_memory_is_one_line(checkpoint, monkeypatch):
    monkeypatch.setattr("hymba.model.weights._nbytes", lambda *_: 2**60)
    with pytest.raises(HymbaError, match="GB of memory"):
        load(checkpoint)
