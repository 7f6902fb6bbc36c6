"""An image-to-text transformer as one writes it with torch's own layers: patches, an encoder, a causal decoder."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers.interpret.cases import lively

WIDTH, VOCABULARY, GRID = 16, 30, (2, 3)  # pictures of 8 x 12 pixels in patches of 4


class ImageToText(nn.Module):
    """images (B, 3, 8, 12) and ids (B, T) -> logits (B, T, V), of the token behind each position."""

    def __init__(self) -> None:
        super().__init__()
        layer: dict[str, Any] = dict(dim_feedforward=24, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        self.patches, self.words = nn.Conv2d(3, WIDTH, 4, 4), nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.randn(1, 6, WIDTH))
        self.text_places = nn.Parameter(torch.randn(1, 12, WIDTH))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 4, **layer), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 4, **layer), 2)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, images: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.logits(images, decoder_input_ids)

    def logits(self, images: Tensor, ids: Tensor) -> Tensor:
        memory = self.encoder(self.patches(images).flatten(2).transpose(1, 2) + self.places)
        size = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size, dtype=memory.dtype)
        states = self.words(ids) + self.text_places[:, :size]
        logits: Tensor = self.head(self.decoder(states, memory, tgt_mask=mask, tgt_is_causal=True))
        return logits


class OfOneDict(ImageToText):
    """The same, whose forward takes one dict."""

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.logits(inputs["images"], inputs["decoder_input_ids"])


class OfOtherNames(ImageToText):
    """The same, whose ids have a name of their own."""

    def forward(self, picture: Tensor, caption: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(picture, caption)


def image_to_text(kind: type[ImageToText] = ImageToText) -> ImageToText:
    torch.manual_seed(0)
    return lively(kind()).eval().double()


def pictures(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
