"""A micro model with every part of Hymba in it."""

import torch

from hymba.model import Hymba, HymbaConfig, init_weights


def micro_config(**changes) -> HymbaConfig:
    """Five layers: global first, middle and last, a sliding group of two, window 5, three meta tokens."""
    values = {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "v_head_dim": 16,
        "intermediate_size": 40,
        "d_inner": 48,
        "d_state": 4,
        "dt_rank": 3,
        "num_meta_tokens": 3,
        "sliding_window": 5,
        "global_layers": (0, 3, 4),
        "kv_groups": ((1, 2),),
    }
    return HymbaConfig.named("tiny", **(values | changes))


def micro_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Hymba:
    """A micro model whose every weight matters: larger than at initialisation, and no norm weight is one."""
    model = init_weights(Hymba(micro_config(**changes)), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 2 and not name.endswith("A_log"):
                parameter.mul_(4)
    return model.to(dtype).eval()
