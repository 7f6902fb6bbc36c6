"""Formulas and their glyphs, the measures of maps, and their rows, without the package that carries the model."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import vlattn_fast as va
from vlattn_lab.real import formula_picture, reading, reading_page, rival
from vlattn_lab.real import symbols as grounding
from vlattn_lab.real.formulas import COUNT, FONTS, KINDS, Formula, codes, draw, formulas, places, symbols
from vlattn_lab.real.grounding import areas, symbol_cases
from vlattn_lab.real.reading import GRID, Rule

BOX = (20.0, 40.0, 36.0, 60.0)  # x0, y0, x1, y1: columns 2.5 to 4.5 and rows 5 to 7.5 of the patches


# --- the list and its boxes ---


def test_the_list_is_the_same_each_time_and_balanced():
    listed = formulas()
    assert listed == formulas() and len(listed) == COUNT and listed[:15] == formulas(15)
    assert listed != formulas(seed=1)
    assert {(one.kind, one.font) for one in listed[:15]} == {(kind, font) for kind in KINDS for font in FONTS}
    assert len({one.source for one in listed}) > 0.9 * COUNT
    for one in listed:
        assert 4 <= len(one.symbols) <= 12 and len({*one.symbols}) == len(one.symbols), one
        assert places(one.source, one.source) is not None


@pytest.mark.parametrize("font", FONTS)
def test_each_symbol_has_a_code_of_its_own(font):
    assert len(codes(font)) == len({*codes(font).values()}) and {*codes(font).values()} >= {"a", "7", "+", r"\alpha", r"\sum"}


def ink_of(drawing, least=0.5):
    return torch.tensor(drawing.blank - drawing.picture) > least


def pixels_of(box, margin):
    """(128, 512), the pixels in a box that is `margin` pixels larger on each side."""
    ys, xs = (torch.arange(size) + 0.5 for size in (128, 512))
    in_rows, in_columns = ((ys > box[1] - margin) & (ys < box[3] + margin), (xs > box[0] - margin) & (xs < box[2] + margin))
    return in_rows[:, None] & in_columns


@pytest.mark.parametrize("font", FONTS)
@pytest.mark.parametrize("kind", ["power", "sum"])
def test_the_ink_of_a_formula_lies_in_the_boxes_of_its_glyphs(kind, font):
    one = next(one for one in formulas() if (one.kind, one.font) == (kind, font) and "frac" not in one.source)
    drawing = draw(one)
    ink = ink_of(drawing)
    boxes = [*drawing.boxes.values()]
    assert [*drawing.boxes] == one.symbols
    assert not bool((ink & ~torch.stack([pixels_of(box, 1.5) for box in boxes]).any(0)).any()), "ink outside of all boxes"
    for symbol, box in drawing.boxes.items():
        ys, xs = (ink_of(drawing, 0.1) & pixels_of(box, 1.5)).nonzero().T  # thin strokes are grey
        edges = [float(xs.min()), float(ys.min()), float(xs.max()) + 1, float(ys.max()) + 1]
        assert edges == pytest.approx(box, abs=3.0), (symbol, "a box is as large as its glyph")


@pytest.mark.parametrize("font", FONTS)
def test_each_box_is_that_of_its_own_glyph(font):
    """A formula with another symbol in one place has other pixels there, and the same elsewhere."""
    first, second = (draw(Formula(0, "root", font, rf"\sqrt{{a}}+{end}=\frac{{9}}{{b}}")) for end in "67")
    changed = torch.tensor(abs(first.picture - second.picture)) > 0.5
    inside = pixels_of(first.boxes["6"], 1.5) | pixels_of(second.boxes["7"], 1.5)
    assert int((changed & inside).sum()) > 20 and not bool((changed & ~inside).any())
    left = [first.boxes[symbol][0] for symbol in ("a", "+", "6", "=", "9")]
    assert left == sorted(left) and first.boxes["9"][3] < first.boxes["b"][1]


def test_bars_and_roots_have_no_box():
    drawing = draw(Formula(0, "root", "cm", r"\frac{\sqrt{k}}{8}"))
    assert [*drawing.boxes] == ["k", "8"]
    without = ink_of(drawing) & ~(pixels_of(drawing.boxes["k"], 1.5) | pixels_of(drawing.boxes["8"], 1.5))
    assert int(without.sum()) > 50


def test_a_symbol_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="once in a formula; got 'x' twice"):
        draw(Formula(0, "power", "cm", "x+x"))


# --- answers ---


def test_the_characters_that_name_glyphs():
    assert symbols(r"\frac{a}{2}+\alpha") == [("a", 6), ("2", 9), ("+", 11), (r"\alpha", 13)]
    answer = r"\begin{align*}\mathbf{+}\,\beta^{\,2}\end{align*}"
    found = places(r"\beta^2+", answer)
    assert {symbol: answer[index] for symbol, index in found.items()} == {r"\beta": "b", "2": "2", "+": "+"}
    assert found["+"] < found[r"\beta"] and [*found] == [r"\beta", "2", "+"]
    swapped = r"\[\underset{f\,=\,4}{\overset{g}{\sum}}z_{b}\]"
    assert swapped[places(r"\sum_{f=4}^{g}z_b", swapped)["g"]] == "g"


@pytest.mark.parametrize("answer", ["a+c", "a+b+b", "a", r"a+\mathcal{B}", r"a+b\varrho", r"\end{equation"])
def test_an_answer_with_other_symbols_is_not_right(answer):
    assert places("a+b", r"\[a\!+\!\mathrm{b}\]") is not None
    assert places("a+b", answer) is None


# --- measures of made-up maps ---


def test_pointing_into_a_box_or_a_patch_beside_it():
    hits = torch.zeros(GRID)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            hits[row, column] = reading.pointing(
                torch.zeros(GRID).index_put_((torch.tensor(row), torch.tensor(column)), torch.tensor(1.0)), BOX
            )
    by_hand = torch.zeros(GRID)
    by_hand[4:8, 1:5] = 1  # centres from 36 to 60 of 32 to 68, and from 12 to 36 of 12 to 44
    by_hand[8, 1:6], by_hand[4:9, 5] = 1, 1  # those at 68, and at 44
    assert torch.equal(hits, by_hand) and torch.equal(hits.bool(), reading.near(BOX))
    assert reading.pointing(torch.zeros(GRID), BOX) == 0.0


def test_mass_is_the_positive_part_inside():
    values = torch.zeros(GRID)
    values[5, 3], values[5, 2], values[0, 0], values[1, 1] = 2.0, 4.0, 3.0, -7.0
    assert reading.mass(values, BOX) == pytest.approx((2 + 4 / 2) / 9)  # half of column 2 lies in the box
    assert float(reading.inside(BOX).sum()) * 64 == pytest.approx(16 * 20)
    assert reading.mass(torch.zeros(GRID), BOX) == 0.0


def test_the_number_that_is_explained():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    assert float(reading.score_of(logits, 1, "logit")) == 2.0
    others = math.log(math.exp(1) + math.exp(4))
    assert float(reading.score_of(logits, 1, "margin")) == pytest.approx(2 - others)
    assert float(reading.score_of(logits, 1, "log_probability")) == pytest.approx(2 - math.log(math.exp(others) + math.exp(2)))


def test_standard_errors_are_those_of_the_formulas():
    groups = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    mean, error = reading_page.clustered(groups)
    group_means = torch.tensor([1.0, 0.0, 2 / 3])
    assert mean == pytest.approx(5 / 9) and error == pytest.approx(float(group_means.std() / 3**0.5))
    assert math.isnan(reading_page.clustered([[1.0]])[1])


# --- rows, of a small model ---

SOURCE, ANSWER = "a+b=7", r"\[a+b\,=7\]"


class Small(nn.Module):
    """An encoder of patches and a decoder of characters, as the package has them, with one layer each."""

    def __init__(self, characters, width=16):
        super().__init__()
        self.cut = nn.Conv2d(1, width, 8, 8)
        self.places = nn.Parameter(torch.randn(GRID[0] * GRID[1], width))
        self.names = nn.Embedding(len(characters) + 2, width)
        self.encoder, self.decoder, self.cross = (nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.out = nn.Linear(width, len(characters) + 2)
        self.answer = [characters.index(character) + 2 for character in ANSWER]

    def forward(self, inputs):
        x = 9 * self.cut(inputs["images"] - 1).flatten(2).mT + self.places  # and those with ink
        y = self.norms[0](x)
        x = self.norms[3](x + self.encoder(y, y, y, need_weights=False)[0])
        t = self.names(inputs["decoder_input_ids"])
        y, later = self.norms[1](t), torch.ones(t.shape[1], t.shape[1], dtype=torch.bool).triu(1)
        t = t + self.decoder(y, y, y, attn_mask=later, need_weights=False)[0]
        return self.out(t + self.cross(3 * self.norms[2](t), 3 * x, x, need_weights=False)[0])  # some patches count far more

    def generate(self, images, **options):
        return torch.tensor([[0, *self.answer, 1]])


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    characters = sorted({*ANSWER})
    model = Small(characters).eval().requires_grad_(False)
    return reading.Reader(model, {number + 2: character for number, character in enumerate(characters)}, 0, 1)


LISTED = [Formula(0, "power", "cm", SOURCE), Formula(1, "power", "stix", "a+b=8")]


def test_rows_of_a_reader(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "FIRST", [Rule("gradient", ("norms",), "logit"), Rule("attention")])
    monkeypatch.setattr(reading, "OTHERS", [Rule("input_gradient", (), "log_probability")])
    monkeypatch.setattr(reading, "COMPARED", [reading.OCCLUSION, Rule("gradient", (), "logit")])
    monkeypatch.setattr(reading, "BESIDE", [Rule("input_gradient", (), "logit", "blank")])
    kept = reading.Kept(tmp_path / "folder" / "rows.jsonl")
    *rows, time = reading.rows(reader, kept, LISTED)
    right, wrong = rows[0], rows[1]
    assert (right["answer"], right["right"], wrong["right"]) == (ANSWER, True, False) and time["seconds"] > 0
    assert [(row["task"], row.get("method")) for row in rows[2:]] == [
        ("formula maps", "gradient"),
        ("formula maps", "attention"),
        ("formula tests", None),
        ("formula tests", None),
        ("formula maps", "input_gradient"),
    ]
    assert all(len(row["mass"]) == 3 and 0 < sum(row["mass"]) < 3 for row in rows[2:4])
    assert [numbers["method"] for numbers in rows[4]["rules"]] == ["occlusion", "gradient"]
    assert rows[4]["rules"][0]["occlusion"] == pytest.approx(1.0) and rows[4]["glyph"] == "b"
    assert [numbers["baseline"] for numbers in rows[5]["rules"]] == ["blank"] and rows[5]["glyph"] == "b"
    again = reading.Kept(kept.path, minutes=0.0)  # a run that goes on
    monkeypatch.setattr(reading, "map_row", lambda *arguments: pytest.fail("measured again"))
    assert [*reading.rows(reader, again, LISTED)][:-1] == rows
    assert [*reading.rows(reader, reading.Kept(tmp_path / "none.jsonl", minutes=0.0), LISTED)] == [
        {"task": "formula time", "seconds": 0.0}
    ]
    text = reading_page.section([*rows, time], {})
    assert "Of the first 2 formulas of the list 1 were read right: 1 of 1 in cm, 0 of 1 in stix" in text
    assert (
        "3 glyphs of 1\nformulas" in text
        and "± nan |" in text
        and "| `attention` |  | 1 |" in text
        and reading_page.section([], {}) == ""
    )


def test_misread_symbols_are_those_that_the_formula_lacks_or_that_came_before():
    one = Formula(0, "power", "cm", "a^8+b=y")

    def found(answer, length=20):
        labels = grounding.misread(one, {"answer": answer, "ids": [0] * length})
        return labels and {answer[place] + str(place): right for place, right in labels.items()}

    assert found(r"\[a^6+b=y\]") == {"a2": True, "64": False, "+5": True, "b6": True, "=7": True, "y8": True}
    assert list(found(r"a^{8}+a=\psi").values()) == [True, True, True, False, True, False]
    assert found(r"a^8+b=yy") is None and found("a^8+b=y", reading.LONGEST - 1) is None
    assert grounding.instead_of("8", one) in set("1234567") | {"9"} and grounding.instead_of("+", one) is None


def test_the_numbers_of_symbols_are_those_of_the_whole_answer(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(grounding, "instead_of", lambda symbol, formula: "7" if symbol == "b" else None)
    answers = [reading.read(reader, one) for one in LISTED]
    right, noise, another, wrong, own = grounding.rows(reader, reading.Kept(tmp_path / "rows.jsonl"), LISTED, answers)
    found = places(SOURCE, ANSWER)
    images = torch.tensor(draw(LISTED[0]).picture)[None, None]
    inputs = {"images": images, "decoder_input_ids": torch.tensor([[0]])}
    table = va.token_grounding(grounding.EncoderDecoder(reader.model), inputs, answer=[answers[0]["ids"]])
    for name in grounding.NUMBERS:
        expected = [float(table.numbers[name][0, place]) for place in found.values()]
        assert right[name] == pytest.approx(expected, abs=2e-5), name
    assert right["characters"] == [ANSWER[place] for place in found.values()] and all(right["right"])
    assert {**right, "case": "another formula", "right": another["right"]} == another and not any(another["right"])
    assert own["number"] == 1 and own["right"] == [True, True, True, True, False]
    assert noise["compactness"] != right["compactness"] and (wrong["characters"], wrong["right"]) == (["7"], [False])
    logs = reader.logits(images, answers[0]["ids"])[0, found["b"]].log_softmax(-1)
    assert wrong["log_probability"] == [pytest.approx(float(logs[reader.model.answer[ANSWER.index("7")]]), abs=2e-5)]


def test_a_case_has_the_right_symbols_and_its_own():
    def row(number, case, right, numbers):
        facts = {"task": "formula grounding", "number": number, "case": case, "characters": [*"ab"[: len(right)]], "right": right}
        return {**facts, "log_probability": numbers, "compactness": numbers[::-1]}

    rows = [row(0, "right", [True, True], [-1.0, -2.0]), row(1, "right", [True, True], [-1.0, -3.0])]
    rows += [row(0, "one wrong symbol", [False], [-2.5]), row(7, "its own answers", [True, False], [-1.0, -9.0])]
    cases = symbol_cases(rows)
    tables, labels = cases["one wrong symbol"]
    assert labels == [[True, True, False], [True, True]] and tables[0].column("compactness").tolist() == [-2.0, -1.0, -2.5]
    tables, labels = cases["its own answers"]
    assert labels == [[True, True], [True, True], [True, False]] and tables[2].tokens == [["a", "b"]]
    assert "| `log_probability` | 0.75 (" in areas({"one": cases["one wrong symbol"]})  # above 3 of 4 right symbols


def test_a_map_is_that_of_the_character_and_its_score(reader):
    """input_gradient in patches: what `of` and `freeze` of the rule give, at the position that predicts the character."""
    one = reading.reading_of(LISTED[0], reading.read(reader, LISTED[0]))
    place = one.places["b"]
    assert ANSWER[place] == "b"
    images = one.images.requires_grad_()
    characters = torch.tensor([[0, *one.ids]])
    logits = reader.model({"images": images, "decoder_input_ids": characters})[:, place]
    (grad,) = torch.autograd.grad(logits.log_softmax(-1)[0, one.ids[place]], images)
    expected = (grad * images)[0, 0].detach().view(GRID[0], 8, GRID[1], 8).sum((1, 3))
    torch.testing.assert_close(reading.relevancy(reader, one, "b", Rule("input_gradient", (), "log_probability")), expected)
    assert reading.relevancy(reader, one, "b", Rule("gradient", ("norms", "attention"), "margin")).shape == GRID


def test_falls_and_curves_are_those_of_edited_pictures(reader):
    one = reading.reading_of(LISTED[0], reading.read(reader, LISTED[0]))
    place = one.places["b"]

    def logits(images):
        with torch.no_grad():
            return reader.model({"images": images, "decoder_input_ids": torch.tensor([[0, *one.ids]])})[0, place]

    ink, falls = reading.falls(reader, one, "b", "logit")
    most = int(falls.abs().argmax())
    row, column = ink.nonzero()[most].tolist()
    edited = one.images.clone()
    edited[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1.0
    expected = logits(one.images)[one.ids[place]] - logits(edited)[one.ids[place]]
    assert float(falls[most]) == pytest.approx(float(expected), abs=1e-5) and len(falls) == int(ink.sum())
    assert abs(float(expected)) > 3e-4, "a fall that can be told from none"
    values = nn.functional.avg_pool2d(one.blank - one.images, 8)[0, 0] + 0.01 * torch.rand(GRID)  # ink first
    deletion, insertion = reading.curves(reader, one, "b", values)
    by_hand = []
    for share in reading.FRACTIONS:
        chosen = torch.zeros(GRID[0] * GRID[1], dtype=torch.bool)
        chosen[values.flatten().topk(round(share * len(chosen))).indices] = True
        large = chosen.view(GRID).repeat_interleave(8, 0).repeat_interleave(8, 1)
        pair = (torch.where(large, one.blank, one.images), torch.where(large, one.images, one.blank))
        by_hand.append([float(logits(images).softmax(-1)[one.ids[place]]) for images in pair])
    assert [deletion, insertion] == pytest.approx(torch.tensor(by_hand).mean(0).tolist(), abs=1e-6)


def test_the_picture_is_alight_where_the_map_is_large(reader):
    grey, shares = torch.ones(2, 2).numpy(), torch.tensor([[[1.0, 0.0], [0.5, 1.0]], [[0.0, 0.0], [0.0, 1.0]]]).numpy()
    grey[0, 1] = 0.0
    shown = formula_picture.lit(grey, shares, [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0)])
    assert shown.tolist() == [[[255, 0, 0], [0, 0, 0]], [[255, 128, 128], [0, 0, 0]]]  # ink, and two colours, give black
    values = torch.full(GRID, -1.0)
    values[4, 9] = 2.0
    share = formula_picture.smooth(values)
    assert share.shape == (128, 512) and share.min() == 0.0 and share.max() == 1.0
    assert (share > 0.9).any() and not (share[:20] > 0).any(), "patches far from the one that counts"
    row, column = divmod(int(share.argmax()), 512)
    assert (row // 8, column // 8) == (4, 9)


def test_each_character_that_names_a_glyph_has_a_colour(reader):
    one = reading.reading_of(LISTED[0], reading.read(reader, LISTED[0]))
    figure = formula_picture.picture(reader, one)
    assert "".join(text.get_text() for text in figure.texts) == ANSWER
    marked = {text.get_text(): text.get_bbox_patch().get_facecolor() for text in figure.texts if text.get_bbox_patch()}
    assert [*marked] == one.formula.symbols and len({*marked.values()}) == len(marked)
    (image,) = figure.axes[0].images
    paper = one.blank[0, 0] > 0
    assert image.get_array().shape == (int(paper.any(1).sum()), int(paper.any(0).sum()), 3), "without the padding"


def test_rules_are_methods_with_options():
    rules = [*reading.FIRST, *reading.OTHERS]
    assert len(set(rules)) == len(rules) == len({rule.key for rule in rules})
    assert {*reading.COMPARED} - {reading.OCCLUSION} <= {*reading.FIRST} >= {*reading.BESIDE}
    blank = torch.ones(1, 1, 2, 2)
    assert repr(Rule("gradcam", (), "logit").made(blank)).startswith("<method gradcam(")
    made = Rule("weighted", ("norms",), "margin").made(blank)
    assert isinstance(made, va.methods.Weighted) and (made.freeze, made.of) == (("norms",), "margin")


# --- the external row, without its package ---


def plain_rules(**changed):
    """A module of rules as the package has it, whose rules are those of torch."""

    def patch_method(fn, module, method_name="forward", keep_original=False):
        if keep_original:
            setattr(module, f"original_{method_name}", getattr(module, method_name))
        setattr(module, method_name, fn)

    norm = nn.LayerNorm.forward
    functions = {
        "layer_norm_forward": lambda self, x: norm(self, x),
        "non_linear_forward": lambda self, x: self.original_forward(x),
        "wrap_attention_forward": lambda fn: lambda module, *args, **options: fn(module, *args, **options),
    }
    return SimpleNamespace(patch_method=patch_method, **{**functions, **changed})


def test_the_rules_of_the_rival_stand_in_place_of_torchs_and_leave_no_trace(monkeypatch):
    changed = {
        "layer_norm_forward": lambda self, x: 2 * x,
        "non_linear_forward": lambda self, x: 3 * self.original_forward(x),
        "wrap_attention_forward": lambda fn: lambda module, query, *args, **options: 5 * fn(module, query, *args, **options),
    }
    monkeypatch.setattr(rival, "patches", lambda: plain_rules(**changed))
    x, attend = torch.randn(1, 3, 4), nn.MultiheadAttention(4, 2, bias=False, batch_first=True).eval()
    attend(x, x, x, need_weights=False)

    def computed():
        return nn.LayerNorm(4)(x), nn.GELU()(x), attend(x, x, x, need_weights=False)[0]

    before = computed()
    with rival.rules():
        norm, gelu, attended = computed()
    torch.testing.assert_close(norm, 2 * x)
    torch.testing.assert_close(gelu, 3 * before[1])
    torch.testing.assert_close(attended, 5 * before[2])
    with pytest.raises(RuntimeError, match="of the model"), rival.rules():
        raise RuntimeError("an error of the model")
    for one, two in zip(before, computed(), strict=True):
        assert torch.equal(one, two)
    assert not hasattr(nn.GELU, "original_forward")


def test_the_rules_are_loaded_without_the_packages_own_imports(tmp_path, monkeypatch):
    folder = tmp_path / rival.PACKAGE / "efficient"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('a name that transformers no longer has')")
    (folder / "patches.py").write_text(f"from {rival.PACKAGE}.efficient.rules import RULE")
    (folder / "rules.py").write_text("RULE = 'identity'")
    for name in [name for name in sys.modules if name.partition(".")[0] == rival.PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(rival, "package", lambda name: tmp_path / name)
    try:
        assert rival.patches().RULE == "identity" and rival.patches() is rival.patches()
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == rival.PACKAGE]:
            del sys.modules[name]


@pytest.mark.parametrize("baseline", [None, "blank"])
def test_with_torchs_own_rules_the_rival_is_input_times_gradient(reader, monkeypatch, baseline):
    monkeypatch.setattr(rival, "patches", plain_rules)
    one = reading.reading_of(LISTED[0], reading.read(reader, LISTED[0]))
    expected = reading.relevancy(reader, one, "b", Rule("input_gradient", (), "logit", baseline))
    torch.testing.assert_close(reading.relevancy(reader, one, "b", Rule(rival.PACKAGE, None, "logit", baseline)), expected)
    ink = nn.functional.max_pool2d(one.blank - one.images, 8)[0, 0] > 0
    assert bool((expected != 0).equal(ink)) == (baseline == "blank"), "less the blank image, a map lies on ink"


# --- the page ---


def made_up(rule, number, pointing, mass):
    return {"task": "formula maps", "number": number, **rule.facts, "pointing": pointing, "mass": mass}


def test_rules_are_compared_on_the_formulas_that_all_have():
    plain, held, lxt = Rule("gradient", (), "logit"), Rule("gradient", ("norms",), "logit"), reading_page.RIVALS[0]
    boxes = {"a": BOX, "b": BOX, "c": BOX}
    facts = {"task": "formula", "kind": "power", "font": "cm", "right": True, "boxes": boxes}
    rows = [{**facts, "number": number} for number in range(3)]
    rows += [made_up(plain, number, [number % 2] * 3, [0.5] * 3) for number in range(3)]
    rows += [made_up(held, number, [1, 1, 1], [0.75] * 3) for number in range(2)]
    rows += [made_up(lxt, number, [1, 1, 1], [0.25] * 3) for number in range(2)]
    readings = reading_page.Readings(rows)
    assert readings.common == {0, 1} and readings.measured == {0, 1, 2}
    text = reading_page.section(rows, {rival.PACKAGE: "2.1"})
    assert "| `gradient` | nothing | 3 | 0.500 ± 0.500 | 0.500 ± 0.000 |" in text
    assert "| `gradient` | norms | 2 | 1.000 ± 0.000 | 0.750 ± 0.000 |" in text
    assert "| lxt (external) | less the blank image | 2 | 1.000 ± 0.000 | 0.250 ± 0.000 |" in text
    assert "`lxt` 2.1, by the authors of AttnLRP" in text and "| `gradient` | norms | +0.000 ± 0.000 | +0.500 ± 0.000 |" in text
    assert "`lxt`" not in reading_page.section([row for row in rows if row.get("method") != rival.PACKAGE], {})
