"""Finds, by the flow of data through one forward pass, where a rule of GIM should act and none did.

The watch sees the operators of a forward below autograd. For each value it keeps a few words, by the storage it lies in
and its place there: what it was computed from, and how. It reads no number, changes no tensor and keeps none alive, so
it costs a few microseconds an operator, and no memory that grows with the tokens. It shares no code with what applies
rules, and learns from it one thing only: :mod:`gim.intercept.sites`. Operators of ``gim_kernels`` count as reached. A
rule that has acted where the watch sees an activation, or a softmax that is written out, is found as well.

Found are a softmax over keys, a norm (a statistic over features that scales what it was computed from), a gated product
(two factors that elementwise functions and linear maps lead to from one source, one of them past a nonlinearity), a
dropout that acts, an operator whose inside cannot be seen, one that gradients stop at, and a tensor that no operator
under the watch wrote. Noted are products and other meetings of branches that no rule is about, and what a user's hook
computes, which is left alone. Linear maps over quantised weights are linear maps. Gradients stop at those that are made
for inference: without a formula, without gradients, over numbers made integers. A ``detach`` is the model's own.

What the flow of data cannot tell: whether a product without a nonlinearity is an MLP's, so all are noted; ``exp`` of a
sum of logarithms; ``x / mean(x)``, which is taken for shares; what another library's operator computes, which is found
as one that cannot be seen into; and attention over keys and values that are weights, which is what a router is too, so
it is noted. One linear map of one value is one value, however often it is computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gim.applied import Part
from gim.intercept.callers import Callers
from gim.intercept.operators import (
    AFFINE,
    CLIPS,
    EXTREMES,
    LOOKUP,
    MATRIX_PRODUCTS,
    POWERS,
    QUOTIENTS,
    SCATTERS,
    TURNS,
    describe,
    may_lack_gradient,
)
from gim.intercept.places import Places
from gim.intercept.sites import SITES, Sites
from gim.intercept.values import (
    CONSTANT,
    CUT,
    MADE,
    ROUNDED,
    UNREAD,
    Tensors,
    Value,
    flatten,
    inside,
    is_real,
    join,
    spans,
)

#: What gradients stop at, though nobody's code says that they should.
STOPS = "operator without a gradient"
#: The rule that a kind of finding should have been reached by; the others concern every rule.
PART_OF: dict[str, Part] = {"softmax over keys": "attention", "norm": "norm", "gated product": "gated_mlp"}
#: Where a rule has acted on what it is not about.
NO_GATE, NO_NORM = "activation taken for a gate", "softmax taken for a norm"
PART_OF |= {NO_GATE: "gated_mlp", NO_NORM: "norm"}


@dataclass(frozen=True)
class Finding:
    """One place where something was found, in one call.

    Args:
        kind: what it is: a key of :data:`PART_OF`, "dropout", "opaque operator", "tensor written out of sight",
            "operator without a gradient", or what is only noted.
        module: qualified name of the module whose code ran.
        place: ``file.py:123`` of that code.
        operator: what was called there.
    """

    kind: str
    module: str
    place: str
    operator: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.operator}, {self.place})"


def _has_gradient(tensor: torch.Tensor) -> bool:
    """Whether autograd can send a gradient back through what a tensor came from."""
    node: Any = tensor.grad_fn
    # The name of torch's stand-ins for a formula that is not there: one raises, the other warns and sends nothing.
    return node is not None and not type(node).name(node).endswith("NotImplemented")


def _last_strides(tensor: torch.Tensor, axes: int) -> list[int]:
    """The strides of a tensor's last axes, but those of one place."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1][-axes:]


class Watch(TorchDispatchMode):
    """Inside, the operators of this thread are watched.

    Args:
        modules: of the model whose code runs, by name, itself first under the empty name; its parameters, buffers and
            what else it holds are constants.
        sites: what rules have reached.
        given: the arguments of its forward, whose tensors are inputs; None where they are not known, and every tensor
            that comes from outside is one.

    Attributes:
        found: what no rule reached, one for each call.
        noted: products with an activation that no rule is about.
        operators: how many operators ran.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What would keep a compiler out of every call costs as much as two operators, and a session keeps it out."""
        return False

    def __init__(
        self, modules: Mapping[str, nn.Module], sites: Sites = SITES, given: Iterable[Any] | None = None
    ) -> None:
        super().__init__()
        self._callers = Callers(modules)
        self._sites = sites
        self.found, self.noted = list[Finding](), list[Finding]()
        self.operators = 0
        self._known: dict[Any, tuple[str, str, bool]] = {}
        self._pieces: dict[Any, Value] = {}
        self._places = Places(modules, given or ())
        self._maps: dict[Any, Value] = {}  # what one linear map of one value gives
        self._asks = given is not None
        self._tensors: Tensors = []  # of the operator that is looked at
        self._cuts = False  # whether any value has been cut off from gradients
        self._blanks = False  # whether any memory has come that nobody filled
        self._withheld: list[Finding] = []  # of the operator that is looked at, whose results have no gradient
        self._hidden: list[tuple[weakref.ref[torch.Tensor], Value]] = []
        # What autograd has not yet seen of the operator that ran last, and what to say if it has no gradient.
        self._unproved: tuple[list[weakref.ref[torch.Tensor]], Finding] | None = None

    def __enter__(self) -> Watch:
        leaf = torch.zeros((), requires_grad=True, device="cpu")
        with torch.enable_grad():
            node = leaf.view(()).grad_fn
        self._began = node._sequence_nr() if node is not None else 0
        self._live = torch.is_grad_enabled()
        self._places.begin()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._prove()
        for reference, value in self._hidden:
            tensor = reference()
            if tensor is not None:
                self._reveal(tensor, value)
        self._places.end()
        self._pieces.clear()
        self._maps.clear()
        self._known.clear()

    # What tensors hold.

    def _of(self, tensor: torch.Tensor) -> Value:
        """What is known of a tensor."""
        value = self._places.of(tensor)
        if value is None:
            value = self._outside(tensor)
            self._places.know(tensor, value)
        return value

    def _outside(self, tensor: torch.Tensor) -> Value:
        """A tensor that no operator wrote: an input, a constant, or the work of code that cannot be watched."""
        if tensor.dim() == 0 or tensor.numel() == 0:
            return CONSTANT
        wrapped = [self._of(one) for one in inside(tensor)]
        if wrapped:
            return wrapped[0] if len(wrapped) == 1 else join(wrapped)
        if is_real(tensor):
            node: Any = tensor.grad_fn
            if node is not None and self._is_computed_here(node):
                self._report("tensor written out of sight", type(node).name(node))
            elif self._asks and self._live and not tensor.requires_grad:
                return CONSTANT  # no gradient flows through it
        return Value(dep=True)

    def _is_computed_here(self, node: Any) -> bool:
        """Whether a node is younger than the forward, or goes back to one that is or to what the forward was given:
        every thread counts its own nodes, and a part may run on a thread of its own."""
        given = {tensor.grad_fn for tensor in self._places.inputs()}
        todo, seen = [node], {node}
        while todo:
            one = todo.pop()
            if type(one).name(one) == "torch::autograd::AccumulateGrad":  # a leaf, which has no age
                if self._places.holds_values(one.variable):
                    return True
            elif one in given or one._sequence_nr() >= self._began:
                return True
            new = [other for other, _ in one.next_functions if other is not None and other not in seen]
            seen.update(new)
            todo += new
        return False

    # What operators do.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            kind, name, doubtful = self._known[func]
        except KeyError:
            kind, name = describe(func)
            doubtful = may_lack_gradient(kind, name)
            self._known[func] = kind, name, doubtful
        if kind == "composite":
            TorchDispatchMode.__enter__(self)
            try:
                return func.decompose(*args, **(kwargs or {}))
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        tensors, outs = Tensors(), Tensors()
        flatten(args, tensors)
        if kwargs:
            flatten(kwargs.values(), tensors)
        if self._unproved is not None:
            self._prove()
        values = [self._of(x) for x in tensors]  # before the operator overwrites any
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        flatten((out,), outs)
        if doubtful and self._live:
            self._doubt(name, tensors, values, outs)
        if kind == "same" and len(tensors) == 1 and len(outs) == 1:
            first = values[0]
            if first is not CONSTANT or self._places.at(outs[0]) is not None:
                floats = first.dep and is_real(tensors[0]) != is_real(outs[0])
                value = first
                if floats:  # made a condition or an index it has no gradient, but it knows its origin
                    value = self._without(Value(source=first.source), kind, name, tensors, values, outs)
                elif first.dep and not first.cut and not torch.is_grad_enabled():
                    value = self._without(first, kind, name, tensors, values, outs)
                if first.hidden:
                    self._reveal(tensors[0], first)
                if first.keys is not None and tensors[0].stride()[-1:] != outs[0].stride()[-1:] and name in TURNS:
                    value = value.like(keys=not first.keys)  # another axis is the last
                elif first.scores and name in TURNS:
                    last, before = _last_strides(outs[0], 1), _last_strides(tensors[0], 2)
                    if last != before[-1:]:
                        value = value.like(aside=not first.aside and last != before[:1], id=value.id)
                self._places.put(outs[0], value, False)  # as squeeze_, which writes no number
            return out
        self._blanks = self._blanks or kind == "blank"
        if self._blanks and kind not in UNREAD and any(v.blank for v in values):
            self._blank(name, tensors, values, outs, kwargs)
        self._tensors = tensors
        value = self._value(kind, name, args, tensors, values, outs)
        if self._cuts or not (torch.is_grad_enabled() or kind == "own"):
            value = self._without(value, kind, name, tensors, values, outs)
        if self._withheld or self._hidden:
            value = self._hide(kind, value, tensors, values, outs)
        if value.dep and value not in values:
            mixes = kind == "softmax over keys" or name == "attention" or (kind == "linear" and value.mixed)
            value.depth = max([one.depth for one in values], default=0) + mixes
        given = {id(x) for x in tensors}
        for index, one in enumerate(outs):
            mine = self._piece(value, (name, "output", index)) if value.dep and len(outs) > 1 else value
            if value.dep and not is_real(one) and any(map(is_real, tensors)):
                # An index or a condition has no gradient, but it knows its origin.
                mine = Value(source=value.source, cut=value.cut, map=value.map)
            self._places.put(one, mine, id(one) in given)
        return out

    def _without(
        self, value: Value, kind: str, name: str, tensors: Tensors, values: list[Value], outs: Tensors
    ) -> Value:
        """The same value, which knows whether it was cut off from gradients by code that says nothing of it: in a
        linear map that runs without them, as those of quantised layers do, or by numbers made integers."""
        if not self._live:
            return value
        grads, flows = torch.is_grad_enabled(), any(x.requires_grad for x in tensors)
        cut, lost = max((v.cut for v in values), default=0), next((v.map for v in values if v.map), None)
        if kind == "same" and (flows or cut) and is_real(tensors[0]) and outs and not any(map(is_real, outs)):
            cut = ROUNDED
        elif grads:
            used = kind not in UNREAD and name not in LOOKUP and any(map(is_real, outs))
            if used and lost:
                given = zip(tensors, values, strict=True)
                self.found += [v.map for x, v in given if v.map and is_real(x) and not x.requires_grad]
            if cut == ROUNDED and not flows and kind == "linear" and name != "cumsum" and not self._callers.is_hook():
                self._report(STOPS, f"{name} of rounded numbers")
            cut, lost = (cut, lost) if not flows and (cut == ROUNDED or not used) else (0, None)
        else:
            cut = max(CUT if flows else 0, cut)
            if kind == "linear" and name != "cumsum" and cut and lost is None and not self._callers.is_hook():
                lost = self._finding(STOPS, f"{name} without gradients")
        self._cuts = self._cuts or cut > 0
        # The same numbers, so known by the same number.
        return value if (cut, lost) == (value.cut, value.map) else value.like(cut=cut, map=lost, id=value.id)

    def _hide(self, kind: str, value: Value, tensors: Tensors, values: list[Value], outs: Tensors) -> Value:
        """The same value, which knows what was found on the way to it where no gradient flowed: a function of
        somebody's own, or code that a compiler made, gives the result a gradient afterwards."""
        found, self._withheld = self._withheld, []
        for tensor, one in zip(tensors, values, strict=True):
            if one.hidden:
                self._reveal(tensor, one)
                found += [each for each in one.hidden if each not in found]
        if (torch.is_grad_enabled() or kind == "own") and any(x.requires_grad for x in tensors):
            found = []  # what is a constant to an operator that has a gradient stays one
        if tuple(found) == value.hidden:
            return value
        value = value.like(hidden=tuple(found), id=value.id)
        self._hidden += [(weakref.ref(one), value) for one in outs if found]
        return value

    def _reveal(self, tensor: torch.Tensor, value: Value) -> None:
        """Find what was hidden of a tensor, where it has a gradient that no operator under the watch gave it."""
        if tensor.requires_grad and tensor.grad_fn is not None:
            self.found += [one for one in value.hidden if one not in self.found]

    def _doubt(self, name: str, tensors: Tensors, values: list[Value], outs: Tensors) -> None:
        """Remember to ask for the gradient of an operator's results once autograd has seen them."""
        flows = any(v.dep and x.requires_grad for x, v in zip(tensors, values, strict=True))
        real = [weakref.ref(one) for one in outs if is_real(one)]
        if flows and real and torch.is_grad_enabled() and not self._callers.is_hook():
            self._unproved = real, self._finding(STOPS, name)

    def _prove(self) -> None:
        """Find the operator that ran last where autograd has nothing to send back through it."""
        if self._unproved is None:
            return
        references, finding = self._unproved
        self._unproved = None
        left = [tensor for reference in references if (tensor := reference()) is not None]
        if left and not any(_has_gradient(tensor) for tensor in left):
            self.found.append(finding)

    def _blank(self, name: str, tensors: Tensors, values: list[Value], outs: Tensors, named: Any) -> None:
        """Memory is read that no operator under the watch has filled."""
        if named and named.get("beta", 1) == 0:
            return  # addmm and its like leave their first argument unread
        for tensor, value in zip(tensors, values, strict=True):
            if value.blank and is_real(tensor) and tensor.numel() and not any(one is tensor for one in outs):
                self._report("tensor written out of sight", name)

    def _piece(self, value: Value, how: Any) -> Value:
        """A piece of a value; a piece of f(x) is f of the same piece of x."""
        if (value.id, how) not in self._pieces:
            new = self._pieces[(value.id, how)] = value.like()
            own = value.source == value.id
            new.source = new.id if own else self._pieces.setdefault((value.source, how), Value(dep=True)).id
        return self._pieces[(value.id, how)]

    def _value(self, kind: str, name: str, args: Any, tensors: Tensors, values: list[Value], outs: Tensors) -> Value:
        """What an operator's result is."""
        real = [v for x, v in zip(tensors, values, strict=True) if is_real(x)]
        deps = [v for v in real if v.dep]
        if not outs and kind != "opaque operator":
            return CONSTANT  # a number for Python has no gradient
        if not deps:
            return self._without_gradient(kind, name, values, outs)
        first = deps[0]
        if kind in MADE:
            return MADE[kind]
        if kind == "copy":
            return values[1]
        if kind == "same":
            return first
        if kind == "piece":
            others = [self._identity(one) for one in zip(tensors, values, strict=True) if one[1] is not first]
            return self._piece(first, (name, *others, *(str(a) for a in args if not isinstance(a, torch.Tensor))))
        if kind == "own":
            return Value(dep=True, mixed=name == "attention" or (first.mixed and "norm" in name))
        if kind == "linear":
            how = name, *(str(one) for one in args if not isinstance(one, torch.Tensor))
            return self._linear(how, list(zip(tensors, values, strict=True)), outs[0])
        if kind == "join":
            return self._maps.setdefault((name, str(args[1:]), *(v.id for v in values)), join(real, parts=real))
        if kind == "softmax":
            if first.scores:
                self._report("softmax over keys", name)
            return first.like(soft=True, act=True, top=name)
        if kind in ("softmax over keys", "opaque operator", "norm", "gated product"):
            if "batch_norm" not in name or True in args[5:6]:  # outside training its statistics are constants
                self._report(kind, name)
            mixed, scores = kind == "softmax over keys" or first.mixed, kind == "norm" and first.scores
            return Value(dep=True, mixed=mixed, act=kind == "opaque operator", scores=scores)
        if (name == "native_dropout" and args[1] > 0 and args[2] is not False) or any(v.random for v in values):
            self._report("dropout", name)
            return first
        if kind == "reduction":
            return self._reduced(name, first, outs[0])
        if kind == "product" or (name == "lerp" and len(tensors) == 3):
            given = zip(tensors, values, strict=True)
            # A mask has no gradient, whatever input it was computed from.
            pair = [(x, v if is_real(x) or not v.dep else Value(source=v.source)) for x, v in given][-2:]
            if name == "lerp":  # start + weight * (end - start)
                pair[0] = tensors[not values[0].dep], join(values[:2])
            result = self._product(name, pair, outs[0])
            return join([values[0], result]) if len(tensors) == 3 and values[0].dep else result
        return self._pointwise(name, values, deps, outs[0])

    def _without_gradient(self, kind: str, name: str, values: list[Value], outs: Tensors) -> Value:
        if kind in MADE:
            return MADE[kind]
        if kind == "opaque operator" and any(map(is_real, outs)) and any(v.dep for v in values):
            self._report(kind, name)
        if kind in ("same", "piece") and values and values[0].blank:
            return values[0]
        if kind == "random" or any(v.random for v in values):
            return Value(random=True)
        if not any(v.dep for v in values) or (any(map(is_real, outs)) and name not in LOOKUP):
            return CONSTANT
        return Value(dep=True)  # rows of a table, by the ids that came in; or such ids, rearranged

    def _linear(self, how: tuple[str, ...], given: list[tuple[torch.Tensor, Value]], out: torch.Tensor) -> Value:
        """A product of matrices, or of one and weights; ``how`` is the operator's name, and its numbers."""
        name = how[0]
        operands = given[name in ("addmm", "baddbmm", "addmv") :]
        pair = [one for one in operands if one[1].dep][:2]
        if len(pair) < 2:
            return self._mapped(how, operands, pair[0], out)
        (x, a), (y, b) = pair
        if name == "bmm" and x.shape[1] == x.shape[2] == y.shape[2] == 1:
            return self._product(name, pair, out)  # number by number, as einsum writes it
        stat = (0, a.source, "power", spans(out)) if a.source == b.source else None
        key = (how, out.shape, *map(self._identity, operands))
        scores = not (a.soft or b.soft or a.scores or b.scores)
        new = self._maps.setdefault(key, Value(dep=True, scores=scores, mixed=True, stat=stat))
        weights = next((v for v in (a, b) if v.scores and v.act and not v.soft), None)
        if weights and weights.top == "exp":  # whatever their sum is divided by, and when
            self._report("softmax over keys", f"exp, {name}")
        elif weights:
            self._report("attention that is no softmax", weights.top, to=self.noted)
        elif any(v.soft and v.keys and not v.scores for v in (a, b)):
            self._report("softmax over keys", f"{name} with keys of learned queries")
        elif any(v.soft and not v.scores for v in (a, b)):
            self._report("a mix by a softmax of no scores", name, to=self.noted)
        elif (a.act or b.act) and not (a.soft or b.soft):
            self._report("matrix product of branches, one of them bent", name, to=self.noted)
        return new

    def _mapped(
        self,
        how: tuple[str, ...],
        operands: list[tuple[torch.Tensor, Value]],
        of: tuple[torch.Tensor, Value],
        out: torch.Tensor,
    ) -> Value:
        """A value times weights: one map of one value is one value, however often it is computed."""
        (x, value), name = of, how[0]
        key = self._matrix(name, operands) or (how, out.shape, *map(self._identity, operands))
        if key in self._maps:
            return self._maps[key]
        if value.soft and not value.scores and len(operands) == 2:
            self._report("weights mixed by a softmax of no scores", name, to=self.noted)
        # Queries that are learned or given, times keys: their softmax is over places, and not over a map's outputs.
        new = Value(dep=True, keys=not operands[0][1].dep if len(operands) == 2 else None)
        new.scores = value.scores and (value.aside or ("convolution" in name and out.dim() > 3))
        self._maps[key] = new
        bent = value.act or name == "_cdist_forward"
        if (spans(out) < spans(x) and (bent or out.shape[-1:] == (1,))) or (bent and name == "cumsum"):
            new.stat = (0, value.source, "bent map" if bent else "map", spans(out))
        return new

    def _matrix(self, name: str, operands: list[tuple[torch.Tensor, Value]]) -> Any:
        """What a product with a matrix of weights computes, whichever way round and by whatever name."""
        if name not in MATRIX_PRODUCTS:
            return None
        first = not operands[0][1].dep
        (_, value), (weights, _) = operands[::-1] if first else operands
        address, (offset, sizes, strides), version = self._places.where(weights)
        axes = list(zip(sizes, strides, strict=True))
        summed = axes.pop(-1 if first or len(axes) == 1 else -2)
        kept = [one for one in axes if one[0] > 1 and one[1]]  # but what repeats
        return value.id, address, version, offset, summed, *kept

    def _identity(self, operand: tuple[torch.Tensor, Value]) -> Any:
        tensor, value = operand
        return value.id if value.dep else self._places.where(tensor)

    def _reduced(self, name: str, value: Value, out: torch.Tensor) -> Value:
        if "prod" in name and isinstance(value.parts, list):
            return self._product(name, [(out, part) for part in value.parts[:2]], out)
        if name == "logsumexp" and value.scores:
            self._report("softmax over keys", name)
        scores = (value.top in ("mul", "bmm") and name == "sum") or value.scores
        how = "power" if name in POWERS else "extreme" if name in EXTREMES else "sum"
        stat = (value.id, value.source, how, 0 if "pool" in name else spans(out))
        return Value(dep=True, scores=scores, mixed=value.mixed, stat=stat, act=value.act, top=name)

    def _product(self, name: str, pair: list[tuple[Any, Value]], out: Any) -> Value:
        """A product or quotient of two values, number by number: where gates, norms and written-out softmaxes are."""
        (x, a), (y, b) = pair if len(pair) == 2 else (pair[0], (out, CONSTANT))
        if not (a.dep and b.dep):
            one = a if a.dep else b
            condition = a.source == b.source and len(pair) == 2  # as in x * (x > 0)
            top = "exp" if one.top == "exp" and a.dep else name  # of exp(scores) times a mask
            return one.like(top=top, act=one.act or condition or (name in QUOTIENTS and b.dep))
        # Of two factors one of which has no gradient, that one was detached, and is a constant.
        flows = x.requires_grad == y.requires_grad or not torch.is_grad_enabled()
        if name in QUOTIENTS:
            b = b.like(act=True)
        elif a.stat and (not b.stat or a.stat[3] < b.stat[3]):
            x, a, y, b = y, b, x, a
        if b.stat and min(b.stat[3], spans(y)) < spans(out):
            scaled = self._scaled(name, a, b, flows)
            if scaled is not None:
                return scaled
        if a.source == b.source:  # an activation, written out
            if flows and self._sites.acts("gated_mlp"):
                self.found.append(self._finding(NO_GATE, name))
            return a.like(act=True, top=name, stat=a.stat if b.stat else None)
        if (a.act or b.act) and flows:
            if a.soft or b.soft or min(spans(x), spans(y)) < spans(out):
                self._report("one factor for a row", name, to=self.noted)
            elif a.mixed or b.mixed:
                self._report("gate of a mixer's output", name, to=self.noted)
            elif a.depth != b.depth:  # their common source lies before an attention
                self._report("gate across attention", name, to=self.noted)
            else:
                self._report("gated product", name)
        elif flows and min(spans(x), spans(y)) == spans(out) and not (a.stat or b.stat):
            self._report("product of branches, none of them bent", name, to=self.noted)
        return Value(dep=True, mixed=a.mixed or b.mixed, top=name, scores=a.scores or b.scores)

    def _scaled(self, name: str, a: Value, b: Value, flows: bool) -> Value | None:
        """A value ``a`` times or over a statistic ``b``: a softmax, shares, a norm; None where it is none of them."""
        assert b.stat is not None
        reduced, source, how, _ = b.stat
        if how[:3] == "sum" and (reduced == a.id or (a.top == "exp" and source == a.source and not a.stat)):
            if a.top == "exp" and a.scores and flows:
                self._report("softmax over keys", f"exp, sum, {name}")
            if a.top == "exp" and a.scores and self._sites.acts("norm"):
                self.found.append(self._finding(NO_NORM, name))
            return a.like(soft=a.top == "exp" or a.soft, act=True, top="share")
        if source != a.source or how == "map":
            return None
        if flows and how == "extreme":
            self._report("division by an extreme", name, to=self.noted)  # as before rounding to integers
        elif flows:
            self._report("norm", f"statistic, {name}")
        return Value(dep=True, mixed=a.mixed, scores=a.scores)

    def _pointwise(self, name: str, values: list[Value], deps: list[Value], out: torch.Tensor) -> Value:
        if name in SCATTERS and spans(out) < max(spans(x) for x, v in zip(self._tensors, values, strict=True) if v.dep):
            return self._reduced(name, deps[-1], out)  # sums of several
        first = next((v for v in deps if not v.stat), deps[0])
        # A value and a statistic of it, as in x - mean(x), are a function of that value.
        root = first.stat[1] if first.stat else first.source
        if any(v.source != first.source and not (v.stat and v.stat[1] == root) for v in deps):
            if name not in AFFINE and name not in CLIPS:
                self._report("branches that meet in a function", name, to=self.noted)
            new = join(deps, act=name not in AFFINE)
            new.top = "log" if all(v.top.startswith("log") for v in deps) else ""
            # Each of one axis with each of another, as distances and sums of queries and keys.
            new.scores |= all(spans(x) < spans(out) for x, v in zip(self._tensors, values, strict=True) if v.dep)
            return new
        if name.startswith("exp") and first.top == "log" and first.source == first.id:
            self._report("branches that meet in a function", f"{name} of a sum of logs", to=self.noted)
        chosen = name in ("where", "masked_fill") and any(v.source == first.source and not v.dep for v in values)
        linear = name in AFFINE and not chosen
        act = any(v.act for v in deps if v.source == first.source) or not linear
        stat = first.stat if all(v.stat for v in deps) else None
        soft = first.soft or any(v.top == "logsumexp" for v in deps)
        return first.like(act=act, top=first.top if linear else name, stat=stat, soft=soft)

    def _report(self, kind: str, operator: str, to: list[Finding] | None = None) -> None:
        """Enter a finding that no rule has reached."""
        part = PART_OF.get(kind)
        if part is not None and self._sites.acts(part):
            return
        flows = torch.is_grad_enabled() and any(x.requires_grad for x in self._tensors)
        if part is not None and self._live and not flows:
            if not self._callers.is_hook():
                self._withheld.append(self._finding(kind, operator))
            return  # where no gradient flows through an operator, no rule is missing
        if (part is not None or kind == "opaque operator") and to is None and self._callers.is_hook():
            kind, to = f"{kind} in a hook", self.noted
        (self.found if to is None else to).append(self._finding(kind, operator))

    def _finding(self, kind: str, operator: str) -> Finding:
        return Finding(kind, *self._callers.where(), operator)
