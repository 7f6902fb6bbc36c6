"""`load_explanations`: reads the results of a run over a dataset, item by item, and gives tables and pages of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vlattn_fast._ground.checks import check_integer, check_writable
from vlattn_fast._ground.extras import extra, with_progress
from vlattn_fast.interpret.dataset.failures import summary
from vlattn_fast.interpret.dataset.gallery import gallery
from vlattn_fast.interpret.dataset.pieces import unpack
from vlattn_fast.interpret.dataset.store import SHARDS, read_settings, stored_items
from vlattn_fast.interpret.result.explanation import Explanation
from vlattn_fast.interpret.result.figures.page import Page
from vlattn_fast.interpret.result.figures.scale import RELEVANCY

if TYPE_CHECKING:
    import pandas as pd


class _Entry(NamedTuple):
    """Where an explanation is stored."""

    item: int
    id: str
    shard: str
    image: str | None  # the path of its image


class Explanations(Sequence[Explanation]):
    """A lazy sequence of explanations, each read on access.

    Attributes:
        ids: the id of each explanation, in the order of the dataset.
        images: the path of each explanation's image; None without one, or if the data set itself holds it.
        failures: the inputs that failed and are missing: dicts with item, id, image, text and error.
        settings: the options of the run.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], entries: list[_Entry], failures: list[Any]) -> None:
        self.directory, self.settings, self.failures = directory, settings, failures
        self._entries = entries
        self._opened: tuple[str, Any, Any] | None = None  # name, file and metadata of the shard that was read last

    @property
    def ids(self) -> list[str]:
        return [entry.id for entry in self._entries]

    @property
    def images(self) -> list[str | None]:
        return [entry.image for entry in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        """The explanation at `index`; for a slice, a lazy sequence."""
        if isinstance(index, slice):
            return Explanations(self.directory, self.settings, self._entries[index], self.failures)
        with extra("explain"):
            from safetensors import SafetensorError, safe_open

        item, _, name, _ = self._entries[index]
        path = self.directory / SHARDS / f"{name}.safetensors"
        try:
            if self._opened is None or self._opened[0] != name:
                opened = safe_open(path, framework="pt")
                self._opened = name, opened, opened.metadata()
            _, shard, metadata = self._opened
            return unpack(json.loads(metadata[str(item)]), lambda place: shard.get_tensor(f"{item}/{place}"))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:  # damaged since this folder was read
            raise _broken(self.directory, f"{path} cannot be read ({error})") from error

    def to_pandas(self) -> pd.DataFrame:
        """Returns a data frame with a line per entry of every explanation: its id, and the columns of `Explanation.to_pandas`."""
        with extra("tables"):
            import pandas as pd
        frames = [one.to_pandas() for one in with_progress(self, "reading")]
        for frame, identity in zip(frames, self.ids, strict=True):
            frame.insert(0, "id", identity)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame({"id": []})

    def mean_map(self) -> Tensor:
        """Returns the mean (h, w) of all maps in float64: what the model looks at in any image. Maps of an answer's words add up.

        Raises:
            ValueError: no explanation has a map, or their grids differ.
        """
        total, count, grid = torch.zeros(()), 0, None
        for identity, explanation in zip(self.ids, with_progress(self, "reading", leave=False), strict=True):
            for part in explanation.image if explanation.image is not None else ():
                single = (part.sum(0) if part.ndim > 2 else part).double()
                if grid is not None and single.shape != grid:
                    raise ValueError(
                        f"mean_map needs maps of one grid; got {tuple(grid)} and {tuple(single.shape)}, of {identity!r}. Take a "
                        "slice of one shape"
                    )
                total, count, grid = total + single, count + 1, single.shape
        if not count:
            raise ValueError(f"mean_map needs explanations with maps; got none among {len(self)}")
        return total / count

    def failure_summary(self) -> list[dict[str, Any]]:
        """Returns how many inputs failed, by reason, the most frequent first: dicts of "error", "count" and the first five "ids".
        Messages that differ only in names and numbers are one reason."""
        return summary(self.failures)

    def to_html(
        self, *, processor: Any = None, limit: int | None = 200, title: str = "Explanations", cmap: str = RELEVANCY
    ) -> Page:
        """Returns a gallery, one self-contained page: a thumbnail of each photo under its map, its words and score; the mean map;
        what failed, by reason. Photos are read again from their paths.

        Args:
            processor: the model's processor, to find the part of a photo that the model sees; see `Explanation.plot`.
            limit: shows only the first `limit` explanations; None = all, of about 15 kB each.
            title: heading of the page.
            cmap: a matplotlib colormap, by its name.
        """
        if limit is not None:
            check_integer("limit", limit, low=0)
        with extra("viz"):
            return gallery(self, processor, limit, title, cmap)

    def save_html(self, path: str | Path, **options: Any) -> Path:
        """Writes the gallery of `to_html`, with the same options, to `path`."""
        check_writable("path", Path(path))
        Path(path).write_text(self.to_html(**options), encoding="utf-8")
        return Path(path)

    def __repr__(self) -> str:
        return f"Explanations({str(self.directory)!r}, {len(self)} explanations, {len(self.failures)} failures)"


def load_explanations(directory: str | Path) -> Explanations:
    """Loads the explanations that `explain_dataset` or `vlattn explain --dataset FILE --out DIR` wrote, also during the run.

    Examples:
        >>> explanations = va.load_explanations("maps")  # doctest: +SKIP
        >>> explanations.save_html("gallery.html")  # doctest: +SKIP

    Args:
        directory: DIR.

    Returns:
        A lazy sequence of `Explanation` in the order of the dataset, named by `ids`. Each is read on access. `failures` lists the
        inputs that failed, which are missing.

    Raises:
        ValueError: no such run wrote `directory`; one of its shards is truncated, damaged or missing.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    if settings is None:
        raise ValueError(f"directory must be one that `vlattn explain --dataset` wrote; got {directory}")
    items, failures = stored_items(directory, lambda fault: _broken(directory, fault))
    entries = [_Entry(line["item"], line["id"], name, line.get("image")) for name, line in items]
    return Explanations(directory, settings, entries, failures)


def _broken(directory: Path, fault: str) -> ValueError:
    return ValueError(
        f"directory must have whole shards; got {directory}: {fault}. `vlattn explain --dataset` with the options of "
        "its settings.json explains these inputs again"
    )
