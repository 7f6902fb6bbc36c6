"""Ctrl-C in a run, and models whose parameters torch does not let be changed: nothing of a run is left behind."""

import threading
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.helpers.interpret.cases import lively
from vlattn_fast.attach.events import RUNNING
from vlattn_fast.attach.session import _overridden, overridden
from vlattn_fast.interpret import explain, probe
from vlattn_fast.nn import capture_attention

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
