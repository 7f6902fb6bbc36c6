"""The training script at a few steps: it runs, learns, repeats itself and leaves weights that load."""

import json

import pytest
import torch

from vlattn_fast.lab import digit_scenes, load_uniter
from vlattn_fast.lab import train as training
from vlattn_fast.lab.processor import VOCABULARY


def test_five_steps_write_weights_and_a_report_that_belong_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "EVALUATED", 50)
    training.main(["--steps", "5", "--seed", "7", "--threads", "1", "--output", str(tmp_path)])
    report = json.loads((tmp_path / training.WEIGHTS).with_suffix(".json").read_text())
    assert (report["steps"], report["seed"], report["threads"]) == (5, 7, 1) and report["torch"] == torch.__version__
    assert "--steps 5 --seed 7 --threads 1" in report["command"] and "step 5: matching" in capsys.readouterr().out
    model, _ = load_uniter(tmp_path)
    assert report["test"] == {"count": 50, "seed": 0, **training.evaluate(model, count=50)}
    again = training.train(5, seed=7, log_every=0)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_every_loss_falls_and_reaches_every_parameter():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, heads = training.UNITER(training.CONFIG), training.TrainingHeads(training.CONFIG.hidden_size)
    scenes = training.sample_scenes(training.KINDS, "train", None, generator)
    parameters = dict(model.named_parameters(prefix="model")) | dict(heads.named_parameters(prefix="heads"))
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    history = []
    for _ in range(12):
        parts = training.losses(model, heads, scenes, torch.Generator().manual_seed(1))
        history.append({name: loss.item() for name, loss in parts.items()})
        optimizer.zero_grad()
        sum(parts.values()).backward()
        optimizer.step()
    assert all(history[-1][name] < history[0][name] for name in ("matching", "word", "box")), history
    still = [name for name, parameter in parameters.items() if parameter.grad is None]
    assert still == ["model.uniter.img_embeddings.mask_embedding.weight"], "only masked-region modelling would train it"


def test_masked_words_are_one_of_the_captions_three_parts():
    ids = digit_scenes(300).input_ids
    masked, where = training.mask_words(ids, torch.Generator().manual_seed(0))
    assert {tuple(torch.nonzero(row).flatten().tolist()) for row in where} == {(1,), (2, 3), (5,)}
    assert torch.equal(masked, torch.where(where, VOCABULARY.index("[MASK]"), ids))


def test_a_training_batch_is_balanced():
    masked, matching = training.KINDS[: training.MASKED], training.KINDS[training.MASKED :]
    assert (masked == 0).all() and torch.bincount(matching).tolist() == [96, 32, 32, 32]


def test_wrong_steps_are_named():
    with pytest.raises(ValueError, match="steps"):
        training.train(0)
