"""What is made of the explanations of a whole data set: a table, the mean map, a gallery, and a summary of what failed."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("typer.testing")
pytest.importorskip("transformers")
image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")

import vlattn_fast as va  # noqa: E402
from tests.helpers import saved_models  # noqa: E402
from tests.helpers.commands import vlattn  # noqa: E402
from vlattn_fast.interpret.dataset.failures import summary  # noqa: E402
from vlattn_fast.interpret.explaining.loading import load_model  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run over five pictures, two of which are none, and what the command printed; the model's folder."""
    folder = tmp_path_factory.mktemp("run")
    model = saved_models.save_vit(folder / "model")
    (folder / "pictures").mkdir()
    for number in range(3):
        image_module.effect_noise((600, 300), 80).convert("RGB").save(folder / "pictures" / f"{number}.png")
    for number in (3, 4):
        (folder / "pictures" / f"{number}.png").write_text("no picture")
    command = ("explain", "--model", model, "--dataset", folder / "pictures", "--out", folder / "maps")
    result = vlattn(*command)
    assert result.exit_code == 1
    return folder / "maps", result.output, model


@pytest.mark.slow
def test_to_pandas(run):
    pandas = pytest.importorskip("pandas")
    explanations = va.load_explanations(run[0])
    frame = explanations.to_pandas()
    parts = [one.to_pandas() for one in explanations]
    assert frame["id"].unique().tolist() == ["0.png", "1.png", "2.png"] and len(frame) == sum(map(len, parts))
    pandas.testing.assert_frame_equal(frame[frame["id"] == "1.png"].drop(columns="id").reset_index(drop=True), parts[1])
    assert len(explanations[:0].to_pandas()) == 0


def test_mean_map(run):
    explanations = va.load_explanations(run[0])
    want = torch.stack([one.image[0].double() for one in explanations]).mean(0)
    torch.testing.assert_close(explanations.mean_map(), want)
    with pytest.raises(ValueError, match="mean_map needs explanations with maps; got none among 0"):
        explanations[:0].mean_map()


def test_gallery(run):
    directory, _, model = run
    explanations, processor = va.load_explanations(directory), load_model(str(model))[1]
    assert [path.rpartition("/")[2] for path in explanations.images] == explanations.ids
    page = explanations.to_html(processor=processor, title="Five <pictures>")
    assert "Five &lt;pictures&gt;" in page and "3 of 3 explanations, 2 failures" in page and "score" in page
    assert re.search(r"<td>2</td><td>image must be .*</td><td>3.png, 4.png</td>", page)
    assert page.count("<figure>") == 3 and "http" not in page.replace("http-equiv", "")
    scales = re.findall(r'class="scale"><span>0</span><i style="background: linear.*?"></i><span>(.*?)</span>', page)
    largest = [float(explanations.mean_map().max()), *(float(one.image.max()) for one in explanations)]
    assert [float(end) for end in scales] == pytest.approx(largest, rel=0.01)  # of the mean, and of each map
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    mean, *thumbnails = [image_module.open(io.BytesIO(base64.b64decode(one))) for one in sources]
    assert mean.size == (240, 240) and [one.size for one in thumbnails] == [(240, 120)] * 3
    with image_module.open(explanations.images[0]) as photo:
        seen = np.asarray(thumbnails[0].convert("RGB"), float) - np.asarray(photo.resize((240, 120)), float)
    colored = np.abs(seen).mean((0, 2))  # the processor shows the model the middle square
    assert colored[70:170].mean() > 2 * max(colored[:50].mean(), colored[190:].mean())
    assert explanations.to_html(limit=1, processor=processor).count("<figure>") == 1
    with pytest.raises(ValueError, match="limit must be at least 0; got -1"):
        explanations.to_html(limit=-1)
    (directory.parent / "pictures" / "0.png").rename(directory.parent / "pictures" / "gone.png")
    try:
        assert "0.png" in explanations.save_html(directory.parent / "gallery.html", processor=processor).read_text()
    finally:
        (directory.parent / "pictures" / "gone.png").rename(directory.parent / "pictures" / "0.png")


def test_a_gallery_of_answers_and_texts(tmp_path):
    model = saved_models.save_llama(tmp_path / "llama")
    rows = [{"text": "a red", "answer": "square circle"}, {"text": "a", "answer": "blue"}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert vlattn("explain", "--model", model, "--dataset", tmp_path / "asked.jsonl", "--out", tmp_path / "out").exit_code == 0
    page = va.load_explanations(tmp_path / "out").to_html()
    assert page.count("<figure>") == 2 and "<img" not in page
    assert all(f">{word}</mark>" in page for word in ("red", "square", "circle", "blue"))


def test_summary_of_failures(run):
    directory, output, _ = run
    (line,) = va.load_explanations(directory).failure_summary()
    assert line["count"] == 2 and line["ids"] == ["3.png", "4.png"] and "…" in line["error"]
    assert f"failed 2: {line['error']} (3.png, 4.png)" in output
    failures = [{"id": str(i), "error": "text must have at most 8 tokens; got " + str(9 + i)} for i in range(7)]
    failures.append({"id": "x", "error": "image must be given for CLIPModel; got none"})
    first, second = summary(failures)
    assert first == {"error": "text must have at most … tokens; got …", "count": 7, "ids": list("01234")}
    assert second == {"error": failures[-1]["error"], "count": 1, "ids": ["x"]}
