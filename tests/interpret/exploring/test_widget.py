"""The widget shows what `explain` and `intervene` give, in a notebook and as a page."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import vlattn_fast as va
from tests.helpers.interpret.edited_maps import made

pytest.importorskip("anywidget")

GROUPS = ["image", "question", "last"]
HEAD = {"layer": 0, "head": 1, "factor": 0}
EDGE = {"layer": 1, "head": 2, "from": "image", "to": "last"}
EDITS = [va.ScaleHeads({0: [1]}, 0.0), va.Knockout(queries="last", keys="image", layers=1, heads=2)]
PHOTOS = list(np.random.default_rng(0).integers(0, 255, (2, 48, 48, 3), dtype=np.uint8))
Browse = Callable[[str, str], dict[str, Any]]


def send(widget: Any, content: Any) -> list[dict[str, Any]]:
    """Messages of the kernel by which it answers one of the page."""
    sent: list[dict[str, Any]] = []
    widget.comm.send = lambda data=None, buffers=None: sent.append(data)
    widget._handle_msg({"content": {"data": {"method": "custom", "content": content}}, "buffers": []})
    return sent


def same(one: va.Explanation, other: va.Explanation) -> None:
    assert one.method == other.method and torch.equal(one.scores, other.scores) and one.target == other.target
    for name, row in other.relevancy.items():
        assert torch.equal(one.relevancy[name], row)


def scores(panes: list[dict[str, Any]]) -> list[list[float]]:
    return [[choice["score"] for choice in pane["choices"]] for pane in panes]


def test_groups_are_those_that_the_tower_has() -> None:
    model, inputs = made("llava")
    names = ["image", "question", "last", "special"]
    found, named = (va.widget(model, inputs, *groups, generate=0).page["models"] for groups in ((), (names,)))
    assert found == named
    vit, pixels = made("vit")
    assert list(va.attribute_edges(vit, pixels).groups) == ["image", "special"]


def test_a_click_changes_the_answer_and_the_map() -> None:
    model, inputs = made("llava")
    widget = va.widget(model, inputs, GROUPS, image=PHOTOS, methods=["gradient", "rollout"], generate=3)
    plain = va.explain(model, inputs)
    same(widget.explanations["gradient"], plain)
    table = va.attribute_edges(model, inputs, GROUPS)
    effects = widget.page["models"][0]["effects"]
    np.testing.assert_allclose(effects[0][2], table.matrix("image", "last"), rtol=1e-3)
    np.testing.assert_allclose(widget.page["models"][0]["flow"], table.by_layer(), rtol=1e-3)
    assert widget.edits == [] and widget.edited["panes"] == []

    sent = send(widget, {"edits": [HEAD, EDGE]})
    (state,) = [message["state"]["edited"] for message in sent if message.get("method") == "update"]
    json.dumps(state, allow_nan=False)
    assert state["edits"] == [HEAD, EDGE] and state["problem"] == ""
    for method in ("gradient", "rollout"):
        with va.intervene(model, inputs, EDITS):
            expected = va.explain(model, inputs, method=method, target=plain.target)
        same(widget.explanations[method], expected)
        with va.intervene(model, inputs, widget.edits):
            same(widget.explanations[method], va.explain(model, inputs, method=method, target=plain.target))
    assert not torch.allclose(widget.explanations["gradient"].scores, plain.scores)
    np.testing.assert_allclose(scores(state["panes"]), [expected.scores.tolist()] * 2, rtol=1e-3)
    (map_,) = state["panes"][1]["choices"][0]["views"][""]["figures"][0]["maps"]
    values = map_["low"] + np.array(map_["cells"]) / 1000 * (map_["high"] - map_["low"])
    np.testing.assert_allclose(values, expected.image[0].flatten(), atol=2e-3 * float(expected.image[0].max()))
    with va.intervene(model, inputs, EDITS):
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[55])[:, 24:]
    assert state["answers"] == [[f"tokens {' '.join(map(str, row))}" for row in tokens.tolist()]]

    send(widget, {"edits": []})
    assert widget.edited["panes"] == [] and widget.edits == []
    same(widget.explanations["gradient"], plain)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (None, 'a message must be {"edits": [...]}; got None'),
        ({"edits": [], "then": 1}, "a message must be"),
        ({"edits": {"layer": 1}}, "a message must be"),
        ({"edits": ["layer"]}, "an edit must have the keys"),
        ({"edits": [{"layer": 1, "head": 2}]}, "an edit must have the keys"),
        ({"edits": [{**EDGE, "factor": 0}]}, "an edit must have the keys"),
        ({"edits": [{**EDGE, "layer": 3}]}, "layer must be among 0, 1, 2; got 3"),
        ({"edits": [{**EDGE, "layer": True}]}, "layer must be among 0, 1, 2; got True"),
        ({"edits": [{**EDGE, "layer": [1]}]}, "layer must be among 0, 1, 2; got [1]"),
        ({"edits": [{**EDGE, "head": 4}]}, "head must be from 0 to 3; got 4"),
        ({"edits": [{**EDGE, "head": -1}]}, "head must be from 0 to 3; got -1"),
        ({"edits": [{**HEAD, "head": None}]}, "head must be from 0 to 3; got None"),
        ({"edits": [{**HEAD, "factor": "0"}]}, "factor must be"),
        ({"edits": [{**HEAD, "factor": float("nan")}]}, "factor must be a finite number"),
        ({"edits": [{**EDGE, "from": "text"}]}, "from must be one of 'image', 'question', 'last'; got 'text'"),
        ({"edits": [{**EDGE, "to": ["last"]}]}, "to must be one of 'image', 'question', 'last'; got ['last']"),
        ({"edits": [HEAD, {**HEAD, "factor": 1}]}, "edits must name each head and each edge once"),
        ({"parts": EDGE, "edits": []}, 'a message must be {"parts": {"layer", "head", "from", "to"}}; got'),
        ({"parts": [EDGE]}, "an edit must have the keys"),
        ({"parts": HEAD}, "parts must be those of an edge of one head"),
        ({"parts": {**EDGE, "head": None}}, "parts must be those of an edge of one head"),
        ({"parts": {**EDGE, "head": 4}}, "head must be from 0 to 3; got 4"),
        ({"parts": {**EDGE, "from": "text"}}, "from must be one of 'image', 'question', 'last'; got 'text'"),
    ],
)
def test_a_message_that_is_no_edit_changes_nothing(message: Any, problem: str, widget: Any) -> None:
    send(widget, {"edits": [HEAD]})
    before, explanations = widget.edited, widget.explanations
    (sent,) = send(widget, message)
    state = sent["state"]["edited"]
    assert state["problem"].startswith(problem)
    assert state == {**before, "number": before["number"] + 1, "problem": state["problem"]}
    assert widget.explanations == explanations and len(widget.edits) == 1


@pytest.fixture(scope="module")
def widget() -> Any:
    torch.manual_seed(0)
    model, inputs = made("llava")
    return va.widget(model, inputs, GROUPS, image=PHOTOS, generate=0)


def test_a_click_cuts_the_edge_that_the_table_has(widget: Any) -> None:
    """The last token is no part of the question, whose edge to itself is cut by a click of its own."""
    send(widget, {"edits": [{"layer": 2, "head": None, "from": "question", "to": "last"}]})
    model, inputs = widget._exploration.models["model"], widget._exploration.inputs
    (cut,) = widget.edits
    assert (cut.queries, cut.keys, cut.layers) == ("last", "question - last", (2,))
    with va.intervene(model, inputs, cut):
        same(widget.explanations["gradient"], va.explain(model, inputs, target=widget._exploration.question["target"]))
    assert widget.page["groups"] == GROUPS


@pytest.mark.parametrize("answer", [None, [[5, 6, 7], [8, 9]]])
def test_a_click_shows_what_makes_a_head_look_there(answer: Any) -> None:
    """Those of `score_parts` on the inputs with their answer, of each sample; the edits stay."""
    model, inputs = made("llava")
    edge = {**EDGE, "layer": 2, "to": "answer" if answer else "last"}
    widget = va.widget(model, inputs, [*GROUPS, *(["answer"] if answer else [])], answer=answer, generate=0)
    send(widget, {"edits": [HEAD]})
    before = widget.edited
    (sent,) = send(widget, {"parts": edge})
    state = sent["state"]["edited"]
    json.dumps(state, allow_nan=False)
    assert state == {**before, "number": before["number"] + 1, "parts": state["parts"]} and len(widget.edits) == 1
    (found,) = state["parts"]["models"]
    assert state["parts"] == {**edge, "models": [found]} and [len(rows) for rows in found] == [8, 8]
    queries: Any = "last"
    if answer:
        sizes, inputs = inputs["attention_mask"].sum(1, keepdim=True), widget._exploration._asked["model"].prompt.arguments
        mask = inputs["attention_mask"].bool()
        queries = mask & (torch.arange(mask.shape[1]) >= sizes)
        assert queries.sum(1).tolist() == [3, 2]
    table = va.score_parts(model, inputs, 2, [2], parts="heads", groups=["image"], queries=queries)
    sums = (table.push["image"] + table.query_push["image"])[:, 0]
    for sample, rows in enumerate(found):
        largest = sums[sample].abs().topk(8).indices.tolist()
        assert [row[0] for row in rows] == [table.names[i] for i in largest]
        expected = [[float(push["image"][sample, 0, i]) for push in (table.push, table.query_push)] for i in largest]
        np.testing.assert_allclose([row[1:] for row in rows], expected, rtol=0, atol=1e-12)
    send(widget, {"edits": []})
    assert widget.edited["parts"] == state["parts"]  # they are those of the unedited model


def test_attention_between_towers_has_no_parts(widget: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget._exploration, "towers", ("text", "vision"))
    send(widget, {"parts": EDGE})
    assert widget.edited["problem"] == "parts must be of attention within a tower; got vision -> text"


def test_another_error_is_shown_and_does_not_stop_the_widget(widget: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(widget._exploration, "state", fails)
    send(widget, {"edits": [HEAD]})
    assert widget.edited["problem"] == "RuntimeError: out of memory"


def test_an_answer_whose_words_are_choices() -> None:
    model, inputs = made("llava")
    answer = [[5, 6, 7], [8, 9]]
    widget = va.widget(model, inputs, [*GROUPS, "answer"], answer=answer, generate=0)
    plain = va.explain(model, inputs, answer=answer)
    same(widget.explanations["gradient"], plain)
    assert [choice["label"] for choice in widget.page["panes"][0]["choices"]] == ["5", "6", "7", "8", "9"]
    send(widget, {"edits": [HEAD]})
    with va.intervene(model, inputs, EDITS[0]):
        same(widget.explanations["gradient"], va.explain(model, inputs, answer=answer))
    true = va.intervene_each(model, inputs, [(2, None, "image", "last")], groups=[*GROUPS, "answer"], answer=answer)
    send(widget, {"edits": [{"layer": 2, "head": None, "from": "image", "to": "last"}]})
    fall = plain.scores - widget.explanations["gradient"].scores
    torch.testing.assert_close(fall.sum(1), true.effects[0], rtol=0, atol=1e-9)


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=24, patch_size=6, num_labels=5))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    return model.double().eval()


def test_two_checkpoints_of_a_classifier_are_asked_about_one_target() -> None:
    torch.manual_seed(3)
    models, inputs = {"before": vit(), "after": vit()}, {"pixel_values": torch.randn(2, 3, 24, 24).double()}
    widget = va.widget(models, inputs, ["image", "special"])
    assert [pane["name"] for pane in widget.page["panes"]] == ["before", "after"]
    plain = widget.explanations
    send(widget, {"edits": [{"layer": layer, "head": head, "factor": -3} for layer in range(2) for head in range(4)]})
    cut = va.ScaleHeads({0: None, 1: None}, -3.0)
    changed = 0
    for number, (name, model) in enumerate(models.items()):
        with va.intervene(model, inputs, cut), torch.no_grad():
            logits = model(**inputs).logits
        picked = logits[[0, 1], plain[name].target]
        torch.testing.assert_close(widget.explanations[name].scores, picked, rtol=0, atol=1e-9)
        changed += int((logits.argmax(-1) != torch.tensor(plain[name].target)).sum())
        best = logits.softmax(-1).max(-1)
        said = [text.split(",")[0] for text in widget.edited["answers"][number]]
        assert said == [f"LABEL_{i} {p:.1%}" for p, i in zip(*best, strict=True)]
    assert changed > 0  # else nothing shows that the target stays
    send(widget, {"edits": [{"layer": layer, "head": head, "factor": 0} for layer in range(2) for head in range(4)]})
    assert "does not depend on the explained token" in widget.edited["problem"]


def test_a_tower_of_a_dual_encoder_and_what_does_not_fit() -> None:
    model, inputs = made("clip")
    widget = va.widget(model, inputs, ["image", "special"], tower="vision")
    send(widget, {"edits": [HEAD]})
    with va.intervene(model, inputs, va.ScaleHeads({0: [1]}, 0.0, tower="vision")):
        same(widget.explanations["gradient"], va.explain(model, inputs))
    assert widget.edited["answers"] == [[]]
    shallow = copy.deepcopy(model)
    shallow.vision_model.encoder.layers = shallow.vision_model.encoder.layers[:2]
    with pytest.raises(ValueError, match="models must have the same towers, layers and heads"):
        va.widget({"one": model, "two": shallow}, inputs, ["image", "special"], tower="vision")
    with pytest.raises(ValueError, match="methods must name at least one method that uses attention, each once"):
        va.widget(model, inputs, ["image"], methods=["gradient", "input_gradient"], tower="vision")
    with pytest.raises(TypeError, match="models must be a model, or a dict"):
        va.widget({}, inputs, ["image"])


READ = """
const root = document.querySelector(".vlattn-explorer"), all = (what, of = root) => [...of.querySelectorAll(what)];
const texts = (what, of = root) => all(what, of).map((one) => one.textContent);
const data = (one) => [...one.getContext("2d").getImageData(0, 0, one.width, one.height).data];
const pixels = () => all("canvas").map((one) => data(one).reduce((sum, value, i) => (sum * 31 + value * (i + 1)) % 1000003, 7));
const button = (text, of = root) => all("button", of).find((one) => one.textContent.startsWith(text));
const cell = (layer, column, of = root) => all("tbody tr", of)[layer].querySelectorAll("button")[column];
const put = (control, value) => { control.value = value; control.dispatchEvent(new Event("input", { bubbles: true })); };
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    torch.manual_seed(0)
    model, inputs = made("llava")
    made_widget = va.widget(model, inputs, GROUPS, image=PHOTOS, methods=["gradient", "rollout"], generate=2)
    send(made_widget, {"edits": [HEAD, EDGE]})
    send(made_widget, {"parts": EDGE})
    path = made_widget.save_html(tmp_path_factory.mktemp("page") / "page.html", title="A <b> title")
    return path.read_text("utf-8"), made_widget


def test_the_page_needs_nothing_else(page: tuple[str, Any]) -> None:
    bare = re.sub(r"base64,[^\"]+", "", page[0]).replace("http://www.w3.org/2000/svg", "")  # the name of a namespace
    assert "A &lt;b&gt; title" in bare and "default-src 'none'" in bare
    for outside in ("http:", "https:", "//", "<script src", "<link", "@import", "url("):
        assert outside not in bare


def test_a_stored_page_shows_the_edits_and_says_that_it_cannot_compute(page: tuple[str, Any], browse: Browse) -> None:
    script = """
results.edited = { pixels: pixels(), score: texts(".score"), answer: texts(".answer"), edits: texts(".edits button") };
button("unedited").click();
results.plain = { pixels: pixels(), score: texts(".score"), answer: texts(".answer") };
button("edited").click();
results.again = pixels();
results.crossed = all("td button").map((one) => one.getAttribute("aria-pressed"));
results.colors = all("td button").map((one) => one.title);
put(root.querySelector("[data-key=kind]"), "head");
results.heads = all("td button").map((one) => one.getAttribute("aria-pressed"));
results.status = [root.querySelector(".status").textContent];
cell(2, 1).click();
results.status.push(root.querySelector(".status").textContent);
const parts = () => all("table.parts tbody tr").map((line) => [...line.children].map((one) => one.textContent));
results.parts = [parts()];
put(root.querySelector("[data-key=kind]"), "parts");
results.asked = all("td button").map((one) => [one.getAttribute("aria-pressed"), one.disabled]);
put(root.querySelector("[data-key=from]"), "question");
results.titles = all("td button").map((one) => one.title);
results.ribbons = all("svg path").map((one) => [one.querySelector("title").textContent, one.getAttribute("class")]);
const choices = all(".bar")[0].querySelectorAll("button");
choices[1].click();
results.second = { pixels: pixels(), score: texts(".score") };
results.parts.push(parts());
put(root.querySelector("[type=range]"), 0);
results.clear = all("canvas").map((one) => data(one).filter(Boolean).length);
const named = (one) => one.getAttribute("aria-label") || one.textContent || one.closest("label");
results.unnamed = all("button, input, select, canvas").filter((one) => !named(one)).length;
"""
    source, widget = page
    found = browse(source, READ + script)
    edited, plain = widget.edited["panes"], widget.page["panes"]

    def both(i: int) -> list[str]:
        pairs = zip(plain, edited, strict=True)
        return [f"{one['choices'][i]['scored']} → {two['choices'][i]['scored']}" for one, two in pairs]

    assert found["edited"]["score"] == [
        f"{a['choices'][0]['scored']} → {b['choices'][0]['scored']}" for a, b in zip(plain, edited, strict=True)
    ]
    assert found["plain"]["score"] == [pane["choices"][0]["scored"] for pane in plain]
    before, after = widget.page["models"][0]["answers"][0], widget.edited["answers"][0][0]
    assert (
        found["edited"]["answer"] == [f"answer: {before} → {after}"] * 2 and found["plain"]["answer"] == [f"answer: {before}"] * 2
    )
    assert found["edited"]["pixels"] == found["again"] and len(set(found["again"] + found["plain"]["pixels"])) == 4
    assert found["edited"]["edits"] == ["layer 0, head 1 × 0 ×", "layer 1, head 2: image → last cut ×", "remove all"]
    assert [i for i, pressed in enumerate(found["crossed"]) if pressed == "true"] == [8]  # a row has "all" and 4 heads
    assert [i for i, pressed in enumerate(found["heads"]) if pressed == "true"] == [2]
    assert [i for i, (pressed, _) in enumerate(found["asked"]) if pressed == "true"] == [8]
    assert [i for i, (_, disabled) in enumerate(found["asked"]) if disabled] == [0, 5, 10]  # all heads have no parts
    for shown, rows in zip(found["parts"], widget.edited["parts"]["models"][0], strict=True):
        assert [row[0] for row in shown] == [row[0] for row in rows]
        numbers = [[float(number.replace("\u2212", "-")) for number in row[1:]] for row in shown]
        np.testing.assert_allclose(numbers, [row[1:] for row in rows], rtol=6e-3)
    effects = widget.page["models"][0]["effects"]
    for titles, part in ((found["colors"], effects[0][2]), (found["titles"], effects[1][2])):
        for i, title in enumerate(title for title in titles if "all heads" not in title):
            shown = float(title.split(": ")[1].replace("\u2212", "-"))
            assert title.startswith(f"layer {i // 4}, head {i % 4}: ") and shown == pytest.approx(part[i // 4][i % 4], rel=6e-3)
    assert found["status"][0] == "" and "needs a kernel" in found["status"][1]
    flow = widget.page["models"][0]["flow"]
    assert len(found["ribbons"]) == sum(bool(x) for layer in flow for row in layer for x in row)
    assert {text.split(": ")[0] for text, kind in found["ribbons"] if kind == "chosen"} == {
        f"layer {i}, question → last" for i in range(3)
    }
    assert found["second"]["score"] == [
        f"{a['choices'][1]['scored']} → {b['choices'][1]['scored']}" for a, b in zip(plain, edited, strict=True)
    ]
    assert found["second"]["pixels"] != found["again"] and found["clear"] == [0, 0] and found["unnamed"] == 0


@pytest.mark.slow
def test_clicks_are_messages_and_answers_are_shown(page: tuple[str, Any], browse: Browse) -> None:
    """The script with a kernel that answers as the real one did."""
    source, widget = page
    answer = json.dumps(widget.edited)
    script = (
        f"""
document.querySelector(".vlattn-explorer").remove();
const answer = {answer}, sent = [];
const state = {{ page: stored.page, edited: {{ number: 0, edits: [], panes: [], answers: [], problem: "" }} }};
let heard = null;
const model = {{ get: (name) => state[name], send: (content) => sent.push(content), save_changes: () => {{}} }};
model.set = (name, value) => {{ results.told = [name, value]; }};
model.on = (name, call) => {{ heard = [name, call]; }};
model.off = (name, call) => {{ results.off = name === heard[0] && call === heard[1]; }};
const end = explore(model, document.getElementById("explorer"));
"""
        + READ
        + """
const say = (edited) => { state.edited = edited; heard[1](); };
results.first = { score: texts(".score"), edits: texts(".edits button"), pixels: pixels() };
cell(1, 3).click();
results.waits = root.querySelector(".status").textContent;
cell(0, 1).click();
say({ ...answer, number: 1 });
results.shown = { score: texts(".score"), status: root.querySelector(".status").textContent, pixels: pixels() };
cell(1, 3).click();
say({ ...state.edited, number: 2, problem: "no such layer" });
results.problem = root.querySelector(".status").textContent;
put(root.querySelector("[data-key=kind]"), "head");
put(root.querySelector("[type=number]"), 2);
cell(2, 4).click();
say({ ...state.edited, number: 3, problem: "" });
cell(1, 0).click();
say({ ...state.edited, number: 4 });
const ribbon = all("svg path").find((one) => one.textContent.startsWith("layer 2, image \u2192 last"));
ribbon.dispatchEvent(new MouseEvent("click", { bubbles: true }));
say({ ...state.edited, number: 5 });
button("layer 0, head 1").click();
say({ ...state.edited, number: 6 });
button("remove all").click();
say({ ...state.edited, number: 7, parts: null });
results.without = texts("table.parts").length;
put(root.querySelector("[data-key=kind]"), "parts");
button("unedited").click();
cell(1, 0).click();
cell(1, 3).click();
cell(2, 3).click();
results.computing = root.querySelector(".status").textContent;
say({ ...state.edited, number: 8, parts: answer.parts });
results.why = [texts("table.parts tbody th"), root.querySelector(".status").textContent];
results.stays = button("unedited").getAttribute("aria-pressed");
results.sent = sent;
end();
"""
    )
    found = browse(source, script)
    assert found["first"]["edits"] == [] and "\u2192" not in found["first"]["score"][0] and found["waits"].startswith("Computing")
    assert "\u2192" in found["shown"]["score"][0] and found["shown"]["status"] == "" and found["problem"] == "no such layer"
    assert found["shown"]["pixels"] != found["first"]["pixels"] and found["off"] is True
    (asked,) = [message for message in found["sent"] if "parts" in message]
    assert asked == {"parts": EDGE} == found["sent"][-1] and found["computing"].startswith("Computing the parts")
    assert found["told"] == ["shown", 8]
    assert found["without"] == 0 and found["stays"] == "true", "parts do not change what is shown"
    assert found["why"] == [[row[0] for row in widget.edited["parts"]["models"][0][0]], ""]
    assert [message["edits"] for message in found["sent"][:-1]] == [
        [EDGE],  # and no further one until it is answered
        [HEAD],
        [HEAD, EDGE, {"layer": 2, "head": 3, "factor": 2}],
        [HEAD, EDGE, *({"layer": 1, "head": head, "factor": 2} for head in range(4))],
        [HEAD, EDGE, {"layer": 2, "head": None, "from": "image", "to": "last"}],
        [EDGE],
        [],
    ]
    for message in found["sent"][:-1]:
        send(widget, message)
        assert widget.edited["problem"] == "" and widget.edited["edits"] == message["edits"]


def test_the_module_that_notebooks_load_draws(page: tuple[str, Any], browse: Browse, tmp_path: Path) -> None:
    _, widget = page
    source = """<!DOCTYPE html><html><body><div id="el"></div><script type="module">
const [source, page, edited] = %s;
const module = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
const model = { get: (name) => ({ page, edited })[name], on: () => {}, off: () => {}, send: () => {}, set: () => {} };
module.default.render({ model, el: document.getElementById("el") });
const count = (what) => document.querySelectorAll(what).length;
document.body.dataset.results = JSON.stringify({ canvases: count("canvas"), cells: count("td button") });
</script></body></html>"""
    data = json.dumps([widget._esm, widget.page, widget.edited]).replace("</", "<\\/")
    found = browse(source.replace("%s", data), "")
    assert found == {"canvases": 2, "cells": 15}
