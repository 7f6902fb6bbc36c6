"""Models that no record names: torch's and open_clip's encoders, and classes of transformers."""

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.interpret.cases import VISION, lively, one_hot
from tests.helpers.interpret.stored_maps import Place, check
from tests.helpers.interpret.tower_cases import HEADS, METHODS, T5, first_rows, made, second, sequences, text
from vlattn_fast.interpret import explain


class Encoder(nn.Module):
    def __init__(self, batch_first: bool, norm_first: bool, width: int = 32) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, HEADS, 48, batch_first=batch_first, norm_first=norm_first)
        self.embed, self.head, self.batch_first = nn.Linear(10, width), nn.Linear(width, 3), batch_first
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=batch_first and not norm_first)

    def forward(self, x: Tensor, padding: Tensor | None = None, causal: bool = False) -> Tensor:
        x = self.embed(x) if self.batch_first else self.embed(x).transpose(0, 1)
        size = x.shape[1 if self.batch_first else 0]
        mask = nn.Transformer.generate_square_subsequent_mask(size).to(x.dtype) if causal else None
        x = self.encoder(x, mask=mask, src_key_padding_mask=padding, is_causal=causal)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.head(x[:, -1 if causal else 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_encoder(batch_first, norm_first, causal):
    model, inputs = lively(Encoder(batch_first, norm_first)).eval(), sequences()
    real = None if causal else inputs["attention_mask"].bool()
    inputs = {"x": inputs["x"], "padding": None if real is None else ~real, "causal": causal}
    row = one_hot(torch.tensor([6, 6]), 7) if causal else first_rows(7)
    # Nothing tells that `padding` is a mask, and Grad-CAM's mean would take what is padded.
    methods = METHODS if causal else METHODS[:3]
    read = -1 if causal else "cls"
    check(model, inputs, {"tower0": Place("encoder", row, real)}, second, methods, position=read, target=second)


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 24, 24)}


def test_beit_with_position_bias():
    config = transformers.BeitConfig(**VISION, num_labels=3, use_relative_position_bias=True)
    place = Place("beit.layers", torch.full((2, 17), 1 / 17, dtype=torch.float64))
    model = made(transformers.BeitForImageClassification(config))
    check(model, pixels(), {"tower0": place}, lambda o: o.logits[:, 1], METHODS, position="mean", target=1)


def test_vit_mae_with_a_noise_of_its_own():
    model = made(transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION, mask_ratio=0.5)))
    inputs = {**pixels(), "noise": torch.rand(2, 16)}
    score = lambda outputs: outputs.last_hidden_state[:, 0, 3]  # noqa: E731
    check(model, inputs, {"tower0": Place("layers", first_rows(9))}, score, METHODS, position="cls", target=score)


def test_blip_image_text_retrieval_without_cross_attention():
    words = dict(T5, encoder_hidden_size=32, bos_token_id=1, eos_token_id=2, sep_token_id=3)
    config = transformers.BlipConfig(text_config=words, vision_config=VISION, image_text_hidden_size=16)
    model, inputs = made(transformers.BlipForImageTextRetrieval(config)), {**text(), **pixels(), "use_itm_head": False}
    places = {
        "tower0": Place("vision_model", first_rows(17)),
        "tower1": Place("text_encoder", first_rows(9), inputs["attention_mask"]),
    }
    score = lambda outputs: outputs.itm_score.diagonal()  # noqa: E731
    check(model, inputs, places, score, METHODS, position="cls", target=score)


def test_owlvit_detects_by_one_patch():
    """Several queries an image: the image's tower is read, at CLS and at the patch."""
    config = transformers.OwlViTConfig(text_config=T5, vision_config=VISION, projection_dim=32)
    model, inputs = made(transformers.OwlViTForObjectDetection(config)), {**text(4), **pixels()}
    row = one_hot(torch.tensor([6, 6]), 17)
    score = lambda outputs: outputs.logits[:, 5, 1]  # noqa: E731
    check(model, inputs, {"tower0": Place("owlvit.vision_model", row)}, score, METHODS, position={"tower0": 6}, target=score)
    with pytest.raises(ValueError, match=r"tower 'tower1' on whole inputs; got a batch of 4 for 2 scores"):
        explain(model, inputs, position="cls", target=score)


def test_xclip_reads_the_text_and_refuses_frames():
    frames = dict(num_frames=2, mit_hidden_size=32, mit_intermediate_size=48, mit_num_attention_heads=4, mit_num_hidden_layers=1)
    config = transformers.XCLIPConfig(
        text_config=dict(T5, eos_token_id=58), vision_config={**VISION, **frames}, projection_dim=32
    )
    model, inputs = made(transformers.XCLIPModel(config)), {**text(), "pixel_values": torch.randn(2, 2, 3, 24, 24)}
    inputs["input_ids"][0, 8] = inputs["input_ids"][1, 5] = 58
    end = (inputs["input_ids"] == 58).float()
    score = lambda outputs: outputs.logits_per_video.diagonal()  # noqa: E731
    places = {"tower3": Place("text_model", end, inputs["attention_mask"])}
    check(model, inputs, places, score, METHODS, position={"tower3": end}, target=score)
    with pytest.raises(ValueError, match="on whole inputs; got a batch of 4 for 2 scores"):
        explain(model, inputs, position={"tower1": "cls"}, target=score)


def test_clipseg_reads_the_decoder_behind_frozen_towers():
    """Its CLIP runs without gradients, so that only the decoder can be read."""
    decoder = dict(reduce_dim=16, decoder_num_attention_heads=4, decoder_intermediate_size=20, extract_layers=[0, 1])
    config = transformers.CLIPSegConfig(text_config=dict(T5, eos_token_id=58), vision_config=VISION, projection_dim=32, **decoder)
    model, inputs = made(transformers.CLIPSegForImageSegmentation(config)), {**text(), **pixels()}
    inputs["input_ids"][0, 8] = inputs["input_ids"][1, 5] = 58
    model.decoder.reduces[0].weight.data.mul_(0.2)  # even maps: float32 keeps their gradients apart
    model.decoder.reduces[1].weight.data.mul_(0.2)
    score = lambda outputs: outputs.logits.flatten(1)[:, 5]  # noqa: E731
    row = one_hot(torch.tensor([1, 1]), 17)
    check(model, inputs, {"tower2": Place("decoder", row)}, score, METHODS, position={"tower2": 1}, target=score)
    with pytest.raises(ValueError, match=r"tower 'tower0' with gradients on; got attention 'clip\.vision_model"):
        explain(model, inputs, position={"tower0": "cls"}, target=score)
