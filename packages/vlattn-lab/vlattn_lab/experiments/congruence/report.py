"""The records of the experiment as tables and pictures, its outcome, and the settings that the search's records choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from vlattn_fast.measuring.figures import panels
from vlattn_fast.measuring.records import grouped, having, markdown, number, spread
from vlattn_lab.experiments.congruence.training import KINDS, value_name
from vlattn_lab.experiments.experiment import Effect, Record, dots, effects_of, less, paired_change

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSSES = (*KINDS, "hard", "relevancy", "told")
LABELS = {
    "untrained": "untrained",
    "none": "no loss",
    "cacr": "CACR",
    "cacr_as_is": "CACR, rows as they are",
    "iais_singular": "IAIS singular",
    "iais_distributed": "IAIS distributed",
    "hard": "hard negatives",
    "relevancy": "relevancy",
    "told": "told, without relevancy",
}
SCORES = ("text", "image", "group", "digit", "relation", "order")
CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6, "digit": 1 / 2, "relation": 1 / 2, "order": 1 / 2}
RISE = 1 / 3  # group score, twice chance, at which a model has begun to tell swapped pairs apart


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


def losses_of(records: Sequence[Record]) -> list[str]:
    """The losses that the records have."""
    return [loss for loss in LOSSES if having(records, loss=loss)]


def effects(records: Sequence[Record]) -> list[Effect]:
    """What each loss adds to the group score on held-out pairs, for the same seed; and relevancy to what it is told."""
    groups = {
        loss: [record["held_out"]["group"] for record in having(records, what="training", loss=loss)]
        for loss in ("none", *losses_of(records))
    }
    asked = [(loss, "none") for loss in groups if loss != "none"] + [("relevancy", "told")] * ("told" in groups)
    return effects_of([(f"{LABELS[a]} less {LABELS[b]}", "group score", less(groups[a], groups[b])) for a, b in asked])


# --- tables ---


def tables(records: Sequence[Record]) -> Iterator[str]:
    search = (_room_table, _effect_table, _final_table)
    for make in (*search, _score_table, _difference_table, _rise_table, _value_table, _cost_table):
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
    for loss in losses_of(searched):
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
    for loss in losses_of(having(records, what="search")):
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
    for arm in ("untrained", "none", *losses_of(records)):
        members = having(records, what="training", loss=arm)
        lines.append([_name(members[0]), *(spread([record["held_out"][score] for record in members]) for score in SCORES)])
    return markdown(["held-out pairs, test scans", *SCORES], lines)


def _difference_table(records: Sequence[Record]) -> str:
    plain, lines = having(records, what="training", loss="none"), []
    for arm in losses_of(records):
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
    for arm in ("none", *losses_of(records)):
        members = having(records, what="training", loss=arm)
        steps = [rise(record) for record in members]
        rose = sum(max(record["curve"]["group"]) >= RISE for record in members)
        less = ("", "") if arm == "none" else paired_change(steps, plain, ",.0f")
        lines.append([_name(members[0]), spread(steps, ",.0f"), f"{rose} of {len(members)}", *less])
    return markdown(["validation", "step at which group is 1/3", "reached", "less no loss", "p"], lines)


def _value_table(records: Sequence[Record]) -> str:
    lines = []
    for arm in (arm for arm in losses_of(records) if arm in KINDS):
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


# --- the picture ---


def scores_of_seeds(records: Sequence[Record]) -> Figure:
    """The group score on held-out pairs, a dot a seed."""
    figure, ((axis,),) = panels(1, 1, (6.4, 3.0))
    arms = ("none", *losses_of(records))
    columns = {
        LABELS[arm]: [record["held_out"]["group"] for record in having(records, what="training", loss=arm)] for arm in arms
    }
    dots(axis, columns, "#6a4fa3")
    axis.axhline(CHANCE["group"], color="#999999", linewidth=0.6, linestyle=":")
    axis.set_ylim(0.0, 1.0)
    axis.set_ylabel("group score, held-out pairs", fontsize=9)
    return figure


FIGURES: dict[str, Callable[[Sequence[Record]], Figure]] = {"congruence": scores_of_seeds}
