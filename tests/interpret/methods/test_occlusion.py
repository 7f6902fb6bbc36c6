"""Occlusion: the score's drop when patches or words give way to a fill, against runs on inputs that are filled by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.interpret.cases import in_double, lively
from tests.helpers.interpret.decoder_cases import DECODERS
from tests.interpret.methods.test_embedding_methods import IDS, Sees, Words

Occlusion = va.methods.Occlusion


def drops(score: Any, x: Tensor, fill: Tensor, grid: tuple[int, int], window: int = 1, stride: int = 1) -> Tensor:
    """(B, h, w): for each patch the mean of score(x) - score(x without a window) over the windows that cover it."""
    (h, w), patch = grid, (x.shape[2] // grid[0], x.shape[3] // grid[1])
    total, count = torch.zeros(len(x), h, w, dtype=x.dtype), torch.zeros(h, w)
    starts = [[*range(0, size - window, stride), size - window] for size in grid]
    for i in starts[0]:
        for j in starts[1]:
            mask = torch.zeros(h, w)
            mask[i : i + window, j : j + window] = 1
            pixels = mask.repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1).bool()
            total += (score(x) - score(torch.where(pixels, fill.expand_as(x), x)))[:, None, None] * mask
            count += mask
    return total / count


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and expected.abs().max() > 1e-6
    assert (actual - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_patches(case: Any, window: int, stride: int) -> None:
    """A patch that gives way at the first layer is a patch whose pixels do."""
    model, x = case.model.double(), in_double(case)["pixel_values"]
    target = model(x).logits.argmax(-1)
    with torch.no_grad():
        score = lambda pixels: model(pixels).logits.gather(1, target[:, None])[:, 0]  # noqa: E731
        for fill, values in (("mean", x.mean((2, 3), keepdim=True)), ("black", x.amin((1, 2, 3), keepdim=True))):
            found = va.explain(model, {"pixel_values": x}, method=Occlusion(window, stride, fill))
            close(found.image, drops(score, x, values, tuple(found.image.shape[1:]), window, stride))
            assert not found.relevancy["vision"][:, 0].any() and torch.equal(found.scores, score(x))
    single = va.explain(model, {"pixel_values": x}, method=Occlusion(window, stride, "black", batch_size=1))
    close(single.image, found.image)


def test_pixels_of_a_model_without_an_adapter() -> None:
    model, x = Sees().double(), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    score = lambda pixels: model(pixels)[:, 1]  # noqa: E731
    with torch.no_grad():
        found = va.explain(model, {"x": x}, target=1, method=Occlusion(2), patches=va.PatchGrid(4, 6))
        close(found.image / 4, drops(score, x, x.mean((2, 3), keepdim=True), (4, 6), 2))  # an image sums over a patch's pixels
        close(found.relevancy["x"].view(2, 8, 12)[:, ::2, ::2], found.image / 4)
    with pytest.raises(ValueError, match=r"patches must be a va.PatchGrid\(rows, columns\) that divides the \(8, 12\) pixels"):
        va.explain(model, {"x": x}, target=1, method="occlusion")
    with pytest.raises(ValueError, match=r"patches must be .* got PatchGrid\(rows=3, columns=3, prefix=0\)"):
        va.explain(model, {"x": x}, target=1, method="occlusion", patches=va.PatchGrid(3, 3))


def test_words() -> None:
    """Windows of words; without a fill of their own they have embeddings of zero."""
    model = Words(60, lambda: nn.GRU(6, 6, batch_first=True)).double()

    def score(embeddings: Tensor) -> Tensor:
        return model.head(model.middle(embeddings)[0]).sum(1)[:, 2] - 4 * model.head.bias[2]

    whole = model.words(IDS).detach()
    for method, fill in ((Occlusion(2), torch.zeros(6, dtype=torch.float64)), (Occlusion(2, fill=7), model.words.weight[7])):
        total, count = torch.zeros(2, 5, dtype=torch.float64), torch.zeros(5)
        for i in range(4):
            without = whole.clone()
            without[:, i : i + 2] = fill.detach()
            total[:, i : i + 2] += (score(whole) - score(without)).detach()[:, None]
            count[i : i + 2] += 1
        close(va.explain(model, {"input_ids": IDS}, target=2, method=method).relevancy["input_ids"], total / count)
    assert method.label == "occlusion(window=2, fill=7)"


def test_the_words_of_an_answer() -> None:
    model = lively(DECODERS["LlamaForCausalLM"]().model).eval().double()
    prompt, answer = [1, 4, 9, 11], [17, 30]
    options = {"answer": answer, "method": Occlusion(fill=5)}
    found = va.explain(model, {"input_ids": torch.tensor([prompt])}, **options)
    with torch.no_grad():
        score = lambda ids: model(torch.tensor([ids])).logits[0, 3:5].log_softmax(-1)[[0, 1], answer]  # noqa: E731
        ids = [*prompt, *answer]
        expected = torch.stack([score(ids) - score([*ids[:i], 5, *ids[i + 1 :]]) for i in range(6)], 1)
    expected[:, 0] = 0  # the first token is no word
    assert (found.relevancy["language"][0] - expected).abs().max() < 1e-5 * expected.abs().max()
    logits = va.explain(model, {"input_ids": torch.tensor([prompt])}, answer=answer, method=Occlusion(fill=5, of="logit"))
    assert logits.of == "logit" and not torch.allclose(logits.relevancy["language"], found.relevancy["language"])
    together = va.explain(model, {"input_ids": torch.tensor([prompt])}, **options, per_token=False)
    close(together.relevancy["language"], found.relevancy["language"].sum(1))


@pytest.mark.parametrize("case", ["clip", "llava", "uniter", "bert", "qwen2_5_vl"], indirect=True)
def test_one_window_or_many_at_once(case: Any) -> None:
    model, inputs = case.model.double(), in_double(case)
    many, single = (va.explain(model, inputs, method=Occlusion(batch_size=size)) for size in (5, 1))
    for tower, row in single.relevancy.items():
        assert (many.relevancy[tower] - row).abs().max() < 1e-5 * row.abs().max()


@pytest.mark.parametrize("case", ["vit"], indirect=True)
def test_a_score_of_a_batch_that_cannot_grow(case: Any) -> None:
    model, inputs = case.model.double(), in_double(case)
    for score in (lambda o: o.logits[[0, 1], [1, 2]], lambda o: o.logits[torch.arange(2), torch.tensor([1, 2])]):
        found = va.explain(model, inputs, target=score, position={"vision": "cls"}, method="gradient")
        occluded = va.explain(model, inputs, target=score, method=Occlusion())
        close(occluded.relevancy["vision"], va.explain(model, inputs, target=[1, 2], method="occlusion").relevancy["vision"])
        assert torch.equal(occluded.scores, found.scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1; got 0"),
        ({"window": 2, "stride": 3}, "stride must be at most window, so that every patch is replaced; got 3 and 2"),
        ({"fill": "grey"}, "fill must be one of 'black'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"of": "chance"}, "of must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Occlusion(**options)
