"""torch.compile and torch.export: one graph, and the outputs, gradients and caches of the model itself."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, export
from transformers import StaticCache

from hymba.errors import HymbaError
from hymba.hf import HymbaCache, HymbaForCausalLM

SMALL = {"num_hidden_layers": 2, "global_attn_idx": [0], "kv_reuse_group": None}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]]).expand(2, -1)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def small(build: Callable[..., HymbaForCausalLM]) -> HymbaForCausalLM:
    return build(**SMALL).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0))


def padded(rows: int, columns: int) -> dict[str, Tensor]:
    """Rows with two tokens less each than the one before, padded on the left."""
    mask = (torch.arange(columns) >= 2 * torch.arange(rows)[:, None]).long()
    ids = tokens(rows, columns)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def compiled(model: HymbaForCausalLM, backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend=backend)


def assert_same(ours: Any, theirs: Any) -> None:
    for name in ("loss", "logits", "hidden_states", "attentions"):
        torch.testing.assert_close(ours.get(name), theirs.get(name), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": tokens(2, 9)},
        padded(2, 9) | {"output_attentions": True, "output_hidden_states": True},
        {"input_ids": tokens(2, 9), "position_ids": PACKED, "use_cache": False},
        {"input_ids": tokens(2, 9), "position_ids": 2 * torch.arange(9)[None]},
        {"input_ids": tokens(2, 9), "seq_idx": torch.arange(9)[None].expand(2, -1) // 4},
    ],
    ids=["tokens", "padded", "packed", "positions", "documents"],
)
def test_forward_is_one_graph(small: HymbaForCausalLM, inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        assert_same(compiled(small)(**inputs), small(**inputs))


@pytest.mark.slow
def test_inductor(small: HymbaForCausalLM) -> None:
    with torch.no_grad():
        assert_same(compiled(small, "inductor")(**padded(2, 9)), small(**padded(2, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("options", [{"skip_logits": True}, {"position_ids": PACKED, "attention_mask": None}], ids=str)
def test_gradients(build: Callable[..., HymbaForCausalLM], options: dict[str, Any], checkpointing: bool) -> None:
    gradients = []
    for wrap in (compiled, lambda model: model):
        model = build(**SMALL).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        wrap(model)(**(padded(2, 9) | options)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [HymbaCache, StaticCache])
def test_steps_of_a_cache_share_a_graph(small: HymbaForCausalLM, kind: type) -> None:
    ids, graphs = tokens(2, 20), []
    cache = HymbaCache(64) if kind is HymbaCache else StaticCache(config=small.config, max_cache_len=64)

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(small, fullgraph=True, backend=count)
    with torch.no_grad():
        whole = small(ids).logits
        small(ids[:, :8], past_key_values=cache)
        for column in range(8, 20):
            logits = step(ids[:, column : column + 1], past_key_values=cache).logits
            torch.testing.assert_close(logits[:, 0], whole[:, column], **TOLERANCE)
    assert cache.get_seq_length() == 20
    assert len(graphs) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate(build: Callable[..., HymbaForCausalLM], kind: str) -> None:
    model, inputs = build(**SMALL).eval(), padded(2, 9)
    del inputs["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": kind}
    wanted = model.generate(**inputs, **options)
    model.forward = compiled(model.forward)
    assert torch.equal(model.generate(**inputs, **options), wanted)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "attention_mask", "labels")], ids=str)
def test_export_of_any_length(small: HymbaForCausalLM, names: tuple[str, ...], strict: bool) -> None:
    example = {name: x for name, x in padded(2, 9).items() if name in names}
    sizes = {0: Dim("rows", max=64), 1: Dim("columns", min=2, max=4096)}
    program = export(small, (), example, dynamic_shapes=dict.fromkeys(names, sizes), strict=strict)
    for rows, columns in ((2, 9), (1, 40), (3, 17)):
        inputs = {name: x for name, x in padded(rows, columns).items() if name in names}
        with torch.no_grad():
            assert_same(program.module()(**inputs), small(**inputs))


def test_an_exported_program_has_no_cache(small: HymbaForCausalLM) -> None:
    with pytest.raises(HymbaError, match="export with use_cache=False"):
        export(small, (), {"input_ids": tokens(2, 9), "use_cache": True}, strict=False)


def test_dynamic_rotary_bases_are_not_exported(build: Callable[..., HymbaForCausalLM]) -> None:
    model = build(**SMALL, rope_type="dynamic_ntk").eval()
    with pytest.raises(HymbaError, match="dynamic_ntk"):
        export(model, (), {"input_ids": tokens(2, 9)}, strict=False)
    loose = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert_same(loose(tokens(2, 9)), model(tokens(2, 9)))
