"""Circuits: which writer speaks to which reader of the residual stream, and how much of a model that explains."""
