"""SCAN's similarities and loss (Lee et al., ECCV 2018) and AttnGAN's loss on words (Xu et al., CVPR 2018)."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.published.authors import assert_equal, defined, on_cpu, published

pytestmark = pytest.mark.filterwarnings("ignore")  # what their code warns of

NORMS = {
    None: "no_norm",
    **{name: name for name in ("softmax", "l2norm", "l1norm", "clipped_l2norm", "clipped_l1norm", "clipped")},
}
AGGREGATIONS = {"logsumexp": "LogSumExp", "max": "Max", "sum": "Sum", "mean": "Mean"}
LENGTHS = torch.tensor([6, 3, 5, 2])
RUNS = [(torch.float64, "streaming"), (torch.float64, "reference"), (torch.float32, "auto")]


def scan() -> SimpleNamespace:
    names = ("func_attention", "cosine_similarity", "xattn_score_t2i", "xattn_score_i2t", "ContrastiveLoss", "l1norm", "l2norm")
    found = defined("kuanghuei/SCAN", "model.py", *names, torch=torch, nn=nn, np=np, Variable=lambda x, **_: x)
    vars(found)["func_attention"].__globals__["l1norm_d"] = found.l1norm  # a name that their file does not define
    return found


def unit_sets() -> tuple[Tensor, Tensor]:
    images, captions = torch.randn(4, 9, 8, dtype=torch.float64), torch.randn(4, 6, 8, dtype=torch.float64)
    return nn.functional.normalize(images, dim=-1), nn.functional.normalize(captions, dim=-1)


@pytest.mark.parametrize(("dtype", "backend"), RUNS)
@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_similarities_of_scan(direction: str, dtype: torch.dtype, backend: str) -> None:
    images, captions = unit_sets()
    cotangent = torch.randn(4, 4, dtype=torch.float64)
    for (norm, their_norm), (aggregation, their_aggregation) in itertools.product(NORMS.items(), AGGREGATIONS.items()):
        options = SimpleNamespace(raw_feature_norm=their_norm, agg_func=their_aggregation, lambda_softmax=9.0, lambda_lse=6.0)

        def compute(options: SimpleNamespace = options) -> dict[str, Tensor]:
            leaves = [x.clone().requires_grad_() for x in (images, captions)]
            similarity = getattr(scan(), f"xattn_score_{direction}")(*leaves, LENGTHS, options)
            grads = torch.autograd.grad(similarity, leaves, cotangent)
            return {"similarity": similarity, "images": grads[0], "captions": grads[1]}

        wanted = dict(published(f"scan {direction} {norm} {aggregation}", compute))
        ours = [x.to(dtype).requires_grad_() for x in (images, captions)]
        rule = {"first_norm": norm, "smooth": 9.0, "aggregation": aggregation, "lambda_lse": 6.0}
        got = va.stacked_cross_attention(*ours, LENGTHS, direction=direction, **rule, backend=backend)
        assert_equal(got, wanted.pop("similarity"), f"{norm} {aggregation}")
        for grad, there in zip(torch.autograd.grad(got, ours, cotangent.to(dtype)), wanted.values(), strict=True):
            assert_equal(grad, there, f"{norm} {aggregation}, a gradient")


@pytest.mark.parametrize("max_violation", [False, True])
def test_loss_of_scan(max_violation: bool) -> None:
    names = {"raw_feature_norm": "clipped_l2norm", "agg_func": "LogSumExp", "lambda_softmax": 9.0, "lambda_lse": 6.0}
    images, captions = unit_sets()

    def compute() -> dict[str, Tensor]:
        with on_cpu():
            loss = scan().ContrastiveLoss(SimpleNamespace(**names, cross_attn="t2i"), 0.2, max_violation)
            return {"loss": loss(images, captions, LENGTHS)}

    ours = va.nn.ScanLoss(0.2, max_violation, direction="t2i", first_norm="clipped_l2norm", aggregation="logsumexp")
    assert_equal(ours(images, captions, LENGTHS), published(f"scan loss {max_violation}", compute)["loss"])


@pytest.mark.parametrize(("dtype", "backend"), RUNS)
@pytest.mark.parametrize("ids", [None, [0, 1, 0, 2, 1]])
def test_words_loss_of_attngan(ids: list[int] | None, dtype: torch.dtype, backend: str) -> None:
    lengths = torch.tensor([6, 3, 5, 2, 4])
    leaves = [torch.randn(5, 8, *size, dtype=torch.float64).mul_(0.7).requires_grad_() for size in ((4, 4), (6,))]

    def compute() -> dict[str, Tensor]:
        smooth = SimpleNamespace(GAMMA1=4.0, GAMMA2=5.0, GAMMA3=10.0)
        config = SimpleNamespace(CUDA=False, TRAIN=SimpleNamespace(SMOOTH=smooth))
        attention = defined("taoxugit/AttnGAN", "code/GlobalAttention.py", "func_attention", torch=torch, nn=nn).func_attention
        imports = {"torch": torch, "nn": nn, "np": np, "cfg": config, "func_attention": attention}
        words_loss = defined("taoxugit/AttnGAN", "code/miscc/losses.py", "cosine_similarity", "words_loss", **imports).words_loss
        fill = Tensor.masked_fill_
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "masked_fill_", lambda x, mask, value: fill(x, mask.bool(), value))  # their masks are bytes
            by_image, by_caption, _ = words_loss(*leaves, torch.arange(5), lengths, None if ids is None else np.array(ids), 5)
        grads = torch.autograd.grad(by_image + by_caption, leaves)
        return {"loss": by_image + by_caption, "images": grads[0], "captions": grads[1]}

    wanted = dict(published(f"attngan {ids}", compute))
    ours = [x.detach().to(dtype).requires_grad_() for x in leaves]
    loss = va.nn.DamsmLoss(4.0, 5.0, 10.0, backend=backend)
    got = loss(ours[0].flatten(2).mT, ours[1].mT, lengths, ids=None if ids is None else torch.tensor(ids))
    assert_equal(got, wanted.pop("loss"), "loss")
    for grad, (name, there) in zip(torch.autograd.grad(got, ours), wanted.items(), strict=True):
        assert_equal(grad, there, name)
