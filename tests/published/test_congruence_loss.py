"""CACR (Pandey et al., ACL 2023) and IAIS (Ren et al., ACL 2021): the losses within CACR's UNITER, whose code is that of IAIS and
the soft kind, against `UNITER.from_published` with `CongruenceLoss`: values and gradients of all parameters."""

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlattn_fast as va
from tests.helpers.published.authors import assert_equal, clone, drawn, published

pytestmark = pytest.mark.filterwarnings("ignore")  # what their code warns of

KINDS = {"cacr": "soft", "iais_singular": "singular", "iais_distributed": "distributed"}
DIRECTIONS = {"text": "L", "image": "V"}
WORDS, REGIONS = [9, 5, 7, 4], [6, 4, 2, 5]  # of each sample
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@contextmanager
def their_uniter() -> Iterator[Any]:
    """Apex's layer norm is torch's here."""
    fused: Any = ModuleType("apex.normalization.fused_layer_norm")
    fused.FusedLayerNorm = nn.LayerNorm
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("apex", "apex.normalization"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setitem(sys.modules, fused.__name__, fused)
        patch.syspath_prepend(str(clone("KhoomeiK/CACR")))
        try:
            config_of = importlib.import_module("model.model").UniterConfig
            config = config_of(60, **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=20)
            yield importlib.import_module("model.itm").UniterForImageTextRetrieval(config, 10, 1).eval()
        finally:
            for name in set(sys.modules) - before:
                if name.partition(".")[0] in ("model", "utils"):
                    del sys.modules[name]


def shapes_of_their_uniter() -> dict[str, Any]:
    with their_uniter() as model:
        return {"shapes": {name: [*x.shape] for name, x in model.state_dict().items()}}


def weights() -> dict[str, Tensor]:
    shapes: dict[str, list[int]] = published("uniter", shapes_of_their_uniter)["shapes"]
    state = drawn(shapes, lambda name: 0.3 if len(shapes[name]) > 1 else 0.1)
    for name, x in state.items():
        if "LayerNorm.weight" in name or "layer_norm.weight" in name:
            x += 1
    state["uniter.embeddings.word_embeddings.weight"][0] = 0
    return state


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_their_uniter(kind: str, direction: str) -> None:
    state = weights()
    batch, num_words, num_regions = len(WORDS), max(WORDS), max(REGIONS)
    place = torch.arange(num_words)
    real_words = place < torch.tensor(WORDS)[:, None]
    inner = real_words & (place > 0) & (place < torch.tensor(WORDS)[:, None] - 1)  # without [CLS] and [SEP], as they have it
    regions = torch.arange(num_regions) < torch.tensor(REGIONS)[:, None]
    ids = torch.randint(1, 60, (batch, num_words)) * real_words
    features, positions = (torch.randn(batch, num_regions, size) * regions[..., None] for size in (10, 7))
    masks = [torch.cat(pair, 1).long() for pair in ((real_words, regions), (inner, regions & False), (inner & False, regions))]

    def compute() -> dict[str, Tensor]:
        with their_uniter() as uniter:
            uniter.load_state_dict(state)
            _, losses = uniter.uniter(
                ids, place[None], features, positions, masks[0], None, None, masks[1], masks[2],
                output_all_encoded_layers=False, IAIS=f"{DIRECTIONS[direction]}-{KINDS[kind]}", pairs_num=1,
            )  # fmt: skip
            losses["self_attn_loss"].backward()
            grads = {name: x.grad for name, x in uniter.named_parameters() if x.grad is not None}
        largest = max(float(grad.abs().max()) for grad in grads.values())
        return {"loss": losses["self_attn_loss"], "largest": largest, **{name: grad / largest for name, grad in grads.items()}}

    wanted = dict(published(f"uniter {kind} {direction}", compute))
    loss_there, largest = wanted.pop("loss"), wanted.pop("largest")

    own = va.models.UNITER.from_published(state, num_attention_heads=4)
    for dtype, backend in ((torch.float64, "streaming"), (torch.float64, "reference"), (torch.float32, "auto")):
        model = copy.deepcopy(own).to(dtype)
        with va.nn.capture_attention(model) as captured:
            model(ids, features.to(dtype), positions.to(dtype), real_words, regions)
        loss = va.nn.CongruenceLoss(kind, direction=direction, backend=backend)(captured, text_mask=inner, image_mask=regions)
        assert_equal(loss, loss_there, f"{dtype} {backend}")
        loss.backward()
        got = dict(model.named_parameters())
        for name, grad in wanted.items():
            here: Tensor | None = got[name].grad
            assert here is not None, name
            assert_equal(here / largest, grad, f"{name} {dtype} {backend}")
