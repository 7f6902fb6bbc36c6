"""The records of the experiment as tables and pictures, its outcome, and the settings that the search's records choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, having, markdown, number, spread
from vlattn_lab.experiments.congruence.training import KINDS, value_name
from vlattn_lab.experiments.experiment import Record, paired_change, paired_test

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = ("cacr", "iais_singular", "iais_distributed", "relevancy")
ARMS = ("none", *LOSSES)
LABELS = {
    "untrained": "untrained",
    "none": "no loss",
    "cacr": "CACR",
    "iais_singular": "IAIS singular",
    "iais_distributed": "IAIS distributed",
    "relevancy": "relevancy",
}
COLOURS = {"cacr": "#6a4fa3", "iais_singular": "#1b7f79", "iais_distributed": "#c8702a", "relevancy": "#b03a5b"}
SCORES = ("text", "image", "group", "digit", "relation", "order")
CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6, "digit": 1 / 2, "relation": 1 / 2, "order": 1 / 2}
RISE = 1 / 3  # group score, twice chance, at which a model has begun to tell swapped pairs apart
LEVEL = 0.05  # of the test of each score, divided by the number of losses


# --- the choice of settings ---


def change(record: Record, records: Sequence[Record]) -> float:
    """What a loss adds to the group score of validation scenes, for the same seed."""
    plain = having(records, what="search", loss="none", seed=record["seed"])
    value: float = record["validation"]["group"] - plain[0]["validation"]["group"]
    return value


def best(records: Sequence[Record], loss: str) -> list[Record]:
    """A record of each setting of a loss, the best first: of those with the most seeds, which were the best with fewer, the one
    with the largest mean change."""

    def order(members: list[Record]) -> tuple[int, float]:
        return -len(members), -sum(change(record, records) for record in members) / len(members)

    return [members[0] for members in sorted(_settings(records, loss), key=order)]


def _settings(records: Sequence[Record], loss: str) -> list[list[Record]]:
    """The search's records by setting."""
    groups = grouped(having(records, what="search", loss=loss), _name)
    return list(groups.values())


# --- the outcome ---


def outcome(records: Sequence[Record]) -> str:
    """Which losses change the group score on held-out pairs, in one bold sentence."""
    plain = [record["held_out"]["group"] for record in having(records, what="training", loss="none")]
    if len(plain) < 2:
        return "**One seed allows no test.**"
    better: list[str] = []
    worse: list[str] = []
    same: list[str] = []
    for loss in LOSSES:
        trained = [record["held_out"]["group"] for record in having(records, what="training", loss=loss)]
        differences = [a - b for a, b in zip(trained, plain, strict=True)]
        clear = paired_test(differences)[1] < LEVEL / len(LOSSES)
        group = same if not clear else better if sum(differences) > 0 else worse
        group.append(f"{LABELS[loss]} ({spread(differences, sign='+')})")
    parts = [f"A gain with {', '.join(better)}." if better else "Nothing is gained with any of the four losses."]
    parts += [f"A loss of accuracy with {', '.join(worse)}."] if worse else []
    parts += [f"No difference with {', '.join(same)}."] if same else []
    return f"**{' '.join(parts)}**"


# --- tables ---


def tables(records: Sequence[Record]) -> Iterator[str]:
    search = (_room_table, _effect_table, _final_table)
    for make in (*search, _score_table, _difference_table, outcome, _rise_table, _value_table, _cost_table):
        yield make(records)


def _name(record: Record) -> str:
    loss = record["loss"]
    if loss not in LOSSES:
        return LABELS[loss]
    place = f", layer {record['layer'] + 1}, {record['direction']}" if loss in KINDS else ""
    return f"{LABELS[loss]}, weight {record['weight']:g}, {record['schedule']}{place}"


def _room_table(records: Sequence[Record]) -> str:
    room = having(records, what="room")
    rows = [(f"{record['scenes']:,}", record) for record in sorted(room, key=lambda record: record["scenes"])]
    rows.insert(1, ("as in the experiment", having(records, what="search", loss="none")[0]))
    names = ("text", "image", "group", "order")
    lines = [[name, *(f"{record['validation'][score]:.3f}" for score in names)] for name, record in rows]
    return markdown(["scenes of a training without a loss, validation", *names], lines)


def _effect_table(records: Sequence[Record]) -> str:
    lines = []
    searched = having(records, what="search", seed=having(records, what="search")[0]["seed"])
    for loss in LOSSES:
        members = having(searched, loss=loss)
        for factor in ("weight", "schedule", *(("layer", "direction") if loss in KINDS else ())):
            shown = []
            for level, ones in grouped(members, lambda record: record[factor]).items():  # noqa: B023
                mean = sum(change(record, records) for record in ones) / len(ones)
                name = level + 1 if factor == "layer" else f"{level:g}" if factor == "weight" else level
                shown.append(f"{name}: {mean:+.3f}")
            lines.append([LABELS[loss], factor, ", ".join(shown)])
    return markdown(["loss", "factor", "group, less no loss, mean over the settings"], lines, words=(0, 1, 2))


def _final_table(records: Sequence[Record]) -> str:
    lines = []
    for loss in LOSSES:
        settings = sorted(_settings(records, loss), key=len, reverse=True)
        above = sum(change(members[0], records) > 0 for members in settings)
        for members in settings:
            if len(members) == len(settings[0]):
                mark = " (chosen)" if members[0] == best(records, loss)[0] else ""
                changes = [change(record, records) for record in members]
                lines.append([_name(members[0]) + mark, *(f"{x:+.3f}" for x in changes), f"{above} of {len(settings)}"])
    seeds = dict.fromkeys(record["seed"] for record in having(records, what="search"))
    head = ["group, less no loss, validation", *(f"seed {seed}" for seed in seeds), "settings above no loss, first seed"]
    return markdown(head, lines)


def _score_table(records: Sequence[Record]) -> str:
    lines = [["chance", *(f"{CHANCE[score]:.3f}" for score in SCORES)]]
    for arm in ("untrained", *ARMS):
        members = having(records, what="training", loss=arm)
        lines.append([_name(members[0]), *(spread([record["held_out"][score] for record in members]) for score in SCORES)])
    return markdown(["held-out pairs, test scans", *SCORES], lines)


def _difference_table(records: Sequence[Record]) -> str:
    plain, lines = having(records, what="training", loss="none"), []
    for arm in LOSSES:
        members = having(records, what="training", loss=arm)
        for pairs, label in (("held_out", "held-out pairs"), ("seen", "pairs seen in training")):
            values = ([[record[pairs][score] for record in group] for group in (members, plain)] for score in SCORES)
            changes = (paired_change(trained, without) for trained, without in values)
            lines.append([f"{LABELS[arm]}, {label}", *(f"{mean} (p {p})" for mean, p in changes)])
    return markdown(["less no loss", *SCORES], lines)


def rise(record: Record) -> float:
    """The first step with a group score of RISE on validation scenes; the last step of a training without."""
    curve = record["curve"]
    steps = [step for step, group in zip(curve["step"], curve["group"], strict=True) if group >= RISE]
    found: float = steps[0] if steps else curve["step"][-1]
    return found


def _rise_table(records: Sequence[Record]) -> str:
    lines, plain = [], [rise(record) for record in having(records, what="training", loss="none")]
    for arm in ARMS:
        members = having(records, what="training", loss=arm)
        steps = [rise(record) for record in members]
        rose = sum(max(record["curve"]["group"]) >= RISE for record in members)
        less = ("", "") if arm == "none" else paired_change(steps, plain, ",.0f")
        lines.append([_name(members[0]), spread(steps, ",.0f"), f"{rose} of {len(members)}", *less])
    return markdown(["validation", "step at which group is 1/3", "reached", "less no loss", "p"], lines)


def _value_table(records: Sequence[Record]) -> str:
    lines = []
    for arm in KINDS:
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
    """The group score over steps, a line a seed."""
    figure, (line,) = panels(1, len(LOSSES), (2.6 * len(LOSSES) + 0.6, 2.7), sharey=True)
    for panel, arm in zip(line, LOSSES, strict=True):
        for loss, colour, width in (("none", "#bbbbbb", 0.8), (arm, COLOURS[arm], 1.1)):
            for record in having(records, what="training", loss=loss):
                panel.plot(record["curve"]["step"], record["curve"]["group"], color=colour, linewidth=width)
        panel.axhline(CHANCE["group"], color="#999999", linewidth=0.6, linestyle=":")
        panel.set_title(_name(having(records, what="training", loss=arm)[0]).replace(", weight", "\nweight"), fontsize=9)
        panel.set_ylim(0.0, 1.0)
        _quiet(panel)
    line[0].set_ylabel("group score, validation", fontsize=9)
    return figure


def congruence_curves(records: Sequence[Record]) -> Figure:
    """The value of each loss on validation scenes over steps, for models trained with this loss and without."""
    from matplotlib.lines import Line2D

    figure, (line,) = panels(1, len(KINDS), (2.6 * len(KINDS) + 0.6, 2.7), sharey=True)
    for panel, arm in zip(line, KINDS, strict=True):
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
