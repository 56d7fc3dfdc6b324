"""Weights that accelerate keeps in CPU memory or on disk, and loads for the time of a module's forward pass.

accelerate's hook on a module (`_hf_hook`) loads the weights before that module's own forward and frees them after it.
The layers also read weights of their submodules directly, so they load all of them first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from hymba.errors import HymbaError


def is_hooked(module: nn.Module) -> bool:
    """Return whether accelerate runs a hook around the forward pass of `module` itself."""
    return "_hf_hook" in module.__dict__


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device that accelerate runs `module` on, or None if no hook says so."""
    for hook in _hooks(module):
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device)
    return None


def prepare_dispatched(model: nn.Module) -> None:
    """Make a model that accelerate has dispatched ready to run.

    A `device_map` may name single parameters, such as the meta tokens. accelerate attaches no hook for those, so they
    are loaded here and stay loaded: they are small.

    Raises:
        HymbaError: `device_map` puts modules on several devices.
    """
    devices = {device for module in model.modules() if (device := execution_device(module)) is not None}
    if len(devices) > 1:
        raise HymbaError(
            f"device_map runs the model on {' and '.join(sorted(map(str, devices)))}, but a Hymba runs on one device: "
            'use device_map={"": 0}, or offload to "cpu" or "disk"'
        )
    for device, (path, module) in product(devices, model.named_modules()):
        for name, parameter in () if is_hooked(module) else module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = _stored_weight(model, f"{path}.{name}")
                module.register_parameter(name, nn.Parameter(value.to(device), parameter.requires_grad))
            elif parameter.device != device:
                parameter.data = parameter.data.to(device)


def _stored_weight(model: nn.Module, name: str) -> Tensor:
    """Return an offloaded weight. A hook's map holds those of the whole model; a prefix makes them its module's."""
    for path, module in model.named_modules():
        for hook in _hooks(module):
            weights: Any = getattr(hook, "weights_map", None)
            if hasattr(weights, "prefix"):
                return weights.dataset[weights.prefix.removesuffix(f"{path}.") + name]
    raise HymbaError(f"{name} is on the meta device, and no hook of accelerate loads it: load the model anew")


@contextmanager
def loaded(*modules: nn.Module) -> Iterator[None]:
    """Load the offloaded weights of `modules`, each by itself, and free them at the end of the block.

    Inside, the modules run without accelerate's hooks, so that no weight is loaded twice or freed early. Weights that
    are loaded already, by a block or a forward pass around this one, stay loaded afterwards.
    """
    with ExitStack() as stack:
        for module in modules:
            if is_hooked(module) and _is_offloaded(module):
                stack.enter_context(_loaded(module))
        yield


@contextmanager
def _loaded(module: Any) -> Iterator[None]:
    forward = module.forward
    module._hf_hook.pre_forward(module)
    module.forward = module._old_forward
    try:
        yield
    finally:
        module.forward = forward
        module._hf_hook.post_forward(module, None)


def _is_offloaded(module: nn.Module) -> bool:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(x.is_meta for x in tensors)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks of `module` one by one; accelerate chains several into one."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
