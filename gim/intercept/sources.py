"""Questions whose answer is a walk through autograd's graph: do two values have a common source, is one a statistic of
another, where do queries and keys flow into scores."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from gim.intercept.flow import CONSTANT, of_edge
from gim.intercept.nodes import kind_of


def share_a_source(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether linear maps and functions number by number lead to two values from one source."""
    starts: list[Any] = [get_gradient_edge(one).node for one in (first, second)]
    sides: list[set[Any]] = [{one} for one in starts]
    fronts = [[one] for one in starts]
    while fronts[0] or fronts[1]:
        for side in (0, 1):
            front: list[Any] = []
            for node in fronts[side]:
                if node in sides[1 - side]:
                    return True
                if _clean(node):
                    new = [one for one in _flowing(node) if one not in sides[side]]
                    sides[side].update(new)
                    front += new
            fronts[side] = front
    return bool(sides[0] & sides[1])


def is_statistic(small: torch.Tensor, root: int) -> bool:
    """Whether a value is a function of linear maps and sums of what a root was bent to: ``rsqrt((x * x) @ mean)``."""
    todo: list[Any] = [get_gradient_edge(small).node]
    nonlinear, seen = False, set[Any]()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        kind, _ = kind_of(node)
        known = of_edge(node, 0)
        if kind == "linear":
            inputs = [of_edge(*edge) for edge in node.next_functions if edge[0] is not None]
            inputs = [one for one in inputs if not one.constant]
            if any(one.root != root for one in inputs):
                return False
            nonlinear |= len(inputs) > 1 or any(one.bend == 2 for one in inputs)
        elif known.reduced is not None and known.reduced.root == root:
            nonlinear |= known.reduced.nonlinear
        elif kind in ("same", "piece", "pointwise", "product", "reduction"):
            todo += _flowing(node)
        else:
            return False
    return nonlinear


def _flowing(node: Any) -> list[Any]:
    """The nodes through which an input flows into one."""
    inputs: list[tuple[Any, bool]] = []
    for one, output in node.next_functions:
        known = CONSTANT if one is None else of_edge(one, output)
        if not known.constant:
            inputs.append((one, known.rows))
    return [one for one, rows in inputs if not rows] or [one for one, _ in inputs]


def _clean(node: Any) -> bool:
    """Whether the way to a source may go on through a node: not through attention, or a product of two values, or a
    running sum."""
    kind, name = kind_of(node)
    if kind in ("attention", "softmax", "leaf") or name in ("gated", "Cumsum", "Cumprod"):
        return False
    if kind == "linear":
        return len(_flowing(node)) < 2
    return not (kind == "product" and of_edge(node, 0).factors)


def meetings(scores: torch.Tensor) -> list[Any]:
    """The nodes where queries and keys flow into scores: matrix products of one with the other, and what else is a
    function of either alone, as its length is, or its product with embeddings of positions. What is computed from the
    input by other ways, a bias or a temperature, is none of them."""
    start: Any = get_gradient_edge(scores).node
    products = [one for one in _behind(start, frozenset()) if _meets(one)]
    roots = frozenset(of_edge(*edge).root for one in products for edge in one.next_functions if edge[0] is not None)
    behind = [one for one in _behind(start, roots - {0}) if one not in products]
    others = [one for one in behind if _is_of(one, roots - {0})]
    made = _made_of(products) if others else set()
    if made.isdisjoint(others):
        return products + others
    # What a query or a key is made of has its factor from where they meet, and what else reads it gives it another.
    readers = [one for one in behind if one not in made and made.issuperset(_flowing(one))]
    return products + [one for one in others if one not in made] + readers


def _made_of(products: list[Any]) -> set[Any]:
    """The nodes that lead to products of queries and keys by linear maps and functions number by number."""
    todo = [node for one in products for node in _flowing(one)]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if _clean(node):
            new = [one for one in _flowing(node) if one not in seen]
            seen.update(new)
            todo += new
    return seen


def adds(node: Any) -> bool:
    """Whether a matrix product adds what depends on the input too."""
    (first, output), name = node.next_functions[0], kind_of(node)[1]
    return name in ("Addmm", "Baddbmm", "Addbmm") and first is not None and not of_edge(first, output).constant


def _meets(node: Any) -> bool:
    """Whether a node is a matrix product of two values that both depend on the input, and neither is of scores."""
    return _multiplies(node) and not any(map(_is_of_scores, _flowing(node)))


def _multiplies(node: Any) -> bool:
    return kind_of(node)[0] == "linear" and len(_flowing(node)) > 1


def _is_of_scores(node: Any) -> bool:
    """Whether a node computes a function, number by number or by a softmax, of scores."""
    todo, seen = [node], {node}
    while todo:
        one = todo.pop()
        if _multiplies(one) and of_edge(one, 0).scores:
            return True
        if kind_of(one)[0] in ("same", "piece", "pointwise", "product", "softmax"):
            new = [each for each in _flowing(one) if each not in seen]
            seen.update(new)
            todo += new
    return False


def _is_of(node: Any, roots: frozenset[int]) -> bool:
    """Whether a node computes a function of one of some values alone."""
    known = of_edge(node, 0)
    if kind_of(node)[0] == "linear":
        inputs = [of_edge(*edge) for edge in node.next_functions if edge[0] is not None]
        return any(one.root in roots for one in inputs if not one.constant)
    return (known.root if known.reduced is None else known.reduced.root) in roots


def _behind(start: Any, roots: frozenset[int]) -> list[Any]:
    """The nodes that a value was computed from, as far as products of two values, maps by weights and functions of
    roots."""
    todo, seen = [start], {start}
    found: list[Any] = []
    while todo:
        node = todo.pop()
        found.append(node)
        kind, _ = kind_of(node)
        ends = kind in ("leaf", "source", "attention", "opaque") or _meets(node) or _is_of(node, roots)
        if ends or (kind == "linear" and not _multiplies(node) and not of_edge(node, 0).scores):
            continue
        new = [one for one in _flowing(node) if one not in seen]
        seen.update(new)
        todo += new
    return found
