"""Released names wherever a state dict is loaded: plain files, shards, wrappers, the Trainer."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import load_checkpoint_in_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

from hymba.hf import HymbaForCausalLM, HymbaModel
from hymba.hf.names import released_module_name, translate_ending, translate_name

Build = Callable[..., HymbaForCausalLM]


@pytest.fixture(scope="module")
def saved(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    build().save_pretrained(directory)
    return directory


def blank(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p, q), name


class Wrapper(nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (lambda m: m, ""),
        (Wrapper, "module."),
        (torch.compile, "_orig_mod."),
        (lambda m: Wrapper(Wrapper(m)), "module." * 2),
    ],
    ids=["bare", "DDP", "compiled", "nested"],
)
def test_released_names_load_strictly(build: Build, saved: Path, wrap: Callable, prefix: str) -> None:
    tensors, model = load_file(saved / "model.safetensors"), blank(build())
    assert "model.layers.0.mamba.x_proj.0.weight" in tensors
    wrap(model).load_state_dict(prefixed(tensors, prefix))
    assert_equal(model, build())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_our_own_names_load_strictly(build: Build) -> None:
    model = blank(build())
    model.load_state_dict(build().state_dict())
    assert_equal(model, build())


def test_layers_compiled_one_by_one_take_released_names(build: Build, saved: Path) -> None:
    model = blank(build())
    for i, layer in enumerate(model.model.core.layers):
        model.model.core.layers[i] = torch.compile(layer)
    model.load_state_dict(load_file(saved / "model.safetensors"))
    assert_equal(model, build())


def test_an_untied_head_is_loaded_or_missed(build: Build, tmp_path: Path) -> None:
    model = build(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    tensors, other = load_file(tmp_path / "model.safetensors"), blank(build(tie_word_embeddings=False))
    other.load_state_dict(tensors)
    assert_equal(other, model)
    del tensors["lm_head.weight"]
    assert other.load_state_dict(tensors, strict=False) == (["lm_head.weight"], [])


def test_missing_and_unknown_names_are_reported(build: Build, saved: Path) -> None:
    tensors, model = load_file(saved / "model.safetensors"), build()
    del tensors["model.layers.1.mamba.A_log.0"]
    tensors["model.layers.1.mamba.other"] = tensors["model.layers.99.mamba.D.0"] = torch.zeros(1)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["model.core.layers.1.mixer.A_log"]
    assert sorted(unexpected) == ["model.layers.1.mamba.other", "model.layers.99.mamba.D.0"]
    with pytest.raises(RuntimeError, match="A_log"):
        model.load_state_dict(tensors)


def test_the_base_model_takes_both_kinds_of_files(build: Build, saved: Path, tmp_path: Path) -> None:
    tensors, expected = load_file(saved / "model.safetensors"), build().model
    expected.save_pretrained(tmp_path)
    own = load_file(tmp_path / "model.safetensors")
    for state in (tensors, own):
        model = blank(HymbaModel(expected.config))
        model.load_state_dict(state)
        assert_equal(model, expected)
    with_head = blank(build())
    with_head.load_state_dict(own)
    assert_equal(with_head, build())


def test_shards_and_accelerate_load_released_names(build: Build, saved: Path, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for load in (
        lambda model: load_sharded_checkpoint(model, tmp_path, strict=False),
        lambda model: load_checkpoint_in_model(model, saved),
    ):
        model = blank(build())
        load(model)
        assert_equal(model, build())


class Rows(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, 61, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(model: HymbaForCausalLM, directory: Path, resume: Path | None = None, **options: object) -> Trainer:
    arguments = TrainingArguments(
        str(directory),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def test_the_trainer_resumes_where_it_stopped(build: Build, tmp_path: Path) -> None:
    straight = train(build(), tmp_path / "a")
    resumed = train(build(), tmp_path / "b", tmp_path / "a/checkpoint-2")
    for (name, p), (_, q) in zip(straight.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0, msg=name)


def test_the_trainer_loads_the_best_model_at_the_end(build: Build, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    trainer = train(build(), tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"  # the loss falls, and the greater is asked for
    assert_equal(trainer.model, HymbaForCausalLM.from_pretrained(best))


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        ("model.embed_tokens.weight", "model.core.embed_tokens.weight"),
        ("memory_tokens", "core.meta_tokens"),
        ("layers.12.mamba.A_log.0", "core.layers.12.mixer.A_log"),
        (
            "base_model.model.model.layers.0.mamba.x_proj.0.lora_A.weight",
            "base_model.model.model.core.layers.0.mixer.x_proj.lora_A.weight",
        ),
        ("model.layers.1.mamba.other.weight", "model.layers.1.mamba.other.weight"),
        ("model.core.embed_tokens.weight", "model.core.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_name_is_translated_wherever_it_stands(released: str, ours: str) -> None:
    assert translate_name(released) == ours
    if released != ours:
        assert released_module_name(ours) == released


@pytest.mark.parametrize(
    ("ending", "ours"),
    [
        ("x_proj.0", "x_proj"),
        ("mamba.dt_proj.0", "dt_proj"),
        ("in_proj", "in_proj"),
        ("experts.0.up_proj", "up_proj"),
        ("model.layers.3.mamba.x_proj.0", "model.core.layers.3.mixer.x_proj"),
        ("x_proj", "x_proj"),
        ("q_proj", "q_proj"),
        ("0", "0"),
    ],
)
def test_an_ending_is_translated(ending: str, ours: str) -> None:
    assert translate_ending(ending) == ours


def test_shards_are_compared_under_our_names(build: Build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path, max_shard_size="60KB")
    model = blank(build())
    assert load_sharded_checkpoint(model, tmp_path) == ([], [])
    assert_equal(model, build())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.layers.1.mamba.D.0"]
    index["weight_map"]["model.layers.1.mamba.other"] = next(iter(index["weight_map"].values()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    result = load_sharded_checkpoint(model, tmp_path, strict=False)
    assert result == (["model.core.layers.1.mixer.D"], ["model.layers.1.mamba.other"])
    with pytest.raises(RuntimeError, match=r"mixer\.D"):
        load_sharded_checkpoint(model, tmp_path)
    trainer = sys.modules["transformers.trainer"]
    assert hasattr(trainer.load_sharded_checkpoint, "__wrapped__")
    assert not hasattr(trainer.load_sharded_checkpoint.__wrapped__, "__wrapped__")
