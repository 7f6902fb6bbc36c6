"""The attention calls of a tower in their order, and the numbers of its layers."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from torch import nn

from vlattn_fast.attach.session import in_layers, layers_of, split_path
from vlattn_fast.interpret.relevancy.traced_call import TracedCall

TOKENWISE = ("mlp", "moe")  # kinds of layers whose tokens do not reach one another, as layers of Nemotron-H say of themselves


class LayerNumbers:
    """Counts blocks: all calls in one part of a list of layers are of one layer. Parts of the list that mix no tokens count as
    well, and so do those of a listed list that do not run: the number is the part's index if a tower has one list.

    Args:
        model: the whole model.
        listed: the lists of layers that the tower's adapter names.
        ran: the paths of the modules that have run.
    """

    def __init__(self, model: nn.Module, listed: Collection[str], ran: Collection[str]) -> None:
        self._model, self._listed, self._ran = model, listed, ran
        self.last = -1  # the number of the last layer that called attention, from 0
        self._paths: list[str] = []  # the modules in it that did
        self._crossed = False  # the last of them attended to another tower

    def enter(self, path: str, crosses: bool) -> int:
        """The number of the layer of the next call. Self-attention and cross-attention in one part of a list of layers are in one
        layer, even in separate lists, such as in T5."""
        before = self._paths[-1] if self._paths else None
        same = before is not None and path not in self._paths
        if same and before is not None and split_path(before) != split_path(path):
            same = crosses != self._crossed and in_layers(_common(before, path))
        if same:
            self._paths.append(path)
        else:
            self.last += 1 + self._without_call(before, path)
            self._paths = [path]
        self._crossed = crosses
        return self.last

    def _without_call(self, before: str | None, path: str) -> int:
        """How many layers lie between that of the last call and that of `path` in its list."""
        if not in_layers(path):
            return 0
        layers, index = split_path(path)
        last, number = ("", -1) if before is None else split_path(before)
        parts = list(self._model.get_submodule(layers).named_children())[number + 1 if last == layers else 0 : index]
        listed = layers in self._listed
        return sum(
            getattr(part, "block_type", None) in TOKENWISE or (listed and ".".join(filter(None, (layers, name))) not in self._ran)
            for name, part in parts
        )


class CallOrder:
    """The attention calls of one tower, in the order in which they ran: their modules, layers and numbers."""

    def __init__(self) -> None:
        self.lists: list[str] = []  # lists of layers, in the order in which they ran
        self.paths: list[str] = []  # modules that called attention, in this order, too
        self.run = 0  # of the module that called attention last
        self.queries = 0  # of that call, over the whole batch
        self.last: int | None = None  # the number of the last call among all of the run
        self.came_through = 0  # the calls that its queries came through, as bits
        self.mixes = False  # it was a recurrence
        self.chunked = False  # some call takes a further part of a sequence
        self._whole = 0  # calls that do not

    @property
    def path(self) -> str | None:
        """The module that called attention last."""
        return self.paths[-1] if self.paths else None

    def enter(self, path: str, number: int, chunk: bool) -> bool:
        """Takes a call in; returns whether it has tokens of the tower that are not counted yet."""
        if layers_of(path) not in self.lists:
            self.lists.append(layers_of(path))
        is_new = not self.paths or (chunk and self._whole == 1)
        self._whole += not chunk
        self.chunked = self.chunked or chunk
        self.paths.append(path)
        self.last = number
        return is_new

    def is_parallel(self, call: TracedCall) -> bool:
        """Whether a call and the last one are the attention and the recurrence of one layer, over the same tokens, as in
        Falcon-H1, which adds their outputs."""
        if self.last is None or self.path is None or call.calls >> self.last & 1 or call.calls != self.came_through:
            return False
        return call.is_mixing != self.mixes and split_path(self.path) == split_path(call.path)


def _common(one: str, another: str) -> str:
    """The modules around both paths."""
    pairs = zip(one.split("."), another.split("."), strict=False)
    return ".".join(part for part, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
