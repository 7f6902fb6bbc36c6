"""The recipes of docs/guides/trainers.md, with the libraries themselves: Trainer of transformers, Lightning, accelerate."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning")

import vlattn_fast as va  # noqa: E402
from tests.helpers.trainers import fresh_state, model_of, weights  # noqa: E402

__all__ = ["fresh_state"]  # pytest finds the fixture here
PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trainers.md"
LOSSES = ("congruence", "relevancy")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page defines, with its classes."""
    variables: dict[str, Any] = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S):
            exec(compile(code, str(PAGE), "exec"), variables)
    return variables


class Steps(va.nn.CongruenceLoss):
    """Remembers the steps of its calls with gradients."""

    def __init__(self, **options: Any) -> None:
        super().__init__("cacr", schedule="linear", num_steps=4, weight=1e3, **options)
        self.seen: list[int] = []

    def forward(self, *args: Any, step: int | None = None, **options: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(self.calls if step is None else step)
        return super().forward(*args, step=step, **options)


@pytest.mark.slow
def test_from_a_checkpoint_on(page: dict[str, Any]) -> None:
    def trained(congruence: Steps, **options: Any) -> None:
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "max_steps": 4}
        arguments = transformers.TrainingArguments("out", per_device_train_batch_size=2, save_steps=2, **quiet)
        trainer = transformers.Trainer(model_of("congruence"), arguments, train_dataset=page["questions"])
        trainer.add_callback(va.train.CongruenceTerm(trainer.model, congruence).trainer_callback(trainer))
        trainer.train(**options)

    trained(Steps())
    trained(again := Steps(), resume_from_checkpoint="out/checkpoint-2")
    assert again.seen == [2, 3]


class Both(nn.Module):
    """A model of which the loss, which counts, is a part."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.congruence = model_of("congruence"), Steps()

    def forward(self, labels: Tensor, attention_mask: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        with va.nn.capture_attention(self.reader) as captured:
            outputs = self.reader(labels=labels, attention_mask=attention_mask, **inputs)
        return {"loss": outputs.loss + self.congruence(captured, text_mask=attention_mask.bool()), "logits": outputs.logits}


def test_the_count_is_in_a_checkpoint_of_trainer(page: dict[str, Any]) -> None:
    """safetensors, in which Trainer stores a model, refused the count, which was a dict."""
    options: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
    }
    options |= {"report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "remove_unused_columns": False}
    arguments = transformers.TrainingArguments("out", **options)
    transformers.Trainer(Both(), arguments, train_dataset=page["questions"]).train()
    again = Both()
    transformers.Trainer(again, arguments, train_dataset=page["questions"]).train(resume_from_checkpoint="out/checkpoint-2")
    assert again.congruence.seen == [2, 3]


@pytest.mark.parametrize(
    "options", ({}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}, {"dynamo_backend": "eager"}), ids=str
)
@pytest.mark.parametrize("loss", LOSSES)
def test_accelerate(page: dict[str, Any], loss: str, options: dict[str, Any]) -> None:
    model, congruence = model_of(loss).train(), Steps()
    before = weights(model)
    if loss == "congruence":
        term = va.train.CongruenceTerm(model, congruence)
    else:
        term = va.train.RelevancyTerm(model, va.nn.RelevancyLoss("inside", prefix=1), weight=0.8)
    data = page["questions" if loss == "congruence" else "images"]
    assert page["train"](model, data, term, 2, cpu=True, **options) == 2
    assert not torch.equal(weights(model), before)
    if loss == "congruence":
        assert congruence.seen == ([0, 0, 1, 1] if "gradient_accumulation_steps" in options else [0, 1])
