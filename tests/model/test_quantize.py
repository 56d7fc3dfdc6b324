"""Quantised models: what they compute, what they keep, and that their scales are hard to better."""

import copy
import json
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import micro_model
from safetensors.torch import load_file, save_file

from hymba.errors import HymbaError
from hymba.model import Scheme, count_parameters, load, quantize, save, scheme_of
from hymba.model.quantize import Quantized, round_weight, search_scales
from hymba.ops.linear import dequantize, round_to_int4

TOKENS = torch.arange(40).reshape(2, 20) % 61


def widened(model):
    """A copy in float32 whose weights are what the quantised ones stand for."""
    plain = micro_model(tie_word_embeddings=model.config.tie_word_embeddings)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, Quantized):
                plain.get_submodule(name).weight.copy_(dequantize(module.weight, torch.float32))
    return plain.requires_grad_(False)


def weight(seed, outputs, inputs):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_computes_with_what_its_weights_stand_for(bits, tied):
    model = quantize(micro_model(tie_word_embeddings=tied), bits)
    plain = widened(model)
    wanted = plain.logits(plain(TOKENS).hidden)
    scale = float(wanted.abs().max())
    assert float((model.logits(model(TOKENS).hidden) - wanted).abs().max()) < 2e-3 * scale
    cache, parts = model.allocate_cache(rows=2, max_length=20), []
    for chunk in TOKENS.split([1, 7, 1, 11], dim=1):
        parts.append(model.logits(model(chunk, cache=cache).hidden))
    assert float((torch.cat(parts, dim=1) - wanted).abs().max()) < 2e-3 * scale


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_quantised_and_what_is_not(bits):
    plain, told = micro_model(tie_word_embeddings=False), []
    model = quantize(micro_model(tie_word_embeddings=False), bits, told.append)
    quantised = {name: module.weight.bits for name, module in model.named_modules() if isinstance(module, Quantized)}
    small = {name for name in quantised if name.endswith(("x_proj", "dt_proj", "lm_head", "embed_tokens"))}
    assert {quantised[name] for name in small} == {8}
    assert {quantised[name] for name in quantised.keys() - small} == {bits}
    assert len(quantised) == 2 + 5 * 7
    assert [row.name for row in told] == [f"{name}.weight" for name in quantised]
    assert count_parameters(model) == count_parameters(plain) == sum(p.numel() for p in plain.parameters())
    before = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    kept = {name.rpartition("layers.0.")[2] for name, _ in model.named_parameters() if ".1." not in name}
    assert {"mixer.A_log", "mixer.D", "mixer.dt_proj.bias", "mixer.conv.weight", "meta_tokens"} <= kept


def test_errors_are_told_as_they_are():
    plain, told = micro_model(), []
    model = quantize(micro_model(), 4, told.append)
    for name, bits, entries, error in told:
        before = plain.get_parameter(name).detach()
        after = dequantize(model.get_submodule(name.removesuffix(".weight")).weight, torch.float32)
        assert error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert error < {8: 0.01, 4: 0.12}[bits]
        assert entries == before.numel()


@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 5), st.booleans())
def test_searched_scales_are_better_than_those_of_the_largest_entry(seed, inputs, outputs, zero_group):
    w = weight(seed, outputs, inputs)
    if zero_group:
        w[:, :64] = 0
    ours, theirs = (dequantize(round_to_int4(w, s), torch.float32) for s in (search_scales(w), None))
    assert bool(ours.isfinite().all())
    rounding = w.norm() / 256  # of the scales to bfloat16
    assert float((ours - w).norm()) <= float(torch.hypot((theirs - w).norm(), rounding))


def test_searched_scales_come_close_to_the_best():
    w = weight(0, 50, 64)
    ours = (dequantize(round_to_int4(w, search_scales(w)), torch.float32) - w).square().sum(1)
    peak, best = w.abs().amax(1), torch.full((50,), torch.inf)
    for steps in torch.linspace(4, 16, 400):
        for sign in (1, -1):
            rounded = round_to_int4(w, (sign * peak / steps)[:, None])
            best = torch.minimum(best, (dequantize(rounded, torch.float32) - w).square().sum(1))
    assert float(ours.sum()) <= float(best.sum()) * 1.005


def test_weights_on_the_grid_come_back_exactly():
    whole = torch.randint(-8, 8, (6, 192), generator=torch.Generator().manual_seed(1)).float()
    whole[:, ::64] = -8.0
    w = whole * torch.tensor([0.5, -0.25, 1.0]).repeat_interleave(64)
    assert torch.equal(dequantize(round_weight("w", w, 4)[0], torch.float32), w)


def test_blocks_change_nothing(monkeypatch):
    w = weight(3, 37, 130)
    whole = [round_weight("w", w, bits) for bits in (8, 4)]
    monkeypatch.setattr(import_module("hymba.model.quantize"), "BLOCK", 300)
    for (before, told), bits in zip(whole, (8, 4), strict=True):
        after, again = round_weight("w", w, bits)
        assert torch.equal(after.values, before.values)
        assert torch.equal(after.scales, before.scales)
        assert again.error == pytest.approx(told.error)


def test_casting_leaves_the_format_alone():
    model = quantize(micro_model(), 4)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(TOKENS).hidden.dtype == torch.bfloat16
    for name, buffer in model.double().named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])
    assert model(TOKENS).hidden.dtype == torch.float64


def test_a_copy_stands_on_its_own():
    model = quantize(micro_model(), 8)
    wanted, other = model(TOKENS).hidden, copy.deepcopy(model)
    with torch.no_grad():
        model.layers[0].mixer.in_proj.weight_scale.zero_()
    assert torch.equal(other(TOKENS).hidden, wanted)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.layers[0].mixer.in_proj.weight.scales, torch.zeros(144))


def test_a_quantised_model_is_for_reading_only():
    model = quantize(micro_model(), 8)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(HymbaError, match="a quantised model cannot be trained"):
        model.train()
    with pytest.raises(HymbaError, match="quantised already"):
        quantize(model, 4)
    with pytest.raises(HymbaError, match="8 or 4 bits, not 3"):
        quantize(micro_model(), 3)
    broken = micro_model()
    with torch.no_grad():
        broken.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(HymbaError, match=r"layers\.1\.mlp\.up_proj\.weight cannot be quantised"):
        quantize(broken, 4)


def test_gradients_flow_to_the_inputs():
    model, embeddings = quantize(micro_model(), 4), torch.randn(1, 9, 24, requires_grad=True)
    ours, wanted = (
        torch.autograd.grad(m(embeddings=embeddings).hidden.square().sum(), embeddings)[0]
        for m in (model, widened(model))
    )
    torch.testing.assert_close(ours, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_scheme_survives_the_config(bits):
    assert scheme_of(quantize(micro_model(), bits)) == Scheme(bits)
    assert scheme_of(micro_model()) is None
    assert Scheme.from_released({"quantization_config": Scheme(bits).to_released()}) == Scheme(bits)
    assert Scheme.from_released({}) is None
    for change in ({"quant_method": "gptq"}, {"bits": 3}, {"group_size": 32}):
        with pytest.raises(HymbaError, match=r"config key quantization_config is .*only"):
            Scheme.from_released({"quantization_config": Scheme(4).to_released() | change})


def resave(directory, change):
    """Let `change` the stored tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture
def checkpoint(tmp_path):
    """A model in 4 bits, and the plain one that it was made from."""
    save(micro_model(dtype=torch.bfloat16), tmp_path / "plain")
    save(quantize(load(tmp_path / "plain"), 4), tmp_path / "four")
    return tmp_path


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_byte_for_byte(tmp_path, bits, tied):
    model = quantize(micro_model(dtype=torch.bfloat16, tie_word_embeddings=tied), bits)
    save(model, tmp_path / "one")
    loaded = load(tmp_path / "one")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(TOKENS).hidden, model(TOKENS).hidden)
    save(loaded, tmp_path / "two", max_shard_size="20KB")
    save(load(tmp_path / "two"), tmp_path / "three")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    stored = sum(x.nbytes for x in load_file(tmp_path / "one" / "model.safetensors").values())
    assert stored == sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def test_stored_names_follow_the_released_ones(checkpoint):
    stored = load_file(checkpoint / "four" / "model.safetensors")
    for name, dtypes in (
        ("model.embed_tokens", (torch.int8, torch.float32)),
        ("model.layers.3.moe.experts.0.up_proj", (torch.uint8, torch.bfloat16)),
        ("model.layers.3.mamba.dt_proj.0", (torch.int8, torch.float32)),
    ):
        assert f"{name}.weight" not in stored
        assert (stored[f"{name}.weight_packed"].dtype, stored[f"{name}.weight_scale"].dtype) == dtypes
    config = json.loads((checkpoint / "four" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "hymba", "bits": 4, "group_size": 64}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantising_while_loading_is_quantising_what_was_loaded(checkpoint, bits):
    told, again = [], []
    wanted = quantize(load(checkpoint / "plain"), bits, told.append)
    model = load(checkpoint / "plain", bits=bits, report=again.append)
    assert sorted(told) == sorted(again)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted.state_dict()[name]), name
        assert tensor.data_ptr() % 64 == 0


def test_the_dtype_is_that_of_the_rest(checkpoint):
    assert load(checkpoint / "four").dtype == torch.bfloat16
    model = load(checkpoint / "four", dtype=torch.float32)
    assert model(TOKENS).hidden.dtype == torch.float32
    assert model.layers[0].mixer.in_proj.weight.bits == 4


def test_schemes_that_do_not_fit_are_told(checkpoint):
    assert scheme_of(load(checkpoint / "four", bits=4)) == Scheme(4)
    with pytest.raises(HymbaError, match="four is quantised to 4 bits already"):
        load(checkpoint / "four", bits=8)
    file = checkpoint / "four" / "config.json"
    config = json.loads(file.read_text())
    for change, problem in (
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'.*supported"),
        ({"quantization_config": None}, "a tensor 'model.*weight_packed' that the config has no place for"),
        ({"quantization_config": {"quant_method": "hymba", "bits": 8}}, r"weight_packed (has shape|is torch\.uint8)"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(HymbaError, match=problem):
            load(checkpoint / "four")
    for bits in (8, 4):
        plain = json.loads((checkpoint / "plain" / "config.json").read_text())
        (checkpoint / "plain" / "config.json").write_text(
            json.dumps(plain | {"quantization_config": Scheme(bits).to_released()})
        )
        with pytest.raises(HymbaError, match=r"a tensor 'model.*\.weight' that the config has no place for"):
            load(checkpoint / "plain")


SCALE = "model.layers.1.mamba.in_proj.weight_scale"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(SCALE), f"lacks the tensor '{SCALE}'"),
        (lambda t: t.update({SCALE: t[SCALE][:, :0].contiguous()}), f"{SCALE} has shape .144, 0., but the config says"),
        (lambda t: t.update({SCALE: t[SCALE].float()}), f"{SCALE} is torch.float32, but the config's scheme says"),
        (lambda t: t.update({"model.memory_tokens": torch.zeros(4, 24)}), r"model\.memory_tokens has shape"),
    ],
)
def test_broken_parts_are_told(checkpoint, change, problem):
    resave(checkpoint / "four", change)
    with pytest.raises(HymbaError, match=problem):
        load(checkpoint / "four")


def test_a_weight_of_the_wrong_shape_is_told_before_it_is_quantised(checkpoint):
    resave(checkpoint / "plain", lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(3)}))
    with pytest.raises(
        HymbaError, match=r"model\.embed_tokens\.weight has shape \(3,\), but the config says \(61, 24\)"
    ):
        load(checkpoint / "plain", bits=4)


def test_a_truncated_file_is_told(checkpoint):
    file = checkpoint / "four" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(HymbaError, match="truncated or corrupt"):
        load(checkpoint / "four")
