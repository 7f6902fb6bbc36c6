"""All that a call could leave behind, in a model and in this process."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from vlattn_fast.attach.events import RUNNING

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a call could leave behind, in a model and in this process."""
    modules, tensors = dict(model.named_modules()), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "forwards": {name: (type(module), vars(module).get("forward")) for name, module in modules.items()},
        "implementations": {
            name: getattr(getattr(m, "config", None), "_attn_implementation", None) for name, m in modules.items()
        },
        "functions": {name: getattr(module, "attention_function", None) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {name: [len(getattr(module, hooks)) for hooks in HOOKS] for name, module in modules.items()},
        "tensors": {name: (id(x), x._version, x.requires_grad, x.dtype, id(x.grad)) for name, x in tensors.items()},
        "global hooks": [len(getattr(nn.modules.module, f"_global{hooks}", ())) for hooks in HOOKS],
        "modes": [*_get_current_function_mode_stack(), torch._C._len_torch_dispatch_stack(), RUNNING.get()],
        "random": [torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()],
        "defaults": [torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()],
        "gradients": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")],
        "saved tensors": torch._C._autograd._saved_tensors_hooks_is_enabled(),
    }


def assert_same(model: nn.Module, before: dict[str, Any], what: str) -> None:
    after = state_of(model)
    for name, value in before.items():
        assert after[name] == value, f"{what}: {name} changed"
