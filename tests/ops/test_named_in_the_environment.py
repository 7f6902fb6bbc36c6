"""VLATTN_BACKEND takes the place of "auto", and the error of a kernel says so."""

import pytest
import torch

import vlattn_fast as va
from tests.helpers import programs
from vlattn_fast.backends.cpu import score_attention
from vlattn_fast.dispatch import choice

X = torch.zeros(2, 4, 3, 6)


def test_the_environment_names_the_backend_of_all_calls():
    """A call that names no backend runs on the one that VLATTN_BACKEND names."""
    code = (
        "import torch, vlattn_fast as va\n"
        "used = []\n"
        "from vlattn_fast.dispatch import choice\n"
        "load = choice.load; choice.load = lambda table, name: used.append(name) or load(table, name)\n"
        "x = torch.randn(1, 1, 5, 8)\n"
        "va.attention_map(x, x, x, x, rule='gradient'); print(*sorted(set(used)))\n"
        "try: va.attention_map(x, x, backend='cuda')\n"
        "except ValueError as error: print('cannot run' in str(error))\n"
    )
    said = programs.run(code, VLATTN_BACKEND="streaming")
    assert said.stdout.splitlines() == ["streaming", "True"]


def test_an_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setattr(choice, "AUTO", "tirton")
    monkeypatch.setattr(choice, "_PLANS", {})
    with pytest.raises(ValueError, match=r"VLATTN_BACKEND in the environment must be one of \('auto', .*; got 'tirton'"):
        va.score_attention(X, X, X)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_an_error_inside_a_kernel_says_how_to_do_without_it(monkeypatch, needs_gradient):
    def forward(inputs):
        raise RuntimeError("PTX was not loaded")

    monkeypatch.setattr(score_attention, "forward", forward)
    monkeypatch.setattr(choice, "select", lambda *call: "cpu")
    monkeypatch.setattr(choice, "_PLANS", {})
    with pytest.raises(RuntimeError, match="PTX was not loaded") as raised:
        va.score_attention(X.clone().requires_grad_(needs_gradient), X, X)
    assert raised.value.__notes__ == [
        "The backend 'cpu' failed. backend='streaming', or VLATTN_BACKEND=streaming in the environment for all calls, runs in "
        "plain PyTorch on any device"
    ]
    with torch.profiler.profile(), pytest.raises(RuntimeError) as raised:  # by torch's dispatcher
        va.score_attention(X, X, X)
    assert any("VLATTN_BACKEND=streaming" in note for note in raised.value.__notes__)
