"""Reads of several rows, as a mean is: over real tokens alone, and without what the rows put on themselves."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

import vlattn_fast as va
from vlattn_fast.interpret import FAMILIES, Explanation, Family, Tower, register_family

METHODS = ("gradient", "weighted", "rollout", "glimpse", "attention", "gradcam", "gradient:no_aggregation")
SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40)
IDS, SHORT = torch.tensor([[2, 11, 12, 13, 14, 15, 3]]), torch.tensor([[2, 21, 22, 3]])


class Sentences(nn.Module):
    """An encoder of texts, pooled by the mean of the real tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return self.head((states * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))


class Own(nn.Module):
    """The same of torch's layers, whose mask has a name of its own: only the attention knows what is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        states = self.encoder(self.embed(words), src_key_padding_mask=padding)
        return self.head(states.masked_fill(padding[..., None], 0.0).sum(1) / (~padding).sum(1, keepdim=True))


def padded(*texts: Tensor) -> tuple[Tensor, Tensor]:
    """The texts (1, n) as ids (B, N), and which of them are real."""
    ids = nn.utils.rnn.pad_sequence([text[0] for text in texts], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[text.shape[1]] for text in texts])


def inputs_of(model: nn.Module, *texts: Tensor) -> dict[str, Tensor]:
    ids, real = padded(*texts)
    own = isinstance(model, Own)
    return {"words": ids, "padding": ~real} if own else {"input_ids": ids, "attention_mask": real.long()}


def alike(batch: Explanation, alone: Explanation, row: int) -> None:
    """The row of a batch as the sample alone has it, and zeros on padding."""
    for tower, want in alone.relevancy.items():
        got = batch.relevancy[tower][row]
        torch.testing.assert_close(got[: want.shape[1]], want[0], rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        assert not got[want.shape[1] :].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Sentences, Own])
def test_a_mean_leaves_padding_out(kind, method):
    torch.manual_seed(0)
    model = kind().eval()
    batch = va.explain(model, inputs_of(model, IDS, SHORT), target=1, method=method, read="mean")
    for row, text in enumerate((IDS, SHORT)):
        alike(batch, va.explain(model, inputs_of(model, text), target=1, method=method, read="mean"), row)


@pytest.mark.parametrize("readout", ["mean", "patch_mean", "cls_and_patch_mean"])
def test_a_records_mean_leaves_padding_out(readout):
    torch.manual_seed(0)
    model = Sentences().eval()
    tower = Tower("text", "bert", "encoder.layer", readout, "bert_text", prefix=0 if readout == "mean" else 1)
    try:
        register_family("Sentences", Family((tower,), "class"))
        batch = va.explain(model, inputs_of(model, IDS, SHORT), target=1)
        for row, text in enumerate((IDS, SHORT)):
            alike(batch, va.explain(model, inputs_of(model, text), target=1), row)
    finally:
        FAMILIES.pop("Sentences", None)


@pytest.mark.parametrize("kind", [Sentences, Own])
def test_a_mean_of_capture_relevancy_leaves_padding_out(kind):
    torch.manual_seed(0)
    model = kind().eval()

    def row(*texts: Tensor) -> Tensor:
        with va.nn.capture_relevancy(model) as captured:
            logits = model(**inputs_of(model, *texts))
        return captured.relevancy(logits[:, 1], read="mean")

    batch = row(IDS, SHORT)
    torch.testing.assert_close(batch[1:, :4], row(SHORT), rtol=1e-4, atol=1e-6)
    assert not batch[1, 4:].any()
