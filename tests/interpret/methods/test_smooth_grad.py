"""SmoothGrad: the mean gradient under noise, against a loop by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import in_double
from tests.interpret.methods.test_embedding_methods import IDS, Sees, Words

pytestmark = pytest.mark.usefixtures("published")

SmoothGrad = va.methods.SmoothGrad


def smoothed(score: Any, x: Tensor, noise: float, count: int, seed: int = 0, origin: Any = 0.0) -> Tensor:
    """(x - origin) times the mean gradient, number by number."""
    generator, total = torch.Generator().manual_seed(seed), torch.zeros_like(x)
    scale = torch.stack([(one.max() - one.min()) * noise for one in x])
    for _ in range(count):
        draw = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        noisy = (x + draw * scale.view(-1, *[1] * (x.ndim - 1))).detach().requires_grad_()
        total += torch.autograd.grad(score(noisy).sum(), noisy)[0]
    return (x - origin) * total / count


def test_pixels_and_words() -> None:
    model, x = Sees().double(), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    rows = smoothed(lambda pixels: model(pixels)[:, 1], x, 0.2, 3, seed=5).sum(1)
    found = va.explain(model, {"x": x}, target=1, method=SmoothGrad(3, 0.2, seed=5))
    torch.testing.assert_close(found.image, rows, rtol=1e-9, atol=1e-12)
    assert found.method == "smoothgrad(n_samples=3, noise=0.2, seed=5)" and torch.equal(found.scores, model(x)[:, 1].detach())
    white = va.explain(model, {"x": x}, target=1, method=SmoothGrad(3, 0.2, "white", seed=5))
    rows = smoothed(lambda pixels: model(pixels)[:, 1], x, 0.2, 3, 5, x.amax((1, 2, 3), keepdim=True)).sum(1)
    torch.testing.assert_close(white.image, rows, rtol=1e-9, atol=1e-12)
    words = Words(60, lambda: nn.GRU(6, 6, batch_first=True)).double()
    rows = smoothed(lambda e: words.head(words.middle(e)[0]).sum(1)[:, 2], words.words(IDS).detach(), 0.1, 16).sum(-1)
    found = va.explain(words, {"input_ids": IDS}, target=2, method="smoothgrad")
    torch.testing.assert_close(found.relevancy["input_ids"], rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_a_tower(case: Any) -> None:
    model, inputs = case.model.double(), in_double(case)
    target = model(**inputs).logits.argmax(-1)
    values: list[Tensor] = []
    first = model.get_submodule("vit.layers.0")

    def score(noisy: Tensor) -> Tensor:
        handle = first.register_forward_pre_hook(lambda module, args: (noisy, *args[1:]))
        try:
            return model(**inputs).logits.gather(1, target[:, None])[:, 0]
        finally:
            handle.remove()

    handle = first.register_forward_pre_hook(lambda module, args: values.append(args[0].detach()))
    model(**inputs)
    handle.remove()
    rows = smoothed(score, values[0], 0.1, 4).sum(-1)
    for _ in range(2):  # the noise is the same in every call
        found = va.explain(model, inputs, method=SmoothGrad(4)).relevancy["vision"]
        assert (found - rows).abs().max() < 1e-9 * rows.abs().max()
    other = va.explain(model, inputs, method=SmoothGrad(4, seed=1)).relevancy["vision"]
    assert not torch.allclose(other, rows)
    still = va.explain(model, inputs, method=SmoothGrad(2, noise=0.0)).relevancy["vision"]
    plain = va.explain(model, inputs, method="input_gradient").relevancy["vision"]
    torch.testing.assert_close(still, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples must be at least 1; got 0"),
        ({"noise": -0.1}, "noise must be"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"baseline": "grey"}, "baseline must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothGrad(**options)
