"""Padding anywhere, packed documents and odd positions through the door: each row as if it stood alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening

from hymba.errors import HymbaError
from hymba.hf import HymbaForCausalLM

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


def alone(model: HymbaForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


@given(masks=st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=1, max_size=3))
def test_padding_may_stand_anywhere(model: HymbaForCausalLM, masks: list[list[bool]]) -> None:
    mask = torch.tensor(masks)
    ids = tokens(*mask.shape)
    with torch.no_grad():
        output = model(ids, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True)
    assert torch.isfinite(output.logits).all()
    for row in range(len(masks)):
        real = mask[row]
        if real.any():
            torch.testing.assert_close(output.logits[row, real], alone(model, ids[row, real]), **TOLERANCE)
        for weights in output.attentions:
            torch.testing.assert_close(weights[row][:, real].sum(-1), torch.ones(6, int(real.sum())))
            assert weights[row][:, real][..., 3:][..., ~real].abs().sum() == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_from_the_mask_change_nothing(model: HymbaForCausalLM, side: str) -> None:
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        told = model(ids, attention_mask=mask, position_ids=positions).logits
        untold = model(ids, attention_mask=mask).logits
    assert torch.equal(told, untold)


def test_unnatural_positions_turn_the_heads(model: HymbaForCausalLM) -> None:
    ids = tokens(2, 8)
    with torch.no_grad():
        natural = model(ids, position_ids=torch.arange(8)[None]).logits
        spread = model(ids, position_ids=3 * torch.arange(8)[None]).logits
        assert torch.equal(natural, model(ids).logits)
    assert (natural - spread).abs().max() > 1e-3


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_packed_documents_stand_alone(model: HymbaForCausalLM, lengths: list[int]) -> None:
    documents = [tokens(n, seed=i) for i, n in enumerate(lengths)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = dict(collate([{"input_ids": d.tolist()} for d in documents]))
    ids, expected = batch["input_ids"], torch.cat([alone(model, d) for d in documents])
    for told in (
        {"position_ids": batch["position_ids"]},
        {"seq_idx": batch["seq_idx"]},
        {key: batch[key] for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")},
    ):
        with torch.no_grad():
            packed = model(ids, **told)
        torch.testing.assert_close(packed.logits[0], expected, **TOLERANCE)
        assert packed.past_key_values is None or len(lengths) == 1


def test_packed_rows_may_be_padded(model: HymbaForCausalLM) -> None:
    ids, mask = tokens(1, 10), torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 0]])
    positions = torch.tensor([[0, 0, 0, 1, 2, 0, 1, 2, 3, 0]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[0, 2:9]
    expected = torch.cat((alone(model, ids[0, 2:5]), alone(model, ids[0, 5:9])))
    torch.testing.assert_close(logits, expected, **TOLERANCE)


def test_embeddings_in_place_of_tokens(model: HymbaForCausalLM) -> None:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(
            model(inputs_embeds=embeddings, attention_mask=mask).logits,
            model(ids, attention_mask=mask).logits,
        )


def test_logits_to_keep(model: HymbaForCausalLM) -> None:
    with torch.no_grad():
        ids = tokens(2, 9)
        whole = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


def test_bad_arguments_are_told(model: HymbaForCausalLM) -> None:
    with pytest.raises(HymbaError, match="exactly one"):
        model()
    with pytest.raises(HymbaError, match="attention_mask"):
        model(tokens(2, 5), attention_mask=torch.ones(2, 1, 5, 5))
