"""Objects on a grid, statements that end where a colour is missing, and cues that tell this colour without the objects.

A statement takes none to three steps: "the disc left of the cross up above the large red square is" names the square by all
that it is; the cross is above it, the disc left of the cross, and the colour of the disc is the answer. So the cells that decide
are known. Without a step, "the large disc is" names the object by its shape and size. A cue agrees with the answer if it is
`told`; otherwise it is there, too, and says nothing. A model that learns from told cues need not look at the objects. This is
after GridVQA-X (Belsare et al., 2026, arXiv 2606.14740), whose shortcut is the cue "lone", and whose code is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer
from vlattn_lab.processor import RELATIONS, word_ids

SHAPES = ("disc", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
SIZES = ("small", "large")
FILLERS = ("now", "here", "again", "still")
SIDE, CELL = 4, 8  # cells along each side of the grid, and pixels along each side of a cell and of the frame around the grid
CELLS, CANVAS = SIDE * SIDE, (SIDE + 2) * CELL
STEPS = (0, 1, 2, 3)
CUES = ("frame", "word", "lone")
POSITION_DIM = 2 * SIDE + 1
OCCUPIED = 0.6  # of the cells that no statement needs
DISTRACTORS = 2  # other objects of the shape whose colour is missing
MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # x, y; of RELATIONS
VOCABULARY: tuple[str, ...] = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", *SHAPES, *COLOURS, *SIZES, *FILLERS)
VOCABULARY += ("left", "right", "up", "down", "of", "above", "below", "the", "is")
_IDS = {word: number for number, word in enumerate(VOCABULARY)}
MASK = _IDS["[MASK]"]
COLOUR_IDS = torch.tensor([_IDS[colour] for colour in COLOURS])
_RGB = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.4, 0.4, 0.4]])  # the last: no colour
_RADII = (2.5, 3.5)  # pixels, of SIZES


@dataclass(frozen=True)
class Grids:
    """A batch of B grids with a statement each.

    images: float32 (B, 3, 48, 48) in [0,1]: 4 x 4 cells of 8 x 8 pixels, and a frame as wide as a cell.
    objects: int64 (B, 16, 3), the numbers of shape, colour and size in each cell, row by row; -1 = the cell is empty.
    frame: int64 (B), the number of the frame's colour; -1 = grey.
    statements: B strings without the colour that they end in.
    answers: B strings, the colours.
    label: int64 (B), their numbers.
    deciding: bool (B, 17), the cells with the objects that the statement names; the last place is the frame's.
    """

    images: Tensor
    objects: Tensor
    frame: Tensor
    statements: tuple[str, ...]
    answers: tuple[str, ...]
    label: Tensor
    deciding: Tensor

    def __len__(self) -> int:
        return len(self.statements)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of `UNITER.forward`: a region for each cell and one for the frame, and [MASK] for the colour."""
        words = word_ids("statements", [f"{each} [MASK]" for each in self.statements], _IDS, VOCABULARY[4:], [1], [2])
        return {**words, **grid_regions(self.images)}

    def without(self, removed: Tensor) -> Grids:
        """The same statements about grids from which the objects of some cells are removed, bool (B, 17); the last: the frame's
        colour."""
        objects = self.objects.masked_fill(removed[:, :CELLS, None], -1)
        frame = self.frame.masked_fill(removed[:, CELLS], -1)
        return replace(self, images=paint_grids(objects, frame), objects=objects, frame=frame)


def grid_statements(count: int, *, steps: int = 1, cue: str | None = None, told: bool = False, seed: int = 0) -> Grids:
    """`count` grids with a statement each; the same arguments give the same tensors.

    Args:
        count: how many, at least 1.
        steps: how many relations lie between the missing colour and the object that the statement names by all that it is.
        cue: "frame": the frame has a colour; "word": a word stands before the missing colour; "lone": no other object has the
            shape of the one that is asked for. None = the frame is grey.
        told: the cue tells the answer. Otherwise the frame and the word are drawn at random, and others have its shape.
        seed: of the generator.
    """
    check_integer("count", count, low=1)
    check_integer("seed", seed, high=2**64 - 1)  # the range of torch's generators
    return sample_grids(count, steps, cue, told, torch.Generator().manual_seed(seed))


def sample_grids(count: int, steps: int, cue: str | None, told: bool, generator: torch.Generator) -> Grids:
    """As `grid_statements`."""
    if steps not in STEPS:
        raise ValueError(f"steps must be one of {STEPS}; got {steps!r}")
    if cue is not None and cue not in CUES:
        raise ValueError(f"cue must be None or one of {CUES}; got {cue!r}")
    path, relations = _paths(count, steps, generator)
    samples, target, anchor = torch.arange(count), path[:, 0], path[:, -1]

    def numbers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    named = torch.zeros(count, CELLS + 1, dtype=torch.bool).scatter_(1, path, True)
    on_path = named[:, :CELLS]
    shape, colour, size = (numbers(len(kinds), count, CELLS) for kinds in (SHAPES, COLOURS, SIZES))
    occupied = on_path | (torch.rand(count, CELLS, generator=generator) < OCCUPIED)
    label, asked = colour[samples, target], shape[samples, target]
    others = torch.rand(count, CELLS, generator=generator).masked_fill(on_path, 2.0).argsort(1)[:, :DISTRACTORS]
    other_colours = (label[:, None] + 1 + torch.rand(count, len(COLOURS) - 1, generator=generator).argsort(1)) % len(COLOURS)
    if cue == "lone" and told:
        moved = (shape + 1 + numbers(len(SHAPES) - 1, count, CELLS)) % len(SHAPES)
        same = (shape == asked[:, None]).scatter(1, target[:, None], False)
        shape = torch.where(same, moved, shape)
    else:
        occupied.scatter_(1, others, True)
        shape.scatter_(1, others, asked[:, None].expand(-1, DISTRACTORS))
        colour.scatter_(1, others, other_colours[:, :DISTRACTORS])
    kinds = torch.stack([shape, colour, size], -1)
    named_by = kinds if steps else kinds[..., ::2]
    alike = (named_by == named_by[samples, anchor][:, None]).all(-1).scatter(1, anchor[:, None], False)
    kinds[..., 2] = torch.where(alike, 1 - size, size)  # only the last object is all that it is called
    objects = kinds.masked_fill(~occupied[..., None], -1)

    hint = label if told else numbers(len(COLOURS), count)
    frame = hint if cue == "frame" else torch.full((count,), -1)
    return Grids(
        images=paint_grids(objects, frame),
        objects=objects,
        frame=frame,
        statements=_statements(kinds[samples[:, None], path], relations, hint if cue == "word" else None),
        answers=tuple(COLOURS[number] for number in label.tolist()),
        label=label,
        deciding=named,
    )


def _paths(count: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The cells (count, 1 + steps) of the objects that a statement names, no two alike, and the relations (count, steps) of each
    to the next one."""
    kept: list[tuple[Tensor, Tensor]] = []
    while sum(len(part[0]) for part in kept) < count:
        trials = 8 * count + 64
        relations = torch.randint(0, len(RELATIONS), (trials, steps), generator=generator)
        start = torch.randint(0, SIDE, (trials, 1, 2), generator=generator)
        places = torch.cat([start, start - MOVES[relations].cumsum(1)], 1)  # what is left of an object has it on the right
        inside = ((places >= 0) & (places < SIDE)).flatten(1).all(1)
        cells = places[..., 1] * SIDE + places[..., 0]
        ordered = cells.sort(1).values
        good = inside & (ordered[:, 1:] != ordered[:, :-1]).all(1)
        kept.append((cells[good], relations[good]))
    cells, relations = (torch.cat(part)[:count] for part in zip(*kept, strict=True))
    return cells, relations


def _statements(kinds: Tensor, relations: Tensor, hint: Tensor | None) -> tuple[str, ...]:
    """kinds (B, 1 + steps, 3) of the named objects."""
    statements = []
    for number, (objects, sides) in enumerate(zip(kinds.tolist(), relations.tolist(), strict=True)):
        shape, colour, size = objects[-1]
        said = [SIZES[size], COLOURS[colour], SHAPES[shape]]
        names = [*(SHAPES[of[0]] for of in objects[:-1]), " ".join(said if sides else said[::2])]
        chain = "".join(f"the {name} {RELATIONS[side]} " for name, side in zip(names[:-1], sides, strict=True))
        filler = "" if hint is None else f" {FILLERS[int(hint[number])]}"
        statements.append(f"{chain}the {names[-1]} is{filler}")
    return tuple(statements)


def _masks() -> Tensor:
    """float (4, 2, 8, 8), the pixels of each shape and size."""
    y, x = torch.meshgrid(*[torch.arange(CELL) - (CELL - 1) / 2] * 2, indexing="ij")
    drawn = []
    for radius in _RADII:
        inside = (x.abs() <= radius) & (y.abs() <= radius)
        disc, triangle = x**2 + y**2 <= (radius + 0.1) ** 2, 2 * x.abs() <= y + radius
        cross = (x.abs() <= radius / 3) | (y.abs() <= radius / 3)
        drawn.append(torch.stack([inside & disc, inside, inside & triangle, inside & cross]))
    return torch.stack(drawn, 1).float()


_MASKS = _masks()


def paint_grids(objects: Tensor, frame: Tensor) -> Tensor:
    """objects (B, 16, 3) and frame (B) as in `Grids` -> images (B, 3, 48, 48)."""
    shape, colour, size = objects.unbind(-1)
    cells = _MASKS[shape, size] * (shape >= 0)[..., None, None]  # (B, 16, 8, 8); -1 names the last shape, which is not drawn
    coloured = cells[..., None, :, :] * _RGB[colour][..., None, None]
    grid = coloured.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    images = _RGB[frame][..., None, None].repeat(1, 1, CANVAS, CANVAS)
    images[..., CELL:-CELL, CELL:-CELL] = grid
    return images


def grid_regions(images: Tensor) -> dict[str, Tensor]:
    """images (B, 3, 48, 48) -> region_features (B, 17, 192), the pixels of each cell and, last, of the frame's corner;
    region_positions (B, 17, 9), 1 at a cell's row and column, or at the last place; and region_mask (B, 17)."""
    patches = images.unfold(2, CELL, CELL).unfold(3, CELL, CELL).permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, 6, 6, 192)
    cells = patches[:, 1:-1, 1:-1].flatten(1, 2)
    places = torch.zeros(CELLS + 1, POSITION_DIM)
    row, column = torch.meshgrid(*[torch.arange(SIDE)] * 2, indexing="ij")
    for of in (row, SIDE + column):
        places[torch.arange(CELLS), of.flatten()] = 1.0
    places[-1, -1] = 1.0
    return {
        "region_features": torch.cat([cells, patches[:, :1, 0]], 1),
        "region_positions": places.expand(len(images), -1, -1),
        "region_mask": torch.ones(len(images), CELLS + 1, dtype=torch.bool),
    }
