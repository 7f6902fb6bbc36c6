"""CongruenceTerm and RelevancyTerm: what Trainer and Lightning train on is the loss by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

pytest.importorskip("accelerate")
lightning = pytest.importorskip("lightning")

import vlattn_fast as va  # noqa: E402
from tests.helpers.interpret import decoder_cases  # noqa: E402
from tests.helpers.trainers import fresh_state, model_of, weights  # noqa: E402
from tests.helpers.two_ranks import results_of  # noqa: E402

__all__ = ["fresh_state"]  # pytest finds the fixture here
TERMS = ("congruence", "relevancy")
WAYS: dict[str, dict[str, Any]] = {
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "bf16": {"bf16": True},
}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def data_of(term: str) -> list[dict[str, Any]]:
    gen = torch.Generator().manual_seed(1)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:24, 8:24] = True
    if term == "relevancy":
        return [{"pixel_values": torch.randn(3, 32, 32, generator=gen), "labels": i % 4, "mask": mask} for i in range(8)]
    return [
        {
            "input_ids": torch.randint(5, 99, (7,), generator=gen),
            "attention_mask": torch.ones(7, dtype=torch.int64),
            "visual_embeds": torch.randn(5, 20, generator=gen),
            "visual_attention_mask": torch.ones(5),
            "labels": torch.eye(4)[i % 4],
        }
        for i in range(8)
    ]


def term_of(term: str, model: nn.Module, **options: Any) -> Any:
    if term == "congruence":
        loss = va.nn.CongruenceLoss("cacr", schedule="linear", num_steps=4, weight=1e3)
        return va.train.CongruenceTerm(model, loss, **options)
    return va.train.RelevancyTerm(model, va.nn.RelevancyLoss("inside", prefix=1), weight=0.8, **options)


def loss_by_hand(term: str, model: Any, batch: dict[str, Any], step: int) -> Tensor:
    """Of one batch at a step, written out."""
    if term == "congruence":
        with va.nn.capture_attention(model) as captured:
            outputs = model(**batch)
        loss = va.nn.CongruenceLoss("cacr", schedule="linear", num_steps=4, weight=1e3)
        return outputs.loss + loss(captured, text_mask=batch["attention_mask"].bool(), step=step)
    batch = dict(batch)
    mask = batch.pop("mask")
    with va.nn.capture_relevancy(model) as captured_relevancy:
        outputs = model(**batch)
    rows = captured_relevancy.relevancy(outputs.logits.gather(1, batch["labels"][:, None]).sum())
    return outputs.loss + 0.8 * va.nn.RelevancyLoss("inside", prefix=1)(rows, mask)


def batches(term: str, size: int = 2) -> list[dict[str, Tensor]]:
    data = data_of(term)
    return [torch.utils.data.default_collate(data[i : i + size]) for i in range(0, len(data), size)]


def trained_by_hand(term: str, steps: int = 2) -> Tensor:
    model = model_of(term).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step, batch in zip(range(steps), batches(term), strict=False):
        optimizer.zero_grad()
        loss_by_hand(term, model, batch, step).backward()
        optimizer.step()
    return weights(model)


class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined, unused-ignore]
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(term: str, model: Any = None, **options: Any) -> Any:
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    steps = {"max_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0}
    schedule = {"lr_scheduler_type": "constant", "remove_unused_columns": False}
    arguments = transformers.TrainingArguments("out", **{**quiet, **steps, **schedule, **options})
    data = data_of(term)
    trainer = InOrder(model_of(term) if model is None else model, arguments, train_dataset=data, eval_dataset=data)
    if term == "congruence":
        trainer.model_accepts_loss_kwargs = False  # VisualBERT takes the number of items, and does not divide by it
    return trainer


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")  # has another name since 5.23
@pytest.mark.parametrize("way", ["plain", *WAYS])
@pytest.mark.parametrize("name", TERMS)
def test_trainer_trains_as_by_hand(name: str, way: str) -> None:
    trainer = trainer_of(name, **WAYS.get(way, {}))
    start = weights(trainer.model)
    term = term_of(name, trainer.model, every=1)
    trainer.add_callback(term.trainer_callback(trainer))
    trainer.train()
    want = trained_by_hand(name)
    change, error = want - start, weights(trainer.model) - want
    assert error.norm() <= (0.1 if way == "bf16" else 1e-3) * change.norm()
    logged = [row[term.name] for row in trainer.state.log_history if term.name in row]
    assert len(logged) == 2 and (logged[1] > 0 or name == "relevancy")
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks  # of the term


def test_the_loss_of_each_step_is_logged_beside_the_term() -> None:
    losses = {}
    for with_term in (False, True):
        trainer = trainer_of("congruence", logging_strategy="steps", logging_steps=1, learning_rate=0.0)
        term = term_of("congruence", trainer.model, every=1)
        if with_term:
            trainer.add_callback(term.trainer_callback(trainer))
        trainer.train()
        rows = trainer.state.log_history
        losses[with_term] = [row["loss"] for row in rows if "loss" in row]
    terms = [row[term.name] for row in rows if term.name in row]
    assert len(losses[False]) == len(terms) == 2
    for plain, loss, value in zip(losses[False], losses[True], terms, strict=True):
        assert loss - plain == pytest.approx(value, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_evaluation_between_steps_has_no_term(name: str) -> None:
    plain = trainer_of(name, model=model_of(name), max_steps=2)
    term = term_of(name, plain.model)
    with term:
        before = plain.evaluate()["eval_loss"]
        assert term._mean.take() is None
    batch = {key: x for key, x in batches(name, 8)[0].items() if key != "mask"}
    with torch.no_grad():
        assert before == pytest.approx(float(plain.model.eval()(**batch).loss), rel=1e-5)
    trainer = trainer_of(name, eval_strategy="steps", eval_steps=1)
    trainer.add_callback(term_of(name, trainer.model).trainer_callback(trainer))
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_decoders_loss_by_the_number_of_its_tokens() -> None:
    """Trainer leaves the division by accumulated batches to such a model: two batches of one are one batch of two."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    state = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).state_dict()
    ids = torch.randint(0, 50, (4, 9))
    data = [{"input_ids": x, "labels": x, "mask": torch.rand(9)} for x in ids]
    changes = []
    for size in (1, 2):
        trainer = trainer_of("relevancy", transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
                             per_device_train_batch_size=size, gradient_accumulation_steps=2 // size)  # fmt: skip
        trainer.model.load_state_dict(state)
        trainer.train_dataset = data
        loss = va.nn.RelevancyLoss("mse")
        term = va.train.RelevancyTerm(trainer.model, loss, score=lambda outputs, batch: outputs.logits[:, -1, 3], weight=50.0)
        trainer.add_callback(term.trainer_callback(trainer))
        trainer.train()
        changes.append(weights(trainer.model))
    torch.testing.assert_close(changes[0], changes[1], rtol=1e-4, atol=1e-6)


def test_a_mask_of_words_and_image_tokens_in_one_is_the_layers_own() -> None:
    case = decoder_cases.llava()
    model, inputs = case.model.train(), case.inputs("left")
    assert not inputs["attention_mask"].all()
    losses = []
    for options in ({}, {"text_mask": None}):
        with va.train.CongruenceTerm(model, va.nn.CongruenceLoss("cacr", weight=1e3), **options):
            losses.append(model(**inputs, labels=inputs["input_ids"]).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(model(**inputs, labels=inputs["input_ids"]).loss.item(), rel=1e-4)


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    "options", ({}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"compiled": True}), ids=str
)
@pytest.mark.parametrize("name", TERMS)
def test_lightning_trains_as_by_hand(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    module = Module(model_of(name).train())
    start = weights(module)
    if options.pop("compiled", False) if (options := dict(options)) else False:
        module.model.compile(backend="eager")
    term = term_of(name, module.model, every=1)
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=2, callbacks=[term.lightning_callback()], log_every_n_steps=1,
        **{**QUIET, "logger": logger}, **options,
    )  # fmt: skip
    size = 1 if "accumulate_grad_batches" in options else 2
    trainer.fit(module, torch.utils.data.DataLoader(data_of(name), batch_size=size))
    want = trained_by_hand(name)
    error, change = weights(module) - want, want - start
    assert error.norm() <= (0.1 if "precision" in options else 1e-3) * change.norm()
    assert term.name in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text(encoding="utf-8")


def test_a_term_a_log_and_qk_clip_leave_nothing_behind() -> None:
    """Callbacks end in the order in which they began."""
    from torch.overrides import _get_current_function_mode_stack

    model = model_of("congruence")
    trainer = trainer_of("congruence", model)
    term, log, clip = term_of("congruence", model), va.train.AttentionLog(model, every=1), va.nn.QKClip(model, 1e6)
    for callback in (clip.trainer_callback(), term.trainer_callback(trainer), log.trainer_callback(trainer)):
        trainer.add_callback(callback)
    trainer.train()
    assert _get_current_function_mode_stack() == []
    assert any("attention/joint/1/mass_image" in row for row in trainer.state.log_history)


def gradients_of_ranks() -> dict[str, Tensor]:
    """The gradients of a step of DDP and of FSDP2, each process with one of the samples; whole without processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    gradients = {}
    several = torch.distributed.is_initialized()
    for name in TERMS:
        batch = batches(name)[0]
        if several:
            rank = torch.distributed.get_rank()
            batch = {key: x[rank : rank + 1] for key, x in batch.items()}
        for way in ("ddp", "fsdp"):
            model = model_of(name).train()
            wrapped: Any = model
            if several and way == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # VisualBERT has some
            elif several:
                for part in model.modules():
                    if type(part).__name__ in ("ViTLayer", "VisualBertLayer"):
                        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
                fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            with term_of(name, wrapped) as term:
                term.step = 2
                wrapped(**batch).loss.backward()
            for key, x in model.named_parameters():
                if x.grad is not None:
                    gradients[f"{name} {way} {key}"] = getattr(x.grad, "full_tensor", lambda x=x: x.grad)()
    return gradients


def test_two_ranks(tmp_path: Path) -> None:
    whole = gradients_of_ranks()
    by_hand = model_of("congruence").train()
    loss_by_hand("congruence", by_hand, batches("congruence")[0], 2).backward()
    for key, x in by_hand.named_parameters():
        if x.grad is not None:
            torch.testing.assert_close(whole[f"congruence ddp {key}"], x.grad)
    for ranks in results_of("tests.train.test_terms", "gradients_of_ranks", tmp_path):
        assert ranks.keys() == whole.keys()
        for key, x in whole.items():
            torch.testing.assert_close(ranks[key], x, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_a_training_behind_one_that_failed(name: str) -> None:
    trainer = trainer_of(name)
    before = num_hooks(trainer.model)
    trainer.add_callback(term_of(name, trainer.model).trainer_callback(trainer))
    failing = trainer.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    failing.remove()
    trainer.train()
    assert num_hooks(trainer.model) == before
    torch.testing.assert_close(weights(trainer.model), trained_by_hand(name))


def num_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_what_is_refused() -> None:
    model = model_of("relevancy").train()
    batch = batches("relevancy")[0]
    with term_of("relevancy", model):
        with pytest.raises(ValueError, match="target must be a field of each sample; got 'mask'"):
            model(pixel_values=batch["pixel_values"], labels=batch["labels"])
        torch.testing.assert_close(model(**batch).loss, loss_by_hand("relevancy", model_of("relevancy").train(), batch, 0))
    with term_of("relevancy", model), pytest.raises(ValueError, match="score must be given if the model is not a classifier"):
        model(pixel_values=batch["pixel_values"], mask=batch["mask"])
    term = term_of("relevancy", model)
    with term, pytest.raises(RuntimeError, match="must be entered once at a time"):
        term.__enter__()
    with pytest.raises(TypeError, match="loss must be a RelevancyLoss"):
        va.train.RelevancyTerm(model, nn.MSELoss())
    with pytest.raises(TypeError, match="loss must be a CongruenceLoss"):
        va.train.CongruenceTerm(model, nn.MSELoss())
    with pytest.raises(ValueError, match="every must be"):
        term_of("relevancy", model, every=0)
    with pytest.raises(TypeError, match="score must be a callable"):
        term_of("relevancy", model, score="logits")
    with pytest.raises(TypeError, match="image_mask must be the name of one of the model's inputs"):
        term_of("congruence", model_of("congruence"), image_mask=torch.ones(2, 5))
    with term_of("congruence", model := model_of("congruence").train(), text_mask="attention_maks"):
        with pytest.raises(
            ValueError, match="text_mask must name one of the model's inputs; got 'attention_maks', and the inputs"
        ):
            model(**batches("congruence")[0])
    trainer = trainer_of("relevancy", label_smoothing_factor=0.1)
    trainer.add_callback(term_of("relevancy", trainer.model).trainer_callback(trainer))
    with pytest.raises(ValueError, match="trainer must take the loss from the model's outputs.*label_smoother"):
        trainer.train()
