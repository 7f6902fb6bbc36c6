"""Finds out which attention calls of one forward pass belong to one tower, and carries relevancy through them.

A tower is the calls over the same tokens. Every tensor remembers the attention calls it was computed from, as bits of an int: a
query continues the tower whose calls it came through. Where its keys came through other calls, the call is cross-attention.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlattn_fast._ground.tensors import compute_dtype, expand_heads, mask_padding
from vlattn_fast.attach.events import Attend, AttentionEvent, ModuleRun, Subscriber, edits_of, is_map
from vlattn_fast.attach.observer import Observer
from vlattn_fast.attach.recurrences.reading import Convolution, FunctionCall, Reader, Reading
from vlattn_fast.attach.session import in_layers, is_checkpointed, layers_of, named
from vlattn_fast.backends.inputs import ScoreAttentionInputs
from vlattn_fast.interpret.adapters.adapter import Adapter
from vlattn_fast.interpret.adapters.sound import sound_in
from vlattn_fast.interpret.relevancy.joined_keys import Joint, check_cross, joint_keys, with_columns
from vlattn_fast.interpret.relevancy.method import Link, Method
from vlattn_fast.interpret.relevancy.recurrent_calls import (
    check_recurrences,
    check_rules,
    mixing_call,
    recurs,
    replacements,
    run_call,
    unseen_convolution,
)
from vlattn_fast.interpret.relevancy.sink_detection import KEEP, Findings, refused, without_sinks
from vlattn_fast.interpret.relevancy.tower_trace import TowerTrace, begun, note_lost_gradient, submodule
from vlattn_fast.interpret.relevancy.traced_call import TracedCall
from vlattn_fast.interpret.relevancy.tracking.tensor_records import TensorRecords
from vlattn_fast.interpret.relevancy.tracking.token_moves import TokenMoves
from vlattn_fast.interpret.relevancy.tracking.token_positions import ids_of


class Trace(Subscriber):
    """The towers of one run of a model. It is a context, and observes the run.

    Args:
        model: the model, without wrappers.
        adapter: it names the towers; if it names none, every tower is found.
        method: says what is made of each attention call of a tower.
        finds_position: the score's gradient names the explained position, in all towers or in none; None = as adapters say.
        n_vectors: the number of relevancy vectors of a tower in one backward pass.
    """

    explains = True

    def __init__(
        self, model: nn.Module, adapter: Adapter, method: Method, finds_position: bool | None = None, n_vectors: int = 1
    ) -> None:
        self.model, self.method, self.trains = model, method, method.trains
        self.finds_towers = not adapter.towers or adapter.bimodal  # towers that no adapter names, and cross-attention
        self._ran: set[str] = set()
        self._records = TensorRecords(model)
        self.moves = TokenMoves(self._records)
        self._make_tower = functools.partial(
            TowerTrace,
            model=model,
            moves=self.moves,
            keeps=self.finds_towers,
            ran=self._ran,
            finds_position=finds_position,
            n_vectors=n_vectors,
            trains=self.trains,
        )
        self.towers = [self._make_tower(entry) for entry in adapter.towers]
        self.calls: list[Link] = []  # in the order in which they ran, if rules for several towers may need them
        self.by_hand: dict[str, set[torch.Size]] = {}  # by module that computed a softmax: the shapes of maps
        self._chunks: dict[int, int] = {}  # of the runs that attended in chunks: their queries, over the whole batch
        self._owners: list[TowerTrace | None] = []  # the tower of each call, by its bit
        self.without_gradient: list[str] = []  # the innermost modules in which a gradient ends
        self.frozen = method.constants()  # of the backward pass
        # Of each call, unless the method keeps sinks: the tower that attends, that of the keys, and what was found about them.
        self.findings: list[tuple[TowerTrace, TowerTrace, Findings]] = []
        self._arguments: Mapping[str, Any] = {}  # of the model
        self._convolutions: dict[int, tuple[Reading, Tensor]] = {}  # by the module's run: the last one, and its output
        self._convolved = set[int]()  # the runs of modules that called torch's convolution themselves
        roots = [submodule(model, tower.path, tower) for tower in adapter.towers]
        if self.finds_towers:
            roots = [model.get_submodule(adapter.within)]
        within = [adapter.within] if self.finds_towers else [tower.path for tower in adapter.towers]
        check_rules(model, within, mixers=method.needs_mixer_rules)
        edits = None if self.trains else edits_of(model)
        mixers = itertools.chain.from_iterable(map(replacements, roots))
        subscribers = [*((self.frozen,) if method.freeze else ()), *(() if edits is None else [edits.for_explained_run()]), self]
        how: dict[str, Any] = {"within": adapter.within, "keeps_sdpa": self.trains, "further": mixers}
        self.observer = Observer(model, subscribers, parts=roots, records=self._records, **how)

    def __enter__(self) -> Self:
        self.observer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.observer.__exit__(*error)

    @property
    def links(self) -> set[tuple[TowerTrace, TowerTrace]]:
        """The pairs of a tower and one that it attends to."""
        return {(call.tower, call.source) for call in self.calls if call.tower is not call.source}

    # --- the run ---

    def begins(self, observer: Observer) -> Iterator[Any]:
        yield from self._records.across_processes(self.model, observer.hook)

    def on_end(self) -> None:
        self._records.forget()

    def on_enter(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if run.path is not None:
            self._ran.add(run.path)
            if args and run.path[-1:].isdigit():
                self._records.enter(args[0])
        if self.method.weighs_sums and args and isinstance(args[0], Tensor) and not isinstance(run.module, nn.Identity):
            record = self._records.at(args[0])
            record.entry = len(self._owners) if record.entry is None else record.entry

    def on_leave(self, run: ModuleRun, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._convolutions.pop(run.number, None)
        first = output[0] if isinstance(output, tuple) else output
        is_constant = self.frozen.attention and self.observer.maps.holds(first)  # a map, held fixed
        if run.path and self.method.needs_score and not is_constant:
            note_lost_gradient(self.without_gradient, run.path, args, output)
        attended = [
            1 << tower.calls.last for tower in self.towers if tower.calls.run == run.number and tower.calls.last is not None
        ]
        if attended and isinstance(first, Tensor) and not self._records.of(first).calls:
            self._records.copy(first, calls=sum(attended))  # lost within, as where several processes add up their heads
        if (queries := self._chunks.pop(run.number, 0)) and isinstance(first, Tensor):
            if first.numel() != queries * first.shape[-1]:  # calls over the same tokens look like chunks until the module returns
                assert run.module is not None
                place = named(run.path or "", run.module)
                raise ValueError(
                    f"model must attend to each token once in a call of a module; got {queries} queries for an output of "
                    f"{tuple(first.shape)} in {place}, and no published rule joins several attentions over the same tokens"
                )

    def takes_function(self, func: Any) -> bool:
        named = func in (functional.conv1d, functional.multi_head_attention_forward)
        return named or getattr(func, "__name__", None) == "flex_attention" or self.method.weighs_sums

    def on_call(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is functional.conv1d:
            self._convolved.add(run.number)
        if func is functional.multi_head_attention_forward and run.path is not None:
            if self.finds_towers or self._around_of(run.path) is not None:
                raise ValueError(
                    "model must call attention through nn.MultiheadAttention or scaled_dot_product_attention; got "
                    f"'{run.path}', which calls multi_head_attention_forward"
                )
        if getattr(func, "__name__", None) == "flex_attention" and run.path is not None and self._concerns(run.path):
            raise ValueError(
                f"model must call attention through scaled_dot_product_attention; got flex_attention in '{run.path}'"
            )
        return self.method.follow(func, args, kwargs, self._last_tower)

    def heads_of_map(self, run: ModuleRun, probabilities: Tensor, dim: Any, number: int) -> int:
        path = run.path
        if path is None or probabilities.ndim < 3:
            return 0
        if probabilities.ndim > 4:  # of blocks of tokens, or of several streams
            self.observer.maps.leave_out(path)
        self.by_hand.setdefault(path, set()).update([probabilities.shape] if is_map(probabilities, dim) else [])
        if not self._concerns(path) or not self.by_hand.get(path):
            return 0
        heads = probabilities.shape[1] if probabilities.ndim == 4 else getattr(run.module, "num_heads", 0)
        return heads if probabilities.ndim == 4 or (heads and len(probabilities) % heads == 0) else 0

    def on_result(self, run: ModuleRun, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        calls = self._records.follow(func, args, kwargs, result)
        if run.path is not None:
            self.moves.follow(func, args, kwargs, result, run.path)
        if calls and isinstance(result, Tensor) and result.ndim == 3:
            if (owner := self._owners[calls.bit_length() - 1]) is not None:
                owner.goes_through(result)

    def _around_of(self, path: str) -> TowerTrace | None:
        """The listed tower that the module at `path` lies in, if any."""
        for tower in self.towers:
            if tower.entry is not None and (not tower.entry.path or f"{path}.".startswith(f"{tower.entry.path}.")):
                return tower
        return None

    def _last_tower(self, tensor: Tensor, another: Tensor) -> tuple[TowerTrace | None, bool]:
        """The tower through whose last attention `tensor` came, and `another` did not, and whether that one entered a module
        before it."""
        last, record = self._records.of(tensor).calls.bit_length() - 1, self._records.of(another)
        owner = None if last < 0 or record.calls >> last else self._owners[last]
        is_last = owner is not None and owner.calls.last == last
        return owner if is_last else None, record.entry is not None and record.entry <= last

    def prepare(self, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments that the model is called with, whose tensors are marked."""
        self._records.give(arguments)
        self._arguments = arguments
        return arguments

    # --- attention calls ---

    def _frozen(self, tensor: Any) -> Any:
        """A tensor from which attention weights are computed, as a constant of the backward pass if the method freezes them."""
        if not self.frozen.attention or not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return tensor
        return self._marked_as(self.frozen.constant(tensor), tensor)

    def _marked_as(self, view: Tensor, tensor: Tensor, dim: int | None = None) -> Tensor:
        """A view of `tensor` with its marks, copied by hand: the trace does not follow its own functions. `dim`: one that it
        adds, or -1."""
        self._records.copy(view, tensor)
        self.moves.hand_on(view, tensor, dim)
        return view

    def on_attention(self, event: AttentionEvent, attend: Attend) -> Tensor:
        """The attention (B, H, N, D) of one call, as the model computes it; with relevancy, if the tower is explained.
        Dropout is off but in a run that trains."""
        tensors, masks, options = self._parts_of(event, attend)
        calls, path = self._records.of(tensors[0]).calls, event.run.path
        query, key = map(self._frozen, tensors[:2])
        masks = {name: mask if name == "group_bias" else self._frozen(mask) for name, mask in masks.items()}
        options["dropout_p"] = event.dropout_p if self.trains else 0.0
        call = TracedCall(path or "", query, key, tensors[2], masks, **options)
        output, owner = (call.computed(), None) if path is None else self._attend(event.run, call, calls)
        self._attended(call, owner, calls, output)
        self._output = output
        return output

    def _parts_of(
        self, event: AttentionEvent, attend: Attend
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], dict[str, Any]]:
        """Query, key and value with their marks, the masks, and the options of the call; also the result of one that ran."""
        sources, masks, options = event.given, dict(event.masks or {}), dict[str, Any]()
        if event.written is not None:
            *written, masks = event.written.as_call()
            options = {"ran": event.written.output, "by_hand": True}
            query, key, value = (self._marked_as(tensor, source) for tensor, source in zip(written, sources, strict=True))
        elif event.inputs is not None:
            x, sink = event.inputs.attention, event.inputs.sink
            output = attend(replace(event, sink=self._frozen(event.sink), lse=self._frozen(event.lse)))
            options = {"ran": output, "score": x.score, "vector": x.vector, "parameter": x.parameter}
            options["lse"] = None if event.lse is None else event.lse.detach()
            masks |= {} if sink is None else {"sink": sink}
            parts = (each if self.trains else each.detach() for each in (x.query, x.key, event.inputs.value))
            query, *key_value = parts
            key, value = (expand_heads(each, query.shape[1]) for each in mask_padding(x.key_mask, *key_value))
            query, key, value = (self._marked_as(each, of) for each, of in zip((query, key, value), sources, strict=True))
        else:
            assert event.value is not None
            dim = 1 if event.is_one_head else None
            views = zip((event.query, event.key, event.value), sources, strict=True)
            query, key, value = (x if x is source else self._marked_as(x, source, dim) for x, source in views)
        return (query, key, value), masks, options

    def on_recurrence(
        self, run: ModuleRun, reader: Reader, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result as the model computes it; relevancy goes along."""
        path = run.path
        if path is None or not self._concerns(path):
            return NotImplemented
        module = self.model.get_submodule(path)
        result, reading, output = run_call(reader, FunctionCall(function, args, kwargs, module), path, self.observer.aside)
        mixer = reading.mixer
        if isinstance(mixer, Convolution) and recurs(module):
            self._convolutions[run.number] = reading, output
            return reading.with_output(result, self._marked_as(output, mixer.value))
        if isinstance(mixer, Convolution) and not reading.is_only_mixer:
            raise ValueError(
                f"model must use supported functions for its recurrence; got {named(path, module)}, whose short convolution "
                "comes before attention or an unsupported recurrence"
            )
        before = self._convolutions.get(run.number)
        if before is None and run.number in self._convolved and reading.channels is not None:
            raise unseen_convolution(path, module)
        mixing = mixing_call(path, module, reading, output, before, self.observer.aside)
        with torch._C.DisableTorchFunction():
            if isinstance(mixer, Convolution):
                self._marked_as(mixing.query, mixer.value, 3)
            calls = self._records.of(mixing.query).calls | self._records.of(mixing.value).calls
            output, owner = self._attend(run, mixing, calls)
            self._attended(mixing, owner, calls, output)
        return reading.with_output(result, output[..., 0] if isinstance(mixer, Convolution) else output)

    def on_inputs(self, run: ModuleRun, inputs: ScoreAttentionInputs) -> ScoreAttentionInputs:
        x = inputs.attention
        inputs = inputs._replace(attention=x._replace(query=self._frozen(x.query), key=self._frozen(x.key)))
        return inputs if self.trains else inputs._replace(seed=None, dropout_p=0.0)

    def on_output(self, event: AttentionEvent, output: Tensor, result: Tensor) -> None:
        if result is not self._output:
            self._marked_as(result, self._output, -1 if event.is_one_head else None)

    def on_lse(self, inputs: ScoreAttentionInputs, lse: Tensor) -> None:
        self._records.copy(lse, inputs.attention.query, inputs.attention.key)

    def _attended(self, call: TracedCall, owner: TowerTrace | None, calls: int, output: Tensor) -> None:
        """Marks the output of a call whose queries came through `calls`; `owner`: the tower that it belongs to, if any."""
        if owner is not None:
            calls |= 1 << len(self._owners)
            self._owners.append(owner)
        self._records.copy(output, call.query, call.key, call.value, calls=calls)
        self.moves.hand_on(output, call.query)

    def _attend(self, run: ModuleRun, call: TracedCall, calls: int) -> tuple[Tensor, TowerTrace | None]:
        """The output, and the tower that it belongs to, None if it is not explained. `calls`: those that the queries came
        through, as bits."""
        if is_checkpointed() and not self.trains:
            raise ValueError(
                "model must run without torch.utils.checkpoint, which runs layers twice; got attention "
                f"'{call.path}' inside of it"
            )
        pooling = next((tower for tower in self.towers if tower.pooling_path == call.path), None)
        if pooling is not None:
            into = pooling.enter_pooling(self._with_columns(call, [pooling.size]))
            output = self.method.pool(pooling, self._without_sinks(pooling, pooling, into))
            return pooling.gradients.leaves_pooling(output), None
        call, owner, is_same = self._linked(run, replace(call, calls=calls, key_calls=self._records.of(call.key).calls))
        joins = self.finds_towers and not is_same
        joint = joint_keys(self.moves, call, owner, self.towers) if joins else []
        if owner is None and (not self.finds_towers or not (is_same or in_layers(call.path))):
            self._check_left_out(call, is_same)
            return call.computed(), None
        tower = owner or begun(self._new_tower(), call.path, self._ids(call.query), self._reached(calls))
        if joint:
            return self._attend_jointly(tower, call, joint), tower
        if is_same:
            return self._attend_to_itself(run, tower, call), tower
        entered = self._records.of(call.query).entered & self._records.of(call.key).entered
        self._check_across(call)
        check_cross(call, owner, self._reached(call.key_calls), bool(calls or (not call.key_calls and entered)))
        return self._attend_across(tower, call), tower

    def _ids(self, tensor: Tensor) -> Tensor | None:
        """The numbers (B, N) of the tokens of queries or keys, if they are known."""
        return ids_of(self.moves.of(tensor), tensor)

    def _with_columns(self, call: TracedCall, sizes: Sequence[int]) -> TracedCall:
        return with_columns(self.moves, call, sizes, strict=self.finds_towers)

    def _linked(self, run: ModuleRun, call: TracedCall) -> tuple[TracedCall, TowerTrace | None, bool]:
        """The call with the columns of its tokens, the tower that it continues, and whether its keys are the tokens of its
        queries."""
        queries, key, key_ids = call.query.shape[2], self._records.of(call.key), self._ids(call.key)
        owner = self._tower_of(run, call.calls, call.query.shape[0], queries, self._ids(call.query))
        # Also where they are others than the queries', or an earlier layer's, which came through fewer calls.
        held = owner is not None and owner.positions.holds(key_ids, all_of=True)
        same = call.is_mixing or held or self._same_tokens(call)
        if not held and not call.is_mixing:
            call = self._with_columns(call, [queries] if same else [tower.size for tower in self._reached(key.calls)])
            same = same and queries == call.tokens
        return call, owner, same

    def _check_left_out(self, call: TracedCall, is_same: bool) -> None:
        """ValueError for a call within a tower with an entry that is in none of its layers: the map would leave it out."""
        if is_same and (around := self._around_of(call.path)) is not None:
            raise ValueError(
                f"model must call only the attention of its layers in tower '{around.name}'; got a call of '{call.path}', "
                "which is in none of them"
            )

    def _check_across(self, call: TracedCall) -> None:
        """ValueError for other keys than the queries' tokens in a model whose adapter knows no cross-attention."""
        if not self.finds_towers:
            raise ValueError(
                f"inputs must give the whole sequence in one forward pass, to towers without cross-attention; "
                f"got {call.query.shape[2]} queries and {call.tokens} keys in attention '{call.path}'"
            )

    def _attend_jointly(self, tower: TowerTrace, call: TracedCall, joint: Sequence[Joint]) -> Tensor:
        """To the tower's own tokens and to those of others in one softmax."""
        number = len(self._owners)
        call = tower.enter(replace(call, columns=joint[0].columns), number, source=True)
        if self.method.sinks != KEEP:
            raise refused(self.method.sinks, call, "a call attends to tokens of several towers")
        output = self.method.cross(tower, call)
        for keys in joint:
            source_call = replace(call, columns=keys.columns)
            self._keep(tower, keys.tower or tower, source_call, output, joint=keys.tower is not None)
        return output

    def _attend_to_itself(self, run: ModuleRun, tower: TowerTrace, call: TracedCall) -> Tensor:
        parallel = tower.calls.is_parallel(call) and self.method.adds_parallel and not self.finds_towers
        call = replace(call, parallel=parallel)
        same_layer = not self.method.needs_mixer_rules and self._repeats(run, tower, call)
        is_chunk = not same_layer and self._is_chunk(run, tower, call)
        call = tower.enter(call, len(self._owners), is_chunk, same_layer=same_layer)
        tower.calls.came_through, tower.calls.mixes = call.calls, call.is_mixing
        tower.note_others(call, measures=not self.trains)
        call = self._without_sinks(tower, tower, call)
        output = self.method.attend(tower, call)
        self._keep(tower, tower, call, output)
        return output

    def _attend_across(self, tower: TowerTrace, call: TracedCall) -> Tensor:
        """To another tower's tokens."""
        tower.note_others(call, measures=not self.trains)
        call = tower.enter(call, len(self._owners), source=True)  # before `_source_of`, if it is new
        source = self._source_of(call)
        call = self._without_sinks(tower, source, call)
        output = self.method.cross(tower, call)
        self._keep(tower, source, call, output)
        return output

    def _without_sinks(self, tower: TowerTrace, source: TowerTrace, call: TracedCall) -> TracedCall:
        if self.method.sinks == KEEP or call.is_mixing:  # a recurrence has no softmax whose rest a token takes
            return call
        call, found = without_sinks(self.method.sinks, tower, call)
        self.findings.append((tower, source, found))
        return call

    def _repeats(self, run: ModuleRun, tower: TowerTrace, call: TracedCall) -> bool:
        """Whether a run of a module attends from the tokens of its last call again, as DiffLlama does to other values."""
        last, ids = ids_of(tower.positions.latest, call.query), self._ids(call.query)
        again = tower.calls.path == call.path and tower.calls.run == run.number
        return again and last is not None and ids is not None and torch.equal(last, ids)

    def _is_chunk(self, run: ModuleRun, tower: TowerTrace, call: TracedCall) -> bool:
        """Whether a call takes a further part of the tower's sequence: a module may attend to a long one in chunks. One run of it
        calls again then, with queries that did not come through the last call."""
        queries = call.query.shape[0] * call.query.shape[2]
        again = tower.calls.path == call.path and tower.calls.run == run.number and tower.calls.last is not None
        apart = not call.parallel and tower.calls.last is not None and not call.calls >> tower.calls.last & 1
        has_rules = self.method.needs_mixer_rules
        if apart and (call.calls or tower.calls.is_parallel(call)) and not again and has_rules:
            raise ValueError(
                f"model must run the attention layers of a tower one after another; got '{call.path}' in parallel to "
                f"'{tower.calls.path}', over the same tokens, and no published rule joins their relevancies. Methods 'gradient' "
                "and 'rollout' only support a recurrence in parallel"
            )
        if again and apart:
            self._chunks[run.number] = self._chunks.get(run.number, tower.calls.queries) + queries
        tower.calls.run, tower.calls.queries = run.number, queries
        return again and apart

    def _keep(self, tower: TowerTrace, source: TowerTrace, call: TracedCall, output: Tensor, joint: bool = False) -> None:
        """Appends to `calls`, with the source's last call that the keys came through; the tower's steps begin anew."""
        if not joint:
            tower.gradients.leaves_call(output, call.chunk, tower.positions.latest)
        if self.finds_towers:
            earlier = range(call.key_calls.bit_length() - 1, -1, -1) if tower is not source else ()
            source_call = next((i for i in earlier if call.key_calls >> i & 1 and self._owners[i] is source), None)
            self.calls.append(Link(tower, source, replace(call, output=output), source_call, joint))

    # --- which tower a call belongs to, and which its keys come from ---

    def _new_tower(self) -> TowerTrace:
        self.towers.append(self._make_tower(None))
        return self.towers[-1]

    def _reached(self, calls: int) -> list[TowerTrace]:
        """The towers among whose calls `calls` are, the latest call's first."""
        owners = (self._owners[i] for i in range(calls.bit_length() - 1, -1, -1) if calls >> i & 1)
        return list(dict.fromkeys(owner for owner in owners if owner is not None))

    def _tower_of(self, run: ModuleRun, calls: int, batch: int, size: int, ids: Tensor | None) -> TowerTrace | None:
        """The tower that a call in `run` continues. `ids`: the numbers (B, N) of its queries' tokens, if they are known."""
        path = run.path or ""
        layers = layers_of(path)
        for tower in sorted(self._reached(calls), key=lambda tower: not tower.positions.holds(ids)):
            if tower.goes_on(path, batch, size, ids):
                return tower
        # A tower's first call, a further part of a sequence that is cut into chunks, or one whose past was hidden from the trace.
        for tower in reversed(self.towers):
            again = path == tower.calls.path and tower.calls.run == run.number
            if layers in tower.calls.lists and (again or path not in tower.calls.paths) and tower.fits(path, batch, size):
                return tower
        return None

    def _same_tokens(self, call: TracedCall) -> bool:
        """Whether queries and keys are of one sequence: in cross-attention they came through the calls of different towers, or
        from different inputs."""
        if call.calls == call.key_calls or not call.calls:
            return call.calls == call.key_calls and (call.calls > 0 or self._records.from_same(call.query, call.key))
        reached = self._reached(call.key_calls)
        return bool(reached) and reached[0] in self._reached(call.calls)[:1]

    def _source_of(self, call: TracedCall) -> TowerTrace:
        """The tower whose tokens are the keys; else a made-up one without layers."""
        key, batch, size = call.key, call.key.shape[0], call.tokens
        for tower in (*self._reached(call.key_calls), *(tower for tower in self.towers if not tower.calls.paths)):
            if (tower.batch, tower.size) == (batch, size):
                return tower
        tower = next((tower for tower in self.towers if not tower.calls.lists and tower.batch is None), None) or self._new_tower()
        tower.batch, tower.size, tower.dtype, tower.device = batch, size, compute_dtype(key), key.device
        return tower

    # --- after the forward pass ---

    def check(self) -> None:
        """ValueError, naming the module, if attention of an explained tower was not traced."""
        called = {path for tower in self.towers for path in tower.calls.paths}
        places = self._places()
        check_recurrences({path: self.model.get_submodule(path) for path in self._ran if path.startswith(places)}, [*called])
        by_hand = {path: shapes for path, shapes in self.by_hand.items() if path.startswith(places)}
        self.observer.maps.check(self.model, by_hand, called, [tower.shape for tower in self.towers])
        number = 0
        for tower in self.towers:
            tower.finish()
            if not tower.name:
                has_layers = bool(tower.calls.paths)
                tower.name = self._name(tower, number) if has_layers else f"context{tower.size}"
                number += has_layers
            tower.check(called, self._ran)

    def _name(self, tower: TowerTrace, number: int) -> str:
        """The name of a tower without an adapter: "sound" of the first one if the input is sound, "text" of its decoder."""
        tower.hears = not number and sound_in(self._arguments, tower.shape) is not None
        decodes = number == 1 and any(name.startswith("decoder_") for name in self._arguments)
        return "sound" if tower.hears else "text" if decodes and any(one.hears for one in self.towers) else f"tower{number}"

    def _concerns(self, path: str) -> bool:
        """Whether a module may lie in a tower that is explained."""
        return path.startswith(self._places())

    def _places(self) -> tuple[str, ...]:
        """How the paths of such modules begin."""
        return ("",) if self.finds_towers else tuple([f"{layers}." for tower in self.towers for layers in tower.calls.lists])
