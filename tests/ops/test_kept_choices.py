"""The plan that `planned` has kept is that of a call whose checks and refusals would read the same, and of no other."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

import vlattn_fast as va
from vlattn_fast import scores
from vlattn_fast.backends import native
from vlattn_fast.backends.cuda import _shared_library
from vlattn_fast.dispatch import call as calls
from vlattn_fast.dispatch import choice
from vlattn_fast.ops import OPERATORS

X = torch.zeros(2, 3)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """The kept plans, none yet."""
    plans: dict[Any, Any] = {}
    monkeypatch.setattr(choice, "_PLANS", plans)
    return plans


class Asked:
    """A plan that counts how often it is made."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        self.times += 1
        return arguments

    def during(self, tensors: tuple[Any, ...], options: tuple[Any, ...], backend: str = "streaming") -> int:
        """How often a call asks for it."""
        before = self.times
        *_, named = choice.planned(self, *tensors, *options, backend)
        assert named == backend
        return self.times - before


class Plain(Tensor):
    """A tensor of another class."""


class Own(scores.Dot):
    """A score function of another class."""


TENSORS: dict[str, Callable[[], Any]] = {
    "shape": lambda: X.mT,
    "dtype": lambda: X.to(torch.bfloat16),
    "device": lambda: X.to("meta"),
    "layout": lambda: X.to_sparse(),
    "gradient": lambda: X.detach().requires_grad_(),
    "absent": lambda: None,
}
Shared = calls.AttentionArguments
W, U = torch.zeros(3, 3), torch.zeros(3)
SCORES: dict[str, Callable[[], scores.Score]] = {
    "class": lambda: scores.Hadamard(U, W),
    "shape": lambda: scores.Additive(U, W[:2]),
    "dtype": lambda: scores.Additive(U, W.double()),
    "gradient": lambda: scores.Additive(U, W.clone().requires_grad_()),
    "absent": lambda: scores.Additive(U),
    "elsewhere": lambda: scores.Additive(U, None, W),
    "word": lambda: scores.Additive(U, W, method="series"),
    "number": lambda: scores.Additive(U, W, tolerance=1.0),
}
OPTIONS: dict[str, tuple[Any, ...]] = {"number": (2, None), "bool": (True, None), "float": (1.0, None), "word": (1, "a")}
SEQUENCES: dict[str, Any] = {
    "tensor": ((X, X.mT), (X, X)),
    "length": ((X, X, X), (X,)),
    "option": ((X, 1), (X, X)),
    "list": ([X, X], (X, X)),  # which a check may refuse
    "depth": ((X, (X,)), (X, X)),
    "absent": (None, (X, X)),
}
# what was asked first, what is the same, and what is another
OTHERS: dict[str, tuple[Any, Any, Callable[[], Any]]] = {
    **{f"{what} of a tensor": ((X, X), (X + 1.0, X), lambda x=x: (X, x())) for what, x in TENSORS.items()},
    **{f"{what} of the first": ((X, X), (X + 1.0, X), lambda x=x: (x(), X)) for what, x in TENSORS.items()},
    # the arguments that calls of attention share come as one
    **{
        f"{what} of attention": ((Shared(X, X),), (Shared(X + 1.0, X),), lambda x=x: (Shared(X, x()),))
        for what, x in TENSORS.items()
    },
    "scale": ((Shared(X, X),), (Shared(X + 1.0, X),), lambda: (Shared(X, X, scale=2.0),)),
    **{
        f"{what} of a score": ((scores.Additive(U, W),), (scores.Additive(U + 1.0, W + 1.0),), lambda score=score: (score(),))
        for what, score in SCORES.items()
    },
    **{f"{what} of a sequence": (((X, X), (X, X)), ((X + 1.0, X), (X, X + 1.0)), lambda x=x: x) for what, x in SEQUENCES.items()},
    **{
        f"option, {what}": ((X, 1, None), (X + 1.0, 1, None), lambda options=options: (X, *options))
        for what, options in OPTIONS.items()
    },
}


def test_the_same_is_asked_once() -> None:
    asked = Asked()
    assert asked.during((X, None), (1, None)) == 1
    assert asked.during((X + 1.0, None), (1, None)) == 0
    parameter = Parameter(X, requires_grad=False)
    assert [asked.during((parameter, None), (1, None)) for _ in range(2)] == [1, 0]
    assert asked.during((X, None), (1, None), "reference") == 1
    assert Asked().during((X, None), (1, None)) == 1  # of another operator


@pytest.mark.parametrize("what", OTHERS)
def test_another_argument_is_asked_for(what: str) -> None:
    asked, (first, same, another) = Asked(), OTHERS[what]
    assert [asked.during(x, ()) for x in (first, same)] == [1, 0]
    assert [asked.during(another(), ()) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    "state", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)], ids=["no gradients", "autocast"]
)
def test_another_state_of_torch_is_asked_for(state: Callable[[], AbstractContextManager[Any]]) -> None:
    asked = Asked()
    asked.during((X,), ())
    with state():
        assert [asked.during((X,), ()) for _ in range(2)] == [1, 0]
    assert asked.during((X,), ()) == 0


@pytest.mark.parametrize("what", ["interpreter", "CPU library", "CUDA library", "emulated library"])
def test_another_choice_of_backends_is_asked_for(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = native.library._replace(exists=True), _shared_library.library._replace(exists=True, device_type="cuda")
    monkeypatch.setattr(native, "library", cpu)
    monkeypatch.setattr(_shared_library, "library", cuda)
    monkeypatch.setattr(calls, "on_cpu", None)
    asked = Asked()
    asked.during((X,), ())
    module, name, value = {
        "interpreter": (calls, "on_cpu", calls.OnCpu()),
        "CPU library": (native, "library", cpu._replace(exists=False)),
        "CUDA library": (_shared_library, "library", cuda._replace(exists=False)),
        "emulated library": (_shared_library, "library", cuda._replace(device_type="cpu")),
    }[what]
    monkeypatch.setattr(module, name, value)
    assert [asked.during((X,), ()) for _ in range(2)] == [1, 0]


@pytest.mark.parametrize(
    "tensors, options",
    [((X.as_subclass(Plain),), ()), ((X,), ({1: 2},)), (((X, {1: 2}),), ()), ((X,), (Own(),))],
    ids=["class of tensors", "dict", "dict among others", "class of scores"],
)
def test_what_may_hold_more_is_not_kept(tensors: tuple[Any, ...], options: tuple[Any, ...], kept: dict[Any, Any]) -> None:
    asked = Asked()
    assert [asked.during(tensors, options) for _ in range(2)] == [1, 1] and not kept


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_not_kept(kept: dict[Any, Any]) -> None:
    asked = Asked()
    assert [asked.during((torch.nested.nested_tensor([X, X]),), ()) for _ in range(2)] == [1, 1] and not kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # which torch gives itself
def test_tangents_are_not_kept(kept: dict[Any, Any]) -> None:
    asked = Asked()
    with forward_ad.dual_level():
        assert [asked.during((forward_ad.make_dual(X, X),), ()) for _ in range(2)] == [1, 1] and not kept


def test_not_too_many_are_kept(kept: dict[Any, Any]) -> None:
    asked = Asked()
    for number in range(5000):
        asked.during((X,), (number,))
    assert 0 < len(kept) <= 4096


Q, C = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4)
CALLS: dict[str, Callable[..., Any]] = {
    "score_attention": lambda x, **options: va.score_attention(x, Q, Q, **options),
    "relevancy_attention": lambda x, **options: va.relevancy_attention(x, Q, Q, C, **options),
    "relevancy_step": lambda x, **options: va.relevancy_step(C, x, Q, Q, Q, **options),
    "attention_map": lambda x, **options: va.attention_map(x, Q, **options),
    "attention_statistics": lambda x, **options: va.attention_statistics(x, Q, **options),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_wrong_is_said_behind_a_call_like_it(name: str, kept: dict[Any, Any]) -> None:
    """Also where Python takes it for what was right."""
    call, mask = CALLS[name], torch.zeros(4, 4)
    good: list[dict[str, Any]] = [{"is_causal": True}, {"enable_gqa": False}, {"attn_mask": mask}, {"backend": "streaming"}]
    for options in good:
        call(Q, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(Q.to(torch.bfloat16))
    number = len(kept)
    assert number == len(good) + 1
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (Q, {"is_causal": 1}, "is_causal must be True or False"),
        (Q, {"enable_gqa": 0}, "enable_gqa must be True or False"),
        (Q, {"attn_mask": mask.clone().requires_grad_()}, "attn_mask must not require a gradient"),
        (Q, {"backend": "triton"}, "cannot run"),
        (Q.to_sparse(), {}, "query must be a dense torch.Tensor"),
        (Q.to(torch.bfloat16), {}, "key must have the dtype of query"),
    ]
    for x, options, words in wrong:
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=words):
                call(x, **options)
    assert len(kept) == number


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_is_kept_gives_the_same(name: str, kept: dict[Any, Any]) -> None:
    x = torch.randn(Q.shape, generator=torch.Generator().manual_seed(0))
    first, second = (CALLS[name](x) for _ in range(2))
    assert len(kept) == 1
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def test_auto_takes_the_same_with_and_without_a_backward_pass(kept: dict[Any, Any]) -> None:
    """So that torch.jit.trace, which checks a trace without gradients, finds the same graph."""
    x = torch.zeros(1, 2, 4, 8)
    for tensor, state in ((x, nullcontext()), (x.clone().requires_grad_(), nullcontext()), (x, torch.no_grad())):
        with state:
            va.score_attention(tensor, Q, Q)
    assert [plan.backend for plan in kept.values()] == ["cpu" if native.library.exists else "sdpa"] * 3


@pytest.mark.parametrize(
    "what, size, dtype, taken",
    [
        ("dot", 4, torch.bfloat16, "sdpa"),
        ("padding", 4, torch.bfloat16, "triton"),
        ("padding", 4, torch.float32, "sdpa"),
        ("additive", 4, torch.bfloat16, "cuda"),
        ("additive", 4, torch.float32, "triton"),
        ("additive, padding", 4, torch.bfloat16, "cuda"),
        ("additive", 200, torch.bfloat16, "triton"),  # CUDA C++ takes 128 units
    ],
)
def test_what_leads_on_a_gpu(what: str, size: int, dtype: torch.dtype, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the times of an H100."""
    monkeypatch.setattr(_shared_library, "library", _shared_library.library._replace(exists=True, device_type="cuda", error=None))
    options: dict[str, Any] = {"key_mask": torch.ones(1, 3, dtype=torch.bool)} if "padding" in what else {}
    if "additive" in what:
        options["score"] = scores.Additive(torch.ones(1, size, dtype=dtype))
    operator, rows = OPERATORS["score_attention"], torch.ones(1, 1, 3, size, dtype=dtype)
    call = operator.describe(query=rows, key=rows, value=rows, **options)
    assert choice.select(operator.backends, call._replace(device_type="cuda", capability=(9, 0)), "auto") == taken


def test_another_thread_may_clear_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cleared(dict[Any, Any]):
        def __setitem__(self, key: Any, value: Any) -> None:
            self.clear()

    monkeypatch.setattr(choice, "_SORTS", Cleared())
    monkeypatch.setattr(choice, "_PLANS", Cleared())
    assert Asked().during((X,), (1,)) == 1
