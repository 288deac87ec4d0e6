"""Where a model's layers, embedding and head are, and how it is called: found once, kept until the model changes."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from gim.parts import adapters
from gim.parts.adapters import hugging_face, torch_modules
from gim.parts.calling import Call, Packing
from gim.parts.hidden_states import device_of

Head = Literal["next token", "masked token", "class", "class of each token"]
#: What transformers says in the names of its classes of what logits are of.
HEADS: tuple[tuple[str, Head], ...] = (
    ("ForSequenceClassification", "class"),
    ("ForMaskedLM", "masked token"),
    ("ForTokenClassification", "class of each token"),
)


@dataclass
class Habits:
    """What runs of a model have shown of it.

    Args:
        writes: whether it writes into what its embedding puts out.
    """

    writes: bool = False


@dataclass(frozen=True)
class _Names:
    """What is kept of a model: names only, so that it keeps nothing alive and goes into no copy.

    ``tree`` is that of the modules they were found in, and ``modules`` the names of all of those.
    """

    tree: int
    modules: tuple[str, ...]
    front: ModuleType
    embedding: str | None
    layers: str | None
    cores: tuple[str, ...]
    taken: torch_modules.Taken
    packing: Packing = field(default_factory=Packing)
    habits: Habits = field(default_factory=Habits)


@dataclass(frozen=True)
class Anatomy:
    """What a model consists of.

    Args:
        modules: every module by its name, the model itself first under the empty name.
        layers: the repeated layers of the decoder, with their names; empty where there are none.
        cores: the Hugging Face models inside that the ids go through, outermost first; the model itself may be one.
        head: what logits are of.
        call: how it is called.
        packing: whether several rows may be read in one, which whoever has tried writes down.
        habits: what runs have shown, likewise.
    """

    modules: Mapping[str, nn.Module]
    layers: tuple[tuple[str, nn.Module], ...]
    cores: tuple[nn.Module, ...]
    head: Head
    call: Call
    packing: Packing
    habits: Habits
    _embedding: str | None

    @property
    def model(self) -> nn.Module:
        """The outermost module."""
        return self.modules[""]

    @property
    def embedding(self) -> nn.Module:
        """The module that turns ids into embeddings.

        Raises:
            TypeError: the model does not say which it is.
        """
        if self._embedding is None:
            raise TypeError(
                f"model must have get_input_embeddings() as Hugging Face models do, got {type(self.model).__name__}"
            )
        return self.modules[self._embedding]

    @property
    def early(self) -> set[nn.Module]:
        """What runs before the last layer, and neither in it nor behind it: the embedding and the other layers."""
        embedding = set() if self._embedding is None else {self.embedding}
        return embedding | {layer for _, layer in self.layers[:-1]} - {layer for _, layer in self.layers[-1:]}

    @property
    def device(self) -> torch.device:
        """Where ids must be."""
        return device_of(self.embedding) or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states: the embedding's, else the config's, else the first floating parameter's, else torch's
        default."""
        said = getattr(_of_text(self.config), "dtype", None)
        held = () if self._embedding is None else self.embedding.parameters()
        candidates = chain(
            (x.dtype for x in held),
            [said] if isinstance(said, torch.dtype) else [],
            (x.dtype for x in self.model.parameters()),
        )
        return next((dtype for dtype in candidates if dtype.is_floating_point), torch.get_default_dtype())

    @property
    def vocabulary_size(self) -> int:
        """How many token ids the model embeds.

        Raises:
            TypeError: its embedding has no weight.
        """
        found = self.embedding
        weight = getattr(found, "weight", getattr(found, "W_E", None))  # TransformerLens's name is the second
        size = getattr(found, "num_embeddings", None)
        if isinstance(size, int) and not (isinstance(weight, torch.Tensor) and weight.dtype.is_floating_point):
            return size  # a quantised weight is packed
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"the input embeddings of {type(self.model).__name__} must have a weight, and have none")
        return int(weight.shape[0])

    @property
    def config(self) -> Any:
        """The config of the Hugging Face model inside, or the model's own; None where there is none."""
        return getattr(self.cores[0] if self.cores else self.model, "config", None)

    @property
    def hidden_size(self) -> int | None:
        """Width of the tensors that go from layer to layer, by the config."""
        width = getattr(_of_text(self.config), "hidden_size", None)
        return width if isinstance(width, int) else None

    @property
    def pad_token_id(self) -> int | None:
        """The id by which the model's own code knows padding, where it is one of the vocabulary."""
        found = hugging_face.pad_token(self.config)
        return found if found is not None and 0 <= found < self.vocabulary_size else None

    @property
    def position_limit(self) -> int | None:
        """How many positions the model was made for; None where its config does not say."""
        limit = getattr(_of_text(self.config), "max_position_embeddings", None)
        if not isinstance(limit, int) or limit <= 0:
            return None
        for module in self.modules.values():
            # A table of positions that has a place for padding starts counting behind it.
            if (
                isinstance(module, nn.Embedding)
                and module.padding_idx is not None
                and module.num_embeddings == limit != self.vocabulary_size
            ):
                return limit - module.padding_idx - 1
        return limit


_kept: weakref.WeakKeyDictionary[nn.Module, _Names] = weakref.WeakKeyDictionary()
#: What :func:`held` has found on this thread or in this task.
_held: contextvars.ContextVar[tuple[tuple[nn.Module, Anatomy], ...]] = contextvars.ContextVar("gim_held", default=())


@contextmanager
def held(model: nn.Module) -> Iterator[Anatomy]:
    """Inside, on this thread or in this task, a model is taken to consist of what it consists of now."""
    parts = of(model)
    token = _held.set((*_held.get(), (model, parts)))
    try:
        yield parts
    finally:
        _held.reset(token)


def of(model: nn.Module) -> Anatomy:
    """The anatomy of a model, which is looked for again only where its tree of modules has changed.

    Raises:
        TypeError: as :func:`check_module`.
    """
    for one, parts in _held.get():
        if one is model:
            return parts
    check_module(model)
    inside, marks = _tree(model)
    tree, names = hash(tuple(marks)), _kept.get(model)
    if names is None or names.tree != tree:
        names = _kept[model] = _find(dict(zip(_named(marks), inside, strict=True)), tree)
    modules = dict(zip(names.modules, inside, strict=True))
    listed: Any = () if names.layers is None else modules[names.layers]
    layers = tuple((f"{names.layers}.{index}", torch_modules.written(layer)) for index, layer in enumerate(listed))
    cores = tuple(modules[name] for name in names.cores)
    return Anatomy(
        modules=modules,
        layers=layers,
        cores=cores,
        head=_head(model, *cores),
        call=Call(model, names.front.arguments, names.taken, cores, [layer for _, layer in layers]),
        packing=names.packing,
        habits=names.habits,
        _embedding=names.embedding,
    )


def check_module(model: Any) -> None:
    """Refuse what is no module of torch's, such as a name or what :func:`gim.load` gives, with a TypeError."""
    if not isinstance(model, nn.Module):
        way = "unpack what gim.load gives" if isinstance(model, tuple) else "load it with gim.load"
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}: {way}, model, tokenizer = gim.load(...)"
        )


#: Of a module: its parent's id, its name there, its own id and class.
_Mark = tuple[int, str, int, type]


def _tree(model: nn.Module) -> tuple[list[nn.Module], list[_Mark]]:
    """A model's modules, each once, in the order of ``named_modules()``, and what tells their tree from another.

    It is asked for often, and does without whole names.
    """
    held, seen = [model], {id(model)}
    marks: list[_Mark] = [(0, "", id(model), type(model))]

    def visit(parent: nn.Module) -> None:
        for name, child in parent._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                held.append(child)
                marks.append((id(parent), name, id(child), type(child)))
                visit(child)

    visit(model)
    return held, marks


def _named(marks: Sequence[_Mark]) -> list[str]:
    """The whole names of modules, the model's own empty."""
    names: dict[int, str] = {}
    for parent, name, own, _ in marks:
        before = names.get(parent, "")
        names[own] = f"{before}.{name}" if before else name
    return list(names.values())


def _find(modules: Mapping[str, nn.Module], tree: int) -> _Names:
    front = adapters.of(modules)
    embedding = front.embedding(modules)
    layers = _layers(modules, embedding or "")
    through = tuple(name for name in (embedding, layers) if name is not None)
    return _Names(
        tree,
        tuple(modules),
        front,
        embedding,
        layers,
        hugging_face.inside(modules, through) if front is hugging_face else (),
        frozenset() if embedding is None else torch_modules.taken(modules, embedding),
    )


def _layers(modules: Mapping[str, nn.Module], embedding: str) -> str | None:
    """The ``ModuleList`` whose every entry contains attention: the nearest to the embedding, of those the longest.

    A model that also sees or hears has layers of its own for that, away from the embedding of ids.
    """
    best, rank = None, (-1, 0)
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        own = (_shared(name, embedding), len(module))
        if own > rank and all(layer is not None and _attends(layer) for layer in module):
            best, rank = name, own
    return best


def _attends(module: nn.Module) -> bool:
    return any("Attention" in type(inner).__name__ for inner in module.modules())


def _shared(one: str, other: str) -> int:
    """How many modules two names both lie in."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((depth for depth, (a, b) in enumerate(pairs) if a != b), len(pairs))


def _head(*models: nn.Module) -> Head:
    for model in models:
        for ending, head in HEADS:
            if type(model).__name__.endswith(ending):
                return head
    return "next token"


def _of_text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config
