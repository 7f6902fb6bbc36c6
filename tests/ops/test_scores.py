"""The score functions: numbers worked on paper, a bias that cancels, the sine series."""

import math

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from vlattn_fast import scores as S
from vlattn_fast._ground import series

F64 = torch.float64


def t(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=F64)


def one_head(*rows: object) -> Tensor:
    return t(*rows)[None, None]


QUERY, KEY = one_head([1, 0], [1, 2]), one_head([3, 4], [0, -1])  # 2x2: every number below is worked on paper
WEIGHT, BIAS, VECTOR = t([1, 2], [0, 1]), t(1, -1), t(2, -1)  # W k = [11, 4], [-2, -1]; W q = [1, 0], [5, 2]

BY_HAND: dict[str, tuple[S.Score, Tensor]] = {
    "dot": (S.Dot(), t([3, 0], [11, -2])),
    "scaled_dot": (S.ScaledDot(), t([3, 0], [11, -2])),  # without the scale
    "cosine": (S.Cosine(), t([3 / 5, 0], [11 / (5 * math.sqrt(5)), -2 / math.sqrt(5)])),
    # |q||k| = 5, 1, 5 sqrt 5, sqrt 5: the clamp at 6 acts on all but the third
    "cosine-eps=6": (S.Cosine(eps=6.0), t([3 / 6, 0], [11 / (5 * math.sqrt(5)), -2 / 6])),
    "general-key": (S.General(WEIGHT), t([11, -2], [19, -4])),
    "general-query": (S.General(WEIGHT, projects="query"), t([3, 0], [23, -2])),
    "general-key-bias": (S.General(WEIGHT, BIAS), t([12, -1], [18, -5])),  # + q . b = 1, -1
    "general-query-bias": (S.General(WEIGHT, BIAS, projects="query"), t([2, 1], [22, -1])),  # + k . b = -1, 1
    "general-relu": (S.General(WEIGHT, BIAS, activation="relu"), t([12, 0], [18, 0])),
    "general-leaky_relu": (S.General(WEIGHT, BIAS, activation="leaky_relu"), t([12, -0.01], [18, -0.05])),
    "general-leaky=0.5": (S.General(WEIGHT, BIAS, activation="leaky_relu", negative_slope=0.5), t([12, -0.5], [18, -2.5])),
    "general-tanh": (S.General(WEIGHT, BIAS, activation="tanh"), t([12, -1], [18, -5]).tanh()),
    "general-sigmoid": (S.General(WEIGHT, BIAS, activation="sigmoid"), t([12, -1], [18, -5]).sigmoid()),
    # q + k = [4, 4], [1, -1] and [4, 6], [1, 1]; + b = [5, 3], [2, -2] and [5, 5], [2, 0]
    "additive": (
        S.Additive(VECTOR, bias=BIAS),
        t(
            [2 * math.tanh(5) - math.tanh(3), 2 * math.tanh(2) + math.tanh(2)],
            [2 * math.tanh(5) - math.tanh(5), 2 * math.tanh(2) - math.tanh(0)],
        ),
    ),
    # W q + k = [4, 4], [1, -1] and [8, 6], [5, 1]
    "additive-query": (
        S.Additive(VECTOR, query_weight=WEIGHT),
        t(
            [2 * math.tanh(4) - math.tanh(4), 2 * math.tanh(1) + math.tanh(1)],
            [2 * math.tanh(8) - math.tanh(6), 2 * math.tanh(5) - math.tanh(1)],
        ),
    ),
    # W [q; k] with W = [[1, 0, 0, 1], [0, 1, 1, 0]]: [q0 + k1, q1 + k0] = [5, 3], [0, 0] and [5, 5], [0, 2]
    "concat": (
        S.Additive.concat(VECTOR, t([1, 0, 0, 1], [0, 1, 1, 0])),
        t([2 * math.tanh(5) - math.tanh(3), 0], [2 * math.tanh(5) - math.tanh(5), -math.tanh(2)]),
    ),
    # q * k = [3, 0], [0, 0] and [3, 8], [0, -2]
    "hadamard": (S.Hadamard(VECTOR, offset=0.5), t([6.5, 0.5], [-1.5, 2.5])),
    "hadamard-relu": (S.Hadamard(VECTOR, activation="relu"), t([6, 0], [-2, 0])),
    "hadamard-leaky=0.5": (S.Hadamard(VECTOR, activation="leaky_relu", negative_slope=0.5), t([6, 0], [-2, 1])),
    # q * (W k + b) = [12, 0], [-1, 0] and [12, 6], [-1, -4]
    "hadamard-key": (S.Hadamard(VECTOR, WEIGHT, BIAS, activation="relu"), t([24, 0], [18, 0])),
    "hadamard-tanh": (
        S.Hadamard(VECTOR, WEIGHT, BIAS, activation="tanh"),
        t([2 * math.tanh(12), -2 * math.tanh(1)], [2 * math.tanh(12) - math.tanh(6), -2 * math.tanh(1) + math.tanh(4)]),
    ),
    # (W q + b) * k = [2, -1] * k = [6, -4], [0, 1] and [6, 1] * k = [18, 4], [0, -1]
    "hadamard-query": (S.Hadamard(VECTOR, WEIGHT, BIAS, projects="query"), t([16, -1], [32, 1])),
    # |q - k|^2 = 4 + 16, 1 + 1 and 4 + 4, 1 + 9; 2 sigma^2 = 2 and, as a number, 8
    "distance": (S.Distance(t(1).reshape(())), t([-10, -1], [-4, -5])),
    "distance-number": (S.Distance(2.0), t([-20 / 8, -2 / 8], [-8 / 8, -10 / 8])),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    """The formula gives the score on paper, and both give softmax(score) v with v = [[1, 0], [0, 1]]."""
    score, wanted = BY_HAND[name]
    torch.testing.assert_close(score.formula(QUERY, KEY)[0, 0], wanted, rtol=1e-14, atol=1e-14)
    wanted = score.default_scale(2) * wanted
    prob = wanted.exp() / wanted.exp().sum(-1, keepdim=True)
    for operator in (va.reference.score_attention, va.score_attention):
        for lse in (False, True):
            out = operator(QUERY, KEY, torch.eye(2, dtype=F64)[None, None], score=score, return_lse=lse)
            torch.testing.assert_close((out[0] if lse else out)[0, 0], prob, rtol=1e-12, atol=1e-14)
            if lse:
                torch.testing.assert_close(out[1][0, 0], wanted.exp().sum(-1).log(), rtol=1e-12, atol=1e-12)


def test_each_score_is_worked_on_paper() -> None:
    missing = set(S.SCORES.values()) - {type(score) for score, _ in BY_HAND.values()}
    assert not missing, f"a case in BY_HAND of tests/ops/test_scores.py for {[kind.__name__ for kind in missing]}"


def test_masks_by_hand() -> None:
    """Scores [3, 0], [11, -2], scale 1/2, and the masks one at a time."""
    value = one_head([1, 0], [0, 1])
    first = [1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(1.5))]
    last = [1 / (1 + math.exp(-6.5)), 1 / (1 + math.exp(6.5))]
    cases = (
        ({}, t(first, last)),
        ({"is_causal": True}, t([1, 0], last)),
        ({"key_mask": torch.tensor([[False, True]])}, t([0, 1], [0, 1])),
        ({"attn_mask": torch.tensor([[True, True], [False, False]])}, t(first, [0, 0])),
        ({"attn_mask": t([-1.5, 0], [0, -math.inf])}, t([0.5, 0.5], [1, 0])),
        ({"attn_mask": torch.tensor([[False, True], [True, True]]), "is_causal": True}, t([0, 0], last)),
    )
    for options, wanted in cases:
        for operator in (va.reference.score_attention, va.score_attention):
            got = operator(QUERY, KEY, value, score="dot", scale=0.5, **options)
            torch.testing.assert_close(got[0, 0], wanted, rtol=1e-13, atol=1e-14)


def inputs(n: int = 5, m: int = 7, d: int = 4) -> list[Tensor]:
    return [torch.randn(2, 3, size, d, dtype=F64, requires_grad=True) for size in (n, m, m)]


@pytest.mark.parametrize("dtype", (F64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_bias_on_the_key_side_cancels(dtype: torch.dtype) -> None:
    """Attention equals that without bias, bit for bit, and the gradient is exactly zero; the lse moves by q . b."""
    query, key, value = (x.detach().to(dtype) for x in inputs())
    weight, bias = torch.randn(4, 4).to(dtype), torch.randn(4).to(dtype).requires_grad_()
    for score, plain in (
        (S.General(weight, bias), S.General(weight)),
        (S.Hadamard(bias.detach(), weight, bias), S.Hadamard(bias.detach(), weight)),
    ):
        out, lse = va.score_attention(query, key, value, score=score, return_lse=True)
        wanted, plain_lse = va.score_attention(query, key, value, score=plain, return_lse=True)
        assert torch.equal(out, wanted)
        (grad,) = torch.autograd.grad(va.score_attention(query, key, value, score=score).pow(2).sum(), bias)
        assert torch.equal(grad, torch.zeros_like(grad))
        moved = query.float() @ (bias.float() if isinstance(score, S.General) else bias.float() ** 2)
        torch.testing.assert_close((lse - plain_lse).float(), moved, rtol=1e-2, atol=1e-2)
    # on the query side, and behind an activation, it does not cancel
    for score in (S.General(weight, bias, projects="query"), S.General(weight, bias, activation="tanh")):
        (grad,) = torch.autograd.grad(va.score_attention(query, key, value, score=score).pow(2).sum(), bias)
        assert grad.abs().max() > 1e-3


def test_concat_is_additive() -> None:
    query, key = torch.randn(2, 3, 5, 4, dtype=F64), torch.randn(2, 3, 7, 6, dtype=F64)
    for shape in ((5, 10), (3, 5, 10)):
        weight, vector, bias = torch.randn(shape, dtype=F64), torch.randn(5, dtype=F64), torch.randn(5, dtype=F64)
        whole = S.Additive.concat(vector, weight, bias, query_size=4)
        parts = S.Additive(vector, weight[..., :4], weight[..., 4:], bias)
        assert torch.equal(*(va.score_attention(query, key, key, score=score) for score in (whole, parts)))
        beside = torch.cat([query[:, :, :, None].expand(-1, -1, -1, 7, -1), key[:, :, None].expand(-1, -1, 5, -1, -1)], -1)
        literal = torch.tanh(torch.einsum("bhijd,had->bhija", beside, weight.expand(3, 5, 10)) + bias) @ vector
        torch.testing.assert_close(whole.formula(query, key), literal)


def test_cosine_clamps_the_product_of_the_norms() -> None:
    """A short query beside a long key: the product is over eps, so nothing is clamped (F.cosine_similarity clamps each)."""
    query, key = one_head([1e-9, 0]), one_head([1e9, 0], [0, 1])
    for operator in (va.reference.score_attention, va.score_attention):
        _, lse = operator(query, key, key, score="cosine", return_lse=True)
        torch.testing.assert_close(lse[0, 0], t(math.log(math.exp(1.0) + 1.0)))


@pytest.mark.parametrize("dtype", (F64, torch.float32), ids=str)
@pytest.mark.parametrize("spread, tolerance", ((0.1, 1e-2), (1.0, 1e-2), (1.0, 1e-4), (3.0, 1e-2), (6.0, 5e-2), (0.0, 1e-3)))
def test_series_keeps_its_tolerance(spread: float, tolerance: float, dtype: torch.dtype) -> None:
    query, key = (spread * torch.randn(1, 2, 40, 5, dtype=dtype) for _ in range(2))
    vector = torch.randn(2, 5, dtype=dtype) / 5
    core = S.Additive(vector, method="series", tolerance=tolerance).core(query, key)
    assert core.kind == "dot"
    exact = S.Additive(vector.double()).formula(query.double(), key.double())
    error = ((core.query @ core.key.mT).double() - exact).abs().max()
    assert error <= tolerance
    assert error > 0 or spread == 0.0, "an error of exactly zero: is it the series at all?"


def test_series_with_weights_equals_exact_within_tolerance() -> None:
    query, key, value = (x.detach() for x in inputs())
    params = [
        x.requires_grad_()
        for x in (
            torch.rand(3, 5, dtype=F64) / 5,
            torch.randn(5, 4, dtype=F64),
            torch.randn(3, 5, 4, dtype=F64),
            torch.randn(5, dtype=F64),
        )
    ]
    exact, series = (
        va.score_attention(query, key, value, score=S.Additive(*params, **options), return_lse=True)
        for options in ({}, {"method": "series", "tolerance": 1e-5})
    )
    torch.testing.assert_close(series, exact, rtol=0, atol=5e-5)
    grads = [torch.autograd.grad(pair[0].sum() + pair[1].sum(), params) for pair in (exact, series)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-2)


def test_series_out_of_reach_names_what_is_attainable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "TERMS", (2, 4, 8, 12))  # the fits of 48 and 64 terms take seconds
    query, key, value = (20 * x.detach() for x in inputs())
    vector = torch.ones(4, dtype=F64)
    with pytest.raises(ValueError, match="tolerance=1e-09 is out of reach .* is attainable .*; raise the tolerance") as caught:
        va.score_attention(query, key, value, score=S.Additive(vector, method="series", tolerance=1e-9))
    named = float(str(caught.value).split(": ")[1].split(" is attainable")[0])
    va.score_attention(query, key, value, score=S.Additive(vector, method="series", tolerance=named))  # now it runs
    core = S.Additive(vector, method="series", tolerance=named).core(query, key)
    assert (core.query @ core.key.mT - S.Additive(vector).formula(query, key)).abs().max() <= named


def test_series_of_half_precision_keeps_float32_features() -> None:
    """Under autocast too: rounding a feature to 8 bits would cost more than the series does."""
    query, key, value = (x.detach().float() for x in inputs())
    score = S.Additive(torch.full((4,), 0.5), method="series", tolerance=1e-4)
    exact = va.reference.score_attention(
        *(x.double() for x in (query, key, value)), score=S.Additive(torch.full((4,), 0.5, dtype=F64))
    )
    low = [x.bfloat16() for x in (query, key, value)]
    rounded = va.reference.score_attention(*(x.double() for x in low), score=S.Additive(torch.full((4,), 0.5, dtype=F64)))
    for lse in (False, True):
        out = va.score_attention(
            *low, score=S.Additive(torch.full((4,), 0.5, dtype=torch.bfloat16), method="series", tolerance=1e-4), return_lse=lse
        )
        out = out[0] if lse else out
        assert out.dtype == torch.bfloat16 and (out.double() - rounded).abs().max() < 2**-8 * rounded.abs().max()
        with torch.autocast("cpu", torch.bfloat16):
            out = va.score_attention(query, key, value, score=score, return_lse=lse)
        out = out[0] if lse else out
        assert out.dtype == torch.bfloat16
        assert (out.double() - exact).abs().max() < 2**-7 * exact.abs().max()  # value and result rounded, features not


def test_series_refusals() -> None:
    query, key, value = (x.detach() for x in inputs())
    score = S.Additive(torch.ones(4, dtype=F64), method="series", tolerance=0.1)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="query, key and vector must be finite"):
            va.score_attention(query.index_fill(2, torch.tensor([0]), bad), key, value, score=score)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="reads the range of its data, which code that is traced"):
        torch.compile(lambda q: va.score_attention(q, key, value, score=score), backend="eager", fullgraph=True)(query)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "radius, terms, bound", ((4, 4, 6.6e-4), (4, 8, 5.7e-5), (6, 5, 1.4e-3), (6, 8, 4.2e-4), (8, 8, 9e-4), (8, 12, 2e-4))
)
def test_series_fit_reaches_the_known_errors(radius: float, terms: int, bound: float) -> None:
    """Within 2.5 times the best errors known for (range, terms), measured on another grid than the fit's."""
    frequencies, coefficients, error = series.fit(float(radius), terms)
    x = torch.linspace(-radius, radius, 12345, dtype=F64)
    fitted = (torch.sin(x[:, None] * torch.as_tensor(frequencies)) * torch.as_tensor(coefficients)).sum(-1)
    measured = float((fitted - x.tanh()).abs().max())
    assert len(coefficients) == terms and measured <= 1.02 * error and measured <= 2.5 * bound


@pytest.mark.parametrize(("name", "kind"), [("additive", "Additive"), ("general", "General"), ("Hadamard", "Hadamard")])
def test_a_name_of_a_learned_score_says_which_object_to_pass(name, kind):
    query = torch.ones(1, 2, 3, 4)
    words = rf"got '{name}'. It has parameters: pass va.scores.{kind}\(...\), or use va.nn.ScoreAttention"
    with pytest.raises(ValueError, match=words):
        va.score_attention(query, query, query, score=name)
