"""The page: what it holds, and what it does in a browser."""

import base64
import html
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.interpret.made import answered, made
from vlattn_fast.interpret import Explanation, explain


def data(page: str) -> dict:
    """What the page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def values(part: dict, low: float, high: float) -> np.ndarray:
    return low + np.array(part["cells"]) / 1000 * (high - low)


def photo(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_the_values_of_rows():
    explanation = made()
    found = data(explanation.to_html(photo()))
    (method,) = found["methods"]
    assert method["name"] == "weighted" and found["towers"] == ["vision", "text"]
    assert [[word["text"] for word in text] for text in found["texts"]] == [["7", "8", "9"], ["5"]]
    for row, choice in enumerate(method["choices"]):
        assert (choice["sample"], choice["score"]) == (row, explanation.scores[row])
        np.testing.assert_allclose(choice["words"], explanation.text[row, : len(found["texts"][row])], rtol=1e-3)
        view = choice["views"][""]
        image = explanation.image[row].numpy()
        np.testing.assert_allclose([view["low"], view["high"]], [0, image.max()], rtol=1e-3)
        np.testing.assert_allclose(view["range"], [image.min(), image.max()], rtol=1e-3)
        ((map_,),) = [figure["maps"] for figure in view["figures"]]
        np.testing.assert_allclose(values(map_, map_["low"], map_["high"]), image.ravel(), atol=2e-3)
        assert map_["size"] == [3, 4] and map_["box"] == [0, 0, 1, 1]
        for name, rows in explanation.relevancy.items():
            part = choice["rows"][name]
            np.testing.assert_allclose(values(part, part["low"], part["high"]), rows[row], atol=2e-3)


def test_the_values_of_an_answer():
    explanation = answered()
    page = explanation.to_html([photo(), photo(20, 30)], others=[replace(explanation, method="rollout")])
    found = data(page)
    assert [method["name"] for method in found["methods"]] == ["gradient", "rollout"]
    assert len(found["images"]) == 2 and found["images"][1]["height"] == 20 and page.count("data:image") == 2
    choices = found["methods"][0]["choices"]
    assert [(c["sample"], c["label"], c["score"]) for c in choices] == [
        (0, "a", -0.5),
        (0, "giraffe", -0.375),
        (1, "me", -1.0),
        (1, "</s>", -2.0),
    ]
    giraffe = choices[1]
    assert giraffe["scored"] == "log-probability \u22120.375 (p 0.69)"
    np.testing.assert_allclose(giraffe["words"][:5], explanation.text[0, 1:, :5].sum(0), rtol=1e-3)
    np.testing.assert_allclose(giraffe["words"][5], explanation.text[0, 1:, 5:].sum(), rtol=1e-3)
    view = giraffe["views"][""]
    map_ = view["figures"][0]["maps"][0]
    expected = explanation.image[0, 1:].sum(0).ravel()
    np.testing.assert_allclose(values(map_, map_["low"], map_["high"]), expected, atol=2e-3)
    assert giraffe["at_position"] == {"language": 1.25} and giraffe["rows"]["language"]["high"] < 1.25 * 2
    assert [word["text"] for word in found["texts"][0]] == ["what", "is", "it", "?"]
    assert choices[2]["views"][""]["figures"][0]["image"] == 1
    labels = re.findall(r'data-choice="(\d)"><span>(.*?)</span>', page)
    assert labels == [("0", "a"), ("1", "giraffe"), ("2", "me"), ("3", "&lt;/s&gt;")]
    assert "<h3>what is it?</h3>" in page and "<h3>who</h3>" in page  # two prompts, each above its answer
    assert "<h3>first</h3>" in explanation.to_html(labels=["first", "second"])


def test_an_answer_in_one_row_is_text():
    explanation = answered()
    parts = {name: getattr(explanation, name).sum(1) for name in ("image", "text", "scores")}
    summed = replace(explanation, relevancy={"language": explanation.relevancy["language"].sum(1)}, **parts)
    found = data(summed.to_html())
    assert [choice["label"] for choice in found["methods"][0]["choices"]] == ["what is it? a giraffe", "who me</s>"]
    assert len(found["texts"][0]) == len(found["methods"][0]["choices"][0]["words"]) == 6


def test_crops_regions_and_towers():
    tiles = made(image=torch.rand(3, 2, 2), image_samples=[0, 0, 1], tower_images={"text": torch.rand(3, 4, 4)})
    apart = data(tiles.to_html(photo()))["methods"][0]["choices"][0]["views"]
    assert [len(figure["maps"]) for figure in apart[""]["figures"]] == [1, 1]
    assert apart["text"]["figures"][0]["maps"][0]["size"] == [4, 4]
    crop = [(0, 0, 0.5, 1), (0.5, 0, 1, 1), (-0.25, 0, 1.25, 1)]
    together = data(tiles.to_html(photo(), crop=crop))["methods"][0]["choices"]
    assert [map_["box"] for map_ in together[0]["views"][""]["figures"][0]["maps"]] == [list(box) for box in crop[:2]]
    assert together[1]["views"][""]["figures"][0]["maps"][0]["box"] == list(crop[2])
    corners = torch.rand(2, 3, 2) / 2
    boxes = torch.cat([corners, corners + 0.3], -1)
    regions = made(image=None, image_samples=None, regions=torch.rand(2, 3), boxes=boxes)
    (figure,) = data(regions.to_html(photo()))["methods"][0]["choices"][1]["views"][""]["figures"]
    np.testing.assert_allclose([map_["box"] for map_ in figure["maps"]], boxes[1], atol=1e-5)
    assert all(map_["size"] == [1, 1] for map_ in figure["maps"])


@pytest.mark.parametrize("case", ["clip"], indirect=True)
def test_it_is_escaped_and_needs_nothing_else(case, tmp_path):
    explanation = explain(case.model, case.inputs)
    hostile = "</script><img src=x onerror=alert(1)> & http"
    explanation = replace(explanation, words=[[f"{i}{hostile}" for i in row] for row in explanation.token_ids])
    pixels = case.inputs["pixel_values"].sigmoid()
    page = explanation.save_html(tmp_path / "page.html", pixels, title="A <b> title").read_text("utf-8")
    assert hostile in data(page)["texts"][0][0]["text"]
    bare = re.sub(r"base64,[^\"]+", "", page)
    assert "A &lt;b&gt; title" in bare and "<b> title" not in bare and "<img" not in bare and bare.count("</script>") == 2
    for outside in ("http:", "https:", "//", "<script src", "<link", "@import", "url("):
        assert outside not in bare
    assert "default-src 'none'" in page


def test_an_empty_page_and_bare_rows():
    assert data(Explanation({"text": torch.zeros(0, 3)}).to_html())["methods"][0]["choices"] == []
    rows = data(Explanation({"tower0": torch.tensor([[0.0, 0.5, 1.0]])}).to_html())["methods"][0]["choices"]
    assert rows[0]["rows"]["tower0"]["cells"] == [0, 500, 1000] and rows[0]["views"][""]["figures"] == []
    broken = Explanation({"text": torch.tensor([[float("nan"), 1.0]])}, scores=torch.tensor([float("inf")])).to_html()
    assert data(broken)["methods"][0]["choices"][0]["score"] is None


def test_other_methods_must_explain_the_same_words():
    for parts in (
        {"token_ids": [[7, 8, 1], [5]]},
        {"image": None, "image_samples": None},
        {"relevancy": {"vision": torch.rand(2, 13)}},
    ):
        with pytest.raises(ValueError, match="others must explain the same samples, words, maps and towers; got Explanation"):
            made().to_html(others=[made(**parts)])


def test_the_photo_keeps_its_size_where_it_can(tmp_path):
    from PIL import Image

    def read(source):
        return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))

    smooth = np.linspace(0, 255, 1200 * 900).reshape(900, 1200, 1).repeat(3, 2).astype(np.uint8)
    (kept,) = data(made().to_html(smooth))["images"]
    assert read(kept["source"]).size == (1200, 900) == (kept["width"], kept["height"])
    (noisy,) = data(made().to_html(photo(1500, 2000)))["images"]
    small = read(noisy["source"])
    assert small.width < 2000 and abs(small.width / small.height - 4 / 3) < 0.01 and len(noisy["source"]) < 4.1e5
    clear = np.zeros((40, 60, 4), np.uint8)  # transparent, so white
    (white,) = data(made().to_html(clear))["images"]
    assert (np.asarray(read(white["source"])) == 255).all()
    palette = Image.fromarray(photo()).convert("P")
    (colored,) = data(made().to_html(palette))["images"]
    assert np.asarray(read(colored["source"])).std(axis=2).mean() > 1


def test_notebooks_show_it_in_a_frame(monkeypatch):
    import sys

    shown = made()._repr_html_()
    page = html.unescape(re.search(r'srcdoc="(.*?)"', shown, re.S)[1])
    assert shown.startswith("<iframe") and data(page)["towers"] == ["vision", "text"]
    page = made().to_html(photo())
    assert isinstance(page, str) and "data:image" in page._repr_html_()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert made()._repr_html_() is None


SEE = """
const canvas = () => document.querySelector("figure canvas");
const pixels = () => [...canvas().getContext("2d").getImageData(0, 0, canvas().width, canvas().height).data];
const alphas = () => pixels().filter((_, i) => i % 4 === 3);
const cell = (row, column) => {
  const x = left + ((1 - left) * (column + 0.5)) / 3, y = (row + 0.5) / 2;
  return alphas()[Math.floor(y * canvas().height) * canvas().width + Math.floor(x * canvas().width)];
};
const see = (name) => {
  results[name] = {
    map: pixels().reduce((sum, value, i) => (sum * 31 + value * (i + 1)) % 1000003, 7),
    cells: [0, 1].map((row) => [0, 1, 2].map((column) => cell(row, column))),
    summary: document.getElementById("summary").textContent,
    shown: document.querySelector("button.shown").textContent,
    shares: [...document.querySelectorAll("#text .word")].map((word) => Number(word.style.getPropertyValue("--share"))),
    table: [...document.querySelectorAll("#table tr")].map((line) => line.textContent),
  };
};
const word = (i) => document.querySelectorAll("[data-choice]")[i];
const key = (name) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
"""


def peaked() -> Explanation:
    """An answer whose first word rests on the first patch, and whose second on the last."""
    explanation = answered()
    image = torch.zeros(2, 3, 2, 3)
    image[0, 0, 0, 0] = image[0, 1:, 1, 2] = image[1, :, 0, 2] = 1.0
    return replace(explanation, image=image)


def test_pointing_at_a_word_shows_its_map(browse):
    explanation = peaked()
    script = """
const left = 0.5;
see("first");
word(1).dispatchEvent(new MouseEvent("mouseenter"));
see("hovered");
word(1).parentElement.dispatchEvent(new MouseEvent("mouseleave"));
see("left");
word(1).click();
see("tapped");
word(0).focus();
see("focused");
key("ArrowRight");
see("arrow");
key("ArrowRight");
see("next");
"""
    found = browse(explanation.to_html(photo(200, 300), crop=(0.5, 0, 1, 1)), SEE + script)
    assert found["hovered"]["map"] != found["first"]["map"] == found["left"]["map"] == found["focused"]["map"]
    assert found["hovered"]["map"] == found["tapped"]["map"] == found["arrow"]["map"]
    full = pytest.approx(0.85 * 255, abs=1)  # of a patch; the rest is transparent
    assert found["first"]["cells"] == [[full, 0, 0], [0, 0, 0]]
    assert found["hovered"]["cells"] == [[0, 0, 0], [0, 0, full]]
    assert found["next"]["cells"] == [[0, 0, full], [0, 0, 0]]
    shares = explanation.text[0, 1:].sum(0)
    shares = shares[:4] / max(*shares[:5].tolist(), shares[5:].sum().item())
    np.testing.assert_allclose(found["hovered"]["shares"], shares, rtol=1e-3)
    assert found["hovered"]["summary"].startswith(
        "“giraffe”, log-probability −0.375 (p 0.69). Image: strongest at the bottom right (2). Words: "
    )
    assert len(found["hovered"]["table"]) == 6 and found["hovered"]["table"][4].startswith("a0.")
    assert [found[name]["shown"] for name in ("first", "hovered", "next")] == ["a", "giraffe", "me"]
    assert len(found["next"]["shares"]) == 1  # the other row's prompt


def test_numbers_stand_beside_words_that_run_from_right_to_left(browse):
    explanation = made(text=torch.tensor([[3.0, 2.0, 1.0]] * 2), words=[["قطة", "▁حمراء", "▁cat"]] * 2)
    script = """
const summary = document.getElementById("summary"), number = document.createRange();
results.text = summary.textContent;
results.places = [...summary.querySelectorAll("bdi")].slice(1).map((word) => {
  number.selectNodeContents(word.nextSibling);
  return [word.getBoundingClientRect().right, number.getBoundingClientRect().left];
});
"""
    found = browse(explanation.to_html(labels=["a", "b"]), script)
    assert "Words: قطة 3, حمراء 2, cat 1." in found["text"] and len(found["places"]) == 3
    assert all(abs(right - left) < 2 for right, left in found["places"])


def test_the_controls(browse):
    other = replace(peaked(), method="rollout", image=peaked().image.flip(-1))
    script = """
const left = 0;
const put = (id, value) => {
  const control = document.getElementById(id);
  if (control.type === "checkbox") control.checked = value; else control.value = value;
  control.dispatchEvent(new Event("input", { bubbles: true }));
};
see("first");
put("opacity", 0);
see("clear");
put("opacity", 100);
put("patches", true);
see("patches");
put("common", true);
see("common");
put("method", 1);
see("rollout");
results.hidden = Object.fromEntries(["method", "tower"].map((id) => [id, document.getElementById(id).parentElement.hidden]));
results.scale = [document.getElementById("low").textContent, document.getElementById("high").textContent];
results.labels = [...document.querySelectorAll("input, select, button, canvas")]
  .filter((one) => !(one.getAttribute("aria-label") || one.textContent || one.closest("label"))).length;
results.pressed = [...document.querySelectorAll("[role=radio]")].map((one) => [one.getAttribute("aria-checked"), one.tabIndex]);
results.live = document.getElementById("summary").getAttribute("aria-live");
"""
    found = browse(peaked().to_html(photo(200, 300), others=[other]), SEE + script)
    assert found["clear"]["cells"] == [[0, 0, 0], [0, 0, 0]]
    assert found["patches"]["cells"] == [[255, 0, 0], [0, 0, 0]] and found["patches"]["map"] != found["first"]["map"]
    assert 100 < found["common"]["cells"][0][0] < 255 and found["scale"] == ["0", "2"]  # "giraffe" has two tokens' worth
    assert found["rollout"]["cells"] == [[0, 0, found["common"]["cells"][0][0]], [0, 0, 0]]
    assert found["hidden"] == {"method": False, "tower": True}
    assert found["labels"] == 0 and found["live"] == "polite"
    assert found["pressed"] == [["true", 0], ["false", -1], ["false", -1], ["false", -1]]


@pytest.mark.slow
def test_the_strip_of_a_sound_has_its_seconds_below(browse):
    strip = torch.tensor([[[0.0, 1.0, 3.0, 2.0]]])
    script = """
const [canvas, caption] = ["canvas", "figcaption"].map((name) => document.querySelector(`figure ${name}`));
results.below = caption.getBoundingClientRect().top >= canvas.getBoundingClientRect().bottom - 1;
results.told = [caption.textContent, canvas.getAttribute("aria-label"), document.getElementById("summary").textContent];
"""
    found = browse(Explanation({"sound": strip.flatten(1)}, image=strip, seconds=[2.0]).to_html(), script)
    caption, label, summary = found["told"]
    assert (
        found["below"]
        and caption == "0 to 2.00 s"
        and label.startswith("Relevancy of the sound")
        and "strongest at 1.25 s" in label
    )
    assert "Sound: strongest at 1.25 s (3)" in summary


def test_an_answers_first_word_rests_on_no_other(browse):
    page = answered(image=torch.zeros(2, 3, 1, 4), text=torch.zeros(2, 3, 7), seconds=[2.0, 2.0]).to_html()
    script = 'results.told = ["range", "spread"].map((id) => document.getElementById(id).textContent);'
    script += 'results.told.push(document.querySelector("figure canvas").getAttribute("aria-label"));'
    found = browse(page, script)["told"]
    assert found[:2] == ["0 everywhere.", "It rests on no other word."] and found[2].endswith(", the same everywhere")


@pytest.mark.slow
def test_the_box_that_clips(browse):
    """One patch of 0.8 among 11 of 0.1 hides them; the box shows them, and says so."""
    image = torch.full((1, 3, 4), 0.1).index_put((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(0.8))
    explanation = Explanation(
        {"vision": torch.rand(1, 12)}, image=(image[0], torch.full((6, 8), 0.1)), image_samples=[0, 0], photos=[0, 0]
    )
    script = """
const told = () => ["high", "range"].map((id) => document.getElementById(id).textContent);
const box = document.getElementById("clip");
results.before = told();
box.checked = true;
box.dispatchEvent(new Event("input", { bubbles: true }));
results.after = told();
results.names = [...document.querySelectorAll("figcaption")].map((one) => one.textContent);
results.said = document.getElementById("summary").textContent;
"""
    found = browse(explanation.to_html(), script)
    assert found["before"] == ["0.8", "Values from 0.1 to 0.8."]
    assert found["after"] == ["0.1", "Values from 0.1 to 0.8, clipped at 0.1."]
    assert found["names"] == ["thumbnail", "tiles"] and "strongest at the top left of the thumbnail (0.8)" in found["said"]
    assert browse(explanation.to_html(scale="quantile"), script)["before"] == found["after"]


@pytest.mark.parametrize("kind", ["rows", "regions", "bare", "tokens", "empty", "towers", "nan"])
def test_every_kind_of_page_runs(browse, kind):
    corners = torch.rand(2, 3, 2) / 2
    explanation = {
        "rows": made(),
        "regions": made(image=None, image_samples=None, regions=torch.rand(2, 3), boxes=torch.cat([corners, corners + 0.3], -1)),
        "bare": made(text=None, token_ids=None, scores=None),
        "tokens": Explanation({"tower0": torch.rand(1, 9)}),
        "empty": Explanation({"tower0": torch.zeros(0, 9)}),
        "nan": made(image=torch.full((2, 3, 4), torch.nan), relevancy={"text": torch.full((2, 6), torch.nan)}),
        "towers": made(tower_images={"text": torch.rand(2, 5, 5)}),
    }[kind]
    page = explanation.to_html(None if kind in ("bare", "empty") else photo()) if kind != "tokens" else explanation.to_html()
    page = page.replace("<body>", "<body><script>window.errors = []; onerror = (text) => { errors.push(text); };</script>")
    script = """
results.errors = errors;
results.drawn = [...document.querySelectorAll("figure canvas")].map((canvas) => [canvas.width, canvas.height]);
const tower = document.getElementById("tower");
if (tower.options.length > 1) { tower.value = "text"; tower.dispatchEvent(new Event("input")); }
results.counted = document.getElementById("counted").textContent;
results.open = document.getElementById("tokens").open;
results.size = document.querySelector("[data-choice]") ? choices()[0].views.text?.figures[0].maps[0].size : undefined;
"""
    found = browse(page, script)
    assert found["errors"] == []
    assert len(found["drawn"]) == (0 if kind in ("tokens", "empty") else 1)
    assert found["open"] == (kind == "tokens")
    if kind == "bare":
        assert found["drawn"] == [[360, 270]]
    if kind == "tokens":
        assert found["counted"].startswith('9 tokens of "tower0"')
    if kind == "towers":
        assert found["size"] == [5, 5] and found["counted"].startswith('6 tokens of "text"')


def test_a_map_that_is_the_same_everywhere(browse):
    image = torch.stack([torch.zeros(3, 4), torch.full((3, 4), 0.25)])
    page = made(image=image, text=None, token_ids=None).to_html(photo())
    script = """
results.said = [0, 1].map((index) => { pin(index); return document.getElementById("summary").textContent; });
results.scale = [...document.querySelectorAll("#low, #high, #range")].map((node) => node.textContent);
"""
    found = browse(page, script)
    assert [text.partition("Image: ")[2] for text in found["said"]] == ["0 everywhere.", "0.25 everywhere."]
    assert found["scale"] == ["0", "0.25", "0.25 everywhere."]
