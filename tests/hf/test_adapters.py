"""PEFT's adapters: merged they compute the same, and both kinds of names load."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hymba.hf import HymbaForCausalLM
from hymba.hf.imports import after_import
from hymba.hf.integrations import undecayed_names
from hymba.hf.names import released_module_name
from hymba.model.projection import StepProjection, project_step
from hymba.training.optimizer import build_optimizer
from hymba.training.recipe import Recipe

Build = Callable[..., HymbaForCausalLM]
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
PROJECTIONS = ["in_proj", "out_proj", "x_proj", "dt_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`", "ignore:Model has `tie_word")


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits.detach()


def adapt(model: nn.Module, config: peft.PeftConfig, seed: int = 0) -> PeftModel:
    """Add an adapter that has been trained, to all appearances."""
    adapted = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in ("lora_B", "magnitude", "ia3", "modules_to_save")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


KINDS = {
    "LoRA": LoraConfig(r=4),
    "DoRA": LoraConfig(r=4, use_dora=True),
    "rsLoRA": LoraConfig(r=4, use_rslora=True, bias="all"),
    "LoRA with bias": LoraConfig(r=4, lora_bias=True, bias="lora_only"),
}


@pytest.mark.parametrize("target", ["dt_proj", "x_proj", "in_proj"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_computes_the_same(build: Build, kind: str, target: str) -> None:
    config = LoraConfig(**{**KINDS[kind].to_dict(), "target_modules": [target]})
    if config.lora_bias and target != "dt_proj":
        pytest.skip("PEFT merges the bias into the layer's, and there is none")
    before = logits(build().eval())
    adapted = adapt(build(), config)
    with_adapter = logits(adapted)
    assert (with_adapter - before).abs().max() > 1e-3
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), with_adapter, atol=1e-4, rtol=1e-4)
    adapted.unmerge_adapter()
    torch.testing.assert_close(logits(adapted), with_adapter, atol=1e-4, rtol=1e-4)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), with_adapter, atol=1e-4, rtol=1e-4)


def test_ia3_scales_the_bias_too(build: Build) -> None:
    config = IA3Config(target_modules=["dt_proj"], feedforward_modules=[])
    adapted = adapt(build(), config)
    with_adapter = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), with_adapter, atol=1e-4, rtol=1e-4)


def test_two_adapters_and_a_saved_module(build: Build) -> None:
    adapted = adapt(build(), LoraConfig(r=2, target_modules=["dt_proj"], use_dora=True))
    adapted.add_adapter("second", LoraConfig(r=3, target_modules=["dt_proj"]))
    adapted.base_model.set_adapter(["default", "second"])
    with_adapters = logits(adapted)
    torch.testing.assert_close(
        logits(adapted.merge_and_unload(adapter_names=["default", "second"])), with_adapters, atol=1e-4, rtol=1e-4
    )
    saved = adapt(build(), LoraConfig(r=2, target_modules=["x_proj"], modules_to_save=["dt_proj"]))
    torch.testing.assert_close(logits(saved), logits(saved.merge_and_unload()), atol=1e-4, rtol=1e-4)


def test_the_bias_of_step_sizes_is_added_in_float32() -> None:
    torch.manual_seed(0)
    projection, x = StepProjection(4, 8).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    steps, bias = project_step(projection, x)
    assert steps.dtype == torch.bfloat16
    assert bias is projection.bias  # the scan adds it in float32
    whole = projection(x)
    torch.testing.assert_close(whole, steps.float() + bias.float(), atol=0, rtol=0)
    adapted = get_peft_model(nn.Sequential(projection), LoraConfig(target_modules=["0"])).base_model.model[0]
    steps, bias = project_step(adapted, x)
    torch.testing.assert_close(steps, whole, atol=0, rtol=0)
    assert not bias.any()


def released(name: str) -> str:
    return re.sub(r"^(.*?)(\.lora_.*|\.weight)$", lambda match: released_module_name(match[1]) + match[2], name)


@pytest.fixture(scope="module")
def adapters(build: Build, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """The same adapter under our names and under the released ones, and what it computes."""
    ours, theirs = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    config = LoraConfig(r=4, target_modules=PROJECTIONS, rank_pattern={"dt_proj": 2}, modules_to_save=["embed_tokens"])
    adapted = adapt(build(), config)
    adapted.save_pretrained(ours)
    tensors = {released(name): x for name, x in load_file(ours / "adapter_model.safetensors").items()}
    assert "base_model.model.model.layers.0.mamba.x_proj.0.lora_A.weight" in tensors
    assert "base_model.model.model.embed_tokens.weight" in tensors
    save_file(tensors, theirs / "adapter_model.safetensors")
    return ours, theirs, logits(adapted)


@pytest.mark.parametrize("by", ["peft", "transformers"])
@pytest.mark.parametrize(
    "targets",
    [
        None,
        ["in_proj", "out_proj", "x_proj.0", "dt_proj.0"],
        ["mamba.in_proj", "mamba.out_proj", "mamba.x_proj.0", "mamba.dt_proj.0"],
        r".*\.mamba\.(in_proj|out_proj|x_proj\.0|dt_proj\.0)",
    ],
    ids=["ours", "released", "longer", "pattern"],
)
def test_adapters_load_under_both_names(
    build: Build, adapters: tuple[Path, Path, Tensor], by: str, targets: object
) -> None:
    ours, theirs, expected = adapters
    directory = ours
    if targets is not None:
        directory = theirs
        config = json.loads((ours / "adapter_config.json").read_text())
        config |= {"target_modules": targets, "rank_pattern": {"dt_proj.0": 2}}
        (theirs / "adapter_config.json").write_text(json.dumps(config))
    model = build().eval()
    if by == "peft":
        model = PeftModel.from_pretrained(model, directory)
    else:
        model.load_adapter(directory)
    torch.testing.assert_close(logits(model.eval()), expected, atol=1e-5, rtol=1e-5)


def test_a_base_checkpoint_loads_below_an_adapter(build: Build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    adapted = adapt(build(), LoraConfig(r=2, target_modules=PROJECTIONS))
    expected = logits(adapted)
    with torch.no_grad():
        adapted.base_model.model.model.core.layers[0].mixer.x_proj.base_layer.weight.zero_()
    missing, unexpected = adapted.base_model.model.load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=False
    )
    assert not unexpected
    assert all("lora" in name for name in missing)
    assert torch.equal(logits(adapted), expected)


def test_an_adapted_head_counts_in_a_loss_without_logits(build: Build) -> None:
    adapted = adapt(build(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        losses = [adapted(input_ids=IDS, labels=IDS, skip_logits=skip).loss for skip in (False, True)]
    torch.testing.assert_close(*losses)


def test_new_adapters_may_target_released_names(build: Build) -> None:
    adapted = get_peft_model(
        build(), LoraConfig(target_modules=["x_proj.0", "gate_proj"], exclude_modules=r".*\.0\.moe.*")
    )
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert "base_model.model.model.core.layers.1.mixer.x_proj" in names
    assert "base_model.model.model.core.layers.1.mlp.gate_proj" in names
    assert "base_model.model.model.core.layers.0.mlp.gate_proj" not in names


def decayed(trainer: Trainer) -> list[Tensor]:
    first, rest = trainer.create_optimizer().param_groups
    assert (first["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    return first["params"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_trainer_decays_what_our_own_optimizer_decays(build: Build, tmp_path: Path, tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    ours = build_optimizer(model, Recipe(peak_lr=1e-3, steps=1, optimizer="adamw")).param_groups[0]["params"]
    assert {id(p) for p in decayed(Trainer(model, arguments))} == {id(p) for p in ours}
    kinds = {name.split(".")[-2] for name, p in model.named_parameters() if any(p is x for x in ours)}
    assert kinds == {*PROJECTIONS, "gate_proj", "up_proj", "down_proj"}


def test_other_models_and_adapters_are_decayed_as_ever(build: Build, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    other = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    assert undecayed_names(other) == set()
    assert [p.shape for p in decayed(Trainer(other, arguments))] == [(3, 4), (4, 4)]
    adapted = get_peft_model(build(), LoraConfig(target_modules=PROJECTIONS))
    count = sum(p.requires_grad for p in adapted.parameters())
    assert len(decayed(Trainer(adapted, arguments))) == count


def test_an_action_runs_once_after_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen, finders = [], list(sys.meta_path)
    after_import("late_module", lambda module: seen.append(module.value))
    assert seen == []
    import late_module

    assert seen == [1]
    assert sys.meta_path == finders
    after_import("late_module", lambda module: seen.append(module.__name__))
    assert seen == [1, "late_module"]
    monkeypatch.delitem(sys.modules, "late_module")
    assert late_module.value == 1
