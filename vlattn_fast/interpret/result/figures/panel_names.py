"""The names of the panels of a sample: which map is the thumbnail of a photo, and which are its tiles."""

from __future__ import annotations

from collections.abc import Sequence

from vlattn_fast.interpret.result.numbers.choices import Patch


def panel_names(photos: Sequence[int] | None, views: Sequence[Sequence[Patch]]) -> list[str]:
    """The name of each panel of a sample, which shows these maps: "thumbnail" and "tiles" of a photo that has both, else its
    number among them; "" for a single panel. `photos`: see `Explanation`."""
    if len(views) < 2:
        return [""] * len(views)
    names = [f"map {number} of {len(views)}" for number in range(1, len(views) + 1)]
    if photos is None or any(patch.box is not None for view in views for patch in view):  # regions
        return names
    by_photo: dict[int, list[int]] = {}
    for number, view in enumerate(views):
        by_photo.setdefault(photos[view[0].index], []).append(number)
    for count, numbers in enumerate(by_photo.values(), start=1):
        sides = [max(views[number][0].values.shape) for number in numbers]
        if len(numbers) == 2 and sides[0] != sides[1]:  # tiles have the patches of several thumbnails
            photo = f"photo {count}, " if len(by_photo) > 1 else ""
            for number, side in zip(numbers, sides, strict=True):
                names[number] = photo + ("tiles" if side == max(sides) else "thumbnail")
    return names
