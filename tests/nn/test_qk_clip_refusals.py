"""QKClip on models of every kind: what its factors cannot reach does not count, and what it cannot rescale it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.two_ranks import results_of
from tests.nn.test_qk_clip import TAU, multihead


class Attention(nn.Module):
    """Two heads of projections, with what a model adds to their logits."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.options = nn.Linear(16, 16), nn.Linear(16, 16), options

    def forward(self, x: Tensor) -> Tensor:
        query, key = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
        if "by hand" in self.options:
            return (self.options["by hand"](query @ key.mT)).softmax(-1) @ key
        if "softcap" in self.options:
            return va.score_attention(query, key, key, **self.options)[0]
        return nn.functional.scaled_dot_product_attention(query, key, key, **self.options)


OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"attn_mask": 7 + 0.01 * torch.arange(25.0).view(5, 5)},
    "hidden by -10000": {"attn_mask": torch.tensor([0.0, 0.0, 0.0, -1e4, -1e4]).expand(5, 5)},
    "hidden by the least number": {"attn_mask": torch.full((5, 5), torch.finfo().min).triu(1)},
    "softcap": {"softcap": 0.75},
    "softcap by hand": {"by hand": lambda scores: 0.75 * torch.tanh(scores / 8**0.5 / 0.75)},
    "tanh by hand": {"by hand": lambda scores: (scores / 8**0.5).tanh()},
}


def test_what_no_factor_reaches_does_not_count() -> None:
    """The largest product of a query and a key that it sees comes to the threshold, behind a softcap and under a bias, too."""
    for name, options in OPTIONS.items():
        model, x, mask = Attention(**options), 10 * torch.randn(2, 5, 16), options.get("attn_mask")
        x[:, 3:] *= 3

        def largest(name: str = name, model: Any = model, x: Tensor = x, mask: Tensor | None = mask) -> list[float]:
            query, key = (p(x).unflatten(-1, (2, 8)).transpose(1, 2) for p in (model.q_proj, model.k_proj))
            logits = query @ key.mT / 8**0.5
            logits = logits if mask is None or name == "bias" else logits.masked_fill(mask < -1.0, -torch.inf)
            return logits.transpose(0, 1).flatten(1).amax(1).tolist()

        expected = largest()
        with va.nn.QKClip(model, TAU) as clip:
            model(x)
            assert clip.step()[""] == pytest.approx(dict(enumerate(expected)), rel=1e-5), name
        assert largest() == pytest.approx([TAU, TAU], rel=1e-5), name


def test_frozen_projections_are_left_alone() -> None:
    model, x = nn.Sequential(Attention(), nn.Flatten(2), nn.Linear(40, 16)), 10 * torch.randn(2, 5, 16)
    model[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    with va.nn.QKClip(model, TAU) as clip:
        model(x)
        assert clip.step() == {}
        model[0].k_proj.bias.requires_grad_(True)
        with pytest.raises(
            ValueError, match="weights and biases that make query and key of '0' must all be trained or all be frozen"
        ):
            model(x)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_projections_with_other_users_are_refused() -> None:
    x = torch.randn(2, 5, 16)
    one, two, three = Attention(), Attention(), Attention()
    one.k_proj.weight = one.q_proj.weight  # the factor would be taken twice
    two.q_proj.bias, two.out = nn.Parameter(torch.zeros(16)), two.k_proj
    torch.nn.utils.parametrizations.weight_norm(three.q_proj)
    for model, words in ((one, "have no other user"), (two, "have no other user"), (three, "be parameters of a linear map")):
        with va.nn.QKClip(model) as clip, pytest.raises(ValueError, match=f"the projections of '' must {words}"):
            clip.model(x)


def test_first_queries_of_zeros() -> None:
    """They tell nothing of the projections, and need no factor."""
    model, x = Attention(), 10 * torch.randn(2, 5, 16)
    for parameter in model.q_proj.parameters():
        nn.init.zeros_(parameter)
    with va.nn.QKClip(model, TAU) as clip:
        model(x)
        assert clip.step() == {}
        nn.init.normal_(model.q_proj.weight)
        model(x)
        assert len(clip.step()[""]) == 2


class Twice(Attention):
    """The second call, which a sample alone does not have, attends with other tensors than the projections."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        once = super().forward(x)
        return once if len(x) == 1 else once + nn.functional.scaled_dot_product_attention(heads, heads, heads)


def test_a_later_call_with_other_tensors_is_refused() -> None:
    """Where its logits pass the threshold; a factor would not bring them down."""
    model, x = Twice(), torch.randn(2, 5, 16)
    with va.nn.QKClip(model, 100.0) as clip:
        model(x)
        assert clip.step() == {}
        for last in (False, True):
            model(30 * x)
            if not last:
                model(300 * x[:1])  # which is as it must be
            with pytest.raises(ValueError, match="the heads of '' must be its projections"):
                clip.step()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.attention, self.use_reentrant = Attention(), use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.attention, x, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers(use_reentrant: bool) -> None:
    model, x = Checkpointed(use_reentrant), (10 * torch.randn(2, 5, 16)).requires_grad_()
    with va.nn.QKClip(model, TAU) as clip:
        model(x).sum().backward()
        assert len(clip.step()["attention"]) == 2
    assert x.grad is not None and x.grad.any()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        query, key = (self.norm(p(x).unflatten(-1, (2, 8)).transpose(1, 2)) for p in (self.q_proj, self.k_proj))
        return nn.functional.scaled_dot_product_attention(query, key, key)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_what_it_refuses() -> None:
    for bad, error, words in (
        (0.0, ValueError, "threshold must be greater than 0; got 0.0"),
        ("1", TypeError, "threshold must be a real number"),
        (torch.nan, ValueError, "threshold must be a finite number"),
    ):
        with pytest.raises(error, match=words):
            va.nn.QKClip(multihead(), bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module; got int"):
        va.nn.QKClip(3)  # type: ignore[arg-type]
    with (
        va.nn.QKClip(Normed()) as clip,
        pytest.raises(ValueError, match="the heads of '' must be its projections, .* .a norm of"),
    ):
        clip.model(torch.randn(2, 5, 16))
    with va.nn.QKClip(Plain()) as clip, pytest.raises(ValueError, match="QKClip found no projections around a call of attention"):
        clip.model(torch.randn(2, 2, 5, 16))
    with va.nn.QKClip(multihead()) as clip, pytest.raises(RuntimeError, match="QKClip recorded no attention since its last step"):
        clip.step()
    with va.nn.QKClip(multihead()) as clip, pytest.raises(RuntimeError, match="QKClip must be entered once at a time"):
        clip.__enter__()
    x = torch.full((1, 3, 16), torch.nan)
    with va.nn.QKClip(multihead()) as clip:
        clip.model(x, x, x)
        with pytest.raises(FloatingPointError, match="the largest logits of '' must be finite"):
            clip.step()


def refusals_on_two_ranks() -> dict[str, list[str]]:
    """Of cases in which rank 1 alone refuses, the errors in this rank; no weight has changed."""
    second = torch.distributed.get_rank() == 1
    torch.manual_seed(0)
    x = 10 * torch.randn(2, 5, 16)
    two_layers = nn.ModuleList([Attention(), Attention()])
    calls: list[tuple[nn.Module, Callable[[Any], Any]]] = [
        (Attention(), lambda model: None if second else model(x)),
        (two_layers, lambda model: [layer(x) for layer in model[: 1 if second else 2]]),
        (Normed() if second else Attention(), lambda model: model(x)),
        (Twice(), lambda model: [model(0.001 * x), model(x if second else 0.001 * x)]),
    ]
    errors = []
    for model, call in calls:
        before = [parameter.clone() for parameter in model.parameters()]
        with va.nn.QKClip(model, 5.0) as clip:
            call(model)
            with pytest.raises((ValueError, RuntimeError)) as refused:
                clip.step()
        assert all(map(torch.equal, before, model.parameters()))
        errors.append(f"{type(refused.value).__name__}: {refused.value}")
    return {"errors": errors}


def test_what_one_process_refuses_all_refuse(tmp_path: Path) -> None:
    first, second = (rank["errors"] for rank in results_of(__name__, "refusals_on_two_ranks", tmp_path))
    assert first == second and [error.split(";")[0][:73] for error in first] == [
        "RuntimeError: rank 1: QKClip recorded no attention since its last step",
        "RuntimeError: rank 1: '1' must attend in each process between two steps",
        "ValueError: rank 1: the heads of '' must be its projections, turned by ro",
        "ValueError: rank 1: the heads of '' must be its projections, turned by ro",
    ]
