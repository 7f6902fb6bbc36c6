"""The records of the experiment as tables and pictures, and the settings that the sweep's records choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, having, markdown, number, spread
from vlattn_lab.experiments.congruence.training import JUMP, RELATIONAL, jump, value_name
from vlattn_lab.experiments.experiment import Cell, Record, paired_change

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


# --- the choice of settings ---


def jump_of(record: Record, names: Sequence[str] = RELATIONAL) -> int | None:
    """The first step by which every accuracy in `names` has passed the jump; None where one never passes it."""
    steps = [jump(record["curve"], name) for name in names]
    return None if None in steps else max(step for step in steps if step is not None)


def at_most(record: Record, names: Sequence[str] = RELATIONAL) -> float:
    """The step of the jump, or the last step of a training without a jump."""
    step = jump_of(record, names)
    return record["curve"]["step"][-1] if step is None else step


def swept(records: Sequence[Record], kind: str) -> list[tuple[Cell, list[Record]]]:
    """Each setting of a loss with its records of the sweep."""
    names = ("loss", "weight", "layer")
    groups = grouped(having(records, what="sweep", loss=kind), lambda record: tuple(record[name] for name in names))
    return [(dict(zip(names, setting, strict=True)), members) for setting, members in groups.items()]


def chosen(records: Sequence[Record], kind: str) -> Cell:
    """The weight and the layer with the earliest mean jump; a tie goes to the highest final accuracy."""

    def order(group: tuple[Cell, list[Record]]) -> tuple[float, float]:
        members = group[1]
        last = [record["curve"][name][-1] for record in members for name in RELATIONAL]
        return sum(map(at_most, members)) / len(members), -sum(last)

    return min(swept(records, kind), key=order)[0]


# --- numbers ---


def _name(record: Record) -> str:
    loss = LABELS[record["loss"]]
    return loss if record["loss"] not in ARMS[1:] else f"{loss}, weight {record['weight']:g}, layer {record['layer'] + 1}"


# --- tables ---


def tables(records: Sequence[Record]) -> Iterator[str]:
    for table in (_swept_table, _jump_table, _score_table, _difference_table, _value_table, _cost_table):
        yield table(records)


def _swept_table(records: Sequence[Record]) -> str:
    lines = []
    for kind in ARMS:
        for cell, members in swept(records, kind):
            mark = " (chosen)" if kind != "none" and cell == chosen(records, kind) else ""
            signs = ["> " if jump_of(record) is None else "" for record in members]
            shown = [f"{sign}{at_most(record):,.0f}" for sign, record in zip(signs, members, strict=True)]
            mean = sum(map(at_most, members)) / len(members)
            lines.append([_name(members[0]) + mark, *shown, f"{max(signs)}{mean:,.0f}"])
    seeds = dict.fromkeys(record["seed"] for record in having(records, what="sweep"))
    return markdown(["validation: step of the jump", *(f"seed {seed}" for seed in seeds), "mean"], lines)


def _jump_table(records: Sequence[Record]) -> str:
    lines = []
    plain = [at_most(record) for record in having(records, what="training", loss="none")]
    for arm in ARMS:
        members = having(records, what="training", loss=arm)
        steps = [[at_most(record, names) for record in members] for names in (["order"], ["relation"], RELATIONAL)]
        jumped = f"{sum(jump_of(record) is not None for record in members)} of {len(members)}"
        change = ("", "") if arm == "none" else paired_change(steps[-1], plain, ",.0f")
        lines.append([_name(members[0]), *(spread(one, ",.0f") for one in steps), jumped, *change])
    head = ["step of the jump", "order", "relation", "both", "jumped", "both, less no loss", "p"]
    return markdown(head, lines)


def _score_table(records: Sequence[Record]) -> str:
    lines = [["chance", *(f"{CHANCE[score]:.3f}" for score in SCORES)]]
    for arm in ("untrained", *ARMS):
        members = having(records, what="training", loss=arm)
        lines.append([_name(members[0]), *(spread([record["held_out"][score] for record in members]) for score in SCORES)])
    return markdown(["held-out pairs, test scans", *SCORES], lines)


def _difference_table(records: Sequence[Record]) -> str:
    plain, lines = having(records, what="training", loss="none"), []
    for arm in ARMS[1:]:
        members = having(records, what="training", loss=arm)
        for pairs, label in (("held_out", "held-out pairs"), ("seen", "pairs seen in training")):
            scores = ([[record[pairs][score] for record in group] for group in (members, plain)] for score in SCORES)
            changes = (paired_change(trained, without) for trained, without in scores)
            lines.append([f"{LABELS[arm]}, {label}", *(f"{change} (p {p})" for change, p in changes)])
    return markdown(["less no loss", *SCORES], lines)


def _value_table(records: Sequence[Record]) -> str:
    lines = []
    for arm in ARMS[1:]:
        members = having(records, what="training", loss=arm)
        value = value_name(arm, members[0]["layer"])
        arms = ("untrained", "none", arm)
        values = [[record["held_out"][value] for record in having(records, what="training", loss=name)] for name in arms]
        lines.append([_name(members[0]), *(spread(one, ".2g") for one in values), *paired_change(values[2], values[1], ".2g")])
    return markdown(["the loss's value, held-out pairs", "untrained", "no loss", "with the loss", "less no loss", "p"], lines)


def _cost_table(records: Sequence[Record]) -> str:
    calls = ("step none", "step ours", "step official", "loss ours", "loss official")
    lines = []
    for record in having(records, what="cost"):
        times = [f"{record[f'{call} ms']:.{1 if call.startswith('step') else 2}f}" for call in calls]
        peaks = [number(record[f"{call} MiB"], ".1f") or "not measured" for call in calls]
        lines.append([record["problem"], LABELS[record["loss"]], *times, *peaks])
    titles = [call.replace(" none", " without").replace(" o", ", o") for call in calls]
    head = ["of", "loss", *(f"{title} ({unit})" for unit in ("ms", "MiB") for title in titles)]
    return markdown(head, lines, words=(0, 1))


# --- pictures ---


def learning_curves(records: Sequence[Record]) -> Figure:
    """Accuracy of order over steps, a line a seed; the triangle marks the mean step of the jump."""
    figure, (line,) = panels(1, len(ARMS), (2.6 * len(ARMS) + 0.6, 2.7), sharey=True)
    for panel, arm in zip(line, ARMS, strict=True):
        for loss in dict.fromkeys(("none", arm)):
            members = having(records, what="training", loss=loss)
            behind = loss != arm
            for record in members:
                colour, width = ("#bbbbbb", 0.8) if behind else (COLOURS[arm], 1.1)
                panel.plot(record["curve"]["step"], record["curve"]["order"], color=colour, linewidth=width)
            mean = sum(at_most(record, ["order"]) for record in members) / len(members)
            panel.plot([mean], [0.44], marker="^", color="#bbbbbb" if behind else COLOURS[arm], clip_on=False, linestyle="none")
        panel.axhline(JUMP, color="#999999", linewidth=0.6, linestyle=":")
        panel.set_title(_name(having(records, what="training", loss=arm)[0]).replace(", weight", "\nweight"), fontsize=9)
        panel.set_ylim(0.44, 1.01)
        _quiet(panel)
    line[0].set_ylabel("accuracy, order of the digits", fontsize=9)
    return figure


def congruence_curves(records: Sequence[Record]) -> Figure:
    """The value of each loss on validation scenes over steps, for models trained with this loss and without."""
    from matplotlib.lines import Line2D

    figure, (line,) = panels(1, len(ARMS[1:]), (2.6 * len(ARMS[1:]) + 0.6, 2.7), sharey=True)
    for panel, arm in zip(line, ARMS[1:], strict=True):
        members = having(records, what="training", loss=arm)
        value = value_name(arm, members[0]["layer"])
        for loss, colour in (("none", "#999999"), (arm, COLOURS[arm])):
            for record in having(records, what="training", loss=loss):
                panel.plot(record["curve"]["step"], record["curve"][value], color=colour, linewidth=1.0)
        panel.set_yscale("log")
        panel.set_title(f"{LABELS[arm]}, layer {members[0]['layer'] + 1}", fontsize=9)
        lines = [Line2D([], [], color="#999999"), Line2D([], [], color=COLOURS[arm])]
        panel.legend(lines, ["no loss", f"weight {members[0]['weight']:g}"], fontsize=7, frameon=False)
        _quiet(panel)
    line[0].set_ylabel("value of the loss (nats)", fontsize=9)
    return figure


def _quiet(panel: Axes) -> None:
    panel.set_xlabel("training steps", fontsize=9)
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {
    "congruence-learning": learning_curves,
    "congruence-values": congruence_curves,
}
