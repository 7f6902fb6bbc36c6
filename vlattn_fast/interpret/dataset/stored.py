"""`load_explanations`: reads the results of a run over a dataset, item by item."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlattn_fast._ground.extras import extra
from vlattn_fast.interpret.dataset.pieces import unpack
from vlattn_fast.interpret.dataset.store import SHARDS, finished, read_settings
from vlattn_fast.interpret.result.explanation import Explanation


class Explanations(Sequence[Explanation]):
    """A lazy sequence, which reads an explanation on access.

    Args:
        ids: the id of each explanation, in the order of the dataset.
        failures: the inputs that failed and are missing: dicts with item, id, image, text and error.
        settings: the options of the run.
    """

    def __init__(
        self, directory: Path, settings: dict[str, Any], entries: list[tuple[int, str, str]], failures: list[Any]
    ) -> None:
        self.directory, self.settings, self.failures = directory, settings, failures
        self._entries = entries
        self._opened: tuple[str, Any, Any] | None = None  # name, file and facts of the shard that was read last

    @property
    def ids(self) -> list[str]:
        return [identity for _, identity, _ in self._entries]

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        """The explanation at `index`; for a slice, a lazy sequence."""
        if isinstance(index, slice):
            return Explanations(self.directory, self.settings, self._entries[index], self.failures)
        with extra("explain"):
            from safetensors import SafetensorError, safe_open

        item, _, name = self._entries[index]
        if self._opened is None or self._opened[0] != name:
            path = self.directory / SHARDS / f"{name}.safetensors"
            try:
                opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _broken(self.directory, f"{path} cannot be read ({error})") from error
            self._opened = name, opened, opened.metadata()
        _, shard, facts = self._opened
        return unpack(json.loads(facts[str(item)]), lambda place: shard.get_tensor(f"{item}/{place}"))

    def __repr__(self) -> str:
        return f"Explanations({str(self.directory)!r}, {len(self)} explanations, {len(self.failures)} failures)"


def load_explanations(directory: str | Path) -> Explanations:
    """The explanations that `vlattn explain --dataset FILE --out DIR` wrote, also during the run.

    Args:
        directory: DIR.

    Returns:
        A lazy sequence of `Explanation` in the order of the dataset, named by `ids`. `failures` lists the failed, missing inputs.

    Raises:
        ValueError: no such run wrote `directory`; one of its shards is truncated or missing.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    if settings is None:
        raise ValueError(f"directory must be one that `vlattn explain --dataset` wrote; got {directory}")
    entries: dict[int, tuple[int, str, str]] = {}
    failures: dict[int, dict[str, Any]] = {}
    for name, lines, fault in finished(directory):
        if fault is not None:
            raise _broken(directory, fault)
        for line in lines:
            if "error" in line:
                failures[line["item"]] = line
            else:
                entries.setdefault(line["item"], (line["item"], line["id"], name))
    missing = [failures[item] for item in sorted(failures) if item not in entries]
    return Explanations(directory, settings, [entries[item] for item in sorted(entries)], missing)


def _broken(directory: Path, fault: str) -> ValueError:
    return ValueError(
        f"directory must have whole shards; got {directory}, where {fault}. `vlattn explain --dataset` with the options of "
        "its settings.json explains these inputs anew"
    )
