"""One tower during a run: its attention calls, and the carrier that passes through them.

Each self-attention call hands the carrier on, so that one backward pass brings the relevancy row from the end of the tower to its
beginning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlattn_fast._ground.tensors import compute_dtype
from vlattn_fast.attach.paths import in_layers, layers_of, split_path
from vlattn_fast.attach.tensor_parallel import has_dtensors, heads_mesh
from vlattn_fast.backends.reference.relevancy_residual import Weighting
from vlattn_fast.interpret.records.record import Tower
from vlattn_fast.interpret.records.tokens import Tokens
from vlattn_fast.interpret.relevancy.methods import Attended, Method, weigh
from vlattn_fast.interpret.relevancy.through_call import Through, attention, relevancy_through

_NUMBER = re.compile(r"\b\d+\b")
# Of torch's functions, without underscores: what adds, and what leaves the numbers as they are.
_SUMS, _UNCHANGED = ("add", "radd", "iadd"), ("dropout", "to", "float", "type_as", "contiguous")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


class TowerTrace:
    """The state of one tower during a run.

    Args:
        record: what a family says about it; None for a tower that is found.
        model: the whole model.
        method, weighting: see `explain`.
        keeps: keep every call, for rules that read them after the backward pass.
    """

    def __init__(self, record: Tower | None, model: nn.Module, method: Method, weighting: str | Weighting, keeps: bool) -> None:
        self.record, self.model, self.method, self.weighting, self.keeps = record, model, method, weighting, keeps
        self.name = "" if record is None else record.name
        self.batch: int | None = None
        self.size = 0  # tokens
        self.dtype, self.device = torch.float32, torch.device("cpu")  # of the carrier
        self.lists: list[str] = []  # lists of layers, in the order in which they ran
        self.paths: list[str] = []  # modules that called attention, in this order, too
        self.last_run = 0  # of the module that called attention last
        self.last_call: int | None = None  # the number of the last call among all of the run
        self.last: Attended | None = None  # for methods that read the last attention alone
        # Where the score's gradient enters the attention of each layer; they tell whether a score depends on it.
        self._edges: list[tuple[int, torch.autograd.graph.GradientEdge]] = []
        self._depth = 0  # layers that ran
        self._entries: list[list[Tensor]] = []  # the carrier in front of each layer; one tensor a chunk in front of the first
        self._carrier: Tensor | None = None  # in front of the attention that runs; None = the first
        self._outs: list[Tensor] = []  # behind it, one a chunk
        self._branch: Tensor | None = None  # behind it and in front of the residual sum ("weighted")
        self._stream: Tensor | None = None
        self._unadded: Tensor | None = None  # the branch that the model has yet to add to its residual stream
        self.sums: list[tuple[Tensor, Tensor]] = []  # x and o behind each attention, where calls are kept ("weighted")
        self._without_gradients: str | None = None  # the first module that called attention in a part that turns gradients off
        self.below: Callable[[Tensor], Tensor] | None = None  # what another tower brings into the first carrier, see connectors
        self.pooling_path: str | None = None
        self.pooled = False
        self.config: Any = getattr(model, "config", None)
        self.mesh: Any = None  # the processes that share the heads of the last call; None = all heads are here
        self._has_dtensors = has_dtensors(model)
        if record is not None:
            root = submodule(model, record.path, record)
            self.config = getattr(root, "config", self.config)
            if record.layers:
                self.lists += [_joined(record.path, layers) for layers in matching(root, record)]
            for further in record.further:
                submodule(model, further, record)
                self.lists.append(further)
            if record.pooling is not None:
                submodule(root, record.pooling, record)
                self.pooling_path = _joined(record.path, record.pooling)

    @property
    def path(self) -> str | None:
        """The module that called attention last."""
        return self.paths[-1] if self.paths else None

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)"""
        return self.batch or 0, self.size

    def tokens_in(self, inputs: Mapping[str, Any]) -> Tokens:
        """Its tokens, of the kind that the record says, or of none."""
        return Tokens(inputs, self.shape) if self.record is None else self.record.tokens_in(self.model, inputs, self.shape)

    # --- which calls are this tower's ---

    def fits(self, path: str, batch: int, size: int) -> bool:
        """Whether a call with these sizes may be the next one."""
        chunked = bool(self._entries) and len(self._entries[0]) > 1
        return self.batch is None or (self.batch == batch and (size == self.size or chunked or path == self.path))

    def goes_on(self, path: str, batch: int, size: int) -> bool:
        """Whether a call whose query came out of this tower is the tower's next one."""
        if not self.fits(path, batch, size):
            return False
        layers, last = layers_of(path), self.lists[-1]
        if layers in self.lists:
            return True
        # Of models whose layers lie in several lists beside one another, or are lists themselves.
        return self.keeps and (_parent(layers) == _parent(last) or _NUMBER.sub("*", layers) == _NUMBER.sub("*", last))

    def _enter(self, path: str, query: Tensor, key: Tensor, call: int, chunk: bool = False) -> None:
        batch, size = query.shape[0], query.shape[2]
        if layers_of(path) not in self.lists:
            self.lists.append(layers_of(path))
        if self.batch is None:
            self.batch, self.dtype, self.device = batch, compute_dtype(query), query.device
        if not chunk and (self.path is None or path in self.paths or split_path(self.path) != split_path(path)):
            self._depth += 1
        if not self.paths or (chunk and self._carrier is None):
            self.size += size
        self.paths.append(path)
        self.last_call = call
        self._find_mesh(path, query, key)

    def _find_mesh(self, path: str, query: Tensor, key: Tensor) -> None:
        if self._has_dtensors:
            self.mesh = heads_mesh(self.model.get_submodule(path), query, key)

    # --- attention calls ---

    def attend(
        self, path: str, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], call: int, chunk: bool
    ) -> Tensor:
        """Self-attention (B, H, N, D) of one call.

        Args:
            call: its number in the run.
            chunk: it takes a further part of the sequence through the module of the last call.
        """
        depth = self._depth
        self._enter(path, query, key, call, chunk)
        if not self.method.carries:
            return self._read_last(path, query, key, value, masks)
        if not chunk:
            self._carrier = None if not self._outs else self._outs[0] if len(self._outs) == 1 else torch.cat(self._outs, 2)
            self._outs = []
            if self._depth > depth:
                self._entries.append([] if self._carrier is None else [self._carrier])
        return self._carry(query, key, value, self._carrier_of(query), masks)

    def _carrier_of(self, query: Tensor) -> Tensor:
        """The carrier of the query's tokens, in front of the attention."""
        size = query.shape[2]
        if self._carrier is None:
            carrier = torch.zeros(query.shape[0], 1, size, dtype=self.dtype, device=query.device, requires_grad=True)
            self._entries[0].append(carrier)
            return carrier if self.below is None else carrier + self.below(carrier)
        carrier = self._carrier
        if carrier.shape[2] != size:
            carrier = carrier.narrow(2, sum(out.shape[2] for out in self._outs), size)
        return carrier.to(query.device, compute_dtype(query))  # layers of a model may have several devices and dtypes

    def _carry(self, query: Tensor, key: Tensor, value: Tensor, carrier: Tensor, masks: dict[str, Any]) -> Tensor:
        method = self.method
        output, carrier = relevancy_through(
            query,
            key,
            value,
            carrier,
            masks,
            rule=method.rule,
            row_normalize=method.row_normalize,
            residual_weight=method.residual_weight,
            attention_weight=method.attention_weight,
            mesh=self.mesh,
        )
        carrier = carrier.to(self.dtype)
        if not carrier.requires_grad and self._without_gradients is None:
            self._without_gradients = self.path
        self._outs.append(carrier)
        if method.weighted and not self.keeps:
            self._branch = carrier
        if not method.needs_score:
            return output.detach()  # only the carrier needs a graph between the layers
        if output.requires_grad:
            self._edges.append((self._depth, torch.autograd.graph.get_gradient_edge(output)))
        return output

    def _read_last(self, path: str, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any]) -> Tensor:
        output = attention(query, key, value, masks)
        layers, index = split_path(path)
        of_last = not in_layers(path) or index == len(list(self.model.get_submodule(layers).children())) - 1
        if self.pooling_path is not None or not of_last:
            return output
        return self._leaf(query, key, value, masks, output)

    def _leaf(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], output: Tensor) -> Tensor:
        """`output`, where the graph starts: only the gradient at it is used, unless those of several calls are."""
        output = (output if self.keeps else output.detach()).requires_grad_()
        self.last = Attended(query.detach(), key.detach(), value.detach(), masks, output, self.mesh)
        self._edges.append((self._depth, torch.autograd.graph.get_gradient_edge(output)))
        return output

    def pool(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any]) -> Tensor:
        """The attention of an attention-pooling head, whose queries are learnt and no tokens."""
        if self.pooled:
            raise ValueError(f"model must call the pooling head of tower '{self.name}' once; got '{self.pooling_path}' again")
        self.pooled = True
        self._find_mesh(self.pooling_path or "", query, key)
        output = attention(query, key, value, masks)
        if not self.method.carries:
            return self._leaf(query, key, value, masks, output)
        if self.method.needs_score and output.requires_grad:
            self._edges.append((self._depth, torch.autograd.graph.get_gradient_edge(output)))
        # The head's queries are learnt and no tokens, so there is no residual term.
        options = masks, self.method.rule, self.method.row_normalize, 0.0, 1.0, self.mesh
        around = self._outs[-1].to(query.device, compute_dtype(query))
        output, carrier = Through.apply(output, around, query, key, value, *options)
        self._outs = [carrier]
        return output if self.method.needs_score else output.detach()

    def cross(self, path: str, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], call: int) -> Tensor:
        """Cross-attention from this tower's tokens to others: its output, at which the score has a gradient."""
        self._enter(path, query, key, call)
        output = attention(query, key, value, masks)
        if not self.method.needs_score:
            return output.detach()
        output = output if output.requires_grad else output.requires_grad_()
        self._edges.append((self._depth, torch.autograd.graph.get_gradient_edge(output)))
        return output

    # --- hooks of method "weighted" ---

    def install(self, of_this_run: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[Any]:
        """Register the hooks at the residual sums, if this method needs them; yields their handles."""
        if not self.method.weighted:
            return
        if self.record is None or self.record.branch is None:
            raise ValueError(
                f"method must be one that needs no residual branch, which tower '{self.name}' has no record of; got 'weighted'"
            )
        root = submodule(self.model, self.record.path, self.record)
        for layer in (layer for layers in matching(root, self.record) for layer in root.get_submodule(layers).children()):
            stream = submodule(layer, self.record.stream, self.record)
            yield stream.register_forward_pre_hook(of_this_run(self._keep_stream), with_kwargs=True)
            branch = submodule(layer, self.record.branch, self.record)
            yield branch.register_forward_hook(of_this_run(self._keep_sum if self.keeps else self._weigh))
        for layers in self.record.further:
            for layer in self.model.get_submodule(layers).children():
                for path in self.record.sums:
                    summed = submodule(layer, path, self.record)
                    yield summed.register_forward_pre_hook(of_this_run(lambda _, terms: self._add_sum(*terms)))

    def _keep_stream(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream = args[0] if args else kwargs.get("hidden_states")
        self._stream = None if stream is None else stream.detach()

    def _keep_sum(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._add_sum(self._stream, output[0] if isinstance(output, tuple) else output)

    def _add_sum(self, stream: Tensor | None, branch: Tensor) -> None:
        if stream is None or stream.shape != branch.shape or len(self.sums) + 1 != len(self.paths):
            raise ValueError(
                f"model must add the output of each attention of tower '{self.name}' to its residual stream; got "
                f"{'no stream' if stream is None else tuple(stream.shape)} and a branch of {tuple(branch.shape)} behind "
                f"'{self.path}'"
            )
        self.sums.append((stream.detach(), branch))

    def _weigh(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        branch = output[0] if isinstance(output, tuple) else output
        if self._branch is None or self._stream is None or self._stream.shape != branch.shape or self.record is None:
            where = "" if self.record is None else self.record.branch
            raise ValueError(
                f"model must add the output of '{where}' to its residual stream behind attention '{self.path}'; got "
                f"{'no stream' if self._stream is None else tuple(self._stream.shape)} and a branch of {tuple(branch.shape)}"
            )
        around = self._carrier if self._carrier is not None else self._entries[0][0]
        branch, self._outs[-1] = weigh(self._stream, branch, around.to(branch.device), self._branch, self.weighting)
        self._branch = self._stream = None
        self._unadded = branch
        return (branch, *output[1:]) if isinstance(output, tuple) else branch

    def follow(self, func: Any, args: Any, result: Any) -> None:
        """ValueError for a branch that `func` changes before it is added: the weights would be those of another sum."""
        if self._unadded is None or not isinstance(result, Tensor) or not any(arg is self._unadded for arg in args):
            return
        name = getattr(func, "__name__", "").strip("_")
        if name not in (*_SUMS, *_UNCHANGED):
            where = "" if self.record is None else self.record.branch
            raise ValueError(
                f"model must add the output of '{where}' to its residual stream as it is where method is 'weighted'; got "
                f"'{name}' of it behind attention '{self.path}'"
            )
        self._unadded = result if name in _UNCHANGED else None

    # --- after the forward pass ---

    def check(self, called: set[str], ran: set[str]) -> None:
        """ValueError, naming the module, if a layer has called no attention.

        Args:
            called, ran: the modules that called attention in this run, and all that ran.
        """
        for layers in self.lists:
            children = dict(self.model.get_submodule(layers).named_children())
            kinds = {type(children[i]) for i in children if _calls(f"{layers}.{i}", called)} if self.paths else set()
            for index, layer in children.items():
                of_kind = type(layer) in kinds or self.record is not None
                # Layers of cross-attention alone do not run in prompts without an image.
                left_out = bool(self.paths) and self.record is not None and self.keeps and _joined(layers, index) not in ran
                if of_kind and not left_out and not _calls(_joined(layers, index), called):
                    raise ValueError(
                        f"model must call the attention of every layer of tower '{self.name}' where explain can see it; got "
                        f"'{_joined(layers, index)}' ({type(layer).__name__}), whose attention was not called"
                    )
        if self.pooling_path is not None and not self.pooled:
            raise ValueError(
                f"model must call the attention of the pooling head of tower '{self.name}'; got '{self.pooling_path}', which was "
                "not called"
            )
        if self.method.weighted and self.keeps and len(self.sums) != len(self.paths):
            raise ValueError(f"model must add each attention of tower '{self.name}' to its stream; got none behind '{self.path}'")
        if self._branch is not None and self.record is not None:
            raise ValueError(f"model must call '{self.record.branch}' in every layer of tower '{self.name}'; got no last call")

    def check_start(self, start_layer: int) -> None:
        """ValueError if there is no such layer, or no gradient reaches it."""
        if self._without_gradients is not None:
            raise ValueError(
                f"model must run tower '{self.name}' with gradients on; got attention '{self._without_gradients}' in a part that "
                "turns them off"
            )
        if not -1 <= start_layer < self._depth:
            raise ValueError(
                f"start_layer must be from -1 (the last layer) to {self._depth - 1} for tower '{self.name}'; got {start_layer}"
            )

    def leaving(self) -> Tensor:
        """The carrier (B, 1, N) behind the last layer that ran."""
        return torch.cat(self._outs, 2) if len(self._outs) > 1 else self._outs[0]

    def carriers(self, start_layer: int) -> tuple[list[Tensor], Tensor]:
        """The carrier in front of layer `start_layer`, in parts along the tokens, and the one behind the last layer."""
        entering, leaving = self._entries[start_layer], self.leaving()
        return entering, leaving

    def edges(self, start_layer: int) -> list[torch.autograd.graph.GradientEdge]:
        """Where gradients enter the attention of layer `start_layer` and later ones."""
        first = self._depth - 1 if start_layer == -1 or not self.method.carries else start_layer
        return [edge for depth, edge in self._edges if depth > first]

    def rows_at_end(self) -> int:
        """Rows of the relevancy that is read: the tokens, or a pooling head's queries."""
        if not self.pooled:
            return self.size
        return self._outs[0].shape[2] if self.method.carries else self.last_call_read().query.shape[2]

    def last_call_read(self) -> Attended:
        """The last attention call, for methods that read no other."""
        if self.last is None:
            raise ValueError(f"model must call the last attention of tower '{self.name}'; got no call")
        return self.last


def submodule(module: nn.Module, path: str, tower: Tower) -> nn.Module:
    """The module at `path`; ValueError if there is none."""
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"model must have a module '{path}' in tower '{tower.name}'; got {type(module).__name__} without"
        ) from error


def matching(root: nn.Module, tower: Tower) -> list[str]:
    """The lists of layers in a tower's module `root` that its record names; ValueError if there is none."""
    pattern = re.escape(tower.layers).replace(r"\*", r"\d+")
    layers = [name for name, _ in root.named_modules() if re.fullmatch(pattern, name)]
    if not layers:
        submodule(root, tower.layers, tower)  # raises
    return layers


def _calls(path: str, called: set[str]) -> bool:
    return any(other == path or other.startswith(f"{path}.") for other in called)


def _joined(*paths: str) -> str:
    return ".".join(path for path in paths if path)
