"""The released model through transformers: same numbers, same bytes, same config.json."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hymba.errors import HymbaError
from hymba.hf import HymbaConfig, HymbaForCausalLM, HymbaModel
from hymba.model import load, quantize, released_name, save

TINY_A = Path(__file__).parent.parent / "fixtures/tiny_a"
META = 4
INPUTS = ["b1_L1", "b1_L4", "b1_L5", "b1_L8", "b1_L9", "b1_L13", "b1_L40", "b3_L5", "b3_L40"]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(TINY_A / "expected.safetensors")


@pytest.fixture(scope="module")
def released() -> HymbaForCausalLM:
    return HymbaForCausalLM.from_pretrained(TINY_A, dtype=torch.float32)


@pytest.mark.parametrize("name", INPUTS)
def test_logits(released: HymbaForCausalLM, expected: dict[str, Tensor], name: str) -> None:
    with torch.no_grad():
        logits = released(expected[f"{name}.input_ids"]).logits
    torch.testing.assert_close(logits, expected[f"{name}.logits"], atol=5e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in INPUTS if name.startswith("b1")])
def test_logits_in_float64(expected: dict[str, Tensor], name: str) -> None:
    model = HymbaForCausalLM.from_pretrained(TINY_A, dtype=torch.float64)
    with torch.no_grad():
        logits = model(expected[f"{name}.input_ids"]).logits
    torch.testing.assert_close(logits, expected[f"{name}.logits_f64"], atol=1e-9, rtol=0)


def test_hidden_states(released: HymbaForCausalLM, expected: dict[str, Tensor]) -> None:
    with torch.no_grad():
        output = released(expected["b1_L40.input_ids"], output_hidden_states=True)
    ours, theirs = torch.cat(output.hidden_states), expected["b1_L40.hidden_states"][:, META:]
    torch.testing.assert_close(ours, theirs, atol=5e-4, rtol=0)


def test_not_the_model_without_sinks(released: HymbaForCausalLM, expected: dict[str, Tensor]) -> None:
    wrong = load_file(TINY_A / "expected_sdpa.safetensors")["b1_L40.logits_nosink"]
    with torch.no_grad():
        logits = released(expected["b1_L40.input_ids"]).logits
    assert (logits - wrong).abs().max() > 1


@pytest.mark.parametrize("name", ["greedy_P5", "greedy_P20"])
def test_greedy_tokens(released: HymbaForCausalLM, expected: dict[str, Tensor], name: str) -> None:
    output = released.generate(
        expected[f"{name}.prompt"],
        attention_mask=torch.ones_like(expected[f"{name}.prompt"]),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.past_key_values is not None  # the file says use_cache: false
    assert output.sequences[0, -24:].tolist() == expected[f"{name}.tokens"][0].tolist()
    torch.testing.assert_close(torch.cat(output.logits), expected[f"{name}.step_logits"], atol=5e-4, rtol=0)


def test_loss_and_gradients(expected: dict[str, Tensor]) -> None:
    reference = load_file(TINY_A / "grads_b3_L40.safetensors")
    names = json.loads((TINY_A / "grad_names.json").read_text())
    model = HymbaForCausalLM.from_pretrained(TINY_A, dtype=torch.float32).train()
    ids = expected["b3_L40.input_ids"]
    loss = model(ids, labels=ids).loss
    loss.backward()
    ours = {released_name(n): p.grad for n, p in model.model.core.named_parameters()}
    torch.testing.assert_close(loss, reference["loss"][0], rtol=1e-3, atol=0)
    norms = torch.stack([ours[name].norm() for name in names])
    torch.testing.assert_close(norms, reference["grad_norms"], rtol=1e-3, atol=1e-6)
    for name, gradient in ours.items():
        if f"grad.{name}" in reference:
            error = (gradient - reference[f"grad.{name}"]).norm()
            assert error <= 1e-3 * reference[f"grad.{name}"].norm(), name


@pytest.mark.parametrize("shard", ["50GB", "100KB"])
def test_saving_gives_the_same_bytes(tmp_path: Path, shard: str) -> None:
    HymbaForCausalLM.from_pretrained(TINY_A, dtype="auto").save_pretrained(tmp_path, max_shard_size=shard)
    before, after = load_file(TINY_A / "model.safetensors"), {}
    for file in tmp_path.glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    stamps = {"torch_dtype", "dtype", "transformers_version"}
    configs = [json.loads((d / "config.json").read_text()) for d in (TINY_A, tmp_path)]
    theirs, ours = ({k: v for k, v in c.items() if k not in stamps} for c in configs)
    assert ours == theirs
    again = HymbaForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again.model.core.meta_tokens, before["model.memory_tokens"])


def test_auto_classes_load_the_released_files() -> None:
    assert isinstance(AutoConfig.from_pretrained(TINY_A), HymbaConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(TINY_A), HymbaForCausalLM)
    bare = AutoModel.from_pretrained(TINY_A, dtype=torch.float32)
    stored = load_file(TINY_A / "model.safetensors")
    assert isinstance(bare, HymbaModel)
    assert torch.equal(bare.core.final_norm.weight, stored["model.final_layernorm.weight"].float())


def test_a_file_is_not_completed_by_defaults(tmp_path: Path) -> None:
    shutil.copytree(TINY_A, tmp_path / "broken")
    config = json.loads((TINY_A / "config.json").read_text())
    del config["num_memory_tokens"]
    (tmp_path / "broken/config.json").write_text(json.dumps(config))
    with pytest.raises(HymbaError, match="num_memory_tokens"):
        HymbaForCausalLM.from_pretrained(tmp_path / "broken")


def test_a_quantised_checkpoint_is_told(tmp_path: Path) -> None:
    save(quantize(load(TINY_A), 4), tmp_path)
    with pytest.raises(HymbaError, match=r"the checkpoint is quantised.*use hymba\.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
