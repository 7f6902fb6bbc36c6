"""`explain` in threads, inside another run, with a shared config, and with Ctrl-C: no run sees another's."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.interpret.cases import lively
from vlattn_fast.attach.events import RUNNING
from vlattn_fast.attach.session import _overridden, overridden
from vlattn_fast.interpret import explain, probe
from vlattn_fast.models.uniter import UNITER, UNITERConfig
from vlattn_fast.nn import capture_attention

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
ROUNDS = 8


def clip_pair() -> tuple[list[torch.nn.Module], dict[str, torch.Tensor]]:
    """Two models of one config object, in training mode."""
    text = dict(TINY, vocab_size=60, max_position_embeddings=12, bos_token_id=57, eos_token_id=58)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(TINY, image_size=16, patch_size=8))
    ids = torch.tensor([[57, 5, 6, 58], [57, 7, 8, 58]])
    models = [lively(transformers.CLIPModel(config)).train() for _ in range(2)]
    return models, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}


def uniter_pair() -> tuple[list[torch.nn.Module], dict[str, torch.Tensor]]:
    config = UNITERConfig(**TINY, vocab_size=50, max_position_embeddings=12, region_dim=10, position_dim=7)
    models: list[torch.nn.Module] = [lively(UNITER(config)).train() for _ in range(2)]
    regions = {"region_features": torch.randn(2, 5, 10), "region_positions": torch.rand(2, 5, 7)}
    return models, {"input_ids": torch.randint(5, 50, (2, 7)), **regions}


PAIRS = {"clip": clip_pair, "uniter": uniter_pair}


@pytest.fixture(params=PAIRS)
def pair(request):
    torch.manual_seed(0)
    return PAIRS[request.param]()


def configs(model: torch.nn.Module) -> list[tuple[int, str]]:
    """Which config each module holds, and the attention it names."""
    held = [getattr(module, "config", None) for module in model.modules()]
    return [(id(config), getattr(config, "_attn_implementation", "")) for config in held]


def left(model: torch.nn.Module) -> list[object]:
    """What a run must leave behind as it was."""
    functions = [vars(module).get("attention_function") for module in model.modules()]
    modes = [module.training for module in model.modules()]
    return [configs(model), functions, modes, [parameter.requires_grad for parameter in model.parameters()]]


def scores(outputs) -> torch.Tensor:
    return outputs.logits_per_image.diagonal() if hasattr(outputs, "logits_per_image") else outputs.logits[:, 0]


def same(got, want) -> None:
    for name, row in want.relevancy.items():
        torch.testing.assert_close(got.relevancy[name], row, rtol=1e-4, atol=1e-5)


class OnPurposeError(Exception):
    pass


def in_two_threads(models, inputs, method="gradient"):
    """Each thread explains its model ROUNDS times; both start each round together, so that their runs overlap."""
    meet = threading.Barrier(2)

    def work(model):
        found = []
        try:
            for _ in range(ROUNDS):
                meet.wait()
                with contextlib.suppress(OnPurposeError):
                    found.append(explain(model, inputs, method=method))
        except BaseException:
            meet.abort()  # the other thread need not wait for this one
            raise
        return found

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, models))


@pytest.mark.parametrize("method", ["gradient", "weighted", "gradcam", "input_gradient"])
def test_one_model_in_two_threads(pair, method):
    """The runs share the model's modules; each sees its own attention calls alone, and the last one puts the model back."""
    (model, _), inputs = pair
    want, before = explain(model, inputs, method=method), left(model)
    for results in in_two_threads([model, model], inputs, method):
        for got in results:
            same(got, want)
    assert left(model) == before


def test_a_model_stays_in_eval_mode_until_the_last_run_over_it_ends(pair):
    """A run that ends puts nothing back that another run still needs."""
    (model, _), inputs = pair
    entered, ended = threading.Event(), threading.Event()

    def slow(outputs):
        entered.set()
        ended.wait()
        modes.append((any(module.training for module in model.modules()), any(p.requires_grad for p in model.parameters())))
        return scores(outputs)

    modes: list[tuple[bool, bool]] = []
    before = left(model)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(explain, model, inputs, target=slow)
        while not entered.wait(0.1) and not run.done():
            pass  # until it is there, or has failed
        try:
            explain(model, inputs)
        finally:
            ended.set()
        run.result()
    assert modes == [(False, False)] and left(model) == before


def test_an_exception_in_one_thread(pair):
    """One of two models of a config raises in each round, in the middle of its forward pass; the other is explained."""
    models, inputs = pair
    want, before = explain(models[1], inputs), [left(model) for model in models]

    def fail(*_):
        raise OnPurposeError

    last = [module for module in models[0].modules() if isinstance(module, torch.nn.Linear)][-1]
    with last.register_forward_pre_hook(fail):
        failed, explained = in_two_threads(models, inputs)
    assert failed == [] and len(explained) == ROUNDS
    for got in explained:
        same(got, want)
    assert [left(model) for model in models] == before


def calls_other(model, call):
    """`call` runs in the middle of the model's forward pass."""
    middle = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)][-2]
    return middle.register_forward_hook(lambda *_: call())


def explains(model, inputs):
    return explain(model, inputs, method="weighted").relevancy


def runs(model, inputs):
    with torch.no_grad():
        return scores(model.eval()(**inputs))


def fails(model, inputs):
    with pytest.raises(ZeroDivisionError):
        explain(model, inputs, target=lambda outputs: 1 / 0)


@pytest.mark.parametrize("method", ["gradient", "weighted"])
def test_a_hook_that_runs_in_the_middle_of_a_run(pair, method):
    """It explains the model that is being explained, or explains or runs another one of its config."""
    models, inputs = pair
    want = explain(models[0], inputs, method=method)
    for call, inner in ((explains, models[0]), (explains, models[1]), (runs, models[1]), (fails, models[1])):
        want_inner, found, running = call(inner, inputs), [], []
        before = [left(one) for one in models]

        def nested(call=call, inner=inner, found=found, running=running):
            if not running:  # not again from the run that this starts
                running.append(True)
                found.append(call(inner, inputs))
                running.pop()

        with calls_other(models[0], nested):
            same(explain(models[0], inputs, method=method), want)
        assert found, call
        for got in found:
            torch.testing.assert_close(got, want_inner, rtol=1e-4, atol=1e-5)
        assert [left(one) for one in models] == before, call


INPUTS = {"input_ids": torch.tensor([[2, 7, 8, 3], [2, 9, 4, 3]])}


def bert() -> nn.Module:
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50, num_labels=3)
    return lively(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)))


class Interrupted(nn.Module):
    """Ctrl-C comes when its mode is set the `after`-th time."""

    def __init__(self) -> None:
        super().__init__()
        self.after = -1

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "training":
            self.after = getattr(self, "after", -1) - 1
            if self.after == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_ctrl_c_while_attributes_are_set_or_put_back(after, place):
    modules: list[nn.Module] = [nn.Identity(), nn.Identity()]
    modules.insert(place, interrupted := Interrupted())
    interrupted.after = after
    with pytest.raises(KeyboardInterrupt), overridden((module, "training", False) for module in modules):
        assert after == 2
    assert all(module.training for module in modules)
    assert not _overridden


def test_a_context_that_a_finalizer_leaves_while_another_one_is_entered():
    """Python may collect a suspended generator at any time."""
    one, other = nn.Identity(), nn.Identity()

    def suspended():
        with overridden([(one, "training", False)]):
            yield

    generator = suspended()
    next(generator)
    states = []

    def changes():
        yield other, "training", False
        generator.close()
        states.append(one.training)
        yield one, "training", False

    def enter():
        with overridden(changes()):
            states.append(one.training)
        states.append(one.training)

    thread = threading.Thread(target=enter, daemon=True)
    thread.start()
    thread.join(10)  # of a deadlock
    assert states == [False, False, True]
    assert other.training
    assert not _overridden


def test_ctrl_c_while_torch_hands_a_call_to_the_trace():
    """torch takes a mode off for the time of a call; Ctrl-C may come before it is put back."""
    model = bert().train()
    expected = explain(model, INPUTS).relevancy["text"]

    def interrupt(*_):
        torch.overrides._pop_mode()
        raise KeyboardInterrupt

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        explain(model, INPUTS)
    with pytest.raises(KeyboardInterrupt), capture_attention(model):
        model(**INPUTS)
    handle.remove()
    assert all(module.training for module in model.modules())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert torch.equal(explain(model, INPUTS).relevancy["text"], expected)


def test_ctrl_c_while_a_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that could not put back what was there before it takes no calls."""
    model, put = bert(), RUNNING.set
    expected = explain(model, INPUTS).relevancy["text"]

    def interrupt(run: Any) -> Any:
        if run is None:
            raise KeyboardInterrupt
        return put(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RUNNING, "set", interrupt)
        explain(model, INPUTS)
    assert RUNNING.get() is None
    assert torch.equal(explain(model, INPUTS).relevancy["text"], expected)


@pytest.mark.parametrize("method", ["gradient", "rollout"])
def test_a_model_made_under_inference_mode_is_refused_and_left_as_it_was(method):
    with torch.inference_mode():
        model = bert().train()
        with pytest.raises(ValueError, match=r"model must be made outside of torch.inference_mode.*word_embeddings"):
            explain(model, INPUTS, method=method)
    with pytest.raises(ValueError, match="model must be made outside"):
        explain(model, INPUTS, method=method)
    report = probe(model, [(INPUTS, None)], tests=["linguistic"])
    assert report.metadata["inputs"] == 2
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not _overridden
