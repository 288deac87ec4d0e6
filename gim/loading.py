"""Models by name: their weights are in safetensors files of their own, looked at before one of them is loaded."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from gim.files import read_json

if TYPE_CHECKING:
    import torch

#: The file with all weights, and the one that says which weights are in which of several files.
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Bytes of an index, at most: those of the largest models have a few million.
INDEX_LIMIT = 64 * 2**20


def load(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """A model in evaluation mode on its device, and its tokenizer.

    It is what the checkpoint was saved as: a causal or a masked language model, or a sequence classifier. Weights come
    from safetensors files only, one file after the other, and none may be missing.

    Args:
        name_or_path: a folder, or the id of a model on the Hugging Face hub.
        dtype: of the weights, such as ``torch.bfloat16`` or ``"bfloat16"``; None for that of the checkpoint.
        device: where it goes, such as ``"cuda:1"``; None for the GPU where there is one, else the CPU.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        ``(model, tokenizer)``.

    Raises:
        TypeError: an argument of another type.
        ValueError: no such dtype or device; an index or a name of a file that leads out of the model's folder; a file
            that is no safetensors file; weights that the files lack; a checkpoint of another kind of model.
        OSError: there is no such model, or a file of it cannot be read.
        ImportError: its code needs a package that is not installed.
    """
    import transformers

    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"name_or_path must be a str or a Path, got {type(name_or_path).__name__}")
    name, where = str(name_or_path), device_named(device)
    _check_dtype(dtype)
    check_folder(name)
    # First, since it is quick and may not be there.
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return load_model(name, dtype=dtype, device=where, trust_remote_code=trust_remote_code), tokenizer


def load_model(
    name: str, *, dtype: torch.dtype | str | None, device: torch.device, trust_remote_code: bool
) -> torch.nn.Module:
    """The model of :func:`load`."""
    import transformers
    from safetensors import SafetensorError

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    check_weights(name, config)
    try:
        model, info = auto_class(config).from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        # They would be random numbers, and so would every attribution.
        raise ValueError(f"its files lack {len(missing)} weights, such as {missing[0]}")
    unused, saved_as, made = sorted(info["unexpected_keys"]), _saved_as(config), type(model).__name__
    # Of a model that also sees or hears, a language model leaves out what no text goes through.
    if unused and saved_as and saved_as != made and not saved_as.endswith("ForConditionalGeneration"):
        raise ValueError(
            f"it was saved as {saved_as}, and {made} has no place for {len(unused)} of its weights, such as "
            f"{unused[0]}: load it with transformers, and differentiate inside gim.GIM"
        )
    loaded: torch.nn.Module = model.to(device).eval()
    return loaded


def auto_class(config: Any) -> Any:
    """What makes the model that a checkpoint was saved as: a causal or a masked language model, or a classifier.

    Raises:
        ValueError: it was saved as an encoder-decoder, of which a causal language model would be a part.
    """
    import transformers

    from gim.parts.adapters import hugging_face

    for ending in ("ForMaskedLM", "ForSequenceClassification"):
        if _saved_as(config).endswith(ending):
            return getattr(transformers, f"AutoModel{ending}")
    reason = hugging_face.refusal(config)
    if reason is not None:
        raise ValueError(f"{_saved_as(config) or type(config).__name__} {reason}")
    return transformers.AutoModelForCausalLM


def _saved_as(config: Any) -> str:
    """The name of the class that a checkpoint was saved as; empty where its config does not say."""
    return next(iter(getattr(config, "architectures", None) or ()), "")


def check_folder(name: str) -> None:
    """Raise a FileNotFoundError where a name looks like a folder and is none: the hub would be asked for it."""
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if not name or (looks_like_path and not Path(name).is_dir()):
        raise FileNotFoundError(f"there is no folder {name!r}")


def device_named(device: torch.device | str | None) -> torch.device:
    """A device that is there; None for the GPU where there is one, else the CPU.

    Raises:
        TypeError: no device and no name of one.
        ValueError: it is not there.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device, its name or None, got {device!r:.80}")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0].partition(". ")[0]  # of some devices torch lists all that it was built for
        raise ValueError(f"{str(device)!r} is not a device that is there: {first}") from error
    return found


def _check_dtype(dtype: torch.dtype | str | None) -> None:
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(dtype, str | torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, its name or None, got {dtype!r:.80}")
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype must be a floating point dtype, got {dtype!r:.80}")


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
