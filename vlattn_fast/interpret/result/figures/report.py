"""A file of JSON, and a figure with a panel for each test: shared by `Evaluation` and `ProbeReport`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from vlattn_fast._ground.checks import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

R = TypeVar("R", bound="Report")


class Report:
    """Results stored as JSON; a subclass names its `FORMAT`, and its fields are the JSON's keys."""

    FORMAT: ClassVar[str]
    metadata: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Writes everything to `path` as JSON; `load` reads it back."""
        check_writable("path", Path(path))
        whole = {
            "format": self.FORMAT,
            "metadata": self.metadata,
            **{name: value for name, value in vars(self).items() if not name.startswith("_")},
        }
        Path(path).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls: type[R], path: str | Path) -> R:
        """Reads what `save` wrote. ValueError if `path` holds something else."""
        try:
            whole = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError:
            whole = None
        if not isinstance(whole, dict) or whole.pop("format", None) != cls.FORMAT:
            raise ValueError(f"path must be a file that {cls.__name__}.save wrote ({cls.FORMAT}); got {path}")
        return cls(**whole)


def panels(count: int, most: int = 2, width: float = 3.8) -> tuple[Figure, list[Any]]:
    """A figure with `count` axes, at most `most` side by side, of `width` inches each: as wide as a page, on which it is read."""
    from matplotlib.figure import Figure

    columns = min(max(count, 1), most)
    lines = -(-max(count, 1) // columns)
    figure = Figure(figsize=(width * columns, 3.2 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]
