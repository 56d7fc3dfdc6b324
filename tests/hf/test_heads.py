"""Classification heads: made from released checkpoints, padded on either side, saved and loaded again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hymba.errors import HymbaError
from hymba.hf import HymbaConfig, HymbaForCausalLM, HymbaModel, HymbaPreTrainedModel

TINY_A = Path(__file__).parent.parent / "fixtures/tiny_a"
AUTO = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
}
IDS = torch.randint(3, 61, (3, 8), generator=torch.Generator().manual_seed(0))
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def head_of(model: Any) -> nn.Linear:
    return model.qa_outputs if hasattr(model, "qa_outputs") else model.score


@pytest.fixture(scope="module")
def saved(build: Callable[..., HymbaForCausalLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    build().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def classifier(saved: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", AUTO)
def test_a_new_head_is_initialized_and_the_rest_loaded(kind: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        model = AUTO[kind].from_pretrained(TINY_A, num_labels=3, dtype=dtype)
    stored = load_file(TINY_A / "model.safetensors")
    core = model.model.core
    assert torch.equal(core.layers[1].mixer.x_proj.weight, stored["model.layers.1.mamba.x_proj.0.weight"].to(dtype))
    assert torch.equal(core.meta_tokens, stored["model.memory_tokens"].to(dtype))
    head = head_of(model)
    assert 0.1 < head.weight.std() / model.config.initializer_range < 3
    assert head.bias is None or not head.bias.any()


@pytest.mark.parametrize("kind", AUTO)
def test_no_head_starts_from_whatever_memory_holds(saved: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(1e30))
    model = AUTO[kind].from_pretrained(saved)
    assert all(p.abs().max() < 100 for p in model.parameters())


def test_a_module_of_ones_own_is_initialized(build: Callable[..., HymbaForCausalLM]) -> None:
    class WithValues(HymbaPreTrainedModel):
        def __init__(self, config: HymbaConfig) -> None:
            super().__init__(config)
            self.model = HymbaModel(config)
            self.value = nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, 1))
            for parameter in self.value.parameters():
                nn.init.constant_(parameter, 1e30)
            self.post_init()

    model = WithValues(build().config)
    norm, linear = model.value
    assert (norm.weight == 1).all()
    assert not norm.bias.any()
    assert not linear.bias.any()
    assert linear.weight.abs().max() < 10


@pytest.mark.parametrize("kind", AUTO)
def test_a_saved_head_is_loaded_again(saved: Path, tmp_path: Path, kind: str) -> None:
    model = AUTO[kind].from_pretrained(saved).eval()
    with torch.no_grad():
        for parameter in head_of(model).parameters():
            parameter.normal_()
        model.save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors").keys()
        assert "model.layers.0.mamba.dt_proj.0.bias" in names
        again = AUTO[kind].from_pretrained(tmp_path).eval()
        for one, other in zip(model(IDS).to_tuple(), again(IDS).to_tuple(), strict=True):
            assert not isinstance(one, Tensor) or torch.equal(one, other)
        blank = AUTO[kind].from_config(model.config)
        blank.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert all(torch.equal(p, q) for p, q in zip(blank.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_class(classifier: Any, side: str) -> None:
    mask = torch.ones_like(IDS)
    for row in (1, 2):
        mask[row, : 2 * row] = 0
    ids = IDS.masked_fill(mask == 0, 60)  # not the config's padding token: the tokenizer may have another
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    with torch.no_grad():
        batch = classifier(ids, attention_mask=mask).logits
        embedded = classifier(inputs_embeds=classifier.get_input_embeddings()(ids), attention_mask=mask).logits
        for row in range(3):
            alone = classifier(ids[row][mask[row].bool()][None]).logits
            torch.testing.assert_close(batch[row : row + 1], alone, **TOLERANCE)
    torch.testing.assert_close(embedded, batch, **TOLERANCE)


def test_a_cached_prefix_changes_no_class(classifier: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    with torch.no_grad():
        whole = classifier(IDS, attention_mask=mask).logits
        past = classifier(IDS[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
        rest = classifier(IDS[:, 5:], attention_mask=mask, past_key_values=past).logits
    torch.testing.assert_close(rest, whole, **TOLERANCE)


def test_without_a_mask_the_padding_token_is_told_by_its_number(
    classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = IDS.clone()
    ids[1, 5:] = classifier.config.pad_token_id
    mask = (ids != classifier.config.pad_token_id).long()
    with torch.no_grad():
        torch.testing.assert_close(classifier(ids).logits, classifier(ids, attention_mask=mask).logits, **TOLERANCE)
        monkeypatch.setattr(classifier.config, "pad_token_id", None)
        assert classifier(ids, attention_mask=mask).logits.isfinite().all()
        assert classifier(ids[:1]).logits.isfinite().all()
        with pytest.raises(HymbaError, match="pass attention_mask, or set"):
            classifier(ids)


def test_losses_and_gradients(saved: Path) -> None:
    labels = torch.tensor([0, 2, 1])
    model = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3)
    output = model(IDS, labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    reward = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=1)
    output = reward(IDS, labels=labels.float())
    torch.testing.assert_close(output.loss, F.mse_loss(output.logits[:, 0], labels.float()))
    token = AutoModelForTokenClassification.from_pretrained(saved, num_labels=3).eval()
    output = token(IDS, labels=IDS % 3)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), (IDS % 3).flatten()))
    question = AutoModelForQuestionAnswering.from_pretrained(saved)
    output = question(IDS, start_positions=labels, end_positions=labels + 1)
    expected = F.cross_entropy(output.start_logits, labels) + F.cross_entropy(output.end_logits, labels + 1)
    torch.testing.assert_close(output.loss, expected / 2)
    assert question.get_input_embeddings() is question.model.core.embed_tokens


def test_a_config_with_a_dtype_builds_one_dtype(classifier: Any) -> None:
    for auto in (*AUTO.values(), AutoModel):
        config = HymbaConfig.from_dict(classifier.config.to_dict() | {"dtype": "bfloat16"})
        model = auto.from_config(config)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model(IDS)[0].isfinite().all()
        direct = type(model)(config)
        assert len({p.dtype for p in direct.parameters()}) == 1
