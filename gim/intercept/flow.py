"""What a value was computed from, read off the graph that autograd has recorded for it.

The graph knows every way of writing an operation by one name, passes through views and in-place writes, and ends at
detached tensors. What is learned of a node is kept as a few words in the node's own metadata, so it is learned once and
ends with the graph; no tensor and no node is held.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.multiprocessing.reductions import StorageWeakRef

from gim.intercept.nodes import WHERE, in_words, kind_of

#: Key of a node's metadata under which its values are described.
_KEY = "gim"
#: Of the node of a linear map, what tells its weight from others; of any node, the numbers of its outputs.
_WEIGHT, _IDENTITY = "gim weight", "gim identity"

_numbers = itertools.count(1)

#: Rows that are chosen by numbers: of a table of weights they are as much an input as an embedding is.
_LOOKUPS = frozenset(["Index", "IndexSelect", "Gather", "Take"])
#: What gives entries in the order they have.
_CUTS = frozenset(["Slice", "Select", "Split", "SplitWithSizes", "Unbind"])
#: Reductions that are nonlinear in themselves.
_POWERS = frozenset(["Norm", "LinalgVectorNorm", "Var", "Std", "VarMean", "StdMean", "Logsumexp", "Prod"])
#: Number by number and linear: a sum with a constant, a mask, a factor.
_AFFINE = frozenset(["Add", "Sub", "Rsub", "Neg", "MaskedFill", "Lerp", "Fill", "Zero", "NanToNum"])
#: Number by number, straight in pieces: what clips is no activation beside one that bends.
_CLIPS = frozenset(["Clamp", "ClampMin", "ClampMax", "Where", "Hardtanh", "Minimum", "Maximum"])
#: Kinds whose result is a root of its own wherever an input flows into them.
_BEGINS = frozenset(["attention", "norm", "opaque"])
#: Kinds that apply weights to data.
_APPLIES = frozenset(["linear", "opaque", "norm"])


class Reduced(NamedTuple):
    """What a statistic was taken of: the value of which it is a sum or an extreme, 0 where it is neither, the root, and
    whether it is a nonlinear function of that; and how many numbers it was, before it met a weight."""

    value: int
    root: int
    nonlinear: bool
    size: int


class Origin(NamedTuple):
    """What is known of a value.

    Args:
        number: of this value.
        root: the number of the value of which this one is a function, number by number.
        path: which piece of the root it is a function of.
        constant: no input flows into it: made of parameters and detached tensors.
        rows: chosen from a table of weights, and nothing but number by number since: an input where it goes alone, as
            the embeddings do; a weight beside one, as an expert's rows are.
        bend: what happened to it number by number since its root: 0 linear, 1 clipped, 2 an activation.
        reduced: for a statistic that is still broadcast, what it was taken of.
        scores: a product of two matrices that both depend on the input, and nothing but number by number, a norm or a
            convolution over their rows and columns since.
        weights: of softmaxes of scores, which a rule has replaced, or of a sum of such, their numbers.
        factors: of a product of several roots, each root and path with its branch: ``"gate"``, ``"up"``, or ``""``
            where the product is not known to be gated.
    """

    number: int
    root: int
    path: tuple[Any, ...] = ()
    constant: bool = False
    rows: bool = False
    bend: int = 0
    reduced: Reduced | None = None
    scores: bool = False
    weights: tuple[int, ...] = ()
    factors: tuple[tuple[int, tuple[Any, ...], str], ...] = ()

    @property
    def place(self) -> tuple[int, tuple[Any, ...]]:
        """The root and the piece of it."""
        return self.root, self.path


CONSTANT = Origin(0, 0, constant=True)


def _new(**changes: Any) -> Origin:
    number = next(_numbers)
    return Origin(number, number, **changes)


def origin(tensor: torch.Tensor) -> Origin:
    """What is known of a tensor."""
    if not tensor.requires_grad:
        return CONSTANT
    node = tensor.grad_fn
    return _leaf(_node(tensor)) if node is None else of_edge(node, tensor.output_nr)


def _node(tensor: torch.Tensor) -> Any:
    """The node of a tensor, which a tensor of a class of somebody's own would be asked for by a view of it."""
    if type(tensor) in (torch.Tensor, nn.Parameter):
        return get_gradient_edge(tensor).node
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(tensor).node


def mark(tensor: torch.Tensor, found: Origin) -> Any:
    """Say what a tensor is, where somebody knows better than the graph tells; gives what holds it."""
    node = _node(tensor)
    node.metadata.setdefault(_KEY, {})[tensor.output_nr] = found
    return node


def take_as_inputs(given: Iterable[torch.Tensor]) -> list[Any]:
    """Say that tensors are inputs, also where they are parameters of somebody's or were computed from such alone.

    Returns:
        What says so, as long as it is held or a graph leads to it.
    """
    return [mark(one, _new()) for one in given if one.requires_grad and origin(one).constant]


def take_as_weights(given: Iterable[torch.Tensor]) -> list[Any]:
    """Say that tensors are weights, though they are no parameters or were computed: as ``functional_call`` puts them.

    Returns:
        As :func:`take_as_inputs`.
    """
    return [mark(one, CONSTANT) for one in given if one.requires_grad and not isinstance(one, nn.Parameter)]


def _leaf(node: Any) -> Origin:
    held = node.metadata.get(_KEY)
    if held is None:
        held = node.metadata[_KEY] = {0: CONSTANT if isinstance(node.variable, nn.Parameter) else _new()}
    return held[0]


def of_edge(node: Any, output: int) -> Origin:
    """What one output of a node is."""
    found = _known_edge(node, output)
    if found is None:
        _walk(node)
        found = _known_edge(node, output)
        assert found is not None, "what was walked is known"
    return found


def _known_edge(node: Any, output: int) -> Origin | None:
    """What one output of a node is; None where the node is not described yet."""
    held = node.metadata.get(_KEY)
    if held is None or 0 not in held:
        return _leaf(node) if kind_of(node)[0] == "leaf" else None
    found: Origin | None = held.get(output)
    if found is None:
        found = held[0]
        kind, name = kind_of(node)
        if kind == "piece" and not found.constant:
            found = _piece(node, held["of"], name, output)
        elif kind == "each":
            one, place = node.next_functions[output]
            found = CONSTANT if one is None else of_edge(one, place)
        held[output] = found
    return found


def _walk(node: Any) -> None:
    """Describe a node and what it needs that is not described yet, without recursion: graphs are deep."""
    todo = [node]
    while todo:
        top = todo[-1]
        held = top.metadata.setdefault(_KEY, {})
        if 0 in held:
            todo.pop()
            continue
        kind, name = kind_of(top)
        inputs: list[Origin | None] = []
        waiting = []
        for one, output in top.next_functions:
            found = None if one is None else _known_edge(one, output)
            inputs.append(found)
            if one is not None and found is None:
                waiting.append(one)
        if waiting and _is_root(kind, top.next_functions):
            waiting = []
        elif waiting and (kind in _BEGINS or name == "gated"):
            # All that counts is whether an input flows in by any way; of attention, that of the values is the shortest.
            waiting = [] if any(one is not None and not one.constant for one in inputs) else waiting[-1:]
        if waiting:
            todo += waiting
            continue
        todo.pop()
        held[0] = _describe(top, inputs)
        if kind == "piece":
            held["of"] = next((one for one in inputs if one is not None and not one.constant), CONSTANT)


def _is_root(kind: str, edges: Any) -> bool:
    """Whether a node's result is a root whatever its one input with a gradient is: beside a weight that asks for none,
    even data that asks for none counts as an input, as :func:`_describe` has it."""
    return kind in _APPLIES and None in [one for one, _ in edges[:2]] and sum(one is not None for one, _ in edges) == 1


def _describe(node: Any, inputs: list[Origin | None]) -> Origin:
    """What a node's first output is."""
    kind, name = kind_of(node)
    live = [one for one in inputs if one is not None and not one.constant]
    if live[1:]:
        live = [one for one in live if not one.rows] or live
    if kind == "source":
        return _new()
    if not live:
        if name in _LOOKUPS and inputs[0] is not None:
            return _new(rows=True)
        # A weight applied to data that asks for no gradient: the data is an input all the same.
        return _mapped(node) if kind in _APPLIES and None in inputs[:2] else CONSTANT
    if kind == "each":
        return inputs[0] or CONSTANT
    first = live[0]
    if kind == "same":
        return first if _WEIGHT not in node.metadata or first.scores else _mapped(node)
    if kind == "piece":
        return _piece(node, first, name, 0)
    if kind == "linear":
        matrices = [one for one in live if one.number]
        if len(matrices) >= 2 and name not in ("Convolution", "Linear"):
            return _mapped(node)._replace(scores=not any(one.weights or one.scores for one in matrices))
        planes = name == "Convolution" and len(node._input_metadata[0].shape) > 3
        return _mapped(node)._replace(scores=planes and first.scores)
    if kind == "reduction":
        nonlinear = first.bend > 0 or name in _POWERS or bool(first.factors)
        value = 0 if name in _POWERS else first.number
        # A statistic of a window is one, however many windows there are.
        size = 1 if "Pool" in name else prod(node._input_metadata[0].shape)
        return _new(reduced=Reduced(value, first.root, nonlinear, size), scores=first.scores, rows=first.rows)
    if kind == "softmax":
        return first._replace(number=next(_numbers), bend=2, scores=False)
    if kind == "product" and name != "gated":
        bent = name == "Div" and len(live) == 1 and inputs[1] is first  # a constant over it
        return _product(live, 2 if bent else 0)
    if kind == "pointwise":
        found = _pointwise(name, live)
        if name not in WHERE or inputs[1:]:
            return found
        return found._replace(number=hash((first.number, in_words(node, name, 0))))
    if kind == "join":
        bend, scores = max(one.bend for one in live), any(one.scores for one in live)
        return _mapped(node)._replace(bend=bend, scores=scores, rows=first.rows)
    return _new(scores=kind == "norm" and first.scores)


def tell_weight(result: Any, operands: Sequence[Any], axis: int | None, *how: Any) -> None:
    """Say by which weight a linear map was made whose result has been computed.

    Args:
        result: of the map.
        operands: what it was applied to, and the weight, in either order.
        axis: of a product of matrices, over which of the last two axes of a weight that comes second it sums, -1 or -2.
        how: what any other map depends on besides, but for what it adds.
    """
    node: Any = result.grad_fn
    data, weight = operands
    if node is None:
        return
    if type(weight) is not nn.Parameter:
        if weight.requires_grad and not origin(weight).constant:
            data, weight, axis = weight, data, axis and -1
        if type(weight) not in (torch.Tensor, nn.Parameter) or (weight.requires_grad and not origin(weight).constant):
            return
    base: Any = None if axis is None else weight._base
    if type(weight) is nn.Parameter:
        held: Any = weakref.ref(weight)
    elif axis is not None and type(base) is nn.Parameter and _is_turned(weight, base):
        held, axis = weakref.ref(base), -3 - axis
    else:
        # Another weight can come to lie where one has been, as those do that are made anew for each call.
        held = StorageWeakRef(weight.untyped_storage()), 0 if weight.is_inference() else weight._version
        held = *held, weight.storage_offset(), weight.shape, weight.stride()
    if data.requires_grad:  # else the way to an input leads to the weight alone, whatever it is applied to
        node.metadata[_WEIGHT] = (held, axis) if axis is not None else (operands[0] is weight, held, *how)


def _is_turned(view: torch.Tensor, base: torch.Tensor) -> bool:
    """Whether a view of a matrix is all of it, with rows and columns exchanged."""
    return base.dim() == 2 and view.shape == base.shape[::-1] and view.stride() == base.stride()[::-1]


def _mapped(node: Any) -> Origin:
    """The root that a linear map or a join begins: the same for one map of one value, however often it is computed."""
    number, _ = _identity((node, 0))
    return Origin(number, number)


def _identity(edge: tuple[Any, int]) -> tuple[int, dict[Any, int]]:
    """The number of what a node computed, the same for the same operation on the same values, and the table of those.

    Values that are computed from one another share a table, which goes with the last of their nodes.
    """
    todo = [edge]
    while todo:
        node, output = todo[-1]
        known = node.metadata.setdefault(_IDENTITY, {})
        if output in known:
            todo.pop()
            continue
        how, edges = _operation(node, output)
        waiting = [one for one in edges if one[1] not in one[0].metadata.get(_IDENTITY, {})]
        if waiting:
            todo += waiting
            continue
        todo.pop()
        inputs = [one.metadata[_IDENTITY][place] for one, place in edges]
        if not inputs:
            known[output] = next(_numbers), {}
        elif how is None:
            known[output] = inputs[0]  # the same numbers
        else:
            table = inputs[0][1]
            key = (how, *(number for number, _ in inputs))
            known[output] = table.setdefault(key, next(_numbers)), table
    found: tuple[int, dict[Any, int]] = edge[0].metadata[_IDENTITY][edge[1]]
    return found


def _operation(node: Any, output: int) -> tuple[Any, list[tuple[Any, int]]]:
    """What a node does, None for nothing, and to which values; to none where another may do the same by other means."""
    weight = node.metadata.get(_WEIGHT)
    kind, name = kind_of(node)
    while weight is not None and kind == "same":  # a view of the map's result
        node = node.next_functions[0][0]
        kind, name = kind_of(node)
    edges = list(node.next_functions)
    if kind == "same" and edges[0][0] is not None:
        return None, edges[:1]
    if kind == "each" and edges[output][0] is not None:
        return None, edges[output : output + 1]
    if kind == "linear":
        live = [one for one in edges if one[0] is not None]
        if live[1:]:
            live = [one for one in live if not of_edge(*one).constant]
        if weight is not None and live and not live[1:]:
            return weight, live
        if weight is None and name in ("Mm", "Bmm") and len(live) == len(edges) == 2:
            return name, live
    elif edges and all(one is not None for one, _ in edges) and (said := in_words(node, name, output)) is not None:
        return said, edges
    return None, []


def _piece(node: Any, whole: Origin, name: str, output: int) -> Origin:
    before, place = node.next_functions[0]
    if name in _CUTS and prod(before._input_metadata[place].shape) == prod(node._input_metadata[output].shape):
        return whole  # an axis of one entry that is taken away, or all of another
    step = in_words(node, name, output) or (name, node._sequence_nr(), output)
    return whole._replace(number=hash((whole.number, step)), path=(*whole.path, step), reduced=None)


def same_root(live: list[Origin]) -> Origin | None:
    """The value that others are statistics or functions of, where there is one."""
    first = next((one for one in live if one.reduced is None), live[0])
    root = first.root if first.reduced is None else first.reduced.root
    for one in live:
        if one.place != first.place and not (one.reduced is not None and one.reduced.root == root):
            return None
    return first


def _product(live: list[Origin], bend: int) -> Origin:
    weights = next((one.weights for one in live if one.weights), ())
    if len(live) == 1:
        return live[0]._replace(number=next(_numbers), bend=max(live[0].bend, bend))
    same = same_root(live)
    if same is not None:
        statistics = [one.reduced for one in live if one.reduced is not None]
        if len(statistics) == len(live):
            return same._replace(number=next(_numbers), bend=2, reduced=statistics[0]._replace(nonlinear=True))
        return same._replace(number=next(_numbers), bend=same.bend if statistics else 2)
    found: dict[tuple[int, tuple[Any, ...]], str] = {}
    for one in live:
        for root, path, branch in one.factors or ((*one.place, ""),):
            found[root, path] = found.get((root, path)) or branch
    factors = tuple((*place, branch) for place, branch in found.items())
    return _new(factors=factors, weights=weights, rows=live[0].rows, scores=any(one.scores for one in live))


def _pointwise(name: str, live: list[Origin]) -> Origin:
    step = 0 if name in _AFFINE else 1 if name in _CLIPS else 2
    same = same_root(live)
    if same is None:
        weights = {number for one in live for number in one.weights} if all(one.weights for one in live) else set()
        scores = any(one.scores for one in live)
        return _new(bend=step, scores=scores, rows=live[0].rows, weights=tuple(sorted(weights)) if step == 0 else ())
    statistics = [one.reduced for one in live if one.reduced is not None]
    reduced = None
    if len(statistics) == len(live):
        reduced = statistics[0]._replace(nonlinear=any(one.nonlinear for one in statistics))
    bend = max(step, *(one.bend for one in live if one.place == same.place), 0)
    return same._replace(number=next(_numbers), bend=bend, reduced=reduced, scores=any(one.scores for one in live))
