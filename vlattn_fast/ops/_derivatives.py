"""The operators `X_backward`, `X_jvp` and `X_second` of an operator X, and with them its derivatives up to the second, of every
mode.

For outputs y = F(x), X_backward is B(x, h) = DF(x)^T h. With tangents u the others are

    J(x, u) = DF(x) u        S(x, h, u) = (D^2 F(x)[u])^T h

J is F's forward mode. All second derivatives follow: J has the gradients B(x, h) by u and S(x, h, u) by x; B has the gradients
J(x, u) by h and S(x, h, u) by x, and the tangent S(x, h, u) + B(x, h.). Only forward mode of forward mode is missing: a Hessian
is forward over reverse.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from vlattn_fast._ground.tensors import as_fake_outputs
from vlattn_fast.backends.inputs import named, schema_of
from vlattn_fast.ops._registration import Saved, define, differentiable, not_differentiable

Named = dict[str, Any]


class Derivatives:
    """Registers an operator X with `X_backward`, `X_jvp` and `X_second`, and makes all but the last differentiable.

    Args:
        name: X.
        types: the inputs of X and of X_backward.
        fields: the arguments that have gradients, in the order of X_backward's outputs.
        outputs: the names of X's outputs. grads: the fields of X_backward for the gradients of outputs, with the output's name;
            other outputs have no gradient.
        passes: compute the outputs of X, the gradients of `fields` by X_backward, the tangents of the outputs with gradients, in
            the order of `grads`, from the inputs of X_jvp, and the gradients of `fields` from the inputs of X_second.
        fake: gives X's outputs, from the inputs of X or of X_jvp.
        fake_backward, fake_second: give the gradients, if not each of `fields` that is there and asked for has one.
        needs: the fields of X_backward that say which gradients are asked for, with the arguments that each is about.
        setup_context: saves what X_backward takes, if that depends on the inputs.
        one_sweep: X_second also takes tangents h. of h and gives S(x, h, u) + B(x, h.), after J(x, u), which may be None without
            `with_jvp`.
    """

    def __init__(
        self,
        name: str,
        types: tuple[Any, Any],
        fields: Sequence[str],
        *,
        outputs: Sequence[str],
        grads: dict[str, str],
        passes: Sequence[Callable[..., Any]],
        fake: Callable[..., Any],
        fake_backward: Callable[..., Any] | None = None,
        fake_second: Callable[..., Any] | None = None,
        needs: Mapping[str, Collection[str]] = MappingProxyType({}),
        setup_context: Callable[..., None] | None = None,
        one_sweep: bool = False,
    ) -> None:
        forward_type, self.backward_type = types
        self.jvp_type, self.second_type = _derivative_inputs(self.backward_type, fields, grads, one_sweep)
        self.fields, self.outputs, self.grads, self.one_sweep = tuple(fields), tuple(outputs), grads, one_sweep
        taken = schema_of(self.backward_type).types
        self.needed = [grad for grad in grads if taken[grad] is Tensor]  # None is no value
        self._needs = {need: frozenset(some) for need, some in needs.items()}
        places = range(len(outputs))
        self._given = _items([outputs.index(output) for output in grads.values()])
        self._constants = _items([i for i in places if outputs[i] not in grads.values()])
        kept = [i for i in places if outputs[i] in taken]
        self._kept = _items(kept)
        self.saved = Saved(forward_type, self.backward_type, outputs=[outputs[i] for i in kept], grads=[*grads, *needs])
        forward, backward, jvp, second = passes

        def backward_fake(inputs: Any) -> tuple[Tensor | None, ...]:
            left_out = {field for need, some in needs.items() if not getattr(inputs, need) for field in some}
            return as_fake_outputs([None if field in left_out else x for field, x in self._named_fields(inputs)])

        def jvp_fake(inputs: Any) -> tuple[Tensor | None, ...]:
            made = dict(zip(self.outputs, flat(fake(inputs)), strict=True))
            return as_fake_outputs([made[output] for output in grads.values()])

        def second_fake(inputs: Any) -> tuple[Tensor | None, ...]:
            gradients = as_fake_outputs([x for _, x in self._named_fields(inputs)])
            if not one_sweep:
                return gradients
            return *(jvp_fake(inputs) if inputs.with_jvp else [None] * len(grads)), *gradients

        single = len(grads) == 1
        returns = f"({', '.join(f'Tensor {output}' for output in outputs)})" if len(outputs) > 1 else "Tensor"
        self.forward = define(name, forward_type, returns, forward, fake)
        of_fields = _tensors(len(fields))
        self.backward = define(f"{name}_backward", self.backward_type, of_fields, backward, fake_backward or backward_fake)
        self.jvp = define(
            f"{name}_jvp",
            self.jvp_type,
            _tensors(len(grads)),
            (lambda inputs: jvp(inputs)[0]) if single else jvp,
            (lambda inputs: jvp_fake(inputs)[0]) if single else jvp_fake,
        )
        returns = _tensors(len(fields) + one_sweep * len(grads))
        self.second = define(f"{name}_second", self.second_type, returns, second, fake_second or second_fake)
        differentiable(name, self._backward_of_forward, setup_context or self._setup_context, self.of_forward)
        differentiable(f"{name}_backward", self._backward_of_backward, save, self._jvp_of_backward)
        differentiable(f"{name}_jvp", self._backward_of_jvp, save, _raises(f"{name} has no forward mode of forward mode"))
        third = f"{name} has no third derivative; it is twice differentiable"
        asked = "create_graph=True or a transform of torch.func asked for more"
        way_out = "torch.compile asks for more if an input requires grad: call what it compiles under torch.no_grad()"
        not_differentiable(f"{name}_second", f"{third} ({asked}). {way_out}")

    def _setup_context(self, ctx: Any, inputs: Any, outputs: Any) -> None:
        each = outputs if isinstance(outputs, tuple) else (outputs,)
        ctx.mark_non_differentiable(*self._constants(each))
        self.saved.save(ctx, inputs, *self._kept(each))

    def _backward_of_forward(self, ctx: Any, *grads: Tensor | None) -> Named:
        asked = list[bool]()
        if self._needs:
            needed = self.saved.needed(ctx)
            asked = [not some.isdisjoint(needed) for some in self._needs.values()]
        inputs = self.saved.inputs(ctx, *self._given(grads), *asked)
        for grad in self.needed:
            if getattr(inputs, grad) is None:
                inputs = inputs._replace(**{grad: torch.zeros_like(getattr(inputs, self.grads[grad]))})
        made: Named = dict(zip(self.fields, self.backward(inputs), strict=True))
        for field, y in made.items():
            if y is not None and y.dim() == 1:  # an empty vector, which stands for None
                made[field] = None
        return made

    def _named_fields(self, inputs: Any) -> list[tuple[str, Any]]:
        x = named(inputs)
        return [(field, x[field]) for field in self.fields]

    def of_forward(self, inputs: Any, tangents: Mapping[str, Any], outputs: tuple[Tensor, ...]) -> Any:
        """The tangents of X's outputs."""
        x = named(inputs) | dict(zip(self.outputs, outputs, strict=True))  # an lse is an input if it has a tangent
        tangents_out = self.tangents_of_outputs(x, {field: tangents[field] for field in self.fields})
        for output, tangent in zip(self.grads.values(), tangents_out, strict=True):
            x[f"{output}_tangent"] = torch.zeros_like(x[output]) if tangent is None else tangent
        of_outputs = tuple([x.get(f"{output}_tangent") for output in self.outputs])
        return of_outputs if len(of_outputs) > 1 else of_outputs[0]

    def tangents_of_outputs(self, x: Named, u: Named) -> tuple[Tensor, ...]:
        """J(x, u); x: the inputs of X_backward but gradients."""
        return flat(self.jvp(named_inputs(self.jvp_type, x, u)))

    def gradients(self, x: Named, h: Named) -> Named:
        """B(x, h) by field; h: gradients of outputs, or None."""
        h = {grad: torch.zeros_like(x[self.grads[grad]]) if y is None and grad in self.needed else y for grad, y in h.items()}
        return dict(zip(self.fields, flat(self.backward(named_inputs(self.backward_type, x | h))), strict=True))

    def second_gradients(self, x: Named, h: Named, u: Named, *, with_jvp: bool = False) -> tuple[tuple[Tensor, ...], Named]:
        """J(x, u), if `with_jvp`, and S(x, h, u) by field."""
        rows, by_fields = self._sweep(x, h, u, {}, with_jvp)
        return self.tangents_of_outputs(x, u) if with_jvp and not self.one_sweep else rows, by_fields

    def tangents_of_gradients(self, x: Named, h: Named, u: Named, h_tangent: Named) -> Named:
        """S(x, h, u) + B(x, h.) by field."""
        if not has_any(u):
            return self.gradients(x, h_tangent) if has_any(h_tangent) else dict.fromkeys(self.fields)
        _, total = self._sweep(x, h, u, h_tangent if self.one_sweep else {}, False)
        if self.one_sweep or not has_any(h_tangent):
            return total
        return {field: plus(total[field], y) for field, y in self.gradients(x, h_tangent).items()}

    def _sweep(self, x: Named, h: Named, u: Named, h_tangent: Named, with_jvp: bool) -> tuple[tuple[Tensor, ...], Named]:
        """What X_second gives: J(x, u) if it does, and the gradients by field."""
        h = {grad: torch.zeros_like(x[self.grads[grad]]) if y is None and grad in self.needed else y for grad, y in h.items()}
        tangents = dict.fromkeys(self.grads) | h_tangent
        derivatives = flat(self.second(named_inputs(self.second_type, x | h | {"with_jvp": with_jvp}, u | tangents)))
        rows = len(self.grads) if self.one_sweep else 0
        return derivatives[:rows], dict(zip(self.fields, derivatives[rows:], strict=True))

    def _jvp_of_backward(self, inputs: Any, tangents: Mapping[str, Any], outputs: tuple[Tensor, ...]) -> Any:
        x, h = named(inputs), {grad: tangents[grad] for grad in self.grads}
        u = self._with_lse(x, {field: tangents[field] for field in self.fields})
        total = self.tangents_of_gradients(x, {grad: x[grad] for grad in self.grads}, u, h)
        pairs = zip(total.values(), outputs, strict=True)  # an output that stands for None needs a tangent, too
        return tuple([torch.zeros_like(out) if y is None or y.shape != out.shape else y for y, out in pairs])

    def _backward_of_backward(self, ctx: Any, *cotangents: Tensor | None) -> Named:
        x = saved(ctx)
        # an output that stands for None has no elements
        u = {
            f: y if y is not None and x[f] is not None and y.shape == x[f].shape else None
            for f, y in zip(self.fields, cotangents, strict=True)
        }
        if not has_any(u):
            return {}
        u, h = self._with_lse(x, u), {grad: x[grad] for grad in self.grads}
        rows, by_fields = self.second_gradients(x, h, u, with_jvp=True)
        by_grads = {grad: None if h[grad] is None else y.to(h[grad].dtype) for grad, y in zip(h, rows, strict=True)}
        return of_tensors(by_fields | by_grads, x)

    def _backward_of_jvp(self, ctx: Any, *cotangents: Tensor | None) -> Named:
        x, h = saved(ctx), dict(zip(self.grads, cotangents, strict=True))
        u = {field: x[f"{field}_tangent"] for field in self.fields}
        x["need_lse"] = u.get("lse") is not None
        if not has_any(h):
            return {}
        by_tangents = {f"{field}_tangent": y for field, y in self.gradients(x, h).items()}
        _, by_fields = self.second_gradients(x, h, u)
        return of_tensors(by_fields | by_tangents, x)

    @staticmethod
    def _with_lse(x: Named, u: Named) -> Named:
        """An lse that has a gradient of its own is an input, as X_jvp and X_second see by its tangent."""
        return u | {"lse": torch.zeros_like(x["lse"])} if x.get("need_lse") and u["lse"] is None and has_any(u) else u


def _derivative_inputs(backward_type: Any, fields: Sequence[str], grads: Collection[str], one_sweep: bool) -> tuple[Any, Any]:
    """Returns the inputs of X_jvp and of X_second, two NamedTuples. Both begin with the tangents `<field>_tangent` of `fields`,
    None for zeros. Then come the fields of X_backward: for X_jvp without `grads`, those of X's outputs. An X_second in one sweep
    also takes the tangents of `grads`, and `with_jvp`."""
    stem, types = backward_type.__name__.removesuffix("BackwardInputs"), get_type_hints(backward_type)
    tangents: list[tuple[str, Any]] = [(f"{field}_tangent", Tensor | None) for field in fields]
    of_grads: list[tuple[str, Any]] = [(f"{field}_tangent", Tensor | None) for field in grads] if one_sweep else []
    rest = [(field, kind) for field, kind in types.items() if not field.startswith("need_")]
    jvp = NamedTuple(f"{stem}JvpInputs", [*tangents, *[each for each in rest if each[0] not in grads]])  # type: ignore[misc]
    return jvp, NamedTuple(f"{stem}SecondInputs", [*tangents, *of_grads, *rest, *[("with_jvp", bool)] * one_sweep])


def _items(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Returns a function that takes a tuple and returns these items of it, without Python: a pass waits for it."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})" if count > 1 else "Tensor"


def flat(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def has_any(x: Named) -> bool:
    return any(y is not None for y in x.values())


def plus(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The sum; None, and a tensor without elements, which stands for it, is zero."""
    if x is None or y is None or x.shape != y.shape:
        return y if x is None or not x.numel() else x
    return x + y


def named_inputs(kind: Any, x: Named, u: Named | None = None) -> Any:
    """The inputs of an operator from the arguments of another; all gradients but that of an lse are needed."""
    arguments = {"need_lse": False} | x | {f"{field}_tangent": y for field, y in (u or {}).items()}
    arguments |= {field: True for field in kind._fields if field.startswith("need_") and field != "need_lse"}
    return schema_of(kind).from_named(arguments)


def of_tensors(gradients: Named, x: Named) -> Named:
    """The gradients of those arguments that are tensors; one without elements stands for None."""
    pairs = [(name, x[name], y) for name, y in gradients.items() if y is not None]
    return {name: y for name, of, y in pairs if isinstance(of, Tensor) and y.shape == of.shape}


def save(ctx: Any, inputs: Any, outputs: Any) -> None:
    x = named(inputs)
    ctx.save_for_backward(*[y if isinstance(y, Tensor) else None for y in x.values()])
    ctx.options = {name: None if isinstance(y, Tensor) else y for name, y in x.items()}


def saved(ctx: Any) -> Named:
    """The arguments that `save` saved, by name."""
    pairs = zip(ctx.saved_tensors, ctx.options.items(), strict=True)
    return {name: option if x is None else x for x, (name, option) in pairs}


def _raises(why: str) -> Callable[..., Any]:
    def jvp(inputs: Any, tangents: Any, outputs: Any) -> Any:
        raise RuntimeError(f"{why}; use reverse mode inside (torch.func.hessian, or jvp of grad)")

    return jvp
