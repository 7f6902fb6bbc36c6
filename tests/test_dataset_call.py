"""`va.explain_dataset`: the command's run of a data set, called from Python."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
image_module = pytest.importorskip("PIL.Image")

import vlattn_fast as va  # noqa: E402
from tests.helpers import saved_models  # noqa: E402
from tests.helpers.commands import vlattn  # noqa: E402
from vlattn_fast.interpret.dataset.store import SETTINGS  # noqa: E402
from vlattn_fast.interpret.explaining.loading import load_model  # noqa: E402


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved_models.save_vit(tmp_path_factory.mktemp("vit")))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        image_module.effect_noise((30, 24), 80).convert("RGB").save(folder / f"{number}.png")
    return folder


def test_it_writes_what_the_command_goes_on_with(vit: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = va.explain_dataset(vit, pictures, out, method=va.methods.Rollout(sinks="keep"), batch_size=2)
    assert (outcome.done, outcome.failed, outcome.skipped, outcome.first) == (3, 0, 0, True)
    explanations = va.load_explanations(out)
    assert explanations.ids == ["0.png", "1.png", "2.png"] and explanations[0].method == "rollout"
    again = vlattn("explain", "--model", vit, "--dataset", pictures, "--out", out, "--method", "rollout")
    assert "done 0, failed 0, skipped 3" in again.output
    refused = vlattn("explain", "--model", vit, "--dataset", pictures, "--out", out)
    assert refused.exit_code == 2 and 'method must be "rollout", as in the earlier runs' in " ".join(refused.output.split())


def test_a_run_goes_on_with_the_same_constants(vit: Path, pictures: Path, tmp_path: Path) -> None:
    """The default is stored by what it means, so that another release's default does not go on with it."""
    out = tmp_path / "out"
    va.explain_dataset(vit, pictures, out)
    stored = json.loads((out / SETTINGS).read_text())
    assert stored["method"] == "gradient" and stored["freeze"] == ["norms", "attention"]
    assert va.explain_dataset(vit, pictures, out, method=va.methods.Gradient(freeze=("norms", "attention"))).skipped == 3
    with pytest.raises(ValueError, match=r'freeze must be \["norms", "attention"\], as in the earlier runs in .*; got \[\]'):
        va.explain_dataset(vit, pictures, out, method=va.methods.Gradient(freeze=()))


def test_a_model_and_inputs_in_memory(vit: Path, pictures: Path, tmp_path: Path) -> None:
    """Tensors as a DataLoader gives them, and rows with images; each map is that of `explain`."""
    model, processor = load_model(str(vit))
    photos = [image_module.open(pictures / f"{number}.png") for number in range(3)]
    pixels = torch.cat([processor(images=photo, return_tensors="pt")["pixel_values"] for photo in photos])
    wanted = [va.explain(model, {"pixel_values": one[None]}, target=1).image for one in pixels]
    loader = DataLoader([{"pixel_values": one} for one in pixels], batch_size=2)
    out = tmp_path / "tensors"
    assert va.explain_dataset(model, loader, out, target=1).done == 2  # batches
    found = torch.cat([each.image for each in va.load_explanations(out)])
    torch.testing.assert_close(found, torch.cat(wanted))
    rows = [{"image": photo, "target": 1, "id": f"photo {number}"} for number, photo in enumerate(photos)]
    rows.append({"inputs": {"pixel_values": pixels[:1]}, "target": 1, "id": "tensor"})
    out = tmp_path / "rows"
    va.explain_dataset(model, rows, out, processor=processor)
    explanations = va.load_explanations(out)
    assert explanations.ids == ["photo 0", "photo 1", "photo 2", "tensor"]
    torch.testing.assert_close(torch.cat([each.image for each in explanations]), torch.cat([*wanted, wanted[0]]))
    assert va.explain_dataset(torch.nn.DataParallel(model), rows, out, processor=processor).skipped == 4
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match='model must be {"class": "ViTForImageClassification", .* Or pass another folder as out'):
        va.explain_dataset(model, rows, out, processor=processor)


def test_no_batch_has_more_samples_than_it_may(vit: Path, tmp_path: Path) -> None:
    model, sizes = load_model(str(vit))[0], []
    model.register_forward_pre_hook(lambda _, args, inputs: sizes.append(len(inputs["pixel_values"])), with_kwargs=True)
    pixels = torch.rand(4, 3, model.config.image_size, model.config.image_size)
    items = [{"pixel_values": part} for part in pixels.split([1, 2, 1])]
    va.explain_dataset(model, items, tmp_path / "out", target=1, batch_size=2)
    assert sizes == [1, 2, 1]


def test_a_run_in_which_all_failed_begins_anew(vit: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert va.explain_dataset(vit, pictures, out, target=99).failed == 3
    assert va.explain_dataset(vit, pictures, out, target=1).done == 3
    assert not va.load_explanations(out).failures


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": torch.nn.Identity()}, ValueError, "Identity has no adapter"),
        ({"model": 3}, TypeError, r"model must be a directory, an id or a torch\.nn\.Module; got int"),
        ({"processor": object()}, ValueError, "processor must be None for a directory or an id"),
        ({"dataset": [1]}, TypeError, "dataset must give mappings, with the columns image, .*; got 1"),
        ({"dataset": [{"photo": 1}]}, ValueError, "dataset must give an image, a text or tensors in each mapping; got photo"),
        ({"dataset": [{"inputs": 1}]}, TypeError, "inputs must be a mapping with the model's tensors; got int"),
        ({"dataset": iter(())}, ValueError, "dataset must have at least one input; got none$"),
        ({"model": "nowhere/at/all"}, ValueError, "model must be the directory or id of a Hugging Face model; got nowhere/at"),
        ({"methods": "rollout"}, TypeError, "options must be among method, text, .*; got methods"),
        ({"method": va.methods.Weighted(weighting=lambda *terms: terms[:2])}, TypeError, "method must have options that JSON"),
        ({"method": "magic"}, ValueError, "method must be one of gradient, .*; got 'magic'"),
        ({"dtype": "float8"}, ValueError, "dtype must be the name of a torch dtype, e.g. 'bfloat16'; got 'float8'"),
        ({"dtype": "nn"}, ValueError, "dtype must be the name"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"workers": -1}, ValueError, "workers must be at least 0"),
    ],
)
def test_what_it_refuses(
    vit: Path, pictures: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        va.explain_dataset(**{"model": vit, "dataset": pictures, "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()
