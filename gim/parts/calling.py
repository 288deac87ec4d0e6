"""How a model is called, through any wrapper: which rows it reads, which arguments reach it, where its logits are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from gim.parts.adapters import hugging_face, torch_modules
from gim.parts.layers import stream


@dataclass(frozen=True)
class Rows:
    """A batch in the alignment that every model can read: each row from the first column, padding behind it.

    So positions are counted as in the row alone, whatever they start from and whoever counts them, and ``[CLS]`` is in
    the first column. Columns that are padding in every row are left out. Or all rows in one, ``[1, L]``.

    Args:
        ids: ``[B, L]``; padding is the model's own padding token where it has one.
        mask: ``[B, L]`` of booleans, which tokens are a row's; None where all are.
        position_ids: ``[B, L]`` or None.
        shift: ``[B]``, how far left each row's tokens have come from where they were given; None for not at all.
        given: ``[B, T]``, the mask of the batch as it was given; None where nothing was padding.
        packed: whether all rows are in one.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    given: torch.Tensor | None = None
    packed: bool = False

    @classmethod
    def of(
        cls,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        pad_token_id: int | None = None,
    ) -> Rows:
        """The rows of a batch ``[B, T]`` whose mask leaves each row a run of tokens."""
        if mask is None:
            return cls(ids, None, position_ids)
        start, lengths = mask.to(torch.int32).argmax(-1), mask.sum(-1)
        columns = torch.arange(int(lengths.max()), device=ids.device)
        at = (start[:, None] + columns).clamp_max(ids.shape[1] - 1)
        inside = columns < lengths[:, None]
        aligned = ids.gather(1, at)
        if pad_token_id is not None:
            aligned = torch.where(inside, aligned, pad_token_id)
        return cls(
            aligned,
            None if bool(inside.all()) else inside,
            None if position_ids is None else position_ids.gather(1, at),
            start,
            mask,
        )

    @classmethod
    def in_one(cls, ids: torch.Tensor, mask: torch.Tensor | None) -> Rows:
        """The rows of a batch ``[B, T]`` one after another, without padding, each with positions from 0.

        To models of transformers each is a document that sees no other. In front and behind stands one more document,
        of one token that is no row's: where anything depends on it, a row is not read as it would be alone.
        """
        given = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        own, places, lengths = ids[given], (given.cumsum(-1) - 1)[given], given.sum(-1)
        mask = pad(torch.ones_like(own, dtype=torch.bool), (1, 1))[None]
        shift = given.to(torch.int32).argmax(-1) - (lengths.cumsum(0) - lengths) - 1
        return cls(
            torch.cat([own[:1], own, own[-1:]])[None], mask, pad(places, (1, 1))[None], shift, given, packed=True
        )

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self.ids.shape[0] if self.given is None else self.given.shape[0]

    @property
    def told(self) -> torch.Tensor | None:
        """The mask that a model is given: models tell documents by their positions where they are given none."""
        return None if self.packed else self.mask

    def columns(self, positions: torch.Tensor) -> torch.Tensor:
        """Where positions ``[B, P]`` of the batch as it was given are now."""
        return positions if self.shift is None else positions - self.shift[:, None].to(positions.device)

    def last(self) -> torch.Tensor:
        """The columns ``[B]``, or ``[1]`` where all rows are as long, of the rows' last tokens."""
        if self.told is None or self.mask is None:
            return torch.tensor([self.ids.shape[1] - 1], device=self.ids.device)
        return self.mask.sum(-1) - 1

    def as_given(self, scores: torch.Tensor) -> torch.Tensor:
        """Numbers ``[B, L]`` in the columns of the batch as it was given ``[B, T]``, 0 on padding."""
        if self.given is None:
            return scores
        found = scores.new_zeros(self.given.shape)
        # Both masks go through the same tokens in the same order.
        found[self.given] = scores.flatten() if self.mask is None else scores[self.mask]
        return found

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        """Of numbers ``[B, H, L]``, or ``[1, H, L]`` of rows in one, each row's sums ``[B, H]``."""
        if not self.packed or self.given is None or self.mask is None:
            return x.sum(-1)
        row = self.given.nonzero()[:, 0]
        own = x[0].mT[self.mask[0]]
        return own.new_zeros(len(self.given), own.shape[1]).index_add_(0, row, own)


@dataclass
class Packing:
    """Whether a model reads several rows in one as it reads each alone, as far as that is known.

    Args:
        proved: it has been seen to.
        refused: why it does not.
    """

    proved: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Kept:
    """Positions of the ids ``[T]`` that something is computed at, ascending ``[K]``.

    In a longer tensor, into which a wrapper has put virtual tokens, they are counted from its end.
    """

    positions: torch.Tensor
    tokens: int

    def among(self, length: int) -> torch.Tensor:
        """Those positions in a tensor of ``length`` tokens.

        Raises:
            ValueError: it has fewer than there are ids.
        """
        if length < self.tokens:
            raise ValueError(f"the model makes {length} tokens of {self.tokens} ids, so none of them has a place")
        return self.positions + (length - self.tokens)


@dataclass(frozen=True)
class Call:
    """Who embeds, who counts positions, who keeps a cache and how long logits are, for one model.

    Args:
        model: the outermost module, which is called.
        arguments: the front end's: from ids, mask and position ids to positional and named arguments.
        taken: names of arguments that reach a module which names them.
        cores: the Hugging Face models inside that the ids go through, outermost first; the model itself may be one.
        layers: of the decoder.
    """

    model: nn.Module
    arguments: Callable[..., tuple[tuple[torch.Tensor, ...], dict[str, Any]]]
    taken: torch_modules.Taken
    cores: Sequence[nn.Module]
    layers: Sequence[nn.Module]

    def prepared(
        self,
        rows: Rows,
        kept: Kept,
        *,
        narrow: bool,
        leaves: list[torch.Tensor],
        replace_forward: Callable[[nn.Module, Callable[..., Any]], None],
    ) -> Prepared:
        """The model ready to be run on rows: its parts are called as they must be, whatever a wrapper hands on.

        Args:
            rows: the batch.
            kept: positions whose logits are wanted.
            narrow: whether to ask for those logits only, where the model can be asked.
            leaves: the embeddings, each time the model has run.
            replace_forward: gives one instance another ``forward``; its owner puts the one before back.

        Raises:
            ValueError: the model cannot be called so; names it and why.
        """
        self.refuse()
        positional, named = self.arguments(self.taken, self.model, rows.ids, rows.told, rows.position_ids)
        prepared = Prepared(self, rows, kept, positional, named, narrow, leaves)
        keeper = next((one for one in self.cores if "logits_to_keep" in torch_modules.parameters(one)), None)
        prepared.keeps = keeper is not None
        for core in self.cores:
            change = functools.partial(prepared.settings, core, outermost=core is self.cores[0], keeps=core is keeper)
            replace_forward(core, _called_with(core, change, prepared.see_head if core is keeper else None))
        return prepared

    def refuse(self) -> None:
        """Raise a ValueError that names the model and says why, where ids alone are not what it is called with."""
        for core in self.cores:
            reason = hugging_face.refusal(core.config)
            if reason is not None:
                raise ValueError(f"{type(core).__name__} {reason}")


class MadeOfLogitsError(ValueError):
    """What is explained is made of the logits at every position, of which a few were computed."""


class Prepared:
    """A model that is ready to be run on one batch."""

    def __init__(
        self,
        call: Call,
        rows: Rows,
        kept: Kept,
        positional: tuple[torch.Tensor, ...],
        named: dict[str, Any],
        narrow: bool,
        leaves: list[torch.Tensor],
    ) -> None:
        self._call = call
        self._rows = rows
        self._kept = kept
        self._positional = positional
        self._named = named
        self._leaves = leaves
        self._narrow = narrow
        #: Whether a Hugging Face model inside can be asked for some logits only.
        self.keeps = False
        #: Whether the logits are of each row as a whole.
        self.of_rows = False
        self._asked = False
        self._narrowed: torch.Tensor | None = None
        self._proved = 0

    def run(self) -> Any:
        """What the model puts out."""
        self._narrowed = None
        longer: list[torch.Tensor] = []

        def see(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = stream(inputs, named)
            if hidden is not None and hidden.dim() == 3 and hidden.shape[1] > self._kept.tokens:
                longer.append(hidden)

        with ExitStack() as hooks:
            for layer in self._call.layers[:1]:
                hooks.enter_context(layer.register_forward_pre_hook(see, with_kwargs=True))
            output = self._call.model(*self._positional, **self._named)
        for hidden in longer[:1]:
            if hidden.requires_grad and not hidden.is_meta and len(self._leaves) == 1:
                self._prove(hidden, self._leaves[0])
        return output

    def logits(self) -> torch.Tensor:
        """The logits ``[B, K, V]`` at the explained positions; those of a classifier stand for the last of each row.

        Raises:
            MadeOfLogitsError: a wrapper makes something of the logits, and the head was asked for a few of them.
            ValueError: which logits belong to which token cannot be told.
        """
        kept, logits = self._kept, self._logits_of(self.run())
        if self.keeps and self._narrow and logits is not self._narrowed:
            raise MadeOfLogitsError(
                f"{type(self._call.model).__name__} gives other logits than the model inside, and what it makes of all "
                "positions is what is explained, so they must be there: add head=all to the memory plan"
            )
        self.of_rows = logits.dim() == 2
        if self.of_rows:
            if not torch.isin(kept.positions, self._rows.last()).all():
                raise ValueError(
                    f"{type(self._call.model).__name__} gives one row of logits for each prompt, not one for each "
                    "token, so the explained position must be the last"
                )
            tokens = self._rows.ids.shape[1]
            labels = [hugging_face.labels(core) for core in self._call.cores]
            if logits.shape[1] == tokens and tokens not in labels and any(labels):
                raise ValueError(
                    f"{type(self._call.model).__name__} gives {tokens} numbers for {tokens} tokens, and whether they "
                    "are of classes or of the tokens cannot be told"
                )
            return logits[:, None].expand(-1, len(kept.positions), -1)
        if self._narrowed is not None:
            return logits
        extra = logits.shape[1] - kept.tokens
        if extra not in (0, self._proved):
            raise ValueError(
                f"{type(self._call.model).__name__} gives {logits.shape[1]} logits for {kept.tokens} ids, and which of "
                "them belongs to which cannot be told"
            )
        return logits[:, kept.among(logits.shape[1])]

    def _logits_of(self, output: Any) -> torch.Tensor:
        """The logits in what a model puts out: by that name, by themselves, or the first of several."""
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        if isinstance(found, tuple | list):
            # transformers puts the loss first, where there is one.
            found = next((one for one in found if isinstance(one, torch.Tensor) and one.dim() > 1), None)
        if isinstance(found, torch.Tensor) and found.shape == self._rows.ids.shape[:1]:
            return found[:, None]  # one number for each row is that of one class
        if not isinstance(found, torch.Tensor) or found.dim() not in (2, 3):
            raise ValueError(
                f"{type(self._call.model).__name__} must put out logits [B, T, V] or [B, C], by themselves, first in a "
                f"tuple or under the name logits, got {type(output).__name__}"
            )
        return found

    def see_head(self, output: Any) -> None:
        """Remember the logits at the explained positions, where the head was asked for those."""
        if self._asked:
            self._narrowed = self._logits_of(output)

    def settings(self, core: nn.Module, given: Mapping[str, Any], *, outermost: bool, keeps: bool) -> dict[str, Any]:
        """What a Hugging Face model inside is called with besides what it was given."""
        if outermost:
            for name in ("attention_mask", "position_ids"):
                if name in self._named and given.get(name) is None:
                    raise ValueError(
                        f"{name} cannot be given to {type(self._call.model).__name__}, which does not hand it on to "
                        f"its {type(core).__name__}"
                    )
        found = hugging_face.settings(core)
        if keeps:
            given_ids = given.get("input_ids")
            tokens = given.get("inputs_embeds") if given_ids is None else given_ids
            self._asked = self._narrow and isinstance(tokens, torch.Tensor)
            if self._asked:
                found["logits_to_keep"] = self._kept.among(tokens.shape[1])  # type: ignore[union-attr]
        return found

    def _prove(self, hidden: torch.Tensor, leaf: torch.Tensor) -> None:
        """Make sure that what a wrapper has put among the embeddings ``leaf`` stands before all of them."""
        extra = hidden.shape[1] - self._kept.tokens
        weights = torch.linspace(1.0, 2.0, hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        for token in (0, self._kept.tokens - 1):
            # What one hidden state depends on, before any layer has mixed them, is its own embedding.
            one = hidden[:, extra + token]
            (grad,) = torch.autograd.grad(one, leaf, weights.expand_as(one), retain_graph=True, allow_unused=True)
            reached = [] if grad is None else (grad != 0).any(-1).any(0).nonzero().flatten().tolist()
            if reached != [token]:
                raise ValueError(
                    f"{type(self._call.model).__name__} makes {hidden.shape[1]} tokens of {self._kept.tokens} ids, and "
                    f"the ids are not the last of them: token {token} of the ids is not where it would be"
                )
        self._proved = extra


def _called_with(
    module: nn.Module,
    change: Callable[[Mapping[str, Any]], dict[str, Any]],
    see: Callable[[Any], None] | None,
) -> Callable[..., Any]:
    """A module's forward, which gets what ``change`` says of its arguments, besides them or in their place.

    Not a hook, for a wrapper may call ``forward`` itself. ``see`` is shown what it puts out.
    """
    names = [name for name in torch_modules.parameters(module) if name != "self"]
    inner = module.forward

    @functools.wraps(inner)
    def forward(*inputs: Any, **named: Any) -> Any:
        placed = dict(zip(names, inputs, strict=False))
        changed = change({**placed, **named})
        inputs = tuple(changed.pop(name, one) for name, one in placed.items()) + inputs[len(placed) :]
        output = inner(*inputs, **{**named, **changed})
        if see is not None:
            see(output)
        return output

    return forward
