"""Triton kernels, one file per operator. Installed as `vlattn_fast.kernels`; the name `kernels` belongs to another package.

Nothing is imported here: a kernel, and with it triton, is imported at its first use.

In: the inputs of an operator, checked, as CUDA tensors.
Out: its outputs, or its gradients.
Imports: backends, backends.reference, _ground.
"""

import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlattn_fast.kernels import attention_divergence as attention_divergence
    from vlattn_fast.kernels import attention_map as attention_map
    from vlattn_fast.kernels import attention_statistics as attention_statistics
    from vlattn_fast.kernels import congruence_loss as congruence_loss
    from vlattn_fast.kernels import indexer_divergence as indexer_divergence
    from vlattn_fast.kernels import maxsim as maxsim
    from vlattn_fast.kernels import paged_attention_statistics as paged_attention_statistics
    from vlattn_fast.kernels import relevancy_attention as relevancy_attention
    from vlattn_fast.kernels import relevancy_residual as relevancy_residual
    from vlattn_fast.kernels import score_attention as score_attention
    from vlattn_fast.kernels import stacked_cross_attention as stacked_cross_attention


def __getattr__(name: str) -> ModuleType:
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"{__name__} has no {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
