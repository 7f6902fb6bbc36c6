"""The perturbation tests of Chefer et al. on LXMERT, positive and negative, over boxes and words, against `evaluate`."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import vlattn_fast as va
from tests.helpers.published.authors import defined, published

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what their code warns of

REPOSITORY, FILE = "hila-chefer/Transformer-MM-Explainability", "lxmert/lxmert/perturbation.py"
ANSWERS = 12
TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def perturbation(model: Any, inputs: dict[str, Tensor], label: dict[str, float]) -> Any:
    """Theirs over this model and these inputs, without its detector, tokenizer and files."""
    boxes = inputs["visual_feats"].shape[1]
    theirs = object.__new__(defined(REPOSITORY, FILE, "ModelPert", torch=torch).ModelPert)
    theirs.COCO_VAL_PATH, theirs.image_preprocess = "", lambda path: (None, None, None)
    theirs.frcnn_cfg, theirs.image_boxes_len = SimpleNamespace(max_detections=boxes), boxes
    theirs.frcnn = lambda *_, **__: {"normalized_boxes": inputs["visual_pos"], "roi_features": inputs["visual_feats"]}
    theirs.lxmert_tokenizer = lambda *_, **__: SimpleNamespace(**{name: inputs[name] for name in TOKENS})
    theirs.lxmert_vqa, theirs.vqa_answers = model, list(label)
    return theirs


@pytest.mark.parametrize(
    "method", ["gradient", *[pytest.param(each, marks=pytest.mark.slow) for each in ("rollout", "attention")]]
)
@pytest.mark.parametrize(("words", "boxes"), [(6, 36), (9, 10), (12, 7)])
def test_curves_on_lxmert(words: int, boxes: int, method: str) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40, "num_qa_labels": ANSWERS}
    config = transformers.LxmertConfig(**sizes, l_layers=2, r_layers=2, x_layers=2, visual_feat_dim=10)
    model = transformers.LxmertForQuestionAnswering(config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.35)  # so that answers change
    ids = torch.randint(5, 40, (1, words))
    ids[0, 0], ids[0, -1] = 2, 3
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs |= {"visual_feats": torch.randn(1, boxes, 10), "visual_pos": torch.rand(1, boxes, 4)}
    label = {f"answer {i}": float(x) for i, x in enumerate(torch.rand(ANSWERS))}
    relevancy = va.explain(model, inputs, method=method).relevancy
    rows = {"text": relevancy["text"][0], "image": relevancy["vision"][0]}
    maps = {part: (row - row.min()) / (row.max() - row.min()) for part, row in rows.items()}

    def accuracy(output: Any) -> Tensor:
        return torch.tensor([label[f"answer {i}"] for i in output.question_answering_score.argmax(-1).tolist()])

    steps = [0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1]

    def compute() -> dict[str, Any]:
        theirs, to, curves = perturbation(model, inputs, label), Tensor.to, {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "to", lambda x, *args, **options: x if args[:1] == ("cuda",) else to(x, *args, **options))
            for test, part in itertools.product(("positive", "negative"), ("image", "text")):
                # transformers' LXMERT does not run without boxes
                theirs.pert_steps = [x for x in steps if part == "text" or int((1 - x) * boxes) > 0]
                theirs.pert_acc = [0] * len(theirs.pert_steps)
                item = {"img_id": "", "sent": "", "label": label}
                curve = getattr(theirs, f"perturbation_{part}")(item, maps["image"], maps["text"], test == "positive")
                curves[f"{test} {part}"] = [float(x) for x in curve]
        return curves

    found = va.evaluate(model, [(inputs, None, None)], methods=(method,), tests=("positive", "negative"), accuracy=accuracy)
    for name, wanted in published(f"perturbation {method} {words} {boxes}", compute).items():
        (curve,) = (row["mean"] for row in found.curves if f"{row['test']} {row['part']}" == name)
        assert curve[: len(wanted)] == pytest.approx(wanted, abs=1e-6), name
