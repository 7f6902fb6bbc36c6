"""The rows of the experiment as tables and pictures, and the settings that the sweep's rows choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vlattn_fast._ground.extras import extra
from vlattn_fast.lab.experiments.congruence.training import JUMP, RELATIONAL, jump, value_name
from vlattn_fast.lab.experiments.experiment import Cell, Row, mean_and_deviation, paired_test

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ARMS = ("none", "iais_singular", "iais_distributed", "cacr")
LABELS = {
    "untrained": "untrained",
    "none": "no loss",
    "iais_singular": "IAIS singular",
    "iais_distributed": "IAIS distributed",
    "cacr": "CACR",
}
COLOURS = {"none": "#555555", "iais_singular": "#1b7f79", "iais_distributed": "#c8702a", "cacr": "#6a4fa3"}
SCORES = ("text", "image", "group", "digit", "relation", "order")
CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6, "digit": 1 / 2, "relation": 1 / 2, "order": 1 / 2}


def of(rows: Sequence[Row], what: str, loss: str | None = None) -> list[Row]:
    return [row for row in rows if row["what"] == what and loss in (None, row["loss"])]


# --- the choice of settings ---


def jump_of(row: Row, names: Sequence[str] = RELATIONAL) -> int | None:
    """The first step by which every accuracy in `names` has passed the jump; None where one never passes it."""
    steps = [jump(row["curve"], name) for name in names]
    return None if None in steps else max(step for step in steps if step is not None)


def at_most(row: Row, names: Sequence[str] = RELATIONAL) -> float:
    """The step of the jump, or the last step of a training without a jump."""
    step = jump_of(row, names)
    return row["curve"]["step"][-1] if step is None else step


def settings_of(row: Row) -> Cell:
    return {name: row[name] for name in ("loss", "weight", "layer")}


def swept(rows: Sequence[Row], kind: str) -> list[tuple[Cell, list[Row]]]:
    """Each setting of a loss with its rows of the sweep."""
    groups: list[tuple[Cell, list[Row]]] = []
    for row in of(rows, "sweep", kind):
        for cell, members in groups:
            if cell == settings_of(row):
                members.append(row)
                break
        else:
            groups.append((settings_of(row), [row]))
    return groups


def chosen(rows: Sequence[Row], kind: str) -> Cell:
    """The weight and the layer with the earliest mean jump; a tie goes to the highest final accuracy."""

    def order(group: tuple[Cell, list[Row]]) -> tuple[float, float]:
        members = group[1]
        last = [row["curve"][name][-1] for row in members for name in RELATIONAL]
        return sum(at_most(row) for row in members) / len(members), -sum(last)

    return min(swept(rows, kind), key=order)[0]


# --- numbers ---


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """Markdown; all but the first `words` columns hold numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _spread(values: Sequence[float], form: str = ".3f") -> str:
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{form}} ± {deviation:{form}}"


def _change(first: Sequence[float], second: Sequence[float], form: str = ".3f") -> tuple[str, str]:
    """The mean of first - second, pair by pair, ± its deviation, and p; one pair has no p."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, deviation = mean_and_deviation(differences)
    p = paired_test(differences)[1]
    shown = "–" if len(differences) < 2 else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return f"{mean:+{form}} ± {deviation:{form}}", shown


def _name(row: Row) -> str:
    loss = LABELS[row["loss"]]
    return loss if row["loss"] not in ARMS[1:] else f"{loss}, weight {row['weight']:g}, layer {row['layer'] + 1}"


# --- tables ---


def tables(rows: Sequence[Row]) -> Iterator[str]:
    yield from (_swept_table(rows), _jump_table(rows), _score_table(rows), _difference_table(rows), _value_table(rows))
    yield _cost_table(rows)


def _swept_table(rows: Sequence[Row]) -> str:
    lines = []
    for kind in ARMS:
        for cell, members in swept(rows, kind):
            mark = " (chosen)" if kind != "none" and cell == chosen(rows, kind) else ""
            signs = ["> " if jump_of(row) is None else "" for row in members]
            shown = [f"{sign}{at_most(row):,.0f}" for sign, row in zip(signs, members, strict=True)]
            mean = sum(at_most(row) for row in members) / len(members)
            lines.append([_name(members[0]) + mark, *shown, f"{max(signs)}{mean:,.0f}"])
    seeds = list(dict.fromkeys(row["seed"] for row in of(rows, "sweep")))
    return _table(["validation: step of the jump", *(f"seed {seed}" for seed in seeds), "mean"], lines)


def _jump_table(rows: Sequence[Row]) -> str:
    lines = []
    plain = of(rows, "training", "none")
    for arm in ARMS:
        members = of(rows, "training", arm)
        line = [_name(members[0])]
        for names in (["order"], ["relation"], RELATIONAL):
            line.append(_spread([at_most(row, names) for row in members], ",.0f"))
        line.append(f"{sum(jump_of(row) is not None for row in members)} of {len(members)}")
        both = [[at_most(row) for row in group] for group in (members, plain)]
        lines.append([*line, *(("", "") if arm == "none" else _change(both[0], both[1], ",.0f"))])
    head = ["step of the jump", "order", "relation", "both", "jumped", "both, less no loss", "p"]
    return _table(head, lines)


def _score_table(rows: Sequence[Row]) -> str:
    lines = [["chance", *(f"{CHANCE[score]:.3f}" for score in SCORES)]]
    for arm in ("untrained", *ARMS):
        members = of(rows, "training", arm)
        lines.append([_name(members[0]), *(_spread([row["held_out"][score] for row in members]) for score in SCORES)])
    return _table(["held-out pairs, test scans", *SCORES], lines)


def _difference_table(rows: Sequence[Row]) -> str:
    plain, lines = of(rows, "training", "none"), []
    for arm in ARMS[1:]:
        members = of(rows, "training", arm)
        for pairs, label in (("held_out", "held-out pairs"), ("seen", "pairs seen in training")):
            cells = []
            for score in SCORES:
                change, p = _change([row[pairs][score] for row in members], [row[pairs][score] for row in plain])
                cells.append(f"{change} (p {p})")
            lines.append([f"{LABELS[arm]}, {label}", *cells])
    return _table(["less no loss", *SCORES], lines)


def _value_table(rows: Sequence[Row]) -> str:
    lines = []
    for arm in ARMS[1:]:
        members = of(rows, "training", arm)
        value = value_name(arm, members[0]["layer"])
        line = [_name(members[0])]
        for compared in ("untrained", "none", arm):
            line.append(_spread([row["held_out"][value] for row in of(rows, "training", compared)], ".2g"))
        pair = [[row["held_out"][value] for row in of(rows, "training", compared)] for compared in (arm, "none")]
        lines.append([*line, *_change(pair[0], pair[1], ".2g")])
    return _table(["the loss's value, held-out pairs", "untrained", "no loss", "with the loss", "less no loss", "p"], lines)


def _cost_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in of(rows, "cost"):
        steps = [f"{row[f'step {name} ms']:.1f}" for name in ("none", "ours", "official")]
        losses = [f"{row[f'loss {name} ms']:.2f}" for name in ("ours", "official")]
        memory = [row[f"{call} MiB"] for call in ("step none", "step ours", "step official", "loss ours", "loss official")]
        shown = ["not measured" if x is None else f"{x:.1f}" for x in memory]
        lines.append([row["problem"], LABELS[row["loss"]], *steps, *losses, *shown])
    calls = ("step without", "step, ours", "step, official", "loss, ours", "loss, official")
    head = ["of", "loss", *(f"{call} (ms)" for call in calls), *(f"{call} (MiB)" for call in calls)]
    return _table(head, lines, words=2)


# --- pictures ---


def _panels(count: int) -> tuple[Figure, Sequence[Axes]]:
    with extra("viz"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * count + 0.6, 2.7), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


def learning_curves(rows: Sequence[Row]) -> Figure:
    """Accuracy of order over steps, a line a seed; the triangle marks the mean step of the jump."""
    figure, panels = _panels(len(ARMS))
    for panel, arm in zip(panels, ARMS, strict=True):
        for loss in dict.fromkeys(("none", arm)):
            members = of(rows, "training", loss)
            behind = loss != arm
            for row in members:
                colour, width = ("#bbbbbb", 0.8) if behind else (COLOURS[arm], 1.1)
                panel.plot(row["curve"]["step"], row["curve"]["order"], color=colour, linewidth=width)
            mean = sum(at_most(row, ["order"]) for row in members) / len(members)
            panel.plot([mean], [0.44], marker="^", color="#bbbbbb" if behind else COLOURS[arm], clip_on=False, linestyle="none")
        panel.axhline(JUMP, color="#999999", linewidth=0.6, linestyle=":")
        panel.set_title(_name(of(rows, "training", arm)[0]).replace(", weight", "\nweight"), fontsize=9)
        panel.set_ylim(0.44, 1.01)
        _quiet(panel, "training steps")
    panels[0].set_ylabel("accuracy, order of the digits", fontsize=9)
    return figure


def congruence_curves(rows: Sequence[Row]) -> Figure:
    """The value of each loss on validation scenes over steps, for models trained with this loss and without."""
    with extra("viz"):
        from matplotlib.lines import Line2D

    figure, panels = _panels(len(ARMS) - 1)
    for panel, arm in zip(panels, ARMS[1:], strict=True):
        members = of(rows, "training", arm)
        value = value_name(arm, members[0]["layer"])
        for loss, colour in (("none", "#999999"), (arm, COLOURS[arm])):
            for row in of(rows, "training", loss):
                panel.plot(row["curve"]["step"], row["curve"][value], color=colour, linewidth=1.0)
        panel.set_yscale("log")
        panel.set_title(f"{LABELS[arm]}, layer {members[0]['layer'] + 1}", fontsize=9)
        lines = [Line2D([], [], color="#999999"), Line2D([], [], color=COLOURS[arm])]
        panel.legend(lines, ["no loss", f"weight {members[0]['weight']:g}"], fontsize=7, frameon=False)
        _quiet(panel, "training steps")
    panels[0].set_ylabel("value of the loss (nats)", fontsize=9)
    return figure


def _quiet(panel: Axes, label: str) -> None:
    panel.set_xlabel(label, fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "congruence-learning": learning_curves,
    "congruence-values": congruence_curves,
}
