"""Circuits: which writer speaks to which reader of the residual stream, and how much of a model that explains."""

from gim.circuits.curve import MIB_SIZES, Curve
from gim.circuits.graph import Graph
from gim.circuits.metrics import logit_difference, probability_difference
from gim.circuits.pairs import Pair, read
from gim.circuits.result import Circuit, Edge
from gim.circuits.run import CircuitInterrupted, CurveInterrupted, attribute

__all__ = [
    "MIB_SIZES",
    "Circuit",
    "CircuitInterrupted",
    "Curve",
    "CurveInterrupted",
    "Edge",
    "Graph",
    "Pair",
    "attribute",
    "logit_difference",
    "probability_difference",
    "read",
]
