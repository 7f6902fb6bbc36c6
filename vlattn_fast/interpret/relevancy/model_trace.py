"""Sees every attention call of a model in one forward pass, and finds out which calls belong to one tower.

A call reaches a `Trace` in one of two ways: transformers' attention interface hands it over, or the model calls
`torch.nn.functional.scaled_dot_product_attention` or this package's operator `score_attention`, which the trace sees as a mode of
torch. Attention that a module writes out by hand is replaced for the run (`attach.handwritten`), so that it takes the second way.

A tower is the calls over the same tokens. Every tensor remembers the attention calls it was computed from, as bits of an int: a
query continues the tower whose calls it came through. Where its keys came through other calls, the call is cross-attention.

A trace is active in the thread and context that entered it; other threads may run the same model meanwhile.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from vlattn_fast._ground.marks import add_mark, new_mark, read_mark
from vlattn_fast._ground.tensors import expand_heads, mask_padding
from vlattn_fast.attach.current import RUNNING, SCORE_ATTENTION, SOFTMAX, edits_of, first_argument, is_map
from vlattn_fast.attach.session import Steps, Stepwise, as_mode, in_layers, is_checkpointed, named, visible
from vlattn_fast.backends.inputs import ScoreAttentionInputs
from vlattn_fast.interpret.records.record import Family
from vlattn_fast.interpret.records.unsupported import check_recurrences, check_rules
from vlattn_fast.interpret.relevancy.found_towers import FindsTowers
from vlattn_fast.interpret.relevancy.joined_keys import JoinedKeys, Part, check_cross, joint_keys
from vlattn_fast.interpret.relevancy.method import LinkedCall, Method
from vlattn_fast.interpret.relevancy.recurrent_calls import replacements
from vlattn_fast.interpret.relevancy.seen_mixers import SeesMixers
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace, begun, submodule
from vlattn_fast.interpret.relevancy.traced_call import Scored, TracedCall
from vlattn_fast.interpret.relevancy.tracking.lost_gradients import note_lost_gradient
from vlattn_fast.interpret.relevancy.tracking.module_paths import ModulePaths
from vlattn_fast.interpret.relevancy.tracking.tensor_marks import TensorMarks
from vlattn_fast.interpret.relevancy.tracking.token_moves import TokenMoves
from vlattn_fast.interpret.relevancy.tracking.token_places import ids_of
from vlattn_fast.interpret.relevancy.written_maps import WrittenMaps
from vlattn_fast.ops._groups import bias_arguments
from vlattn_fast.ops._sinks import with_sink


class Trace(FindsTowers, SeesMixers, Stepwise, TorchFunctionMode):
    """A context with one run of a model in it; everything is put back on leaving, also by an exception.

    Args:
        model: the model, without wrappers.
        family: its record, which names the towers; where it names none, every tower is found.
        method: says what is made of each attention call of a tower.
    """

    explains, edits = True, False

    def __init__(self, model: nn.Module, family: Family, method: Method) -> None:
        super().__init__()
        self.model, self.method, self.trains = model, method, method.trains
        self.finds_towers = not family.towers or family.bimodal  # towers that no record names, and cross-attention
        self._ran: set[str] = set()
        self._make_tower = functools.partial(TowerTrace, model=model, keeps=self.finds_towers, ran=self._ran)
        self.towers = [self._make_tower(record) for record in family.towers]
        self.calls: list[LinkedCall] = []  # in the order in which they ran, where rules for several towers may read them
        self.written = WrittenMaps(self.trains)
        self.by_hand: dict[str, set[torch.Size]] = {}  # modules that took a softmax themselves: those that may be maps for sure
        self._names = ModulePaths(model, family.within)
        # Paths of the modules that run now, the outermost first; None = of another model, or a part that is not explained.
        self._paths: list[str | None] = [""]
        self._chunks: dict[int, int] = {}  # of the runs that attended in chunks: their queries, over the whole batch
        self._runs, self._run = [0], 0  # each run of each module has a number: those under way, and the last number given
        self._owners: list[TowerTrace | None] = []  # the tower of each call, by its bit
        self._marks = TensorMarks(model)
        self._joined = JoinedKeys(self._part, refuses=self.finds_towers)
        self.moves = TokenMoves(self._marks.calls, self._marks.constants)
        self.without_gradient: list[str] = []  # the innermost modules in which a gradient ends
        self._begin_mixers()
        self._key_mark = new_mark("keys")  # of a tensor: the towers whose self-attention took it for its keys, as bits
        self._around, self._edits, self._is_over = RUNNING.get(), None if self.trains else edits_of(model), False
        self._follows = type(method).follow is not Method.follow  # most methods do not
        self._roots = [submodule(model, tower.path, tower) for tower in family.towers]
        if self.finds_towers:
            self._roots = [model.get_submodule(family.within)]
        parts = [family.within] if self.finds_towers else [tower.path for tower in family.towers]
        check_rules(model, parts, beside=method.goes_beside)

    @property
    def links(self) -> set[tuple[TowerTrace, TowerTrace]]:
        """The pairs of a tower and one that it attends to."""
        return {(call.tower, call.source) for call in self.calls if call.tower is not call.source}

    # --- the run ---

    def _steps(self) -> Steps:
        mixers = itertools.chain.from_iterable(map(replacements, self._roots))
        attention = visible(self._roots, self.trains, None if self.trains else self.model, mixers)
        yield attention.__exit__
        attention.__enter__()
        yield self._end
        RUNNING.set(self)
        yield from as_mode(self)
        # The hooks that follow the modules are torch's global ones: they also see modules of other models, which a hook may run.
        yield nn.modules.module.register_module_forward_pre_hook(self._of_this_run(self._push)).remove
        yield nn.modules.module.register_module_forward_hook(self._of_this_run(self._pop), always_call=True).remove
        yield from self._marks.across_processes(self.model, self._of_this_run)
        for handle in self.method.hooks(self.model, self.towers, self._of_this_run):
            yield handle.remove

    def _end(self) -> None:
        RUNNING.set(self._around)
        self._is_over = True
        self._marks.forget()
        self.moves.forget()

    def _push(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before each module runs: notes its path and the number of its run; `_pop` takes them off again."""
        around = self._paths[-1]
        path = around if isinstance(module, nn.Softmax) else self._names.of(module, around, self._runs[-1])  # its caller takes it
        self._paths.append(path)
        if path is not None:
            self._ran.add(path)
            self._marks.enter(path, args)
        self._run += 1
        self._runs.append(self._run)

    def _pop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        path, run = self._paths.pop(), self._runs.pop()
        self._convolutions.pop(run, None)
        first = output[0] if isinstance(output, tuple) else output
        frozen = self.method.frozen
        is_constant = frozen is not None and frozen.attention and self.written.holds(first)  # a map, held fixed
        if path and self.method.needs_score and not is_constant:
            note_lost_gradient(self.without_gradient, path, args, output)
        attended = [1 << tower.last_call for tower in self.towers if tower.last_run == run and tower.last_call is not None]
        if attended and isinstance(first, Tensor) and not self._marks.calls((first,)):
            self._marks.add_calls(first, sum(attended))  # lost within, as where several processes add up their heads
        if (queries := self._chunks.pop(run, 0)) and isinstance(first, Tensor):
            if first.numel() != queries * first.shape[-1]:  # calls over the same tokens look like chunks until the module returns
                raise ValueError(
                    f"model must attend to each token once in a run of a module; got {queries} queries for an output of "
                    f"{tuple(first.shape)} in {named(path or '', module)}, and no published rule joins several attentions over "
                    "the same tokens"
                )

    def _of_this_run(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, silent in runs over the same model by other threads and by hooks."""
        return lambda *args: hook(*args) if RUNNING.get() is self else None

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (
            self._is_over or self._aside
        ):  # torch takes a mode off for each call, and may put it back after Ctrl-C in a run that ended
            return func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return self._sdpa(*args, **kwargs)
        if func is SCORE_ATTENTION:
            return self._score_attention(ScoreAttentionInputs(*args))
        if func is with_sink:
            return self._with_sink(*args)
        if func is functional.conv1d:
            self._convolved.add(self._runs[-1])
        path = self._paths[-1]
        if func is functional.multi_head_attention_forward and path is not None:
            if self.finds_towers or self._around_of(path) is not None:
                raise ValueError(
                    "model must call attention through nn.MultiheadAttention or scaled_dot_product_attention; got "
                    f"'{path}', which calls multi_head_attention_forward"
                )
        if getattr(func, "__name__", None) == "flex_attention" and path is not None and self._concerns(path):
            raise ValueError(f"model must call attention through scaled_dot_product_attention; got flex_attention in '{path}'")
        if func in SOFTMAX and path is not None and (scores := first_argument(args, kwargs)).ndim > 2:
            if scores.ndim > 4:  # of blocks of tokens, or of several streams
                self.written.leave_out(path)
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            self.by_hand.setdefault(path, set()).update([scores.shape] if is_map(scores, dim) else [])
        result = None
        if func in SOFTMAX and path is not None and self._edits is not None:
            result = self._edits.edited_softmax(self, path, func, args, kwargs)
        if result is None:
            result = self.method.follow(func, args, kwargs, self._behind) if self._follows else func(*args, **kwargs)
        result = result if self._is_over else self._written(func, args, kwargs, result)
        if isinstance(result, torch.Size) or not (result is None or isinstance(result, (Tensor, tuple, list))):
            return result  # a shape, a dtype, a number: many of the calls
        calls = self._marks.hand_on(func, args, kwargs, result)
        if path is not None and not self._is_over:
            self.moves.follow(func, args, kwargs, result, path)
        if calls and isinstance(result, Tensor) and result.ndim == 3:
            if (owner := self._owners[calls.bit_length() - 1]) is not None:
                owner.goes_through(result)
        self._joined.follow(func, args, kwargs, result)
        return result

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """`result`, through which relevancy goes where it is a map times values that a module of a tower wrote out."""
        path = self._paths[-1]
        if path is None or not self._concerns(path):
            return result
        if func in SOFTMAX and isinstance(result, Tensor) and self.by_hand.get(path):
            heads = None if result.ndim == 4 else getattr(self.model.get_submodule(path), "num_heads", 0)
            if heads is None or (heads and len(result) % heads == 0):
                self.written.take(path, result, heads)
            return result
        call = self.written.product(func, args, kwargs, result)
        if call is None:
            return result
        query, key, value, masks = call.as_call()
        for tensor, part in zip((query, key, value), call.marks, strict=True):
            self._marked_as(tensor, part)
        output = self.attend(query, key, value, masks)
        return self._marked_as(call.as_product(output), output)

    def _around_of(self, path: str) -> TowerTrace | None:
        """The recorded tower that the module at `path` lies in, if any."""
        for tower in self.towers:
            if tower.record is not None and (not tower.record.path or f"{path}.".startswith(f"{tower.record.path}.")):
                return tower
        return None

    def _behind(self, tensor: Tensor, another: Tensor) -> TowerTrace | None:
        """The tower through whose last attention `tensor` came, and `another` did not."""
        last = self._marks.calls((tensor,)).bit_length() - 1
        owner = None if last < 0 or self._marks.calls((another,)) >> last else self._owners[last]
        return owner if owner is not None and owner.last_call == last else None

    def prepare(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments that the model is called with, whose tensors are marked."""
        self._marks.give(arguments)
        return arguments

    # --- attention calls ---

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """scaled_dot_product_attention: `attend` on tensors of four dimensions."""
        masks = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa, "dropout_p": dropout_p}
        if query.ndim == 4:
            shapes = [tensor.shape[:2] for tensor in (query, key, value)]
            if not enable_gqa and shapes.count(shapes[0]) < 3:  # torch's function broadcasts batch and heads, as for multi-query
                shape = torch.broadcast_shapes(*shapes)
                query, key, value = (self._marked_as(x.expand(*shape, -1, -1), x) for x in (query, key, value))
            return self.attend(query, key, value, masks)
        if query.ndim != 3:
            raise ValueError(
                f"model must call attention with (B, H, N, D) tensors; got {tuple(query.shape)} in '{self._paths[-1]}'"
            )
        if attn_mask is not None and attn_mask.ndim == 3:
            masks["attn_mask"] = attn_mask.unsqueeze(1)
        query, key, value = (self._marked_as(x.unsqueeze(1), x, 1) for x in (query, key, value))  # (B, N, D) is one head
        return self._marked_as((output := self.attend(query, key, value, masks)).squeeze(1), output, -1)

    def _frozen(self, tensor: Tensor) -> Tensor:
        """A tensor that attention weights are made of, as a constant of the backward pass where the method freezes them."""
        frozen = self.method.frozen
        if frozen is None or not frozen.attention or not tensor.requires_grad:
            return tensor
        with torch._C.DisableTorchFunction():
            constant = frozen.constant(tensor)
        return self._marked_as(constant, tensor)

    def _score_attention(self, inputs: ScoreAttentionInputs) -> tuple[Tensor, Tensor]:
        """The operator's output and log-sum-exp."""
        inputs = inputs._replace(query=self._frozen(inputs.query), key=self._frozen(inputs.key))
        with torch._C.DisableTorchFunction():
            output, lse = SCORE_ATTENTION(*(inputs if self.trains else inputs._replace(seed=None, dropout_p=0.0)))
            query, key, value = (x if self.trains else x.detach() for x in (inputs.query, inputs.key, inputs.value))
            key, value = (expand_heads(x, query.shape[1]) for x in mask_padding(inputs.key_mask, key, value))
            tensors = query, key, value
        for tensor, source in zip(tensors, (inputs.query, inputs.key, inputs.value), strict=True):
            self._marked_as(tensor, source)
        masks = {name: getattr(inputs, name) for name in ("attn_mask", "key_mask", "is_causal", "scale")} | bias_arguments(inputs)
        score = Scored(inputs.score, inputs.vector, inputs.parameter, output, inputs.sink)
        self._marks.copy(lse, inputs.query, inputs.key)
        if inputs.sink is not None:  # the public call applies it next, and the attention ends there
            self._before_sink = tensors, masks, score
            return output, lse
        return self.attend(*tensors, {**masks, "score": score}), lse

    def _with_sink(self, output: Tensor, lse: Tensor, logit: Tensor) -> Tensor:
        """The output of the call of score_attention that ran last, with its sink."""
        tensors, masks, score = self._before_sink
        with torch._C.DisableTorchFunction():
            score = replace(score, output=with_sink(output, self._frozen(lse), self._frozen(logit)))
        return self.attend(*tensors, {**masks, "score": score})

    def _marked_as(self, view: Tensor, tensor: Tensor, dim: int | None = None) -> Tensor:
        """A view of `tensor` with its marks, copied by hand: the trace does not see itself. `dim`: one that it adds, or -1."""
        self._marks.copy(view, tensor)
        self._joined.copy(view, tensor)
        self.moves.hand_on(view, tensor, dim)
        return view

    def attend(self, query: Tensor, key: Tensor, value: Tensor, masks: dict[str, Any], module: nn.Module | None = None) -> Tensor:
        """The attention (B, H, N, D) of one call, as the model computes it; relevancy goes along where the tower is explained.
        Dropout is off but in a run that trains."""
        dropout_p = masks.pop("dropout_p", 0.0)
        with torch._C.DisableTorchFunction():  # the trace does not see what it computes itself
            path, calls = self._paths[-1], self._marks.calls((query,))
            query, key = self._frozen(query), self._frozen(key)
            masks = {name: self._frozen(mask) if isinstance(mask, Tensor) else mask for name, mask in masks.items()}
            edits = None if path is None else self._edits
            masks, finish = (masks, None) if edits is None else edits.edited(self, path or "", query, key, masks)
            call = TracedCall(path or "", query, key, value, masks, dropout_p=dropout_p if self.trains else 0.0)
            output, owner = (call.computed(), None) if path is None else self._attend(call, calls)
            output = output if finish is None else finish(output)
            self._attended(call, owner, calls, output)
        return output

    def _attended(self, call: TracedCall, owner: TowerTrace | None, calls: int, output: Tensor) -> None:
        """Marks the output of a call whose queries came through `calls`; `owner`: the tower that it belongs to, if any."""
        if owner is not None:
            calls |= 1 << len(self._owners)
            self._owners.append(owner)
        self._marks.add_calls(output, calls, call.query, call.key, call.value)
        self.moves.hand_on(output, call.query)

    def _attend(self, call: TracedCall, calls: int) -> tuple[Tensor, TowerTrace | None]:
        """The output, and the tower that it belongs to, None where it is not explained. `calls`: those that the queries came
        through, as bits."""
        path, batch, queries = call.path, call.query.shape[0], call.query.shape[2]
        if is_checkpointed() and not self.trains:
            raise ValueError(
                "model must keep what it computes (use_reentrant=False runs layers twice); got attention "
                f"'{path}' inside of torch.utils.checkpoint"
            )
        for tower in self.towers:
            if tower.pooling_path is not None and path == tower.pooling_path:
                pooling = tower.enter_pooling(self._joined.with_columns(call, [tower.size]), self.moves)
                return tower.leaves_pooling(self.method.pool(tower, self.method.judged(tower, tower, pooling))), None
        key_calls = self._marks.calls((call.key,))
        ids, key_ids = (ids_of(self.moves.of(tensor), tensor) for tensor in (call.query, call.key))
        owner = self._tower_of(path, calls, batch, queries, ids)
        # A layer may share an earlier layer's keys, which came through fewer calls than its queries.
        shared = owner is not None and bool(read_mark((call.key,), self._key_mark) >> self.towers.index(owner) & 1)
        held = owner is not None and owner.places.holds(key_ids, all_of=True)  # also where they are others than the queries'
        same = call.of_one_sequence or held or shared or self._same_tokens(call, calls, key_calls)
        if not held and not call.of_one_sequence:
            call = self._joined.with_columns(call, [queries] if same else [tower.size for tower in self._reached(key_calls)])
            same = same and queries == call.tokens
        joint = joint_keys(self._joined, call, owner, self.towers, self._reached) if self.finds_towers and not same else []
        if owner is None and (not self.finds_towers or not (same or in_layers(path))):
            if same and (around := self._around_of(path)) is not None:  # the map would leave it out
                raise ValueError(
                    f"model must call only the attention of its layers in tower '{around.name}'; got a call of '{path}', which "
                    "is in none of them"
                )
            return call.computed(), None
        tower = owner or begun(self._new_tower(), path, ids, self._reached(calls))
        tower.entered = tower.entered or self._marks.entered(call.query)
        if joint:
            call = tower.enter(replace(call, columns=joint[0].columns), len(self._owners), moves=self.moves, source=True)
            output = self.method.attended_jointly(tower, call)
            for keys in joint:
                of_source = replace(call, columns=keys.columns)
                self._keep(tower, keys.tower or tower, of_source, output, keys.calls, joint=keys.tower is not None)
            return output, tower
        if same:
            call = replace(call, beside=tower.stands_beside(call, calls) and self.method.adds_beside and not self.finds_towers)
            call = tower.enter(call, len(self._owners), self._is_chunk(tower, call, calls), self.moves)
            tower.last_calls, tower.last_mixes = calls, call.of_one_sequence
            add_mark(call.key, self._key_mark, 1 << self.towers.index(tower))
            tower.note_others(call, measures=not self.trains)
            call, output = self.method.attended(tower, tower, call)
            self._keep(tower, tower, call, output, key_calls)
            return output, tower
        if not self.finds_towers:
            raise ValueError(
                f"inputs must give the whole sequence in one forward pass, to towers without cross-attention; "
                f"got {queries} queries and {call.tokens} keys in attention '{path}'"
            )
        first = calls == key_calls == 0 and self._marks.entered_as_one(call.query, call.key)
        check_cross(call, owner, self._reached(key_calls), calls == key_calls, first or calls != 0)
        tower.note_others(call, measures=not self.trains)
        call = tower.enter(call, len(self._owners), moves=self.moves, source=True)  # before `_source_of`, if it is new
        source = self._source_of(key_calls, call)
        call, output = self.method.attended(tower, source, call)
        self._keep(tower, source, call, output, key_calls)
        return output, tower

    def _is_chunk(self, tower: TowerTrace, call: TracedCall, calls: int) -> bool:
        """Whether a call takes a further part of the tower's sequence: a module may attend to a long one in chunks. One run of it
        calls again then, with queries that did not come through the last call."""
        run, queries = self._runs[-1], call.query.shape[0] * call.query.shape[2]
        again = tower.path == call.path and tower.last_run == run and tower.last_call is not None
        beside = not call.beside and tower.last_call is not None and not calls >> tower.last_call & 1
        if beside and (calls or tower.stands_beside(call, calls)) and not again:
            raise ValueError(
                f"model must attend layer behind layer in a tower; got '{call.path}' beside '{tower.path}', over the same "
                "tokens, and no published rule joins their relevancies. Methods 'gradient' and 'rollout' add a recurrence's"
            )
        if again and beside:
            self._chunks[run] = self._chunks.get(run, tower.queries) + queries
        tower.last_run, tower.queries = run, queries
        return again and beside

    def _keep(
        self, tower: TowerTrace, source: TowerTrace, call: TracedCall, output: Tensor, key_calls: int, joint: bool = False
    ) -> None:
        """Appends to `calls`, with the source's last call that the keys came through; the tower's steps begin anew."""
        if not joint:
            tower.leaves_call(output, call.chunk)
        if self.finds_towers:
            behind = range(key_calls.bit_length() - 1, -1, -1) if tower is not source else ()
            seen = next((i for i in behind if key_calls >> i & 1 and self._owners[i] is source), None)
            self.calls.append(LinkedCall(tower, source, replace(call, output=output), len(self._owners), seen, joint))

    def _part(self, tensor: Tensor, dim: int) -> Part:
        """A tensor as a part of a join along `dim`."""
        calls, entered, keys_of = self._marks.calls((tensor,)), self._marks.entered(tensor), read_mark((tensor,), self._key_mark)
        return Part(tensor.shape[dim], self._marks.origin(tensor), calls=calls, entered=entered, keys_of=keys_of)

    # --- after the forward pass ---

    def check(self) -> None:
        """ValueError, naming the module, if attention of an explained tower was not seen."""
        called = {path for tower in self.towers for path in tower.paths}
        check_recurrences({path: self.model.get_submodule(path) for path in self._ran if self._concerns(path)}, [*called])
        by_hand = {path: shapes for path, shapes in self.by_hand.items() if self._concerns(path)}
        self.written.check(self.model, by_hand, called, [tower.shape for tower in self.towers])
        number = 0
        for tower in self.towers:
            tower.finish()
            if not tower.name:
                tower.name, number = (f"tower{number}", number + 1) if tower.paths else (f"context{tower.size}", number)
            tower.check(called, self._ran)

    def _concerns(self, path: str) -> bool:
        """Whether a module may lie in a tower that is explained."""
        return self.finds_towers or any(path.startswith(f"{layers}.") for tower in self.towers for layers in tower.lists)
