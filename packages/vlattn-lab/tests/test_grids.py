"""Grids: what the statements say is solved here from words and objects, without the package's own paths."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from vlattn_lab.grids import CELLS, COLOURS, CUES, FILLERS, SHAPES, SIZES, STEPS, grid_regions, grid_statements, paint_grids
from vlattn_lab.scenes import batches, joined, select

STEP_TO = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # from an object to what is there
RGB = {"red": (1.0, 0.0, 0.0), "green": (0.0, 0.8, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}


def objects_of(grids, number):
    """(column, row) -> (shape, colour, size)"""
    names = {}
    for cell, (shape, colour, size) in enumerate(grids.objects[number].tolist()):
        if shape >= 0:
            names[cell % 4, cell // 4] = SHAPES[shape], COLOURS[colour], SIZES[size]
    return names


def solved(statement, objects):
    """The colour that a statement ends in, and the places that it names, the last object first; None if an object is missing."""
    words = statement.split()
    words = words[: words.index("is")]
    parts = " ".join(words).split("the ")[1:]  # "disc left of ", ..., "large red square"
    place, *more = [place for place, object_ in objects.items() if set(parts[-1].split()) <= set(object_)]
    assert not more, "the last object is the only one of its kind"
    places = [place]
    for part in reversed(parts[:-1]):
        shape, relation, *_ = part.split()
        move = STEP_TO[relation]
        place = place[0] + move[0], place[1] + move[1]
        if objects.get(place, (None,))[0] != shape:
            return None, places
        places.append(place)
    return objects[place][1], places


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("cue", [None, *CUES])
@pytest.mark.parametrize("steps", STEPS)
def test_the_named_objects_decide_the_colour(steps, cue, told):
    grids = grid_statements(40, steps=steps, cue=cue, told=told, seed=3)
    for number, (statement, answer) in enumerate(zip(grids.statements, grids.answers, strict=True)):
        colour, places = solved(statement, objects_of(grids, number))
        assert colour == answer == COLOURS[grids.label[number]] and len(places) == steps + 1
        deciding = grids.deciding[number].nonzero()[:, 0].tolist()
        assert sorted(row * 4 + column for column, row in places) == deciding
    removed = grids.without(grids.deciding)
    assert torch.equal(removed.objects[~grids.deciding[:, :CELLS]], grids.objects[~grids.deciding[:, :CELLS]])
    assert all(not set(objects_of(removed, n)) & set(solved(s, objects_of(grids, n))[1]) for n, s in enumerate(grids.statements))


def cue_of(grids, number, cue):
    """The number of the colour that a cue names; None = it names none."""
    objects = objects_of(grids, number)
    if cue == "frame":
        return int(grids.frame[number])
    if cue == "word":
        return FILLERS.index(grids.statements[number].split()[-1])
    asked = grids.statements[number].split()[1]
    colours = [colour for shape, colour, _ in objects.values() if shape == asked]
    return COLOURS.index(colours[0]) if len(colours) == 1 else None


@pytest.mark.parametrize("cue", CUES)
def test_a_told_cue_tells_the_answer_and_another_one_does_not(cue):
    told, plain = (grid_statements(400, steps=2, cue=cue, told=told, seed=5) for told in (True, False))
    assert [cue_of(told, n, cue) for n in range(400)] == told.label.tolist()
    right = sum(cue_of(plain, n, cue) == label for n, label in enumerate(plain.label.tolist())) / 400
    assert right < 0.33, "one in four by chance, 0 for a lone object"  # 3.7 standard deviations above 1/4
    assert max(Counter(told.answers).values()) < 140 and max(Counter(plain.answers).values()) < 140


def test_without_a_cue_words_alone_and_shapes_alone_do_not_tell_the_answer():
    grids = grid_statements(600, steps=1, seed=7)
    assert (grids.frame == -1).all() and all(statement.endswith(" is") for statement in grids.statements)
    hits = named = 0
    for number, statement in enumerate(grids.statements):
        objects = objects_of(grids, number)
        colours = [colour for shape, colour, _ in objects.values() if shape == statement.split()[1]]
        assert len(set(colours)) >= 3  # the object and two others, each of another colour
        most = Counter(colours).most_common(1)[0][0]
        hits += most == grids.answers[number]
        named += statement.split()[-3] == grids.answers[number]
    assert hits / 600 < 0.45 and named / 600 < 0.31


def test_images_show_the_objects_and_the_frame():
    grids = grid_statements(30, cue="frame", seed=1)
    looks = {}
    for number in range(30):
        objects = objects_of(grids, number)
        inner = grids.images[number, :, 8:40, 8:40]
        for column in range(4):
            for row in range(4):
                pixels = inner[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                drawn = pixels.any(0)
                if (column, row) not in objects:
                    assert not drawn.any()
                    continue
                shape, colour, size = objects[column, row]
                assert torch.equal(pixels[:, drawn].T.unique(dim=0), torch.tensor([RGB[colour]]))
                looks.setdefault((shape, size), drawn)
                assert torch.equal(looks[shape, size], drawn)
        ring = grids.images[number].clone()
        ring[:, 8:40, 8:40] = torch.tensor(RGB[COLOURS[grids.frame[number]]])[:, None, None]
        assert torch.equal(ring.flatten(1).T.unique(dim=0), torch.tensor([RGB[COLOURS[grids.frame[number]]]]))
    assert len(looks) == 8 and len({tuple(look.flatten().tolist()) for look in looks.values()}) == 8
    small = {shape: int(looks[shape, "small"].sum()) for shape in SHAPES}
    assert all(small[shape] < int(looks[shape, "large"].sum()) for shape in SHAPES)
    grey = grids.without(torch.zeros(30, CELLS + 1, dtype=torch.bool).index_fill(1, torch.tensor([CELLS]), True))
    assert torch.equal(grey.images[..., 8:40, 8:40], grids.images[..., 8:40, 8:40]) and (grey.images[:, :, 0, 0] == 0.4).all()
    assert torch.equal(paint_grids(grids.objects, grids.frame), grids.images)


def test_regions_are_the_cells_and_the_frame():
    grids = grid_statements(5, cue="frame", seed=2)
    regions = grid_regions(grids.images)
    assert regions["region_features"].shape == (5, 17, 192) and regions["region_positions"].shape == (5, 17, 9)
    for cell in (0, 6, 15):
        row, column = divmod(cell, 4)
        pixels = grids.images[:, :, 8 + 8 * row : 16 + 8 * row, 8 + 8 * column : 16 + 8 * column]
        assert torch.equal(regions["region_features"][:, cell], pixels.flatten(1))
        assert regions["region_positions"][0, cell].nonzero()[:, 0].tolist() == [row, 4 + column]
    assert regions["region_positions"][0, 16].nonzero()[:, 0].tolist() == [8]
    assert torch.equal(regions["region_features"][:, 16], grids.images[:, :, :8, :8].flatten(1))


def test_the_same_arguments_give_the_same_grids_and_wrong_ones_an_error():
    state = torch.get_rng_state()
    one, two, other = (grid_statements(20, steps=3, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state()), "the global generator was used"
    assert one.statements == two.statements != other.statements and torch.equal(one.images, two.images)
    parts = joined([*batches(one, 6)])
    assert parts.statements == one.statements and torch.equal(parts.objects, one.objects)
    assert select(one, [3]).answers == (one.answers[3],)
    for wrong in ({"steps": -1}, {"steps": 4}, {"cue": "size"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            grid_statements(3, **wrong)
    with pytest.raises(ValueError, match="count"):
        grid_statements(0)
