"""What is worked out once for all layers of a call."""

import torch

from hymba.model.call import Call
from hymba.ops.attention import Plan


def place(model, steps: int, rows: int = 2, **keywords) -> Call:
    x = torch.zeros(rows, steps, model.config.hidden_size)
    return Call.place(model.config, x, model.prefix(), 10000.0, **keywords)


def test_layers_of_a_window_share_one_mask(model):
    config, documents = model.config, torch.tensor([[0, 0, 1], [0, 1, 1]])
    call = place(model, 3, documents=documents)
    masks = [call.mask(config.window(i), config.num_meta_tokens) for i in range(config.num_hidden_layers)]
    windows = {mask["window"]: mask for mask in masks}
    assert len(windows) > 1
    assert all(mask is windows[mask["window"]] for mask in masks)
    assert all(isinstance(mask["plan"], Plan) for mask in masks)
    assert len({id(mask["plan"]) for mask in masks}) == len(windows)


def test_masks_have_a_name_where_sizes_alone_decide_them(model):
    whole = place(model, 5)
    assert whole.pattern == place(model, 5, rows=3).pattern
    assert whole.pattern not in (None, place(model, 6).pattern)
    assert place(model, 5, positions=torch.ones(2, 5, dtype=torch.int64)).pattern == whole.pattern  # rotary alone
    assert place(model, 5, lengths=torch.tensor([5, 4])).pattern is None
    assert place(model, 5, documents=torch.zeros(2, 5, dtype=torch.int64)).pattern is None
    x, cache = torch.zeros(1, 5, model.config.hidden_size), model.allocate_cache(1, 8)
    assert Call.place(model.config, x, cache, 10000.0).pattern is None
