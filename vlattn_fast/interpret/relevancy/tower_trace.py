"""One tower during a run: which attention calls are its own, what is known of its tokens, and the carrier through its layers."""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from vlattn_fast._ground.checks import is_distributed
from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.attach.session import layers_of, named
from vlattn_fast.attach.tensor_parallel import has_dtensors, heads_mesh
from vlattn_fast.interpret.adapters.adapter import Tower
from vlattn_fast.interpret.adapters.tokens import Sounds, Tokens
from vlattn_fast.interpret.relevancy.call_order import TOKENWISE, CallOrder, LayerNumbers
from vlattn_fast.interpret.relevancy.traced_call import Recursion, Through, TracedCall
from vlattn_fast.interpret.relevancy.tracking.token_moves import TokenMoves
from vlattn_fast.interpret.relevancy.tracking.token_numbers import Numbers
from vlattn_fast.interpret.relevancy.tracking.token_positions import TokenPositions, flat_rows

_NUMBER = re.compile(r"\b\d+\b")


class Carriers:
    """The carriers of one tower, before its layers and after the last call.

    A carrier (B, 2 T, N) is passed from call to call. In the backward pass the cotangents of its first T lines are the relevancy
    vectors, carried back from the end of the tower, where they are the weights of the explained positions. Those of the other T
    lines are only the contribution of attention, zero at the end of the tower. They are carried separately, since the difference
    of both would lose its digits next to the larger entries.
    """

    def __init__(self, n_vectors: int) -> None:
        self.n_vectors = n_vectors  # T
        self.entering: list[list[Tensor]] = []  # before each layer; one tensor a chunk before the first
        self._layers: list[int] = []  # their numbers
        self.after: list[Tensor] = []  # after the last call, one a chunk
        self._before: Tensor | None = None  # before the call that runs; None = the first
        self.dtype = torch.float32
        self.without_gradients: str | None = None  # the first module that called attention in a part that turns gradients off
        self.below: Callable[[Tensor], Tensor] | None = None  # what a vision tower brings into the first carrier

    def through(self, call: TracedCall, recursion: Recursion) -> Tensor:
        """The output (B, H, N, Dv) of a self-attention call, through which the carrier goes, too."""
        if call.parallel:
            return self._through_parallel(call, recursion)
        if not call.chunk:
            self._before = self.leaving() if self.after else None
            self.after = []
            if not self._layers or call.layer != self._layers[-1]:
                self.entering.append([] if self._before is None else [self._before])
                self._layers.append(call.layer)
        if call.token_positions is not None:
            parts = [self._of_tokens(call.query)] if self._before is None and not self.after else [self._before]
            before = torch.cat([part for part in parts if part is not None] or self.entering[0], 2)
            # The keys of a further part of the sequence are as they were before the module.
            both = (flat_rows(x.to(call.query.device)) for x in (before, self.after[-1] if self.after else before))
            output, carrier = Through.apply(call.computed(), *both, call, recursion)
            self.after = []
        else:
            output, carrier = call.through(self._of_tokens(call.query), recursion)
        carrier = carrier.to(self.dtype)
        if not carrier.requires_grad and self.without_gradients is None:
            self.without_gradients = call.path
        self.after.append(carrier)
        return output

    def _through_parallel(self, call: TracedCall, recursion: Recursion) -> Tensor:
        """The output of a call over the tokens of the last one. The maps of both are added."""
        last_share, this_share = recursion.parallel
        how = recursion._replace(residual_weight=0.0, attention_weight=this_share)
        before = self.entering[0][-1] if self._before is None else self._before
        if self._before is None and self.below is not None:
            before = before + self.below(before)
        output, carrier = call.through(before.to(call.query.device, compute_dtype(call.query)), how)
        last = self.after[0] * last_share
        self.after = [last + carrier.to(last)]
        return output

    def into_probes(self, call: TracedCall, output: Tensor, recursion: Recursion) -> Tensor:
        """`output` of a pooling head's call. The carrier is that of its queries, which are learned: there is no residual term."""
        before = self.after[-1].to(call.query.device, compute_dtype(call.query))
        before = (
            before if call.token_positions is None else call.token_positions.pick(flat_rows(before), call.token_positions.keys)
        )
        how = recursion._replace(residual_weight=0.0, attention_weight=1.0)
        output, carrier = Through.apply(output, before, None, call, how)
        self.after = [carrier]
        return output

    def _of_tokens(self, query: Tensor) -> Tensor:
        """The carrier of the query's tokens, before the attention."""
        size = query.shape[2]
        if self._before is None:
            carrier = torch.zeros(
                query.shape[0], 2 * self.n_vectors, size, dtype=self.dtype, device=query.device, requires_grad=True
            )
            self.entering[0].append(carrier)
            return carrier if self.below is None else carrier + self.below(carrier)
        carrier = self._before
        if carrier.shape[2] != size:
            carrier = carrier.narrow(2, sum(out.shape[2] for out in self.after), size)
        return carrier.to(query.device, compute_dtype(query))  # layers of a model may have several devices and dtypes

    def entering_from(self, layer: int) -> list[Tensor]:
        """The carriers before the first layer from number `layer` on."""
        return self.entering[bisect_left(self._layers, layer)]

    @property
    def before(self) -> Tensor:
        """The carrier before the last call."""
        return torch.cat(self.entering[0], 2) if self._before is None else self._before

    def leaving(self) -> Tensor:
        """The carrier (B, 2 T, N) after the last layer that ran."""
        return torch.cat(self.after, 2) if len(self.after) > 1 else self.after[0]


class ScoreGradients:
    """Where the score's gradient enters one tower: the outputs of its attention calls, and the states after them."""

    def __init__(self, finds_position: bool) -> None:
        self.finds_position = finds_position  # the score's gradient names the explained position
        # Then, of each call: where a gradient enters its output, and the tokens (B, N, C) after it, with their numbers.
        self.states: list[list[tuple[GradientEdge, Numbers | None]]] = []
        self.after_pooling: GradientEdge | None = None  # and where one enters the output of the pooling head
        # Where it enters the attention of each layer; they tell whether a score depends on it.
        self._edges: list[tuple[int, GradientEdge]] = []

    def leaves_pooling(self, output: Tensor) -> Tensor:
        """Note where a gradient enters the output of the pooling head; returns it."""
        self.after_pooling = edge_at(output) if output.requires_grad else None
        return output

    def leaves_call(self, output: Tensor, chunk: bool, numbers: Numbers | None) -> None:
        """Begin the states after a call at its output; a further part of a sequence is not a call of its own."""
        if not self.finds_position:
            return
        if output.is_leaf:  # the graph begins here
            self.states.clear()
        if not chunk or not self.states:
            self.states.append([])
        if output.requires_grad:
            self.states[-1].append((edge_at(output), numbers))

    def enters(self, layer: int, output: Tensor) -> None:
        """Note that the score's gradient enters an attention call at `output`, if it has one."""
        if output.requires_grad:
            self._edges.append((layer, get_gradient_edge(output)))

    def from_layer(self, first: int) -> list[GradientEdge]:
        """Where gradients enter the attention of layer `first` and later ones."""
        return [edge for layer, edge in self._edges if layer >= first]


@dataclasses.dataclass
class ResidualSums:
    """The residual sums of one tower, for methods that weight their terms."""

    waits: bool = False  # an attention has yet to be added to the stream
    carries: bool = False  # that attention is of the tower to itself, through which the carrier goes
    unsummed: str | None = None  # the first module whose attention was never added to the stream
    branch: Tensor | None = None  # o, if something else was added to it already,
    partial: Tensor | None = None  # and their sum
    # By the number of a call: the stream and the branch (B, N, C), and the tensor that the model adds.
    terms: dict[int, tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=dict)


class TowerTrace:
    """The state of one tower during a run of `model`, of whose modules `ran` has the paths."""

    def __init__(
        self,
        entry: Tower | None,
        model: nn.Module,
        moves: TokenMoves,
        keeps: bool = False,
        ran: Collection[str] = (),
        finds_position: bool | None = None,
        n_vectors: int = 1,
        trains: bool = False,
    ) -> None:
        self.entry, self.model = entry, model  # no entry: a tower that is found
        self.keeps = keeps  # every call is cached, for rules that use them after the backward pass
        self.trains = trains  # the model trains on the same graph
        self.cached: list[Any] = []  # what the method caches for the backward pass: calls, or embeddings
        self.pool: TracedCall | None = None  # and that of the pooling head
        self.links: list[Any] = []  # the calls that give it relevancy, if towers attend to one another and each is a map
        self.sums = ResidualSums()
        self.name = "" if entry is None else entry.name
        self.hears = False  # its tokens are a sound's, in the order of time
        self.batch: int | None = None
        self.size = 0
        self.dtype, self.device = torch.float32, torch.device("cpu")  # of the carrier
        self.grid: tuple[int, int] | None = None  # rows and columns, if the tokens are the pixels of an image
        self.patches: tuple[int, int] | None = None  # rows and columns of the patches that the model cuts these pixels into
        self.attended: Tensor | None = None  # bool (B, N), False = no query of the first softmax attends to it; None = to all
        self._has_masks = False  # a call came whose masks tell which tokens are attended to
        # By module: how many of its keys are not tokens, and the share of attention that they take; None = not measured.
        self.others: dict[str, tuple[int, Tensor | None]] = {}
        self.probes: int | None = None  # queries of the pooling head; None before it ran
        self.calls, self.positions = CallOrder(), TokenPositions(moves)
        named_by_gradient = entry is None or entry.rule.by_gradient
        self.gradients = ScoreGradients(named_by_gradient if finds_position is None else finds_position)
        self.carriers = Carriers(n_vectors)  # of methods that carry relevancy through the layers
        self._has_dtensors = is_distributed() and has_dtensors(model)
        self.pooling_path: str | None = None
        if entry is not None:
            root, lists = submodule(model, entry.path, entry), self.calls.lists
            if entry.layers:
                lists += [_joined(entry.path, layers) for layers in matching(root, entry)]
            for further in entry.further:
                submodule(model, further, entry)
                lists.append(further)
            if entry.pooling is not None:
                submodule(root, entry.pooling, entry)
                self.pooling_path = _joined(entry.path, entry.pooling)
        self.numbers = LayerNumbers(model, tuple(self.calls.lists), ran)

    @property
    def layer(self) -> int:
        """The number of the last layer that ran; -1 before the first."""
        return self.numbers.last

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch or 0, self.size

    @property
    def described(self) -> str:
        """Its name, first list of layers and size."""
        return (
            f"{self.name} ({self.calls.lists[0]}: {self.size} tokens)"
            if self.calls.lists
            else f"{self.name} ({self.size} tokens)"
        )

    def tokens_in(self, inputs: Mapping[str, Any]) -> Tokens:
        """Its tokens, of the kind that the entry says, or of none."""
        if self.entry is None:
            return (Sounds if self.hears else Tokens)(inputs, self.shape, attended=self.attended)
        return self.entry.tokens_in(self.model, inputs, self.shape)

    @property
    def pooled(self) -> bool:
        """Whether the pooling head ran."""
        return self.probes is not None

    # --- which calls are this tower's ---

    def fits(self, path: str, batch: int, size: int) -> bool:
        """Whether a call with these sizes may be the next one."""
        has_size = size == self.size or self.calls.chunked or path == self.calls.path
        return self.batch is None or (self.batch == batch and has_size)

    def goes_on(self, path: str, batch: int, size: int, ids: Tensor | None) -> bool:
        """Whether a call whose query came out of this tower, with the token numbers `ids`, is the tower's next one."""
        if not self.fits(path, batch, size) and not self.positions.holds(ids):
            return False
        layers, last = layers_of(path), self.calls.lists[-1]
        if layers in self.calls.lists:
            return True
        # Layers may be in several parallel lists, or be lists themselves.
        siblings = layers.rpartition(".")[0] == last.rpartition(".")[0]
        return self.keeps and (siblings or _NUMBER.sub("*", layers) == _NUMBER.sub("*", last))

    # --- attention calls ---

    def enter(
        self, call: TracedCall, number: int, chunk: bool = False, source: bool = False, same_layer: bool = False
    ) -> TracedCall:
        """Take a call of this tower's tokens in, the run's number `number`; returns it with what the tower knows of it. `source`:
        its keys are another tower's; `same_layer`: it is of the last call's layer."""
        path, query = call.path, call.query
        if self.batch is None:
            self.batch, self.dtype, self.device = query.shape[0], compute_dtype(query), query.device
            self.carriers.dtype = self.dtype
        if not self._has_masks and not call.is_mixing:
            self._has_masks, self.attended = True, None if chunk else _attended(call)
        if not chunk and not same_layer:
            self.numbers.enter(path, source)
        if self.calls.enter(path, number, chunk):
            self.size += query.shape[2]
        key, columns = (call.query, None) if source else (call.key, call.columns)
        token_positions = self.positions.enter(call.query, key, columns, path, chunk, self.size)
        if call.parallel and (token_positions is not None or self.calls.chunked):
            raise ValueError(f"model must keep its tokens in order if a layer has two parallel mixers; got others in '{path}'")
        self.positions.end = None
        known: dict[str, Any] = {"number": number, "layer": self.layer, "chunk": chunk, "token_positions": token_positions}
        return dataclasses.replace(call, mesh=self._mesh(call), **known)

    def note_others(self, call: TracedCall, measures: bool) -> None:
        """Note the keys of a call that are not tokens; `measures` the share of attention that they take."""
        if count := call.key.shape[2] - call.tokens:
            self.others[call.path] = count, call.share_of_others() if measures else None

    def enter_pooling(self, call: TracedCall) -> TracedCall:
        """Take the call of the attention-pooling head in, whose queries are learned and no tokens."""
        if self.pooled:
            raise ValueError(f"model must call the pooling head of tower '{self.name}' once; got '{self.pooling_path}' again")
        self.probes = call.query.shape[2]
        token_positions = self.positions.pool(call.key, call.columns) if self.calls.paths else None
        return dataclasses.replace(call, mesh=self._mesh(call), token_positions=token_positions)

    def _mesh(self, call: TracedCall) -> Any:
        if not self._has_dtensors:
            return None
        heads = (call.value, call.value) if call.by_hand else (call.query, call.key)  # whose queries are maps
        return heads_mesh(self.model.get_submodule(call.path), *heads)

    def enters_gradient(self, output: Tensor) -> None:
        """Note that the score's gradient enters an attention call at `output`, if it has one."""
        self.gradients.enters(self.layer, output)

    def goes_through(self, states: Tensor) -> None:
        """Note states (B, N, C) after the last call; the score may be computed from any of them."""
        self.positions.goes_through(states)
        noted = self.gradients.states
        if noted and states.grad_fn is not None and (states.shape[:2] == self.shape or self.positions.reorders):
            noted[-1].append((edge_at(states), self.positions.numbers(states)))

    # --- after the forward pass ---

    def finish(self) -> None:
        """Counts the tokens as they entered, if the first call has them otherwise, such as in windows."""
        shape = self.positions.finish(self.entry is not None) if self.calls.paths and not self.pooled else None
        if shape is not None:
            self.batch, self.size = shape

    def check(self, called: set[str], ran: set[str]) -> None:
        """ValueError if a layer is not among the modules that `called` attention in this run; `ran` are all that ran."""
        for layers in self.calls.lists:
            children = dict(self.model.get_submodule(layers).named_children())
            kinds = {type(children[i]) for i in children if _calls(f"{layers}.{i}", called)} if self.calls.paths else set()
            for index, layer in children.items():
                path, listed = _joined(layers, index), self.entry is not None
                # Layers with only cross-attention do not run for prompts without an image.
                left_out = bool(self.calls.paths) and listed and not _calls(path, ran)
                mixes = getattr(layer, "block_type", None) not in TOKENWISE
                if (listed or type(layer) in kinds) and mixes and not left_out and not _calls(path, called):
                    raise ValueError(
                        f"no attention call was traced in layer {named(path, layer)} of tower '{self.name}'. Use "
                        "scaled_dot_product_attention or transformers' attention interface there"
                    )
        if self.pooling_path is not None and not self.pooled:
            raise ValueError(
                f"model must call the attention of the pooling head of tower '{self.name}'; got '{self.pooling_path}', which was "
                "not called"
            )

    def check_start(self, start_layer: int) -> None:
        """ValueError if there is no such layer, or no gradient reaches it."""
        if self.carriers.without_gradients is not None:
            raise ValueError(
                f"model must run tower '{self.name}' with gradients on; got attention '{self.carriers.without_gradients}' in a "
                "part that turns them off"
            )
        if not -self.layer - 1 <= start_layer <= self.layer:
            raise ValueError(
                f"start_layer must be from {-self.layer - 1} to {self.layer} for tower '{self.name}', -1 = the last layer; got "
                f"{start_layer}"
            )

    def first_layer(self, start_layer: int) -> int:
        """The number of layer `start_layer`, from the end if it is negative."""
        return self.layer + 1 + start_layer if start_layer < 0 else start_layer

    def edges(self, start_layer: int) -> list[GradientEdge]:
        """Where gradients enter the attention of layer `start_layer` and later ones."""
        return self.gradients.from_layer(self.first_layer(start_layer))


def edge_at(tensor: Tensor) -> GradientEdge:
    """Where a gradient enters a tensor that requires one, even if the model turns gradients off."""
    with torch.enable_grad():
        return get_gradient_edge(tensor)


def note_lost_gradient(paths: list[str], path: str, inputs: tuple[Any, ...], output: Any) -> None:
    """Appends `path` to `paths` if the module at `path` ends the gradient, and no module inside of it is known to do so."""
    if _ends_gradient(inputs, output) and not any(inner.startswith(f"{path}.") for inner in paths):
        paths.append(path)


def _ends_gradient(inputs: tuple[Any, ...], output: Any) -> bool:
    """Whether a gradient at the output of a module reaches none of the tokens that came in."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return False
    node = output.grad_fn
    if output.requires_grad and (node is None or not node.name().endswith("NotImplemented")):
        return False
    tokens = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad and x.shape[:-1] == output.shape[:-1]]
    return any(node is None or x.grad_fn is not node for x in tokens)  # the same node: a module that hands its input on


def begun(tower: TowerTrace, path: str, ids: Tensor | None, before: Iterable[TowerTrace]) -> TowerTrace:
    """`tower`, which begins at `path` with the tokens `ids`, after others. It cannot be explained if layers of the same list
    had only some of its tokens before: its relevancy would leave these layers out."""
    for part in before:
        if layers_of(path) in part.calls.lists and ids is not None and bool((part.positions.locate(ids) >= 0).any()):
            tower.positions.fail(
                f"model must have all tokens of a sequence in its first attention layer; got '{part.calls.paths[0]}' over "
                f"{part.size} tokens, and '{path}' over {ids.shape[1]}, which include some of these"
            )
    return tower


def submodule(module: nn.Module, path: str, tower: Tower) -> nn.Module:
    """The module at `path`; ValueError if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"model must have a module '{path}' in tower '{tower.name}'; got {type(module).__name__} without it"
        ) from error


def matching(root: nn.Module, tower: Tower) -> list[str]:
    """The lists of layers in a tower's module `root` that its entry names; ValueError if there is none."""
    pattern = re.escape(tower.layers).replace(r"\*", r"\d+")
    several = [name for name, _ in root.named_modules() if re.fullmatch(pattern, name)] if "*" in tower.layers else []
    if not several:
        submodule(root, tower.layers, tower)
    return several or [tower.layers]


def _attended(call: TracedCall) -> Tensor | None:
    """bool (B, N), False = a token that the masks hide from every query, such as padding; None = there is none."""
    (batch, _, count, _), mask, keys = call.key.shape, call.masks["attn_mask"], call.masks.get("key_mask")
    parts = [] if keys is None else [keys]
    if mask is not None and mask.numel():
        largest = mask.detach()[(None,) * (4 - mask.ndim)].amax((1, 2))
        parts.append(largest if mask.dtype == torch.bool else largest > torch.finfo(mask.dtype).min / 2)
    seen = torch.ones(batch, count, dtype=torch.bool, device=call.key.device)
    for part in parts:
        seen = seen & part
    seen = call.at_tokens(seen)
    return None if bool(seen.all()) or seen.shape[1] != call.query.shape[2] else seen


def _calls(path: str, called: set[str]) -> bool:
    return any(caller == path or caller.startswith(f"{path}.") for caller in called)


def _joined(*paths: str) -> str:
    return ".".join(path for path in paths if path)
