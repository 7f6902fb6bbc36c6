"""Calls whose results are compared to the bit, with those of some of their samples.

Two kinds of calls rest on torch's own bits, which depend on where a number lies: those with a sink, whose share is torch's
sigmoid, and those that project by a matrix; the matrices are identities here, without a bias, so that every product is exact.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlattn_fast.backends.reference.paged_attention_statistics import STATISTICS
from vlattn_fast.checking.cases import Example, Sizes, cases_of
from vlattn_fast.dispatch.choice import load
from vlattn_fast.ops import OPERATORS
from vlattn_fast.ops.paged_attention_statistics import paged_attention_statistics

OUTPUTS = {
    "score_attention": ("out", "lse"),
    "relevancy_attention": ("out", "carrier"),
    "relevancy_step": ("relevancy",),
    "relevancy_residual": ("sum", "carrier"),
    "recurrent_step": ("relevancy",),
    "attention_map": ("map",),
    "attention_divergence": ("divergence",),
    "indexer_divergence": ("divergence",),
    "congruence_loss": ("loss",),
    "stacked_cross_attention": ("similarity",),
    "maxsim": ("similarity",),
}


def calls(name: str, sizes: Sizes) -> Iterator[Example]:
    """Of each kind, and where there are keys also with key heads that are shared."""
    if name == "paged_attention_statistics":
        yield _requests(sizes.batch)
        return
    if name == "maxsim":  # its queries are the samples
        sizes = sizes._replace(images=7, captions=sizes.batch)
    for example in cases_of(name).examples(sizes):
        if example.operator != name or "sink" in example.tensors:
            continue
        tensors = {key: _exact(key, x) for key, x in example.tensors.items()}
        options = {**example.options, **({"reduction": "none"} if name == "congruence_loss" else {})}
        steps = name == "recurrent_step"  # its gradients are those of streaming
        yield replace(example, tensors=tensors, options=options, differentiable=not steps)
        if "key" in tensors:
            tensors |= {key: x[:, :2] for key, x in tensors.items() if key in ("key", *(() if steps else ("value",)))}
            shared = {} if steps else {"enable_gqa": True}
            yield replace(example, tensors=tensors, options={**options, **shared}, differentiable=not steps)


def _requests(batch: int) -> Example:
    """A request a sample, with its newest token."""
    tensors = {"query": torch.randn(batch, 4, 24), "key_cache": torch.randn(40, 2, 16, 24)}
    options = {"block_table": torch.randint(40, (batch, 5)), "lengths": torch.randint(1, 80, (batch,))}
    options |= {"key_groups": torch.randint(-1, 3, (batch, 80)), "num_groups": 3, "statistics": STATISTICS}

    def arrange(x: dict[str, Tensor]) -> dict[str, Any]:
        return {**x, "query_starts": torch.arange(len(x["query"]) + 1)}

    return Example(paged_attention_statistics, "", tensors, options, arrange, differentiable=False)


def _exact(name: str, x: Tensor) -> Tensor:
    if name == "bias":
        return torch.zeros_like(x)
    return torch.eye(len(x), dtype=x.dtype) if name in ("weight", "query_weight", "key_weight") else x


class Run:
    """A call on some of the samples: its results by name, those of random cotangents and tangents among them."""

    def __init__(self, example: Example, backend: str, dtype: torch.dtype, batch: int) -> None:
        self.example, self.backend, self.tensors, self.batch = example, backend, example.in_dtype(dtype), batch
        self.drawn: dict[str, Tensor] = {}
        module = load(OPERATORS[example.operator].backends, backend)
        is_plain = example.differentiable and "score" not in example.arguments(self.tensors)
        self.has_second, self.has_tangents = (is_plain and hasattr(module, name) for name in ("second", "jvp"))

    def results(self, first: int = 0, last: int | None = None) -> dict[str, Tensor]:
        samples = slice(first, last)
        leaves = {name: self._of(x, samples).detach().clone() for name, x in self.tensors.items()}
        options = {name: self._of(x, samples) for name, x in self.example.options.items()}
        call = replace(self.example, options=options)
        results = self._tangents(call, leaves, samples) if self.has_tangents else {}
        leaves = {name: x.requires_grad_(self.example.differentiable) for name, x in leaves.items()}
        results |= (outputs := self._outputs(call, leaves))
        if any(x.requires_grad for x in outputs.values()):
            results |= (grads := self._gradients("gradient", outputs, leaves, samples))
            results |= self._gradients("second gradient", grads, leaves, samples) if self.has_second else {}
        return {name: x.detach() for name, x in results.items()}

    def differing(self, whole: dict[str, Tensor], first: int, last: int) -> set[str]:
        """The results of these samples that have other bits than those of all samples, `whole`."""
        part = self.results(first, last)
        of_samples = {name: x[first:last] for name, x in whole.items() if x.shape[:1] == (self.batch,)}
        return {name for name, x in of_samples.items() if not torch.equal(x, part[name])}

    def _gradients(self, title: str, of: dict[str, Tensor], leaves: dict[str, Tensor], samples: slice) -> dict[str, Tensor]:
        of = {name: x for name, x in of.items() if x.requires_grad}
        grads = torch.autograd.grad(
            list(of.values()),
            list(leaves.values()),
            [self._random(name, x, samples) for name, x in of.items()],
            create_graph=self.has_second,
            materialize_grads=True,
            allow_unused=True,
        )
        return {f"{title} of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def _tangents(self, call: Example, leaves: dict[str, Tensor], samples: slice) -> dict[str, Tensor]:
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(x, self._random(f"tangent of {name}", x, samples)) for name, x in leaves.items()}
            outputs = {name: forward_ad.unpack_dual(x).tangent for name, x in self._outputs(call, duals).items()}
        return {f"tangent of {name}": x for name, x in outputs.items() if x is not None}

    def _random(self, name: str, like: Tensor, samples: slice) -> Tensor:
        """Random numbers by this name, drawn when it is first asked for, for all samples."""
        return self._of(self.drawn.setdefault(name, torch.randn_like(like)), samples)

    def _of(self, x: Any, samples: slice) -> Any:
        """These samples of what has some: no other size is as large as the batch."""
        return x[samples] if isinstance(x, Tensor) and x.shape[:1] == (self.batch,) else x

    def _outputs(self, call: Example, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        result = call.run(tensors, backend=self.backend)
        names = getattr(result, "_fields", None) or OUTPUTS[call.operator]
        return dict(zip(names, [result] if isinstance(result, Tensor) else result, strict=False))
