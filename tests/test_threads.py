"""Eight threads of operators and of `explain` at once, with a GIL and, in a free-threaded Python, without one: the bits of one
thread.

`python -X gil=0 -m pytest tests/test_threads.py` is the test without the GIL; the modules of other packages may turn it on again
otherwise.
"""

import contextvars
import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers import programs
from vlattn_fast.attach.events import RUNNING
from vlattn_fast.attach.observer import Observer
from vlattn_fast.checking import verify
from vlattn_fast.checking.cases import Sizes
from vlattn_fast.models.uniter import UNITER, UNITERConfig
from vlattn_fast.ops import OPERATORS

THREADS = 8
BACKENDS = ("cpu", "sdpa", "streaming", "reference")
SIZES = Sizes(queries=9, keys=11, head_dim=8, value_dim=8, regions=6, words=5, features=8, rows=2, images=2, captions=2)


@pytest.fixture(autouse=True, scope="module")
def switching() -> Iterator[None]:
    """With a GIL threads take turns a hundred times as often as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[list[Any]]:
    """The results of all calls in each thread. All begin together, each with another call."""
    begin = threading.Barrier(THREADS)

    def run(number: int) -> list[Any]:
        begin.wait()
        results: list[Any] = [None] * len(calls)
        for i in range(len(calls)):
            each = (i + number * len(calls) // THREADS) % len(calls)
            results[each] = calls[each]()
        return results

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def equal_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return got.keys() == expected.keys() and all(
        torch.equal(torch.nan_to_num(got[name]), torch.nan_to_num(x)) for name, x in expected.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype: torch.dtype) -> None:
    """Outputs and gradients on every backend of a CPU; torch has one level of forward mode for all threads."""
    named = {}
    for case in verify.cases(sizes=SIZES):
        tensors = case.in_dtype(dtype)
        for backend in BACKENDS:
            if not OPERATORS[case.operator].refusals(backend, case.arguments(tensors)):
                named.setdefault((case.operator, backend), (case, tensors))
    assert {operator for operator, _ in named} == {*OPERATORS}
    calls = [
        lambda case=case, tensors=tensors, backend=backend: verify._run(case, tensors, backend)
        for (_, backend), (case, tensors) in named.items()
    ]
    expected = [call() for call in calls]
    for results in in_threads(calls):
        wrong = [name for name, got, one in zip(named, results, expected, strict=True) if not equal_bits(got, one)]
        assert not wrong


def test_first_calls() -> None:
    """All threads make the first calls of a new process at once: libraries, modules and kernels are loaded then."""
    done = programs.run(
        """
import json, sys, threading, torch
import vlattn_fast as va
torch.manual_seed(0)
q, carrier, begin, results = torch.randn(2, 3, 9, 8), torch.rand(2, 3, 9), threading.Barrier(8), []
sys.setswitchinterval(5e-6)
def first():
    begin.wait()
    x = q.clone().requires_grad_()
    out, r = va.relevancy_attention(x, q, q, carrier, rule="attention")
    (out.sum() + va.score_attention(x, q, q, score=va.scores.Cosine()).sum()).backward()
    results.append([out, r, x.grad, va.attention_statistics(q, q).entropy])
threads = [threading.Thread(target=first) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([len(results), all(torch.equal(a, b) for one in results for a, b in zip(one, results[0], strict=True))]))
"""
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [THREADS, True]


def uniter() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """A model of this package, which needs no transformers, and its inputs."""
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    torch.manual_seed(0)
    model = UNITER(UNITERConfig(**sizes, max_position_embeddings=12, region_dim=10, position_dim=7)).eval()
    regions = {"region_features": torch.randn(3, 5, 10), "region_positions": torch.rand(3, 5, 7)}
    masks = {"attention_mask": torch.ones(3, 6, dtype=torch.bool), "region_mask": torch.rand(3, 5) > 0.2}
    return model, {"input_ids": torch.randint(9, (3, 6)), **regions, **masks}


@pytest.fixture(scope="module")
def explained() -> list[Callable[[], dict[str, Tensor]]]:
    """Explanations of models that all threads share, of two inputs and by several methods."""
    models = [uniter()]
    if find_spec("transformers") is not None:
        from tests.helpers.interpret.cases import llava, vit

        models += [(case.model.eval(), case.inputs) for case in (vit(), llava())]

    calls: list[Callable[[], dict[str, Tensor]]] = []
    for model, inputs in models:
        flipped = {key: x.flip(0) if isinstance(x, Tensor) else x for key, x in inputs.items()}
        for method, given in (("gradient", inputs), ("gradient", flipped), ("weighted", inputs), ("input_gradient", inputs)):
            calls.append(lambda a=model, b=given, c=method: va.explain(a, b, method=c).relevancy)
    return calls


@pytest.mark.slow  # tests/interpret/explaining/test_threads.py has two threads
def test_explain(explained: list[Callable[[], dict[str, Tensor]]]) -> None:
    expected = [call() for call in explained]
    for results in in_threads(explained):
        assert [i for i, (got, one) in enumerate(zip(results, expected, strict=True)) if not equal_bits(got, one)] == []


def test_a_run_is_that_of_its_thread() -> None:
    """Also if a thread has a copy of the context of a run, as each has in a free-threaded Python."""
    model, inputs = uniter()
    expected, others = va.explain(model, inputs).relevancy, list[Any]()

    def other() -> None:
        others.append(RUNNING.get())
        others.append(va.explain(model, inputs).relevancy)

    def within(*_: Any) -> None:
        if not others and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=contextvars.copy_context().run, args=(other,))
            assert RUNNING.get() is not None
            thread.start()
            thread.join()

    hook = model.register_forward_pre_hook(within)
    got = va.explain(model, inputs).relevancy
    hook.remove()
    assert others[0] is None
    assert equal_bits(others[1], expected) and equal_bits(got, expected)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_other_tools_in_the_middle_of_a_run() -> None:
    """Each runs the model several times while another thread explains it."""
    from tests.helpers.interpret.cases import llava

    case, others = llava(), list[Any]()
    model, inputs = case.model.eval(), case.inputs

    def tools() -> list[Tensor]:
        edges = va.attribute_edges(model, inputs, ["image", "last"], target=7).matrix("image", "last")
        return [va.lens(model, inputs).probability, va.logit_parts(model, inputs, 7).parts, torch.as_tensor(edges)]

    def within(*_: Any) -> None:
        if not others and threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: others.append(tools()))
            thread.start()
            thread.join()

    expected, relevancy = tools(), va.explain(model, inputs).relevancy
    hook = model.register_forward_pre_hook(within)
    got = va.explain(model, inputs).relevancy
    hook.remove()
    assert all(torch.equal(one, other) for one, other in zip(expected, others[0], strict=True))
    assert equal_bits(got, relevancy)


def test_a_run_that_a_finalizer_ends_in_another_thread() -> None:
    """Python collects a suspended generator in any thread, within a run of its own."""
    model, inputs = uniter()
    expected, others = va.explain(model, inputs).relevancy, list[Any]()
    left = Observer(torch.nn.Identity(), [], parts=[])
    left.__enter__()

    def other() -> None:
        hook = model.register_forward_pre_hook(lambda *_: left.__exit__())
        others.append(va.explain(model, inputs).relevancy)
        hook.remove()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    torch.overrides._pop_mode()  # of this thread, which the other one does not see
    assert RUNNING.get() is None
    assert equal_bits(others[0], expected)


class TakesDict(torch.nn.Module):
    """A forward with one dict, of which the pixels may be absent."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.meanwhile = torch.nn.Embedding(9, 4), list[Callable[[], None]]()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if self.meanwhile:
            self.meanwhile.pop()()
        pixels = batch.get("pixel_values")
        states = self.embedding(batch["input_ids"]).sum(1)
        return states if pixels is None else states * pixels.mean()


def test_inputs_that_are_dicts() -> None:
    """Another thread's run, of other entries, begins within a run of several passes, and ends after it."""
    model, method, others = TakesDict().eval(), va.methods.IntegratedGradients(n_steps=2), list[Any]()
    text = {"batch": {"input_ids": torch.tensor([[1, 2, 3]])}}
    both = {"batch": {**text["batch"], "pixel_values": torch.rand(1, 3, 4, 4)}}

    def explained(inputs: dict[str, Any]) -> dict[str, Tensor]:
        return va.explain(model, inputs, method=method, target=2).relevancy

    expected, begun, ended = (explained(text), explained(both)), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: others.append(explained(text)))

    def within() -> None:
        begun.set()
        assert ended.wait(10)

    def start() -> None:
        model.meanwhile.append(within)
        thread.start()
        assert begun.wait(10)

    model.meanwhile.append(start)
    try:
        got = explained(both)
    finally:
        ended.set()
        thread.join()
    assert equal_bits(others[0], expected[0]) and equal_bits(got, expected[1])
