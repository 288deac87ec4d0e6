"""Where a model's weights are: in safetensors files of its own folder, looked at before one of them is loaded."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gim.files import read_json

#: The file with all weights, and the one that says which weights are in which of several files.
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Bytes of an index, at most: those of the largest models have a few million.
INDEX_LIMIT = 64 * 2**20


def check_weights(name: str, config: Any) -> None:
    """Find out whether everything that a model's weights would be read from is a safetensors file of the model's own.

    The loader of transformers opens whatever an index names: a pickled file, or one anywhere on the disk.

    Args:
        name: a folder, or the id of a model on the hub, whose index is fetched if it has one, then its shards.
        config: the model's config, which may name the file of the weights.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: an index that is none; a file it names by something else than a relative path inside its folder,
            that lies elsewhere (in the hub's cache, the blobs that it links to are its own), or that is no
            safetensors file.
    """
    chosen = getattr(config, "transformers_weights", None)
    if chosen is not None:
        _check_name("config.json", chosen, (".safetensors", ".safetensors.index.json"))
    folder = Path(name)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "adapter_model.safetensors").is_file():
            raise ValueError("the adapter of adapter_config.json has no adapter_model.safetensors")
        whole = chosen or WEIGHTS
        if whole.endswith(".safetensors") and (folder / whole).is_file():
            if chosen is not None:
                _check_file(folder, folder / whole)
            return
        index = folder / (chosen or INDEX)
        if index.is_file():
            for shard in _shards(index):
                _check_file(folder, folder / shard)
        return
    found = _from_hub(name, chosen)
    if found is not None and found.name.endswith(".index.json"):
        from transformers.utils.hub import cached_files

        # Fetched by the names that the index gives, hence after those were checked.
        for path in cached_files(name, _shards(found)) or []:
            _check_file(found.parent, Path(path))


def _from_hub(name: str, chosen: str | None) -> Path | None:
    """The index of a model on the hub, or the file that its config names, in the cache; None where it has no index."""
    import huggingface_hub
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, chosen or INDEX, _raise_exceptions_for_missing_entries=False)
    except OSError:
        # Without a network nothing tells that there is no index; a single file in the cache is taken before one.
        if isinstance(huggingface_hub.try_to_load_from_cache(name, WEIGHTS), str):
            return None
        raise
    return None if found is None else Path(found)


def _shards(index: Path) -> list[str]:
    """The checked names of the files that an index names."""
    fields = read_json(index, INDEX_LIMIT)
    where = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(where, dict) or not where or not isinstance(fields.get("metadata"), dict):
        raise ValueError(f"{index.name} is not an index of weights: it must have a weight_map and metadata")
    for shard in where.values():
        _check_name(index.name, shard, (".safetensors",))
    return sorted(set(where.values()))


def _check_name(by: str, name: Any, endings: tuple[str, ...]) -> None:
    """Raise a ValueError unless a name is a relative path that stays in its folder, and has one of the endings."""
    if not isinstance(name, str) or not name.endswith(endings) or "\0" in name:
        raise ValueError(f"{by} names {name!r}, which is not a safetensors file: weights load from those only")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{by} names {name!r}, which is not inside the model's folder")


def _check_file(folder: Path, path: Path) -> None:
    """Raise unless a file is a safetensors file, and lies in the folder or in the part of the hub's cache behind it."""
    from safetensors import SafetensorError, safe_open

    own = folder.resolve()
    homes = [own]
    if own.parent.name == "snapshots":
        # A snapshot in the hub's cache links to the blobs of its repository, and those to blobs that several share.
        repository = own.parent.parent
        homes += [repository / "blobs", repository.parent / "blobs"]
    real = path.resolve()
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(
            f"{path.name} is a link out of the model's folder, to {real}: give the folder that the weights lie in, or "
            "put the file itself into this one"
        )
    if not real.is_file():
        raise FileNotFoundError(f"{path.name}, which holds weights, is not in the model's folder")
    try:
        with safe_open(real, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a safetensors file: {error}") from error
