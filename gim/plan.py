"""How the backward's memory is spent: a plan, as a value with a name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

Checkpoint = Literal["none", "mlp", "layer"]
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)
Offload = Literal["none", "cpu"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
Head = Literal["explained", "all"]
HEADS: tuple[Head, ...] = get_args(Head)

#: Tokens of a tile where a plan is chosen for the user: enough rows to keep matrix products busy.
MLP_TILE = 4096


@dataclass(frozen=True)
class MemoryPlan:
    """What is kept between the forward and the backward. Every plan gives the same attributions.

    Args:
        checkpoint: ``"none"`` keeps every layer's activations: the fastest. ``"mlp"`` keeps an MLP's input and runs
            the MLP again in the backward. ``"layer"`` keeps each decoder layer's input and runs the layer again.
        keep_attention: with ``checkpoint="layer"``, keep attention's output and log-sum-exp too, so that only the
            layer's cheaper parts run again. The other two keep them in any case.
        offload: ``"cpu"`` moves what is kept at the checkpoints to host memory, pinned where there is a GPU, and
            fetches it back one layer ahead of the backward. Without a GPU it is ordinary memory, and nothing is won.
        mlp_tile: run the MLP, and the norm in front of it, this many tokens at a time where they run again; None for
            all at once. The last tile is shorter where the tiles do not divide the prompt.
        head: ``"explained"`` runs the head, and the last layer's attention and MLP, for the explained positions only;
            ``"all"`` runs the last layer for every position. It takes the place of the other where a user's hook or
            code, or a wrapper, may read what is computed at other positions.

    Raises:
        TypeError: a flag that is not a bool, a tile that is not an integer.
        ValueError: a name that is not a choice; a tile < 1; an offload or a tile without a checkpoint to act on.

    Example:
        >>> MemoryPlan.parse("layer+attention+tile=4096")
        MemoryPlan(checkpoint='layer', keep_attention=True, offload='none', mlp_tile=4096, head='explained')
        >>> MemoryPlan("mlp").name
        'mlp'
    """

    checkpoint: Checkpoint = "none"
    keep_attention: bool = False
    offload: Offload = "none"
    mlp_tile: int | None = None
    head: Head = "explained"

    def __post_init__(self) -> None:
        choices = (("checkpoint", CHECKPOINTS), ("offload", OFFLOADS), ("head", HEADS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not isinstance(self.keep_attention, bool):
            raise TypeError(f"keep_attention must be True or False, got {self.keep_attention!r}")
        if self.mlp_tile is not None:
            if isinstance(self.mlp_tile, bool) or not isinstance(self.mlp_tile, int):
                raise TypeError(f"mlp_tile must be a number of tokens or None, got {self.mlp_tile!r}")
            if self.mlp_tile < 1:
                raise ValueError(f"mlp_tile must be at least 1 token, got {self.mlp_tile}")
        if self.checkpoint == "none":
            for name, asked in (("offload", self.offload != "none"), ("mlp_tile", self.mlp_tile is not None)):
                if asked:
                    raise ValueError(f'{name} acts on checkpoints: take checkpoint="mlp" or "layer", not "none"')

    @property
    def name(self) -> str:
        """The plan in one word, which :meth:`parse` reads."""
        parts: list[str] = [self.checkpoint]
        if self.keep_attention and self.checkpoint == "layer":
            parts.append("attention")
        if self.offload == "cpu":
            parts.append("offload")
        if self.mlp_tile is not None:
            parts.append(f"tile={self.mlp_tile}")
        if self.head == "all":
            parts.append("head=all")
        return "+".join(parts)

    @classmethod
    def parse(cls, name: str) -> MemoryPlan:
        """The plan of a name such as ``"layer+attention+offload+tile=4096+head=all"``; ``offload=cpu`` is ``offload``.

        Raises:
            ValueError: a part that is none of these.
        """
        checkpoint, *parts = name.split("+")
        if checkpoint not in CHECKPOINTS:
            raise ValueError(
                f"memory must be a MemoryPlan, 'auto' or one of {CHECKPOINTS}, with levers such as "
                f"'layer+attention+tile=4096', got {name!r}"
            )
        chosen: dict[str, object] = {}
        for part in parts:
            tile = re.fullmatch(r"tile=(-?\d+)", part)
            if tile:
                chosen["mlp_tile"] = int(tile[1])
            elif part == "attention":
                chosen["keep_attention"] = True
            elif part in ("offload", "offload=cpu"):
                chosen["offload"] = "cpu"
            elif part == "head=all":
                chosen["head"] = "all"
            else:
                raise ValueError(
                    f"memory: {part!r} in {name!r} is none of attention, offload, tile=TOKENS and head=all"
                )
        return cls(checkpoint, **chosen)  # type: ignore[arg-type]  # each name has its type above

    def describe(self, pinned: bool = True) -> str:
        """In words, for a report; ``pinned`` tells that there is a GPU to offload from."""
        words = {
            "none": "every activation kept",
            "mlp": "MLPs run again in the backward",
            "layer": "a checkpoint at each layer",
        }[self.checkpoint]
        if self.keep_attention and self.checkpoint == "layer":
            words += ", attention kept"
        if self.offload == "cpu":
            words += ", checkpoints in pinned host memory" if pinned else ", checkpoints offloaded to ordinary memory"
        if self.mlp_tile is not None:
            words += f", MLPs in tiles of {self.mlp_tile} tokens"
        if self.head == "all":
            words += ", last layer at every position"
        return words


#: The plans that ``memory="auto"`` chooses among, roughly the fastest first: what runs again in a plan is a part of
#: what runs again in the next. Which of them is the fastest for a prompt, its estimate tells.
PLANS: tuple[MemoryPlan, ...] = (
    MemoryPlan("none"),
    MemoryPlan("mlp"),
    MemoryPlan("mlp", mlp_tile=MLP_TILE),
    MemoryPlan("layer", keep_attention=True),
    MemoryPlan("layer", keep_attention=True, mlp_tile=MLP_TILE),
    MemoryPlan("layer"),
    MemoryPlan("layer", mlp_tile=MLP_TILE),
    MemoryPlan("layer", keep_attention=True, offload="cpu", mlp_tile=MLP_TILE),
    MemoryPlan("layer", offload="cpu", mlp_tile=MLP_TILE),
)
