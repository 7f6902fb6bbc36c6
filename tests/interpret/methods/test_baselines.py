"""`baseline=` of input times gradient and integrated gradients: an input, or embeddings, in place of zero."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import in_double
from tests.interpret.methods.test_embedding_methods import IDS, Sees, Words, entered

pytestmark = pytest.mark.usefixtures("published")

METHODS = va.methods
PROCESSOR = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]))


def pictures() -> Tensor:
    return torch.randn(2, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def blurred(x: Tensor) -> Tensor:
    """Each pixel a mean of all, those beyond the edges included, by weights exp(-d^2 / 2 s^2)."""
    sigma = min(x.shape[-2:]) / 20
    radius = max(1, int(-(-3 * sigma // 1)))
    for dim in (-2, -1):
        size = x.shape[dim]
        weights = torch.zeros(size, size, dtype=x.dtype)
        for i in range(size):
            for d in range(-radius, radius + 1):
                weights[i, min(max(i + d, 0), size - 1)] += torch.exp(torch.tensor(-(d**2) / (2 * sigma**2), dtype=x.dtype))
        weights /= weights.sum(1, keepdim=True)
        x = (weights @ x) if dim == -2 else x @ weights.T
    return x


def colour(value: float) -> Tensor:
    return torch.tensor([(value - m) / s for m, s in ((0.5, 0.2), (0.4, 0.3), (0.3, 0.4))], dtype=torch.float64).view(3, 1, 1)


BASELINES: dict[str, tuple[Any, Any]] = {
    "black": ("black", lambda x: x.amin((1, 2, 3), keepdim=True)),
    "white": ("white", lambda x: x.amax((1, 2, 3), keepdim=True)),
    "mean": ("mean", lambda x: x.mean((2, 3), keepdim=True)),
    "blur": ("blur", blurred),
    "a picture": (torch.full((3, 1, 1), 0.25), lambda x: torch.full((3, 1, 1), 0.25)),
    "named": ({"x": "mean"}, lambda x: x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", BASELINES)
def test_pictures(name: str) -> None:
    baseline, formula = BASELINES[name]
    model, x = Sees().double(), pictures().requires_grad_()
    got = va.explain(model, {"x": x.detach()}, target=1, method=METHODS.InputGradient(baseline))
    (grad,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    expected = ((x - formula(x)) * grad).sum(1).detach()
    torch.testing.assert_close(got.relevancy["x"], expected.flatten(1), rtol=1e-9, atol=1e-12)
    assert got.method.startswith("input_gradient(baseline=")
    integrated = va.explain(model, {"x": x.detach()}, target=1, method=METHODS.IntegratedGradients(3, baseline))
    rows = torch.zeros_like(expected)
    for step in range(3):
        origin = (formula(x) + torch.zeros_like(x)).detach()
        between = (origin + (x.detach() - origin) * (step + 0.5) / 3).requires_grad_()
        (grad,) = torch.autograd.grad(model(between)[:, 1].sum(), between)
        rows += ((x - origin) * grad).sum(1).detach() / 3
    torch.testing.assert_close(integrated.relevancy["x"], rows.flatten(1), rtol=1e-9, atol=1e-12)
    assert torch.equal(integrated.scores, got.scores)  # the run on the input itself is what it was


def test_colours_are_those_of_the_processor() -> None:
    model, x = Sees().double(), pictures().requires_grad_()
    (grad,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    for name, value in (("black", 0.0), ("white", 1.0)):
        method = METHODS.InputGradient(name)
        got = va.explain(model, {"x": x.detach()}, target=1, method=method, processor=PROCESSOR).relevancy["x"]
        torch.testing.assert_close(got, ((x - colour(value)) * grad).sum(1).flatten(1).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["clip", "vit", "llava"], indirect=True)
def test_towers_take_the_embeddings_of_the_baseline(case: Any) -> None:
    """What enters the first layers, by a run of the model on the other picture; words, which are the same there, count 0."""
    layers = {"clip": "vision_model.encoder.layers.0", "vit": "vit.layers.0", "llava": "model.language_model.layers.0"}
    kind = next(name for name in layers if name in type(case.model).__name__.lower())
    model, inputs = case.model.double(), in_double(case)
    first = model.get_submodule(layers[kind])
    score = lambda: case.score(model(**inputs), inputs)  # noqa: E731
    ((values, grad),) = entered(model, [first], score)
    other = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], 0.5)}
    ((origin, _),) = entered(model, [first], lambda: case.score(model(**other), other))
    got = va.explain(model, inputs, method=METHODS.InputGradient(torch.full((3, 1, 1), 0.5)))
    expected = ((values - origin) * grad).sum(-1)
    tower = next(name for name, row in got.relevancy.items() if row.shape == expected.shape and name != "text")
    assert (got.relevancy[tower] - expected).abs().max() < 1e-9 * expected.abs().max() and expected.abs().max() > 0
    if kind == "llava":
        assert got.text is not None and not got.text.any() and got.image.any()
    if kind == "clip":
        assert not got.relevancy["text"].any()


def test_words() -> None:
    model = Words(60, lambda: nn.GRU(6, 6, batch_first=True)).double()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    x = model.words(IDS).detach().requires_grad_()
    (grad,) = torch.autograd.grad(model.head(model.middle(x)[0]).sum(1)[:, 2].sum(), x)
    embedding = torch.randn(6, dtype=torch.float64)
    tokenizer = type("Names", (), {"pad_token_id": 9, "all_special_ids": [2, 9], "__call__": lambda self, text: None})()
    special = model.words(torch.where(IDS == 2, IDS, 9))
    for baseline, origin in (
        (7, model.words.weight[7]), ({"input_ids": 7}, model.words.weight[7]), (embedding, embedding), ("pad", special)
    ):  # fmt: skip
        method = METHODS.InputGradient(baseline)
        got = va.explain(model, {"input_ids": IDS}, target=2, method=method, processor=tokenizer if baseline == "pad" else None)
        torch.testing.assert_close(got.relevancy["input_ids"], ((x - origin) * grad).sum(-1).detach(), rtol=1e-9, atol=1e-12)

    class Masked(Words):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids)

    masked = Masked(60, lambda: nn.GRU(6, 6, batch_first=True)).double()
    got = va.explain(masked, {"input_ids": IDS, "attention_mask": mask}, target=2, method=METHODS.InputGradient(7))
    assert not got.relevancy["input_ids"][1, 3:].any() and got.relevancy["input_ids"][1, :3].all()  # padding stays


def test_the_gap_to_the_gain(tmp_path: Path) -> None:
    """Entries add up to the score's gain over the baseline; where they do not, a warning says so."""

    class Steep(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.sum((1, 2, 3)) ** 9)[:, None]

    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    black = torch.full((1, 1, 1), 0.5)
    got = va.explain(Steep(), {"x": x}, target=0, method=METHODS.IntegratedGradients(64, black))
    torch.testing.assert_close(got.relevancy["x"].sum(-1), got.scores - 2.0**9, rtol=1e-3, atol=0)
    torch.testing.assert_close(got.gap, got.relevancy["x"].sum(-1) - (got.scores - 2.0**9))
    with pytest.warns(
        UserWarning, match=r"The entries do not add up .* Pass n_steps above 1, or another baseline; `explanation.gap`"
    ):
        few = va.explain(Steep(), {"x": x}, target=0, method=METHODS.IntegratedGradients(1, black))
    assert few.gap.tolist() == [18 * 3.0**8 - (4.0**9 - 2.0**9)]  # at 3/4 of each pixel
    few.save(tmp_path / "few.safetensors")
    assert (
        torch.equal(va.Explanation.load(tmp_path / "few.safetensors").gap, few.gap)
        and va.explain(Steep(), {"x": x}, target=0, method=METHODS.IntegratedGradients(1, black, freeze=("norms",))).gap is None
    )
    named = va.explain(Steep(), {"x": x}, target=0, method=va.methods.IntegratedGradients(n_steps=16))
    assert named.method == "integrated_gradients(n_steps=16)"


@pytest.mark.parametrize(
    ("baseline", "error", "message"),
    [
        ("grey", ValueError, "baseline must be one of 'black', 'white', 'blur', 'mean', 'pad', .*; got 'grey'"),
        (0.5, TypeError, "baseline must be a name, a token id, a tensor, or a dict from inputs to these; got"),
        (True, TypeError, "baseline must be a name"),
        (7, ValueError, r"inputs must hold token ids for baseline=7; got \['x'"),
        ({"y": "black"}, ValueError, r"baseline must name inputs that are tensors, among \['x'\]; got 'y'"),
        ({"x": 7}, ValueError, r"baseline must be a token only for ids \(B, N\); got 7 for 'x'"),
        ({"x": torch.zeros(5)}, ValueError, r"baseline must broadcast to 'x' \(2, 3, 8, 12\); got \(5,\)"),
        (torch.zeros(5), ValueError, r"baseline must broadcast to the images in inputs, or to the embeddings .* got \(5,\)"),
        (pictures(), ValueError, "baseline must change the embeddings of the towers x; got those of the input"),
    ],
)  # fmt: skip
def test_bad_baselines(baseline: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        va.explain(Sees().double(), {"x": pictures()}, target=1, method=METHODS.InputGradient(baseline))


def test_pictures_that_are_cut_into_patches() -> None:
    from vlattn_fast.interpret.explaining.baseline import baseline_image

    patches = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    assert baseline_image("white", patches, None).eq(3.0).all() and baseline_image("black", patches, PROCESSOR).eq(-2.0).all()
    assert baseline_image("mean", patches, None).eq(torch.tensor([2.0, -0.75])).all()
    of_each = {"image_grid_thw": torch.tensor([[1, 1, 1], [1, 1, 1]])}  # two images of one patch each
    assert torch.equal(baseline_image("mean", patches, None, inputs=of_each), patches)
    assert baseline_image("white", patches, None, inputs=of_each).tolist() == [[1.0, 1.0], [3.0, 3.0]]
    with pytest.raises(ValueError, match="baseline must be 'black', 'white', 'mean' or a tensor for images"):
        baseline_image("blur", patches, None)
