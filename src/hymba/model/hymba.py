"""Hymba, the whole network, top-down (arXiv 2411.13676). Shape letters: see :mod:`hymba.model.config`.

Every layer reads its input with attention heads and Mamba heads side by side and averages the two. There is one path:
training has no cache, prefill is T > 1, decode is T = 1, and a chunk is any T on a filled cache. The M meta tokens run
once a call without a cache, as one row; the state they leave (:class:`~hymba.model.cache.Prefix`) is where every row
and every packed document starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hymba.model.arguments import Placement, check_inputs, check_memory, check_tokens
from hymba.model.cache import Cache, Prefix
from hymba.model.call import Call
from hymba.model.config import HymbaConfig
from hymba.model.dynamic_rope import as_tensor, prefix_of_rows, restart_rows, rope_bases, run_as_rows
from hymba.model.output import HymbaOutput, empty_output
from hymba.model.projection import (
    Linear,
    RMSNorm,
    StepProjection,
    add_projected_mean,
    add_projection,
    project_gated,
    project_norm,
    project_step,
)
from hymba.ops.attention import Heads, attention, attention_weights, visible, weigh_values
from hymba.ops.causal_conv1d import causal_conv1d
from hymba.ops.graph import side_by_side
from hymba.ops.linear import linear
from hymba.ops.precision import accumulate_dtype
from hymba.ops.rms_norm import norm_parts
from hymba.ops.rotary import apply_rotary
from hymba.ops.selective_scan import selective_scan


class Hymba(nn.Module):
    """The hybrid-head language model. Weights are uninitialised until `init_weights` or `load` fills them."""

    layer_class: type[HymbaLayer]  # a subclass may take layers that can be checkpointed, sharded, …

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        meta = torch.empty(c.num_meta_tokens, c.hidden_size)
        self.meta_tokens = nn.Parameter(meta) if c.num_meta_tokens else None
        self.layers = nn.ModuleList(self.layer_class(c, i) for i in range(c.num_hidden_layers))
        self.final_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if c.tie_word_embeddings else Linear(c.hidden_size, c.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.final_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, those aside that are quantised."""
        return self.final_norm.weight.dtype

    def forward(
        self,
        tokens: Tensor | None = None,
        *,
        embeddings: Tensor | None = None,
        cache: Cache | None = None,
        prefix: Prefix | None = None,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> HymbaOutput:
        """Run T tokens of each row after the meta tokens, or after what `cache` holds.

        B and T may be 0: the outputs are then empty, and the cache stays as it is.

        Args:
            tokens: (B, T) int64, text tokens only; or
            embeddings: (B, T, D) in their place.
            cache: read and, at the end, T tokens longer.
            prefix: the meta tokens' state, for callers who know that the weights have not changed since they called
                :meth:`prefix`; None computes it. Not with a cache, which holds it already.
            lengths: (B,) int64 in 0 … T, real tokens per row; the rest of the row is padding on the right. None: all T.
                Nothing in the padding, NaN included, reaches a real token, a state or a gradient.
            documents: (B, T) int64, the same number on all tokens of one packed document; a number that comes again
                after another one starts a new document. Not with a cache.
            positions: (B, T) int64 rotary positions, 0 = first text token; they do not change which tokens are seen.

        Returns:
            Outputs that are zero at padding.

        Raises:
            HymbaError: arguments contradict one another, have a wrong shape or dtype or, on the CPU, values out of
                range; or the cache is full.
        """
        size = check_inputs(self.config, tokens, embeddings)
        check_memory(cache, prefix, documents, size[0])
        where = Placement.checked(size, lengths, documents, positions)
        x = self._embed(tokens, embeddings, where.padding)
        outputs = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        if 0 in size:
            return empty_output(self.config, x, cache, **outputs)
        if not self.config.dynamic_rope:
            return self._run_texts(x, cache or prefix or self.prefix(), self._meta_base, where, **outputs)
        bases = rope_bases(self.config, x, cache, where)
        if documents is not None and {*bases} != {self._meta_base}:
            return run_as_rows(self.forward, x, where, self.config.num_meta_tokens, **outputs)
        if cache is not None:
            restart_rows(cache, bases, self.prefix)
        elif {*bases} != {self._meta_base}:
            prefix = prefix_of_rows(bases, self.prefix)
        return self._run_texts(x, cache or prefix or self.prefix(), as_tensor(bases), where, **outputs)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (..., vocab) logits in at least float32 of hidden states (..., D)."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        scores = linear(hidden, head.weight)
        return scores.to(accumulate_dtype(scores))

    def allocate_cache(
        self, rows: int, max_length: int, bits: int | None = None, prefix: Prefix | None = None
    ) -> Cache:
        """Return a cache for `rows` sequences of up to `max_length` text tokens, holding the meta tokens' state.

        Args:
            bits: of its keys and values, 8 or those of the model's dtype.
            prefix: the meta tokens' state, if it is known from the same weights; None computes it.
        """
        with torch.no_grad():
            return Cache.start(self.config, prefix or self.prefix(), rows, max_length, bits)

    def prefix(self, base: float | Tensor | None = None) -> Prefix:
        """Run the meta tokens and return the state they leave, where every sequence starts; differentiable.

        Nothing is kept from call to call: weights change in ways that a module cannot see (fused optimizers,
        `p.data`, adapters, hooks). Callers whose weights are frozen keep what this returns and pass it on.

        Args:
            base: rotary base, or (n,) bases of as many rows; None: that of a sequence of meta tokens alone.
        """
        return self.run_meta_tokens(base)[0]

    def run_meta_tokens(
        self,
        base: float | Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> tuple[Prefix, HymbaOutput]:
        """Run the meta tokens alone, T = M, one row for each `base`; return the state they leave and their outputs."""
        blank = Prefix.blank(self.config, self.dtype, self.device)
        if self.meta_tokens is None:
            return blank, HymbaOutput(self.final_norm.weight.new_empty(1, 0, self.config.hidden_size))
        x = self.meta_tokens[None]
        if isinstance(base, Tensor):
            x = x.expand(len(base), -1, -1)
        base = self._meta_base if base is None else base
        call = Call.place(self.config, x, blank, base, output_attentions=output_attentions)
        output, prefix = self._run(x, blank, call, output_hidden_states)
        return prefix, output

    @property
    def _meta_base(self) -> float:
        """The rotary base of a sequence of meta tokens alone; of all sequences, unless the base is dynamic."""
        return self.config.rope_base(self.config.num_meta_tokens)

    def _embed(self, tokens: Tensor | None, embeddings: Tensor | None, padding: Tensor | None) -> Tensor:
        """Return the inputs of the first layer (B, T, D), zero at padding whatever stands there."""
        if tokens is not None:
            tokens = tokens if padding is None else tokens.masked_fill(padding, 0)
            check_tokens(tokens, self.embed_tokens.weight.shape[0])  # which may be resized
            embeddings = self.embed_tokens(tokens).to(self.dtype)
        assert embeddings is not None
        return embeddings if padding is None else embeddings.masked_fill(padding[..., None], 0)

    def _run_texts(
        self,
        x: Tensor,
        memory: Cache | Prefix,
        base: float | Tensor,
        where: Placement,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> HymbaOutput:
        """Run inputs (B, T, D) after what `memory` holds, which takes them in."""
        memory.reserve(where.lengths, x.shape[1])
        call = Call.place(
            self.config,
            x,
            memory,
            base,
            lengths=where.lengths,
            documents=where.documents,
            positions=where.positions,
            output_attentions=output_attentions,
        )
        output, _ = self._run(x, memory, call, output_hidden_states)
        memory.advance(where.lengths, x.shape[1])
        return output if where.padding is None else output.cleared(where.padding)

    def _run(
        self, x: Tensor, memory: Cache | Prefix, call: Call, output_hidden_states: bool
    ) -> tuple[HymbaOutput, Prefix]:
        """Run all layers; return the outputs and the state they leave."""
        keys: dict[int, Any] = {}
        values: dict[int, Any] = {}
        conv_states, ssm_states, hidden_states, attentions = [], [], [], []
        for i, (layer, owner) in enumerate(zip(self.layers, self.config.owners, strict=True)):
            if output_hidden_states:
                hidden_states.append(x)
            shared = memory.stored(owner) if owner == i else (keys[owner], values[owner])
            out = layer(x, *shared, *memory.states(i, x.shape[0]), memory, call)
            x, keys[owner], values[owner], conv_state, ssm_state, weights = out
            memory.write(i, conv_state, ssm_state)
            conv_states.append(conv_state)
            ssm_states.append(ssm_state)
            attentions.append(weights)
        x = self.final_norm(x)
        output = HymbaOutput(
            x,
            (*hidden_states, x) if output_hidden_states else None,
            tuple(attentions) if call.output_attentions else None,
        )
        return output, Prefix(keys, values, conv_states, ssm_states)


class LayerOutput(NamedTuple):
    """What a layer returns: its output (B, T, D), the keys and values it attended to, the states it leaves, and its
    attention matrices when they were asked for."""

    x: Tensor
    keys: Heads
    values: Heads
    conv_state: Tensor
    ssm_state: Tensor
    attention: Tensor | None


class HymbaLayer(nn.Module):
    """Hybrid heads, then a gated MLP, each behind a norm and added to the stream."""

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = HybridMixer(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        keys: Heads,
        values: Heads,
        conv_state: Tensor,
        ssm_state: Tensor,
        memory: Cache | Prefix,
        call: Call,
    ) -> LayerOutput:
        """Map (B, T, D) to (B, T, D). `keys` and `values` are the owner's: stored ones if this layer is the owner,
        complete ones if it is a consumer. They are arguments, so that gradient checkpointing sees them as values."""
        out = self.mixer(x, self.input_norm, keys, values, conv_state, ssm_state, memory, call)
        return out._replace(x=self.mlp(out.x, self.mlp_norm))


Hymba.layer_class = HymbaLayer


class HybridMixer(nn.Module):
    """Attention heads and Mamba heads over one input projection, normed, averaged and projected back."""

    def __init__(self, config: HymbaConfig, layer: int) -> None:
        super().__init__()
        c = self.config = config
        self.is_owner = c.owners[layer] == layer
        self.window = c.window(layer)
        query_width = c.num_attention_heads * c.head_dim
        kv_widths = (c.num_key_value_heads * c.head_dim, c.num_key_value_heads * c.v_head_dim)
        # Rows of in_proj: query, (key, value,) SSM input, SSM gate.
        self.widths = [query_width, *(kv_widths if self.is_owner else ()), c.d_inner, c.d_inner]
        self.in_proj = Linear(c.hidden_size, sum(self.widths), bias=False)
        self.conv = CausalConv(c.d_inner, c.d_inner, c.d_conv, groups=c.d_inner)
        self.x_proj = Linear(c.d_inner, c.dt_rank + 2 * c.d_state, bias=False)
        self.dt_norm = RMSNorm(c.dt_rank, c.rms_norm_eps)
        self.B_norm = RMSNorm(c.d_state, c.rms_norm_eps)
        self.C_norm = RMSNorm(c.d_state, c.rms_norm_eps)
        self.dt_proj = StepProjection(c.dt_rank, c.d_inner)
        self.A_log = nn.Parameter(torch.empty(c.d_inner, c.d_state))
        self.D = nn.Parameter(torch.empty(c.d_inner))
        self.attention_norm = RMSNorm(c.d_inner, c.rms_norm_eps)
        self.ssm_norm = RMSNorm(c.d_inner, c.rms_norm_eps)
        self.out_proj = Linear(c.d_inner, c.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        keys: Heads,
        values: Heads,
        conv_state: Tensor,
        ssm_state: Tensor,
        memory: Cache | Prefix,
        call: Call,
    ) -> LayerOutput:
        """Add both branches' view of the normed stream to the stream; see :meth:`HymbaLayer.forward`."""
        q, *kv, u, gate = project_norm(norm, self.in_proj, x).split(self.widths, dim=-1)
        (attended, keys, values, weights), (scanned, conv_state, ssm_state) = side_by_side(
            x,
            lambda: self._attend(q, kv, keys, values, memory, call),
            lambda: self._scan(u, gate, conv_state, ssm_state, memory.in_place, call),
        )
        x = add_projected_mean((self.attention_norm, self.ssm_norm), self.out_proj, attended, scanned, x)
        return LayerOutput(x, keys, values, conv_state, ssm_state, weights)

    def _attend(
        self, q: Tensor, kv: Sequence[Tensor], keys: Heads, values: Heads, memory: Cache | Prefix, call: Call
    ) -> tuple[Tensor, Heads, Heads, Tensor | None]:
        """Return the attention branch (B, T, E), the keys and values attended to, and its matrices (B, H, T, S) when
        they are asked for. An owner's own `kv` join the stored ones first."""
        if self.is_owner:
            k = apply_rotary(self._heads(kv[0], self.config.num_key_value_heads), *call.rotary)
            v = self._heads(kv[1], self.config.num_key_value_heads)
            keys, values = memory.extend(self.window, (keys, values), k, v, call.slots[self.window])
        q = apply_rotary(self._heads(q, self.config.num_attention_heads), *call.rotary)
        mask = call.mask(self.window, self.config.num_meta_tokens)
        if not call.output_attentions:
            return attention(q, keys, values, **mask).flatten(2), keys, values, None
        weights = attention_weights(q, keys, visible(**mask))
        return weigh_values(weights, values).to(q.dtype).flatten(2), keys, values, weights

    def _scan(
        self, u: Tensor, gate: Tensor, conv_state: Tensor, ssm_state: Tensor, in_place: bool, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the Mamba branch (B, T, E) and the states it leaves (arXiv 2312.00752, with normed dt, B and C)."""
        c = self.config
        u, conv_state = self.conv(u, conv_state, in_place, call)
        norms = self.dt_norm.weight, self.B_norm.weight, self.C_norm.weight
        dt, B, C = norm_parts(self.x_proj(u), norms, c.rms_norm_eps)
        steps, bias = project_step(self.dt_proj, dt)
        y, ssm_state = selective_scan(
            u,
            steps,
            self.A_log,
            B,
            C,
            self.D,
            dt_bias=bias,
            gate=gate,
            initial_state=ssm_state,
            lengths=call.lengths,
            document_offsets=call.document_offsets,
            final_state=ssm_state if in_place else None,
        )
        return y, conv_state, ssm_state

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1))


class CausalConv(nn.Conv1d):
    """The short convolution before the scan, and its SiLU."""

    bias: nn.Parameter

    def forward(  # type: ignore[override]
        self, u: Tensor, state: Tensor, in_place: bool, call: Call
    ) -> tuple[Tensor, Tensor]:
        """Map (B, T, E) to (B, T, E); take and return the state (B, E, d_conv − 1), overwritten if `in_place`."""
        return causal_conv1d(
            u,
            self.weight[:, 0],
            self.bias,
            initial_state=state,
            lengths=call.lengths,
            document_offsets=call.document_offsets,
            final_state=state if in_place else None,
        )


class MLP(nn.Module):
    """down( SiLU(gate x) · up x )."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """Add the MLP of the normed stream to the stream (B, T, D)."""
        return add_projection(self.down_proj, project_gated(norm, self.gate_proj, self.up_proj, x), x)
