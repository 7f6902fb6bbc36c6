"""Object detectors: one query of an encoder-decoder, by the published rules on stored maps, and those that no rule covers."""

from typing import Any

import pytest
import torch
import transformers

from tests.helpers.interpret import linked_maps
from tests.helpers.interpret.cases import TEXT, lively
from tests.helpers.interpret.stored_maps import assert_rows, with_floats
from vlattn_fast.interpret import explain

SIZES = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
)
RESNET = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])


def detr(kind: str) -> Any:
    torch.manual_seed(0)
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage2"])
    make = {
        "detr": (transformers.DetrConfig, transformers.DetrForObjectDetection),
        "conditional": (transformers.ConditionalDetrConfig, transformers.ConditionalDetrForObjectDetection),
    }[kind]
    config = make[0](**SIZES, use_timm_backbone=False, backbone_config=backbone, num_queries=5, num_labels=3)
    return lively(make[1](config)).eval().double()


def pictures(padded: bool) -> dict[str, torch.Tensor]:
    """Features of 4 x 5, of which the second picture has 2 x 3."""
    generator = torch.Generator().manual_seed(2)
    inputs = {"pixel_values": torch.randn(2, 3, 32, 40, generator=generator).double()}
    if padded:
        mask = torch.ones(2, 32, 40, dtype=torch.long)
        mask[1, 16:], mask[1, :, 24:] = 0, 0
        inputs["pixel_mask"] = mask
    return inputs


def stored(model: Any, inputs: dict[str, Any], score: Any) -> linked_maps.Maps:
    model.set_attn_implementation("literal")
    o = model(**inputs, output_attentions=True)
    return linked_maps.encoder_decoder_maps(o, score(o).sum())


def published(model: Any, inputs: dict[str, Any], score: Any, queries: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of each picture's query in R_qq, its own entry 0, and in R_qi."""
    return linked_maps.published("gradient", stored(model, inputs, score), queries)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["detr", "conditional"])
def test_against_stored_maps(kind, padded):
    model, inputs = detr(kind), pictures(padded)
    objects = 3 if kind == "detr" else None  # the last logit of DETR says that there is no object
    logits = model(**inputs).logits.detach()
    sure = logits.softmax(-1)[..., :3] if kind == "detr" else logits.sigmoid()
    surest = sure.flatten(1).argmax(-1) // 3
    assert logits.shape == (2, 5, 4 if kind == "detr" else 3)

    for target, queries in ((None, surest.tolist()), (3, [3, 3]), ([4, 0], [4, 0])):
        rows = torch.arange(2), torch.tensor(queries)
        score = lambda o, rows=rows: o.logits[rows][:, :objects].max(-1).values  # noqa: E731
        want = published(model, inputs, score, queries)
        got = explain(model, inputs, target=target)
        assert got.target == queries and got.position["queries"].tolist() == queries
        assert_rows(got.relevancy["queries"], want[0])
        assert_rows(got.relevancy["vision"], want[1])
        torch.testing.assert_close(got.scores, score(model(**inputs)).detach())
        maps = want[1].view(2, 4, 5)
        for found, wanted in zip(got.image, (maps[0], maps[1, :2, :3] if padded else maps[1]), strict=True):
            assert_rows(found.flatten(), wanted.flatten())
        if padded:
            assert maps[1].sum() == pytest.approx(float(maps[1, :2, :3].sum()))
        assert got.image_samples == [0, 1] and got.text is None and "<canvas" in got.to_html()

    single = explain(model.float(), with_floats(inputs, torch.float32), target=[4, 0])
    assert_rows(single.relevancy["vision"], want[1])


@pytest.mark.parametrize("kind", ["detr", "conditional"])
def test_every_method(kind):
    model, inputs = detr(kind), pictures(False)
    maps = stored(model, inputs, lambda o: o.logits[:, 3, :3].max(-1).values)
    for method in linked_maps.METHODS:
        got, want = explain(model, inputs, target=3, method=method), linked_maps.published(method, maps, [3, 3])
        assert_rows(got.relevancy["queries"], want[0], what=method)
        assert_rows(got.relevancy["vision"], want[1], what=method)


def test_a_callable_target_scores_one_query():
    model, inputs = detr("detr"), pictures(False)
    score = lambda o: o.logits[:, 3, 1] - o.logits[:, 3, 3]  # noqa: E731
    want = published(model, inputs, score, [3, 3])
    for read in ({}, {"position": 3}):
        got = explain(model, inputs, target=score, **read)
        assert_rows(got.relevancy["vision"], want[1])
    with pytest.raises(ValueError, match="position must name the explained token of tower 'queries'; got None"):
        explain(model, inputs, target=lambda o: o.logits[:, :, 1].logsumexp(1))
    with pytest.raises(ValueError, match="position must be None for a detector, whose explained token is the object query"):
        explain(model, inputs, target=3, position=3)
    with pytest.raises(ValueError, match=r"target must be from 0 to 4 \(object queries\); got 5"):
        explain(model, inputs, target=5)


def test_other_calls():
    model = detr("detr").float()
    empty = explain(model, {"pixel_values": torch.zeros(0, 3, 32, 40)})
    assert empty.relevancy["vision"].shape == (0, 20) and empty.target == []


@pytest.mark.parametrize("kind", ["GroundingDino", "MMGroundingDino"])
def test_grounding_dino_is_refused(kind):
    backbone = transformers.ResNetConfig(**RESNET, out_features=["stage1", "stage2"])
    text = transformers.BertConfig(**TEXT, max_position_embeddings=16)
    config = getattr(transformers, f"{kind}Config")(
        **SIZES,
        use_timm_backbone=False,
        backbone_config=backbone,
        text_config=text,
        num_queries=6,
        num_feature_levels=2,
        max_text_len=9,
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 64, 64), "input_ids": torch.tensor([[101, 7, 8, 1012, 102]]).clamp(max=59)}
    reasons = rf"'model\.encoder\.layers\.0\.[\w.]+' \({kind}BiMultiHeadAttention\), which takes two softmaxes"
    for options in ({}, {"position": 0, "target": lambda o: o.logits[:, 0, 0]}):
        with pytest.raises(ValueError, match=reasons) as raised:
            explain(model, inputs, **options)
        assert f"({kind}MultiscaleDeformableAttention), which samples values at a few learned points" in str(raised.value)


def test_bridge_tower_is_refused():
    config = transformers.BridgeTowerConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        text_config=dict(TEXT, hidden_size=64, num_hidden_layers=3, max_position_embeddings=16),
        vision_config=dict(hidden_size=64, num_hidden_layers=3, patch_size=8, image_size=32),
    )
    model = transformers.BridgeTowerForImageAndTextRetrieval(config).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "input_ids": torch.tensor([[0, 7, 8, 2]])}
    for options in ({}, {"position": 0, "target": lambda o: o.logits[:, 1]}):
        with pytest.raises(
            ValueError, match=r"'bridgetower\.cross_modal_text_link_tower\.0' \(BridgeTowerLinkTower\), which adds up"
        ):
            explain(model, inputs, **options)
