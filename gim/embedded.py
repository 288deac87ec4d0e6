"""What the ids of a forward become: embeddings whose gradient is asked for, once, and by one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from gim.intercept.frames import running
from gim.intercept.session import Session
from gim.parts.anatomy import Anatomy

#: What torch says of code that writes into a leaf. Few models do so to their embeddings: a copy is as large as they.
LEAF_WRITTEN = "a leaf Variable that requires grad is being used in an in-place operation"

Found = TypeVar("Found")


def copied_if_written(parts: Anatomy, run: Callable[[], Found]) -> Found:
    """What ``run`` gives; run again, and from then on once, where the model writes into its embeddings."""
    try:
        return run()
    except RuntimeError as error:
        if parts.habits.writes or LEAF_WRITTEN not in str(error):
            raise
    parts.habits.writes = True
    return run()


class Leaf:
    """The embeddings of a forward's ids.

    Args:
        ids: ``[B, T]``, what the model is given.

    Attributes:
        made: the embeddings ``[B, T, d]``, each time that the model embedded something.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self.made: list[torch.Tensor] = []
        self._ids = ids
        self._given: list[torch.Tensor] = []
        flat = ids.flatten()
        # As positions and kinds of tokens may be, which are no ids.
        self._is_even = ids.is_meta or bool((flat.diff() == flat.diff()[:1]).all())

    def embed(self, output: torch.Tensor, *given: Any) -> torch.Tensor:
        """What the model's embedding puts out of what it was given, asking for its gradient."""
        self._given += [one for one in given if isinstance(one, torch.Tensor)]
        leaf = output.detach().requires_grad_(True)
        self.made.append(leaf)
        return leaf

    def only(self) -> torch.Tensor:
        """The one time.

        Raises:
            ValueError: there were others or none, or of other ids, as far as that is known.
        """
        if len(self.made) != 1:
            raise ValueError(
                f"model must embed its input ids once, through get_input_embeddings(); it did so {len(self.made)} times"
            )
        leaf = self.made[0]
        if leaf.shape[:-1] != self._ids.shape:
            what = f"{tuple(leaf.shape[:-1])} of them"
        elif any(not one.is_meta and not torch.equal(one.to(self._ids), self._ids) for one in self._given):
            what = "other ids, or these in another order"
        else:
            return leaf
        raise ValueError(
            f"model must embed its input ids as they are, of shape {tuple(self._ids.shape)}; it embedded {what}"
        )

    def is_of(self, index: torch.Tensor) -> bool:
        """Whether rows that are looked up by these numbers are those of the ids."""
        if index.numel() != self._ids.numel() or index.is_meta:
            return False
        if index.data_ptr() == self._ids.data_ptr():
            return True
        return not self._is_even and torch.equal(index.flatten().to(self._ids), self._ids.flatten())


@contextmanager
def leaf(parts: Anatomy, session: Session, ids: torch.Tensor) -> Iterator[Leaf]:
    """Inside, the output of the embedding is a leaf, or a copy of one for a model that writes into it. That the ids are
    looked up in another table too is noted, and an error outside of the model that embeds them."""
    made = Leaf(ids)

    def replace(_: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if not session.is_followed_here():
            return output
        found = made.embed(output, *inputs[:1])
        return found.clone() if parts.habits.writes else found

    def see(index: torch.Tensor) -> None:
        modules = [frame.module for frame in running.frames]
        if parts.embedding in modules or not made.is_of(index):
            return
        name = running.frames[-1].name or type(parts.model).__name__
        what = f"{name} looks up the ids beside the model's embedding, and what a token does by it is in no score"
        core = next(iter(parts.cores), parts.model)
        if core not in modules:
            whole, inner = type(parts.model).__name__, type(core).__name__
            raise ValueError(f"{what}: {whole} reads them outside of its {inner} too")
        session.report.note(what)

    session.see_lookup = see
    try:
        with parts.embedding.register_forward_hook(replace):
            yield made
    finally:
        session.see_lookup = None
