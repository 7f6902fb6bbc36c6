"""Tensors that are not plain ones: without values, of other layouts, with tangents; and dtypes that do not go together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import vlattn_fast as va
from tests.helpers.ops.every_call import CALLS, every_call, gradients, leaves, outputs_of
from vlattn_fast import scores as S
from vlattn_fast.checking.cases import Example
from vlattn_fast.ops._groups import resolve_groups

BACKENDS = ("auto", "streaming", "reference")


def run(every: Example, x: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Outputs, and gradients where there are any."""
    x = leaves(every, x)
    outputs = outputs_of(every.run(x, backend=backend))
    return [*outputs, *gradients(outputs, x)]


def facts(tensors: list[Tensor]) -> list[Any]:
    return [(tuple(x.shape), x.dtype) for x in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors(name: str, backend: str) -> None:
    every = every_call(name, 5)
    results = run(every, {key: value.to("meta") for key, value in every.tensors.items()}, backend)
    assert facts(results) == facts(run(every, every.tensors, backend))
    assert all(x.is_meta for x in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors(name: str, backend: str) -> None:
    every = every_call(name, 5)
    want = facts(run(every, every.tensors, backend))
    with FakeTensorMode():
        every = every_call(name, 5)
        assert facts(run(every, every.tensors, backend)) == want


@pytest.mark.parametrize("backend", ("auto", "streaming"))
def test_a_sine_series_without_values(backend: str) -> None:
    """Its length follows the range of the data, but no output does."""

    def call(device: str) -> list[Tensor]:
        x = [torch.randn(2, 4, 5 + n, 6, device=device, requires_grad=True) for n in range(2)]
        vector = torch.randn(6, device=device, requires_grad=True)
        score = S.Additive(vector, method="series", tolerance=0.1)
        outputs = va.score_attention(x[0], x[1], x[1], score=score, return_lse=True, backend=backend)
        return [*outputs, *torch.autograd.grad([out.sum() for out in outputs], [*x, vector])]

    want = facts(call("cpu"))
    assert facts(call("meta")) == want
    with FakeTensorMode():
        assert facts(call("cpu")) == want


def test_lengths_and_groups_without_values() -> None:
    """Arguments that are checked by value elsewhere."""
    with FakeTensorMode():
        images, captions, query = torch.randn(2, 4, 8), torch.randn(3, 5, 8), torch.randn(1, 2, 4, 8)
        lengths, groups = torch.tensor([1, 2, 3]), torch.tensor([0, 1, 1, 0])
        assert va.stacked_cross_attention(images, captions, lengths).shape == (2, 3)
        assert va.attention_statistics(query, query, key_groups=groups, num_groups=2).mass.shape == (1, 2, 4, 2)
        with pytest.raises(ValueError, match="num_groups must be an integer if .* got None"):
            va.attention_statistics(query, query, key_groups=groups)


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor(list(x))


def dtensor(x: Tensor) -> Tensor:
    """A DTensor without a mesh of processes: its class, by name, is what is looked at."""

    class DTensor(Tensor):
        pass

    return x.as_subclass(DTensor)


FOREIGN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nested": (nested, "a nested torch.float32 tensor"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "a nested torch.float32 tensor"),
    "sparse": (lambda x: x.to_sparse(), "a torch.sparse_coo torch.float32 tensor"),
    "DTensor": (dtensor, "a DTensor of torch.float32"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", CALLS)
def test_other_layouts_are_refused_by_name(name: str, kind: str) -> None:
    make, words = FOREIGN[kind]
    every = every_call(name, 5)
    x = every.tensors
    for argument in (argument for argument, tensor in x.items() if tensor.dim() > 1):  # nested tensors have two dimensions
        changed = x | {argument: make(x[argument])}
        # of a nested query an operator on documents says what else must be nested, or which dimension must vary
        expected = rf"must be a (dense torch\.Tensor|jagged tensor|nested tensor).*; got ({words}|a torch)"
        with pytest.raises(TypeError, match=expected):
            every.run(changed)


def tangents() -> dict[str, tuple[Callable[[Tensor], Any], Tensor]]:
    """Calls of one secondary argument that test_tangents of properties/ has not, or that has no tangent."""
    q, carrier = torch.randn(1, 2, 4, 8), torch.randn(1, 3, 4)
    images = torch.randn(2, 4, 8)
    return {
        "attn_mask": (lambda x: va.score_attention(q, q, q, attn_mask=x), torch.randn(4, 4)),
        "carrier": (lambda x: va.relevancy_attention(q, q, q, x), carrier),
        "residual_weight": (lambda x: va.relevancy_attention(q, q, q, carrier, residual_weight=x), torch.rand(1, 4)),
        "attention_weight": (lambda x: va.relevancy_attention(q, q, q, carrier, attention_weight=x), torch.rand(1, 4)),
        "lse": (lambda x: va.relevancy_step(carrier, q, q, rule="attention", lse=x), torch.randn(1, 2, 4)),
        "branch_carrier": (lambda x: va.relevancy_residual(images, images, images.mT, x), images.mT),
        "cross text key": (lambda x: va.congruence_loss((q, q), (q, q), ((q, q), (q, x))), q),
        "offset": (lambda x: va.score_attention(q, q, q, score=S.Hadamard(q[0, 0, 0], offset=x)), torch.randn(1)),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", tangents())
def test_a_tangent_is_no_zero_in_silence(name: str) -> None:
    """Of a float argument: a constant raises, a carrier is passed on, and the others have the tangent that the gradient has."""
    call, x = tangents()[name]

    def total(x: Tensor) -> Tensor:
        return sum(y.sum() for y in outputs_of(call(x)) if y.is_floating_point())

    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        if name in ("attn_mask", "residual_weight", "attention_weight"):
            with pytest.raises(ValueError, match=f"^{name} must not have a forward-mode tangent"):
                call(dual)
            return
        made = forward_ad.unpack_dual(total(dual)).tangent
    expected = tangent.sum()  # of a carrier, whose backward pass is a rule
    if name != "carrier":
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(total(leaf), leaf, allow_unused=True, materialize_grads=True)
        expected = torch.zeros(()) if name == "branch_carrier" else (grad * tangent).sum()
    torch.testing.assert_close(torch.zeros(()) if made is None else made, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CALLS)
def test_float64_beside_float32_under_autocast(name: str) -> None:
    every = every_call(name, 5)
    x = every.tensors
    second = list(x)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"(must have the dtype of|must be torch\.float32|must have .*dtype).*; got"):
            every.run(x | {second: x[second].double()})


def test_an_attn_mask_that_requires_a_gradient() -> None:
    q, mask = torch.randn(1, 2, 4, 8), torch.randn(4, 4, requires_grad=True)
    carrier, weight = torch.zeros(1, 1, 4), torch.rand(1, 4, requires_grad=True)
    calls: dict[str, Callable[[], Any]] = {
        "attn_mask": lambda: va.score_attention(q, q, q, attn_mask=mask),
        "residual_weight": lambda: va.relevancy_attention(q, q, q, carrier, residual_weight=weight),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name} must not require a gradient.*; got"):
            call()
        for off in (torch.no_grad(), torch.inference_mode()):
            with off:
                call()


class OnDevice:
    """Groups on a GPU, as far as `resolve_groups` asks."""

    device, is_meta, is_cuda = torch.device("cuda"), False, False

    def __init__(self, values: list[int]) -> None:
        self.values, self.reads = torch.tensor(values), 0

    def numel(self) -> int:
        return self.values.numel()

    def aminmax(self) -> Any:
        self.reads += 1
        return self.values.aminmax()


def test_groups_on_a_gpu_are_read_once_or_not_at_all() -> None:
    groups = OnDevice([0, 2, 1])
    for num_groups, number, reads in ((2, 2, 0), (None, 3, 1)):
        assert resolve_groups(groups, num_groups) == number and groups.reads == reads  # type: ignore[arg-type]
