"""AttentionLog and PictureLog: numbers by the stored maps, pictures in a folder, and a training that stays as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

lightning = pytest.importorskip("lightning")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

import vlattn_fast as va  # noqa: E402
from tests.helpers.trainers import fresh_state, model_of, weights  # noqa: E402
from tests.helpers.two_ranks import results_of  # noqa: E402
from tests.train.test_terms import QUIET, Module, batches, data_of, term_of, trained_by_hand, trainer_of  # noqa: E402

__all__ = ["fresh_state"]  # pytest finds the fixture here
LLAMA = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_entropy_and_mass_are_those_of_the_maps() -> None:
    model = model_of("congruence").train()
    batch = batches("congruence")[0]
    with va.train.AttentionLog(model) as log:
        model(**batch)
    got = log.take()
    eager = model_of("congruence").train()
    eager.set_attn_implementation("eager")
    maps = eager(**batch, output_attentions=True).attentions
    assert set(got) == {f"attention/joint/{i}/{what}" for i in range(2) for what in ("entropy", "mass_image", "mass_text")}
    for i, prob in enumerate(maps):
        assert got[f"attention/joint/{i}/entropy"] == pytest.approx(float(-(prob * prob.log()).sum(-1).mean().detach()), rel=1e-4)
        assert got[f"attention/joint/{i}/mass_image"] == pytest.approx(float(prob[..., 7:].sum(-1).mean().detach()), rel=1e-4)
    assert log.take() == {}


def test_groups_of_a_decoder_with_padding() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, num_key_value_heads=2)).train()
    ids, real = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    real[0, :3] = 0
    with va.train.AttentionLog(model, groups=lambda batch: {"low": batch["input_ids"] < 25}) as log:
        model(input_ids=ids, attention_mask=real)
    got = log.take()
    model.set_attn_implementation("eager")
    prob = model(input_ids=ids, attention_mask=real, output_attentions=True).attentions[1]
    mass = (prob * (ids < 25)[:, None, None]).sum(-1).mean(1)[real.bool()].mean()
    assert got["attention/text/1/mass_low"] == pytest.approx(float(mass.detach()), rel=1e-4)
    assert "attention/text/1/mass_image" not in got


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    ],
    ids=str,
)
def test_trainer_logs_every_few_steps(options: dict[str, Any]) -> None:
    trainer = trainer_of("congruence", max_steps=4, **options)
    log = va.train.AttentionLog(trainer.model, every=2)
    trainer.add_callback(log.trainer_callback(trainer))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "attention/joint/1/entropy" in row]
    assert [row["step"] for row in rows] == [1, 3]
    assert all(0.5 < row["attention/joint/0/entropy"] <= 2.49 for row in rows)  # log 12 keys
    assert all(
        row["attention/joint/0/mass_image"] + row["attention/joint/0/mass_text"] == pytest.approx(1, rel=1e-2) for row in rows
    )
    plain = trainer_of("congruence", max_steps=4, **options)
    plain.train()
    torch.testing.assert_close(weights(trainer.model), weights(plain.model), rtol=1e-4, atol=1e-5)


def test_lightning_logs_to_its_logger(tmp_path: Path) -> None:
    module = Module(model_of("congruence").train())
    log = va.train.AttentionLog(module.model, every=2)
    pictures = va.train.PictureLog(module.model, batches("congruence", 1)[0], tmp_path / "pictures", every=2, target=1)
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    callbacks = [log.lightning_callback(), pictures.lightning_callback()]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=4, callbacks=callbacks, log_every_n_steps=1, **{**QUIET, "logger": logger}
    )
    trainer.fit(module, torch.utils.data.DataLoader(data_of("congruence"), batch_size=2))
    stored = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text(encoding="utf-8")
    assert "attention/joint/1/mass_text" in stored
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [f"step_00000{i}.png" for i in (0, 2, 4)]


def test_pictures_leave_the_training_as_it_is(tmp_path: Path) -> None:
    trainer, plain = (trainer_of("relevancy", max_steps=3, remove_unused_columns=True) for _ in range(2))
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    pictures = va.train.PictureLog(trainer.model, inputs, tmp_path, every=2, image=torch.rand(32, 32, 3).numpy())
    trainer.add_callback(pictures.trainer_callback(trainer))
    trainer.train()
    plain.train()
    assert torch.equal(weights(trainer.model), weights(plain.model))
    files = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in files] == ["step_000000.png", "step_000002.png"]
    assert files[0].read_bytes() != files[1].read_bytes() and all(path.stat().st_size > 1000 for path in files)
    assert pictures.draw(7).name == "step_000007.png" and (tmp_path / "step_000007.png").exists()


@pytest.mark.slow
def test_a_relevancy_term_has_the_attention_for_itself(tmp_path: Path) -> None:
    """Pictures go on, and a log says why it is empty."""
    trainer = trainer_of("relevancy")
    term = term_of("relevancy", trainer.model)
    pictures = va.train.PictureLog(trainer.model, {"pixel_values": torch.ones(1, 3, 32, 32)}, tmp_path, every=1)
    for each in (term, pictures):
        trainer.add_callback(each.trainer_callback(trainer))
    trainer.train()
    assert len(list(tmp_path.glob("*.png"))) == 3
    torch.testing.assert_close(weights(trainer.model), trained_by_hand("relevancy"))
    trainer.add_callback(va.train.AttentionLog(trainer.model).trainer_callback(trainer))
    with pytest.raises(ValueError, match="A RelevancyTerm of the same model hides its attention"):
        trainer.train()
    trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # Trainer does not, where a step failed


def logs_of_ranks() -> dict[str, Any]:
    """Numbers of DDP and of FSDP2, each process with one of two samples, and of FSDP2 a picture."""
    import tempfile

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))
    sample = {key: x[rank : rank + 1] for key, x in batches("congruence")[0].items()}
    ddp = torch.nn.parallel.DistributedDataParallel(model_of("congruence").train(), find_unused_parameters=True)
    sharded, classifier = model_of("congruence").train(), model_of("relevancy")
    for model in (sharded, classifier):
        for part in model.modules():
            if type(part).__name__ in ("ViTLayer", "VisualBertLayer"):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    with tempfile.TemporaryDirectory() as folder:
        pictures = va.train.PictureLog(classifier, {"pixel_values": torch.ones(1, 3, 32, 32)}, folder, every=1)
        pictures._end_step(1, rank == 0)
        files = [path.name for path in Path(folder).iterdir()]
    return {"ddp": logged(ddp, sample), "fsdp": logged(sharded, sample), "files": files}


def logged(model: Any, batch: dict[str, Any]) -> dict[str, float]:
    with va.train.AttentionLog(model) as log:
        model(**batch).loss.backward()
    return log.take()


@pytest.mark.slow  # terms have two ranks, too
def test_two_ranks(tmp_path: Path) -> None:
    """Each process logs its own samples. All run the sharded model for a picture, and one stores it."""
    first, second = results_of("tests.train.test_logs", "logs_of_ranks", tmp_path)
    assert first["files"] == ["step_000001.png"] and second["files"] == []
    whole = logged(model_of("congruence").train(), batches("congruence")[0])
    for way in ("ddp", "fsdp"):
        means = {name: (x + second[way][name]) / 2 for name, x in first[way].items()}
        assert means == pytest.approx(whole, rel=1e-4) and first[way] != second[way]


def test_what_is_refused(tmp_path: Path) -> None:
    model = model_of("congruence").train()
    with pytest.raises(ValueError, match="every must be"):
        va.train.AttentionLog(model, every=0)
    with pytest.raises((TypeError, ValueError), match="groups must be"):
        va.train.AttentionLog(model, groups={"image": torch.ones(1)})  # type: ignore[arg-type]
    with (
        va.train.AttentionLog(model, groups=lambda batch: {"odd": torch.ones(2, 12)}),
        pytest.raises(TypeError, match="must be bool"),
    ):
        model(**batches("congruence")[0])
    everywhere = torch.ones(2, 12, dtype=torch.bool)
    wrong: list[tuple[Any, str]] = [
        ("all", "must return a mapping of names"),
        ({"a": 3}, r"groups\['a'\] must be a torch.Tensor"),
        ({"a": everywhere, "b": everywhere}, "must not share tokens.* got 'b' and 'a'"),
    ]
    for groups, words in wrong:
        log = va.train.AttentionLog(model, groups=lambda batch, groups=groups: groups)  # type: ignore[misc]
        with log, pytest.raises((TypeError, ValueError), match=words):
            model(**batches("congruence")[0])
    module = Module(model)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_steps=2, callbacks=[va.train.AttentionLog(module).lightning_callback()], **QUIET
    )
    with pytest.raises(ValueError, match="model must be the module that a training step calls.* of Module"):
        trainer.fit(module, torch.utils.data.DataLoader(data_of("congruence"), batch_size=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be a directory"):
        va.train.PictureLog(model, {}, tmp_path / "file")
