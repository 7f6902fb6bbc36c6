"""The recipes of docs/guides/trainers.md, with the libraries themselves: Trainer of transformers, Lightning, accelerate."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning")

import vlattn_fast as va  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "trainers.md"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LOSSES = ("congruence", "relevancy")
WAYS: dict[str, dict[str, Any]] = {
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "bf16": {"bf16": True},
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page defines, with its classes."""
    variables: dict[str, Any] = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S):
            exec(compile(code, str(PAGE), "exec"), variables)
    return variables


@pytest.fixture(autouse=True)
def fresh_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """accelerate keeps the first choices of a process, also in the environment."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


class Steps(va.nn.CongruenceLoss):
    """Remembers the steps of its calls with gradients."""

    def __init__(self, **options: Any) -> None:
        super().__init__("cacr", schedule="linear", num_steps=4, weight=1e3, **options)
        self.seen: list[int] = []

    def forward(self, *args: Any, step: int | None = None, **options: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append(self.calls if step is None else step)
        return super().forward(*args, step=step, **options)


def model_of(loss: str) -> nn.Module:
    torch.manual_seed(0)
    if loss == "congruence":
        config = transformers.VisualBertConfig(**SIZES, **NO_DROPOUT, visual_embedding_dim=20, vocab_size=99, num_labels=4)
        return transformers.VisualBertForQuestionAnswering(config)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SIZES, **NO_DROPOUT, image_size=32, patch_size=8, num_labels=4)
    )


def trainer_of(page: dict[str, Any], loss: str, **options: Any) -> Any:
    torch.manual_seed(1)
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    given = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        **quiet,
        **options,
    }
    arguments = transformers.TrainingArguments("out", remove_unused_columns=False, **given)
    data = page["questions" if loss == "congruence" else "pictures"]
    own = {"congruence": Steps()} if loss == "congruence" else {}
    kind = page["CongruenceTrainer" if loss == "congruence" else "RelevancyTrainer"]
    return kind(model_of(loss), arguments, train_dataset=data, eval_dataset=data, **own)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([x.detach().flatten() for x in model.parameters()])


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")  # has another name since 5.23
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_trainer(page: dict[str, Any], loss: str, way: str) -> None:
    """Two steps end where those of the plain way end."""
    start = weights(model_of(loss))
    plain, other = trainer_of(page, loss), trainer_of(page, loss, **WAYS[way])
    plain.train()
    other.train()
    moved, difference = weights(plain.model) - start, weights(other.model) - weights(plain.model)
    assert difference.norm() <= (0.1 if way == "bf16" else 1e-3) * moved.norm()
    assert "eval_loss" in other.evaluate()
    if loss == "congruence":
        assert other.congruence.seen == ([0, 0, 1, 1] if way == "accumulation" else [0, 1])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_moves_the_model(page: dict[str, Any], loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_loss = trainer_of(page, loss)
    with_loss.train()
    kind = va.nn.CongruenceLoss if loss == "congruence" else va.nn.RelevancyLoss
    monkeypatch.setattr(kind, "forward", lambda *_, **__: torch.zeros(()))
    without = trainer_of(page, loss)
    without.train()
    assert (weights(with_loss.model) - weights(without.model)).norm() > 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_evaluation_between_steps_counts_nothing(page: dict[str, Any], loss: str) -> None:
    """Each evaluation of a Trainer called the loss, which counted: four steps were twelve."""
    trainer = trainer_of(page, loss, max_steps=4, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4)
    if loss == "congruence":
        trainer.compute_loss = without_step(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    if loss == "congruence":
        assert trainer.congruence.seen == [0, 1, 2, 3] and trainer.congruence.calls == 4


def without_step(trainer: Any) -> Callable[..., Any]:
    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        with va.nn.capture_attention(model) as captured:
            outputs = model(**inputs)
        loss = outputs.loss + trainer.congruence(captured, text_mask=inputs["attention_mask"].bool())
        return (loss, outputs) if return_outputs else loss

    return compute_loss


def test_from_a_checkpoint_on(page: dict[str, Any]) -> None:
    trainer_of(page, "congruence", max_steps=4, save_strategy="steps", save_steps=2).train()
    again = trainer_of(page, "congruence", max_steps=4)
    again.train(resume_from_checkpoint="out/checkpoint-2")
    assert again.congruence.seen == [2, 3]


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
    "options", ({}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"compiled": True}), ids=str
)
def test_lightning(page: dict[str, Any], options: dict[str, Any]) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    load = page["loader"]
    compiled = "compiled" in options
    options = {} if compiled else options
    module = page["Reader"](model_of("congruence").train(), num_steps=4)
    if compiled:
        module.model.compile(backend="eager")
    module.congruence = Steps()
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_steps=2, **quiet, **options)
    trainer.fit(module, load(page["questions"]), load(page["questions"]))
    assert module.congruence.seen == ([0, 0, 1, 1] if "accumulate_grad_batches" in options else [0, 1])
    module.congruence.calls = 7
    trainer.save_checkpoint("checkpoint")
    stored = torch.load("checkpoint", weights_only=True)
    again = page["Reader"](model_of("congruence"), num_steps=4)
    again.load_state_dict(stored["state_dict"])
    assert stored["global_step"] == 2 and again.congruence.calls == 7
    classifier = page["Classifier"](model_of("relevancy").train())
    if compiled:
        classifier.model.compile(backend="eager")
    before = weights(classifier)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_steps=2, **quiet, **options)
    trainer.fit(classifier, load(page["pictures"]))
    assert trainer.global_step == 2 and not torch.equal(weights(classifier), before)


@pytest.mark.parametrize(
    "options", ({}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}, {"dynamo_backend": "eager"}), ids=str
)
@pytest.mark.parametrize("loss", LOSSES)
def test_accelerate(page: dict[str, Any], loss: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(page, "congruence", congruence := Steps())
    model = model_of(loss).train()
    before = weights(model)
    data, loss_of = ("questions", "attention_loss") if loss == "congruence" else ("pictures", "relevancy_loss")
    assert page["train"](model, page[data], page[loss_of], 2, cpu=True, **options) == 2
    assert not torch.equal(weights(model), before)
    if loss == "congruence":
        assert congruence.seen == ([0, 0, 1, 1] if "gradient_accumulation_steps" in options else [0, 1])
