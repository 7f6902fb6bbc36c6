"""`freeze`: the backward pass takes denominators of norms, or attention weights, for constants, and nothing else changes."""

import contextlib
import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import CASES, in_double, lively
from vlattn_fast.attach.frozen import Frozen
from vlattn_fast.attach.observer import Observer

METHODS = [va.methods.Gradient, va.methods.Weighted, va.methods.GradCam, va.methods.InputGradient, va.methods.Glimpse]


@contextlib.contextmanager
def holding(model: nn.Module, **options: bool) -> Iterator[Frozen]:
    """A context in which values of the model are constants."""
    with Observer(model, [frozen := Frozen(**options)]):
        yield frozen


class Detached(nn.Module):
    """A LayerNorm or a norm by the root mean square, written out, whose denominator is detached."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        self.centred = isinstance(norm, nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
            return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt().detach() * self.weight + self.bias
        x32 = x.float()  # as transformers computes it, whatever the dtype
        root = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps).detach()
        return self.weight * (x32 * root).to(x.dtype)


def detached(model: nn.Module) -> nn.Module:
    """A copy of the model with detached denominators."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, nn.LayerNorm) or type(part).__name__.endswith("RMSNorm"):
                setattr(module, name, Detached(part))
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_norms_are_constants(case: Any, method: type[va.methods.Method]) -> None:
    inputs = in_double(case)
    frozen = va.explain(case.model, inputs, method=method(freeze=("norms",)))
    plain = va.explain(case.model, inputs, method=method(freeze=()))
    expected = va.explain(detached(case.model), inputs, method=method(freeze=()))
    assert torch.equal(frozen.scores, plain.scores)
    for tower, row in expected.relevancy.items():
        assert (frozen.relevancy[tower] - row).abs().max() < 1e-9 * row.abs().max()
        assert (plain.relevancy[tower] - row).abs().max() > 1e-4 * row.abs().max()


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_each_layer_and_the_label(case: Any) -> None:
    inputs = in_double(case)
    frozen = va.explain_layers(case.model, inputs, method=va.methods.Gradient(freeze=("norms",), of="margin"), per="layer")
    expected = va.explain_layers(detached(case.model), inputs, method=va.methods.Gradient(freeze=(), of="margin"), per="layer")
    torch.testing.assert_close(frozen.relevancy["vision"], expected.relevancy["vision"], rtol=0, atol=1e-12)
    whole = va.explain(case.model, inputs, method=va.methods.Weighted(weighting="norm", freeze=("norms", "attention")))
    assert whole.method == "weighted(weighting=norm)"


class Attends(nn.Module):
    """Two layers of attention, by torch's function or written out; `constant`: with detached weights."""

    def __init__(self, by_hand: bool, constant: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.by_hand, self.constant = by_hand, constant

    def forward(self, features: Tensor) -> Tensor:
        x = self.embed(features)
        for layer in self.layers:
            query, key, value = layer(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            if self.by_hand or self.constant:
                weights = (query @ key.mT / 2).softmax(-1)
                out = (weights.detach() if self.constant else weights) @ value
            else:
                out = nn.functional.scaled_dot_product_attention(value=value, key=key, query=query)
            x = x + out.transpose(1, 2).flatten(2)
        return x[:, 0].square()


@pytest.mark.parametrize("method", [va.methods.Gradient, va.methods.Weighted, va.methods.InputGradient])
@pytest.mark.parametrize("by_hand", [False, True])
def test_attention_is_constant(method: type[va.methods.Method], by_hand: bool) -> None:
    model, inputs = Attends(by_hand).double(), {"features": torch.randn(2, 5, 6).double()}
    constant = Attends(by_hand, constant=True).double()
    constant.load_state_dict(model.state_dict())
    how: dict[str, Any] = {"target": lambda outputs: outputs[:, 1]}
    if method.needs == "attention":
        how["position"] = "cls"
    frozen = va.explain(model, inputs, method=method(freeze=("attention",)), **how)
    expected = va.explain(constant, inputs, method=method(freeze=()), **how)
    plain = va.explain(model, inputs, method=method(freeze=()), **how)
    for tower, row in expected.relevancy.items():
        torch.testing.assert_close(frozen.relevancy[tower], row, rtol=0, atol=1e-12)
        assert not torch.allclose(plain.relevancy[tower], row)


class Biased(nn.Module):
    """Attention whose bias is computed from tokens, behind a router with as many experts as there are tokens."""

    def __init__(self, constant: bool = False) -> None:
        super().__init__()
        self.embed, self.layer, self.bias, self.router = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 2), nn.Linear(8, 5)
        self.experts, self.constant = nn.Parameter(torch.randn(5, 8, 8)), constant

    def forward(self, features: Tensor) -> Tensor:
        x = self.embed(features)
        x = x + torch.einsum("bne,bnd,edc->bnc", self.router(x).softmax(-1), x, self.experts)
        query, key, value = self.layer(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        bias = self.bias(x).mT[:, :, None].expand(-1, -1, x.shape[1], -1)
        if self.constant:
            out = (query @ key.mT / 2 + bias).softmax(-1).detach() @ value
        else:
            out = nn.functional.scaled_dot_product_attention(query, key, value, bias)
        return (x + out.transpose(1, 2).flatten(2))[:, 0].square()


@pytest.mark.parametrize("method", [va.methods.Gradient, va.methods.InputGradient])
def test_a_bias_is_constant_and_a_router_is_not(method: type[va.methods.Method]) -> None:
    model, constant, inputs = Biased().double(), Biased(constant=True).double(), {"features": torch.randn(2, 5, 6).double()}
    constant.load_state_dict(model.state_dict())
    how: dict[str, Any] = {"target": lambda outputs: outputs[:, 1]} | ({"position": "cls"} if method.needs == "attention" else {})
    got, plain = (va.explain(model, inputs, method=method(freeze=freeze), **how) for freeze in (("attention",), ()))
    expected = va.explain(constant, inputs, method=method(freeze=()), **how)
    for tower, row in expected.relevancy.items():
        torch.testing.assert_close(got.relevancy[tower], row, rtol=0, atol=1e-12)
        assert method.needs == "attention" or not torch.allclose(plain.relevancy[tower], row)


SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "torch": lambda scores: torch.softmax(scores, dim=3),
    "functional": lambda scores: nn.functional.softmax(input=scores, dim=-1, dtype=torch.float64),
    "tensor": lambda scores: scores.softmax(-1),
    "special": lambda scores: torch.special.softmax(scores, -1),
    "module": nn.Softmax(dim=-1),
    "logarithm": lambda scores: torch.log_softmax(scores, -1).exp(),
}


@pytest.mark.parametrize("queries", [5, 1])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_softmax_by_any_name_is_attention(name: str, queries: int) -> None:
    x, projections = torch.randn(2, 2, 5, 5, dtype=torch.float64), torch.randn(3, 5, 5, dtype=torch.float64)

    def attends(x: Tensor, hold: Hold = lambda weights: weights) -> Tensor:
        query, key, value = (x @ each for each in projections)
        return hold(SOFTMAXES[name](query[:, :, :queries] @ key.mT)) @ value

    x.requires_grad_()
    with holding(nn.Identity(), norms=False, attention=True):
        output = attends(x)
        over_heads = (x[:, :, :1] @ x.mT).softmax(1) + x.exp()
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (over_heads, (x[:, :, :1] @ x.mT).softmax(1) + x.exp())]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (output, attends(x, Tensor.detach), attends(x))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(grads[2], grads[1], rtol=1e-2)


def test_written_norms_and_maps_are_constants_of_a_training_only_while_asked() -> None:
    x, cotangent = torch.randn(2, 2, 3, 12, dtype=torch.float64).requires_grad_(), torch.randn(2, 2, 3, 12, dtype=torch.float64)

    def output(hold: Hold = lambda constant: constant) -> Tensor:
        y = WRITTEN["power"](x, hold)
        return hold((y @ x.detach().mT).softmax(-1)) @ y

    with holding(nn.Identity(), attention=True, switches=True) as frozen:
        trained = output()
    plain, constant, before = (
        torch.autograd.grad(y, x, cotangent, retain_graph=True)[0] for y in (output(), output(Tensor.detach), trained)
    )
    with frozen.holding():
        (held,) = torch.autograd.grad(trained, x, cotangent, retain_graph=True)
    (after,) = torch.autograd.grad(trained, x, cotangent)
    torch.testing.assert_close((before, held, after), (plain, constant, plain), rtol=1e-10, atol=1e-12)


def test_training_keeps_its_gradients() -> None:
    """The loss has the plain derivatives, the relevancy those of constant denominators, from one forward pass."""
    case = CASES["vit"]()
    lively(case.model)
    inputs = in_double(case)
    model = case.model.eval()
    for freeze in (("norms",), ("norms", "attention")):
        with va.nn.capture_relevancy(model, method=va.methods.Gradient(freeze=freeze)) as captured:
            logits = model(**inputs).logits
        with pytest.raises(ValueError, match="position"):  # which leaves no constants in the pass
            captured.relevancy(logits[:, 1], position=99)
        row = captured.relevancy(logits[:, 1])
        expected = va.explain(model, inputs, target=1, method=va.methods.Gradient(freeze=freeze)).relevancy["vision"]
        torch.testing.assert_close(row.detach(), expected, rtol=0, atol=1e-10)
        of_loss = torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
        plain = torch.autograd.grad(model(**inputs).logits.square().sum(), list(model.parameters()), allow_unused=True)
        for one, another in zip(of_loss, plain, strict=True):
            assert one is another is None or torch.allclose(one, another, rtol=1e-10, atol=0)


def test_the_gradient_of_relevancy() -> None:
    """Through the score's gradient, too, with what is constant in it as a function of the weights: by differences."""
    case = CASES["vit"]()
    lively(case.model)
    inputs, method = in_double(case), va.methods.Gradient()
    weight = case.model.vit.layers[0].layernorm_before.weight

    def squares() -> float:
        return float(va.explain(case.model, inputs, target=1, method=method).relevancy["vision"].square().sum())

    with va.nn.capture_relevancy(case.model, method=method, higher_order=True) as captured:
        logits = case.model(**inputs).logits
    (grad,) = torch.autograd.grad(captured.relevancy(logits[:, 1]).square().sum(), [weight])
    direction, step = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        weight += step * direction
        above = squares()
        weight -= 2 * step * direction
        below = squares()
    assert (above - below) / (2 * step) == pytest.approx(float(grad @ direction), rel=1e-6)


def test_layers_that_run_again_in_the_backward_pass() -> None:
    case = CASES["vit"]()
    lively(case.model)
    inputs, grads = in_double(case), []
    case.model.train()
    for checkpointed in (False, True):
        if checkpointed:
            layer = case.model.vit.layers[1]
            layer.forward = functools.partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)
        with va.nn.capture_relevancy(case.model, method=va.methods.Gradient()) as captured:
            logits = case.model(**inputs).logits
        row = captured.relevancy(logits[:, 1])
        grads.append(torch.autograd.grad(row.square().sum() + logits.sum(), [*case.model.parameters()], allow_unused=True))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


class ByLargest(nn.Module):
    """A norm by the largest magnitude, which takes no root."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(-1, keepdim=True)


Hold = Callable[[Tensor], Tensor]


def root(squares: Tensor) -> Tensor:
    return (squares + 1e-6).sqrt()


def squares(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True)


def deviations(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def by_both(deviation: Tensor, mean: Tensor, x: Tensor, hold: Hold) -> Tensor:
    """One node computes the root and the mean, which keeps its derivative."""
    return (x - mean) / hold(deviation)


WEIGHT = torch.linspace(0.5, 2.0, 36, dtype=torch.float64).view(3, 12)
WRITTEN: dict[str, Callable[[Tensor, Hold], Tensor]] = {  # norms of x (2, 3, 12), with `hold` around their denominators
    "power": lambda x, hold: x / hold((squares(x) + 1e-6).pow(0.5)),
    "negative power": lambda x, hold: x * hold((squares(x) + 1e-6) ** -0.5),
    "reciprocal": lambda x, hold: hold(root(squares(x))).reciprocal() * x,
    "power of -1": lambda x, hold: x * hold(root(squares(x))) ** -1,
    "weight of the root": lambda x, hold: x * (WEIGHT / hold(root(squares(x)))),
    "matrix of weights": lambda x, hold: WEIGHT * (deviations(x) * hold(1 / root(squares(deviations(x))))),
    "var": lambda x, hold: deviations(x) * hold((x.var(-1, correction=0, keepdim=True) + 1e-6).rsqrt()),
    "var of moments": lambda x, hold: deviations(x) / hold(root(squares(x) - x.mean(-1, keepdim=True) ** 2)),
    "std": lambda x, hold: deviations(x) / (hold(x.std(-1, keepdim=True)) + 1e-6),
    "std and mean": lambda x, hold: by_both(*torch.std_mean(x, -1, keepdim=True), x, hold),
    "in place": lambda x, hold: x.clone().div_(hold(squares(x).add_(1e-6).sqrt_())),
    "product": lambda x, hold: x / hold(root((x * x).sum(-1, keepdim=True) / 12)),
    "einsum": lambda x, hold: x / hold(root(torch.einsum("bnc,bnc->bn", x, x)))[..., None],
    "norm": lambda x, hold: x / (hold(x.norm(dim=-1, keepdim=True)) / 12**0.5).clamp_min(1e-6),
    "length": lambda x, hold: hold(torch.linalg.vector_norm(x, dim=-1, keepdim=True)) ** -1 * x * WEIGHT,
    "normalize": lambda x, hold: x / hold(x.norm(dim=-1, keepdim=True).clamp_min(1e-12)),
    "groups": lambda x, hold: (x.unflatten(-1, (2, 6)) / hold(root(squares(x.unflatten(-1, (2, 6)))))).flatten(-2),
    "another dtype": lambda x, hold: (x.float() * hold(torch.rsqrt(squares(x.float()) + 1e-6))).to(x.dtype),
    "gate": lambda x, hold: x * x.sigmoid() / hold(root(squares(x * x.sigmoid()))),
    "after a projection": lambda x, hold: (x @ WEIGHT.T @ WEIGHT) * hold(torch.rsqrt(squares(x) + 1e-6)),
    "cumulative": lambda x, hold: x / hold(root(x.square().sum(-1, keepdim=True).cumsum(1) / 12)),
}


class Written(nn.Module):
    """A norm; `dropout`: with a child module. `width`: after a projection, in a layer."""

    def __init__(self, name: str, width: int = 0) -> None:
        super().__init__()
        self.name, self.dropout = name, nn.Dropout()
        self.query = nn.Linear(12, width, dtype=torch.float64) if width else nn.Identity()

    def forward(self, x: Tensor, hold: Hold = lambda denominator: denominator) -> Tensor:
        if self.name == "normalize" and x.requires_grad and hold is not Tensor.detach:
            return self.dropout(nn.functional.normalize(self.query(x), dim=-1))
        return self.dropout(WRITTEN[self.name](self.query(x), hold))


@pytest.mark.parametrize("place", ["module", "layer"])
@pytest.mark.parametrize("name", WRITTEN)
def test_a_written_norm_has_a_constant_denominator(name: str, place: str) -> None:
    """In a module of its own, with child modules and weights of any shape, and in a layer that writes it between other steps."""
    model = Written(name, 12 if place == "layer" else 0).eval()
    x, cotangent = torch.randn(2, 3, 12, dtype=torch.float64).requires_grad_(), torch.randn(2, 3, 12, dtype=torch.float64)
    with holding(model) as frozen:
        output = model(x)
    expected = model(x, Tensor.detach)
    assert torch.equal(output, model(x)) and not frozen.missed
    grads = [torch.autograd.grad(y, x, cotangent)[0] for y in (output, expected, model(x))]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6 if name == "another dtype" else 1e-12, atol=1e-12)
    assert not torch.allclose(grads[2], grads[1], rtol=1e-2)


class Half(nn.Module):
    """Vectors of unit length, half as wide as the input; `meanwhile` another thread runs this module."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.meanwhile = nn.Linear(12, 6, dtype=torch.float64), nn.Identity()

    def forward(self, x: Tensor, hold: Hold = lambda denominator: denominator) -> Tensor:
        thread = threading.Thread(target=self.meanwhile, args=(x,))
        thread.start()
        thread.join()
        x = self.down(x)
        return x / hold(x.norm(dim=-1, keepdim=True))


class Doubles(nn.Module):
    """A layer around it."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths, self.up = Half(), nn.Linear(6, 12, dtype=torch.float64)

    def forward(self, x: Tensor, *hold: Hold) -> Tensor:
        return self.up(self.lengths(x, *hold)).square()


def test_a_layer_holds_the_lengths_of_its_parts() -> None:
    """Of those that give tensors of another shape; what another thread runs meanwhile is no part."""
    model, x = Doubles(), torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    with holding(model):
        output = model(x)
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (output, model(x, Tensor.detach))]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no norm")


class Catches(nn.Module):
    """Goes on after an error of its part, with tokens and a weight of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.fails, self.weight = Fails(), nn.Parameter(WEIGHT[0].clone())

    def forward(self, x: Tensor, hold: Hold = lambda denominator: denominator) -> Tensor:
        with contextlib.suppress(ValueError):
            self.fails(x)
        return x / hold(x.norm(dim=-1, keepdim=True)) * (self.weight / self.weight.square().mean().sqrt())


def test_a_module_may_go_on_after_an_error_and_norms_of_weights_keep_their_derivative() -> None:
    model, x = Catches(), torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    with holding(model):
        output = model(x)
    grads = [torch.autograd.grad(y.sum(), (x, model.weight)) for y in (output, model(x, Tensor.detach))]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


class Similar(nn.Module):
    """The cosines of two embeddings, whose vectors get unit length outside of layers; `norm`: after a norm in a function."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(12, 6, dtype=torch.float64), norm

    def forward(self, x: Tensor, hold: Hold = lambda denominator: denominator) -> Tensor:
        if self.norm:
            x = WRITTEN["power"](x, hold)
        embeds = self.layer(x)[:, 0]
        embeds = embeds / embeds.pow(2).sum(-1, keepdim=True).pow(0.5)
        return embeds @ nn.functional.normalize(self.layer(x)[:, 1], dim=-1).T


@pytest.mark.parametrize("norm", [False, True])
def test_the_vectors_of_a_similarity_are_no_norm(norm: bool) -> None:
    """They belong to the score. A root of a mean of squares is a norm's wherever it is."""
    model, x = Similar(norm), torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    with holding(model) as frozen:
        output = model(x)
    assert not frozen.missed
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (output, model(x, Tensor.detach))]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_a_long_context_holds_no_graph_of_passes_that_have_ended() -> None:
    """Such as that of lengths which belong to no layer."""
    model, x = Similar(), torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    with Observer(model, [Frozen()]) as observer:
        model(x)
        nn.functional.normalize(x) + ByLargest.forward(model, x)
        (run,) = observer.runs
        assert run.module is None and not run.lengths and not run.magnitudes


class NormFunction(torch.autograd.Function):
    """A norm in one node, as a kernel has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return nn.functional.rms_norm(x, x.shape[-1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(nn.functional.rms_norm(x, x.shape[-1:]), x, grad)[0]


class Fused(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * NormFunction.apply(x)


class Gates(nn.Module):
    """Products of x with a share that is no denominator: its lengths, its gate, a curve of each number; and shares of experts."""

    def forward(self, x: Tensor) -> Tensor:
        experts = x.softmax(-1)
        x = x + experts / experts.norm(p=1, dim=-1, keepdim=True)
        squares = x.square()
        lengths = squares.sum(-1, keepdim=True).sqrt()
        share = lengths / lengths.mean(1, keepdim=True)
        return (
            x * share
            + x * squares.mean(-1, keepdim=True).sigmoid()
            + x / (1 + squares).sqrt()
            + x / x.exp().sum(-1, keepdim=True)
        )


def test_what_is_not_held_is_named_and_other_products_are_not_norms() -> None:
    model = nn.ModuleDict(
        {"fused": Fused(), "instance": nn.InstanceNorm1d(4), "batch": nn.BatchNorm1d(4), "gates": Gates()}
    ).eval()
    x = torch.randn(2, 4, 6, requires_grad=True)
    with holding(model) as frozen:
        outputs = [module(nn.functional.dropout(model["fused"](x))) for module in model.values()]
        gated = model["gates"](x)
    assert frozen.missed == ["'fused' (Fused)", "'instance' (InstanceNorm1d)"] and len(outputs) == 4
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (gated, model["gates"](x))]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("groups", [1, 3])
def test_functions_of_torch(groups: int) -> None:
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    cotangent, weight, bias = torch.randn(2, 6, 5).double(), torch.rand(6).double(), torch.rand(6).double()
    f = nn.functional
    calls = [
        lambda: f.layer_norm(x, (6, 5)),
        lambda: f.layer_norm(x, [5], eps=1e-3),
        lambda: f.rms_norm(x, (5,), weight[:5]),
        lambda: f.group_norm(x, groups, weight, bias),
        lambda: torch.layer_norm(x, (5,), weight[:5], bias[:5]),
    ]
    for call in calls:
        plain = call()
        with holding(nn.Identity()):
            output = call()
        assert torch.equal(plain, output)
        (grad,) = torch.autograd.grad(output, x, cotangent)
        (of_plain,) = torch.autograd.grad(plain, x, cotangent)
        constant = bias[:, None] if output is not None and call is calls[3] else bias[:5] if call is calls[4] else 0.0
        torch.testing.assert_close((grad * x).sum(), (cotangent * (output - constant)).sum(), rtol=1e-9, atol=0)
        assert (of_plain * x).sum().abs() < 0.1 * (grad * x).sum().abs() + 0.05


def test_roots_outside_of_modules() -> None:
    """Cosines divide by norms in the model's own code; a power may have exponents of its own for each number."""
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, 12, dtype=torch.float64)
    for divided in (lambda: x / x.norm(dim=-1, keepdim=True), lambda: nn.functional.normalize(x, dim=-1)):
        with holding(nn.Identity(), similarities=True):
            output = divided()
            assert torch.equal(torch.pow(x, torch.full_like(x, 2.0)), x * x)
        (grad,) = torch.autograd.grad(output, x, cotangent)
        torch.testing.assert_close((grad * x).sum(), (cotangent * output).sum())


class Missed(Attends):
    def __init__(self) -> None:
        super().__init__(by_hand=False)
        self.norm = ByLargest()

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(super().forward(features))


def test_a_norm_that_is_not_reached_is_said() -> None:
    model, inputs = Missed(), {"features": torch.randn(2, 5, 6)}
    how: dict[str, Any] = {"target": lambda outputs: outputs[:, 1], "position": "cls"}
    with pytest.warns(UserWarning, match=r"The norm in 'norm' \(ByLargest\) is not held fixed"):
        va.explain(model, inputs, method=va.methods.Gradient(freeze=("norms",)), **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        va.explain(model, inputs, method=va.methods.Gradient(freeze=()), **how)


class Overwrites(nn.Module):
    """A layer that writes into what its norm gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attends(by_hand=True)
        self.norm = nn.LayerNorm(6)

    def forward(self, features: Tensor) -> Tensor:
        h = self.norm(features)
        h *= 0.5
        return self.attention(h)


def test_a_model_may_write_into_what_a_norm_gives() -> None:
    model, inputs = Overwrites().double(), {"features": torch.randn(2, 5, 6).double()}
    expected = va.explain(model, inputs, target=lambda outputs: outputs[:, 1], position="cls").relevancy
    with va.nn.capture_relevancy(model) as captured:
        outputs = model(**inputs)
    row = captured.relevancy(outputs[:, 1].sum(), position="cls")
    torch.testing.assert_close(row.detach(), next(iter(expected.values())))


def test_norms_of_torch_with_all_their_arguments() -> None:
    x = torch.randn(2, 4, 3)
    with holding(nn.Identity()):
        assert torch.equal(torch.layer_norm(x, [3], cudnn_enable=False), nn.functional.layer_norm(x, [3]))
        assert torch.equal(torch.group_norm(x, 2, cudnn_enabled=False), nn.functional.group_norm(x, 2))


def test_options_that_are_none() -> None:
    with pytest.raises(ValueError, match="freeze must be among norms, attention; got 'norm'"):
        va.methods.Gradient(freeze=("norm",))
    with pytest.raises(TypeError, match="freeze must be a sequence of names, or \\(\\)"):
        va.methods.Gradient(freeze="norms")
    for kind, option in ((va.methods.Rollout, "freeze"), (va.methods.Attention, "of"), (va.methods.Occlusion, "freeze")):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            kind(**{option: ()})
    with pytest.raises(ValueError, match="of must be .*logit.*; got 'logits'"):
        va.methods.Weighted(of="logits")
    model, inputs = Attends(by_hand=False), {"features": torch.randn(2, 5, 6)}
    with pytest.raises(TypeError, match=r"method must be a name or an object, such as va.methods.Gradient\(\); got the class"):
        va.explain(model, inputs, method=va.methods.Gradient, position="cls")
    with pytest.raises(ValueError, match="of must be left out if target is a callable"):
        va.explain(model, inputs, method=va.methods.Gradient(of="logit"), position="cls", target=lambda outputs: outputs[:, 0])


def test_a_score_beside_a_sink_is_constant() -> None:
    """A score's bias cancels in a softmax, but not beside a sink. The output is linear in the values: <gradient, x> is it."""
    layer = va.nn.ScoreAttention(8, 2, "biased_general").double()
    layer.sink = nn.Parameter(torch.randn(2).double())
    for name, parameter in layer.named_parameters():
        if name in ("v_proj.bias", "out_proj.bias"):
            nn.init.zeros_(parameter)
        elif name.startswith("score"):
            nn.init.normal_(parameter)
    x = torch.randn(2, 5, 8).double().requires_grad_()
    for attention in (True, False):
        with holding(layer, norms=False, attention=attention):
            output = layer(x)[:, 0, 1].sum()
            (grad,) = torch.autograd.grad(output, x)
        assert torch.allclose((grad * x).sum(), output, rtol=1e-9) == attention
