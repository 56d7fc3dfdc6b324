"""Weights offloaded to CPU memory or disk by accelerate: the same outputs as with all weights loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file
from torch import Tensor

from hymba.errors import HymbaError
from hymba.hf import HymbaForCausalLM

CPU = torch.device("cpu")
SPLIT = {
    "model.core.embed_tokens": "cpu",
    "model.core.meta_tokens": "disk",  # a parameter by itself
    "model.core.final_norm": "disk",
    "lm_head": "cpu",
    **{f"model.core.layers.{i}": "disk" if i % 2 else "cpu" for i in range(5)},
}
BY_DEVICE_MAP = {
    "all on disk": {"device_map": {"": "disk"}},
    "cpu and disk": {"device_map": SPLIT},
    "auto": {"device_map": "auto", "max_memory": {"cpu": "60KB"}},
    "sequential": {"device_map": "sequential", "max_memory": {"cpu": 60_000}},
}
BY_ACCELERATE = {
    "cpu_offload": lambda model, _: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "dispatch_model": lambda model, folder: dispatch_model(model, SPLIT, main_device="cpu", offload_dir=folder),
    "one block a layer": lambda model, _: cpu_offload(model, CPU, preload_module_classes=["HymbaDecoderLayer"]),
}


def inputs() -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(model: HymbaForCausalLM, plain: HymbaForCausalLM) -> None:
    """Forward passes, losses and generation agree, and weights are freed afterwards."""
    with torch.no_grad():
        model(**inputs())  # loads what a device map names by itself
    offloaded = names_offloaded(model)
    assert offloaded
    labels = inputs()["input_ids"]
    with torch.no_grad():
        for options in ({}, {"labels": labels}, {"labels": labels, "skip_logits": True}, {"use_cache": False}):
            ours, theirs = (m(**inputs(), **options) for m in (model, plain))
            for name in ("loss", "logits"):
                torch.testing.assert_close(ours.get(name), theirs.get(name))
        seen, wanted = (m(**inputs(), output_attentions=True, output_hidden_states=True) for m in (model, plain))
    torch.testing.assert_close(seen.attentions, wanted.attentions)
    torch.testing.assert_close(seen.hidden_states, wanted.hidden_states)
    generate = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for strategy in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        ours, theirs = (m.generate(**inputs(), **generate, **strategy) for m in (model, plain))
        assert torch.equal(ours, theirs), strategy
    assert names_offloaded(model) == offloaded


def names_offloaded(model: HymbaForCausalLM) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}


@pytest.mark.parametrize("how", BY_DEVICE_MAP)
def test_device_maps(model: HymbaForCausalLM, tmp_path: Path, how: str) -> None:
    model.save_pretrained(tmp_path / "model")
    options = BY_DEVICE_MAP[how] | {"offload_folder": tmp_path / "offload"}
    loaded = HymbaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", **options)
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert before.keys() == after.keys() - {"lm_head.weight"}  # on disk, tied weights are two
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("how", BY_ACCELERATE)
@pytest.mark.parametrize("changes", [{}, {"num_memory_tokens": 0, "tie_word_embeddings": False}], ids=str)
def test_models_offloaded_by_accelerate(
    build: Callable[..., HymbaForCausalLM], tmp_path: Path, how: str, changes: dict[str, object]
) -> None:
    offloaded = BY_ACCELERATE[how](build(**changes).eval(), tmp_path)
    assert_same(offloaded, build(**changes).eval())


def test_a_layer_split_between_memory_and_disk(build: Callable[..., HymbaForCausalLM], tmp_path: Path) -> None:
    mixer, whole = "model.core.layers.1.mixer.", {"model.core.layers.1", "model.core.meta_tokens"}
    parts = {name: place for name, place in SPLIT.items() if name not in whole} | {
        "model.core.meta_tokens": "cpu",
        "model.core.layers.1.mlp": "disk",
        **{f"model.core.layers.1.{name}_norm": "cpu" for name in ("input", "mlp")},
        **{mixer + name: "disk" for name in ("A_log", "dt_norm", "dt_proj", "in_proj", "ssm_norm", "x_proj")},
        **{mixer + name: "cpu" for name in ("D", "B_norm", "C_norm", "attention_norm", "conv", "out_proj")},
    }
    assert_same(dispatch_model(build().eval(), parts, main_device="cpu", offload_dir=tmp_path), build().eval())


def test_several_devices_are_refused(build: Callable[..., HymbaForCausalLM]) -> None:
    model = cpu_offload(build().eval(), execution_device=CPU)
    layer = model.model.core.layers[3]
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cuda:1", offload=True, weights_map={}))
    with pytest.raises(HymbaError, match="device_map runs the model on cpu and cuda:1"), torch.no_grad():
        model(**inputs())
