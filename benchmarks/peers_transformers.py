"""Other models in transformers, with random weights: the process that `benchmarks.peers` measures.

The numbers are those of the released config.json files: meta-llama/Llama-3.2-1B and -3B, HuggingFaceTB/SmolLM2-1.7B,
Qwen/Qwen2.5-1.5B, tiiuae/Falcon-H1-1.5B-Base (sizes also in arXiv 2507.22448), state-spaces/mamba-1.4b-hf. Multipliers
of Falcon-H1 are left at one: they change no time.
"""

from __future__ import annotations

import itertools
import json
import time
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconH1Config, LlamaConfig, MambaConfig, PreTrainedModel, Qwen2Config
from transformers.generation.streamers import BaseStreamer
from transformers.initialization import no_init_weights

from benchmarks.models import SEED
from benchmarks.peers import print_result

_LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _LLAMA_ROPE,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA_1B = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64}
_LLAMA_3B = {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128}
_FALCON = {
    "vocab_size": 65537,
    "hidden_size": 2048,
    "intermediate_size": 4608,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_d_ssm": 3072,
    "mamba_n_heads": 48,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_chunk_size": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
    "tie_word_embeddings": False,
}
_SMOLLM = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 130000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_QWEN = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
_MAMBA = {"vocab_size": 50280, "hidden_size": 2048, "num_hidden_layers": 48, "state_size": 16}

CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama-3.2-1b": (LlamaConfig, _LLAMA | _LLAMA_1B),
    "llama-3.2-3b": (LlamaConfig, _LLAMA | _LLAMA_3B),
    "smollm2-1.7b": (LlamaConfig, _SMOLLM),
    "qwen2.5-1.5b": (Qwen2Config, _QWEN),
    "falcon-h1-1.5b": (FalconH1Config, _FALCON),
    "mamba-1.4b": (MambaConfig, _MAMBA),
}
_TOY = {"num_hidden_layers": 2, "vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2}
BLOCK = 1 << 20  # entries drawn; they are repeated to fill a matrix


def build(name: str, toy: bool, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Return a model in bfloat16, its matrices filled with one random block over and over."""
    kind, values = CONFIGS[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with no_init_weights(), torch.device(device):
            options = {} if kind is MambaConfig else {"attn_implementation": "sdpa"}
            model = AutoModelForCausalLM.from_config(kind(**values | (_TOY if toy else {})), **options)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    _fill(model)
    return model.to(torch.bfloat16).requires_grad_(False).eval()


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Fill matrices with normal numbers, vectors with ones, biases with zeros, and A_log so that states decay."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(SEED)).mul_(0.02).to(torch.bfloat16)
    block = block.to(next(model.parameters()).device)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        elif parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            for part in parameter.view(-1).split(BLOCK):
                part.copy_(block[: part.numel()])


class Clock(BaseStreamer):
    """Notes when each token comes; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has been noted."""


@torch.no_grad()
def child(text: str) -> None:
    """Measure one model as the JSON object `text` says, through its own `generate`, and print the result."""
    task = json.loads(text)
    model = build(task["model"], task["toy"])
    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(3, model.config.vocab_size, (1, task["context"]), generator=generator)
    _generate(model, prompt, 2)
    clock = _generate(model, prompt, task["tokens"] + 1)
    # The prompt, the first token, and then the steps.
    first, *steps = (later - sooner for sooner, later in itertools.pairwise(clock.times))
    print_result(first, steps, sum(x.nbytes for x in model.parameters()))


def _generate(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> Clock:
    clock = Clock()
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    mask = torch.ones_like(prompt)
    model.generate(prompt, attention_mask=mask, do_sample=False, streamer=clock, pad_token_id=0, **limits)
    return clock
