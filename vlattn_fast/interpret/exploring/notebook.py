"""The widget, with the same script as its page; this file imports anywidget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from vlattn_fast._ground.checks import check_writable
from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.exploring.exploration import Exploration, State
from vlattn_fast.interpret.intervening.edges import EdgeTable
from vlattn_fast.interpret.intervening.edits import Edit
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.figures.page import TEMPLATES, Drawn, fill_template, finite
from vlattn_fast.interpret.result.figures.photos import read_boxes, read_images
from vlattn_fast.interpret.result.numbers.choices import read_samples

_HERE = Path(__file__).parent / "templates"
_SCRIPT = "\n".join(path.read_text(encoding="utf-8") for path in (TEMPLATES / "drawing.js", _HERE / "exploring.js"))


class Explorer(anywidget.AnyWidget):
    """The widget of `va.widget`. A click in the notebook sends a message, and `edited` returns what changed."""

    _esm = f"{_SCRIPT}\nexport default {{ render: ({{ model, el }}) => explore(model, el) }};\n"
    _css = (_HERE / "exploring.css").read_text(encoding="utf-8")
    page = traitlets.Dict().tag(sync=True)  # what stays
    edited = traitlets.Dict().tag(sync=True)  # the edits, and what they changed; the parts of a head
    shown = traitlets.Int().tag(sync=True)  # set by the page: marimo runs cells with the widget again if the page sets a value

    def __init__(self, exploration: Exploration, image: Any, labels: Any, crop: Any, processor: Any, cmap: str) -> None:
        first = next(iter(exploration.plain.explanations.values()))
        images = read_images(first, image)
        boxes = read_boxes(first, images, crop, processor)
        self._drawn = Drawn(first, labels, images, boxes, read_samples(first, labels))
        self._exploration, self._shown, answers = exploration, exploration.plain, exploration.plain.answers
        page = {
            **self._drawn.shared(cmap),
            "groups": list(exploration.groups),
            "heads": [[layer, count] for layer, count in exploration.heads.items()],
            "models": [{"name": n, "answers": answers[n], **_effects(table)} for n, table in exploration.tables.items()],
            "panes": self._panes(exploration.plain),
        }
        empty = {"number": 0, "edits": [], "panes": [], "answers": [], "parts": None, "problem": ""}
        super().__init__(page=page, edited=empty)
        self.on_msg(self._receive)

    @property
    def edits(self) -> list[Edit]:
        """The edits that are shown, for `va.intervene`."""
        return list(self._shown.edits)

    @property
    def explanations(self) -> dict[str, Explanation]:
        """The explanations that are shown, by the names of methods and models: of the edited models, or of the unedited ones."""
        return dict(self._shown.explanations)

    def save_html(self, path: str | Path, title: str = "Heads and edges") -> Path:
        """Writes the widget in its present state to `path`: one self-contained page that needs no network. Everything works there
        except computing again, which needs a kernel."""
        check_writable("path", Path(path))
        with extra("viz"):
            page = fill_template(_HERE / "exploring.html", title=title, data={"page": self.page, "edited": self.edited})
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)

    def _receive(self, widget: Any, message: Any, buffers: Any) -> None:
        """Computes what a message of the page asks for. A message that is wrong changes only `problem`."""
        number = self.edited["number"] + 1  # tells the page that its message is answered, even if nothing else changes
        try:
            if isinstance(message, dict) and "parts" in message:
                models = self._exploration.parts(message)
                self.edited = {**self.edited, "number": number, "parts": {**message["parts"], "models": models}, "problem": ""}
                return
            self._shown = self._exploration.state(message)
        except Exception as error:  # else the page would wait
            kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
            self.edited = {**self.edited, "number": number, "problem": f"{kind}{error}"}
            return
        panes, answers = (self._panes(self._shown), list(self._shown.answers.values())) if self._shown.edits else ([], [])
        changed = {"edits": message["edits"], "panes": panes, "answers": answers}
        self.edited = {**self.edited, **changed, "number": number, "problem": ""}

    def _panes(self, state: State) -> list[dict[str, Any]]:
        models = list(self._exploration.models)
        return [
            {"name": name, "model": models.index(model), "choices": self._drawn.choices("models", state.explanations[name])}
            for name, (model, _) in self._exploration.panes.items()
        ]


def _effects(table: EdgeTable) -> dict[str, Any]:
    """First-order effects by (from, to, layer, head), and by (layer, from, to) of all heads; null if there is no such edge."""

    def numbers(values: Any) -> Any:
        return [numbers(each) for each in values] if isinstance(values, list) else finite(values)

    heads = [[table.matrix(from_, to).tolist() for to in table.groups] for from_ in table.groups]
    return {"effects": numbers(heads), "flow": numbers(table.by_layer().tolist())}
