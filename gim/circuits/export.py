"""Circuits in files and as other libraries' objects."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gim.circuits.graph import Graph
from gim.circuits.result import Circuit
from gim.evaluation.extras import need
from gim.files import check_writable, read_json, write_atomically

if TYPE_CHECKING:
    import networkx
    import pandas as pd

#: Bytes of a JSON file that are read, at most: an 8B has 1.6 million edges of some 70 bytes.
LONGEST = 2**30
ENDINGS = (".json", ".pt")
#: Under which a Parquet file's metadata has the graph and the settings.
KEY = b"gim.circuits"


def dataframe(circuit: Circuit) -> pd.DataFrame:
    """What :meth:`Circuit.to_dataframe` gives."""
    pandas, graph = need("pandas", "circuits"), circuit.graph
    if circuit.level == "node":
        return pandas.DataFrame({"writer": graph.writer_names, "score": circuit.scores.tolist()})
    rows, columns = graph.edges.nonzero().unbind(1)
    return pandas.DataFrame(
        {
            "writer": [graph.writer_names[row] for row in rows.tolist()],
            "reader": [graph.reader_names[column] for column in columns.tolist()],
            "score": circuit.scores[rows, columns].tolist(),
        }
    )


# ------------------------------------------------------------------------------------------------------- Parquet


def save(circuit: Circuit, path: str | os.PathLike[str]) -> None:
    """What :meth:`Circuit.save` does."""
    arrow, parquet = need("pyarrow", "circuits"), need("pyarrow.parquet", "circuits")
    if Path(path).suffix != ".parquet":
        raise ValueError(f"path must end in .parquet, by which load knows it, got {path}")
    check_writable(path)
    table = arrow.Table.from_pandas(dataframe(circuit), preserve_index=False)
    graph = circuit.graph
    said = {
        "graph": {name: getattr(graph, name) for name in ("layers", "heads", "parallel", "width", "groups")},
        "settings": circuit.settings,
    }
    metadata = {**(table.schema.metadata or {}), KEY: json.dumps(said).encode()}
    sink = arrow.BufferOutputStream()
    parquet.write_table(table.replace_schema_metadata(metadata), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def load(path: str | os.PathLike[str]) -> Circuit:
    """What :meth:`Circuit.load` gives."""
    ending = Path(path).suffix
    readers = {".parquet": _from_parquet, ".json": _from_json, ".pt": _from_tensors}
    if ending not in readers:
        raise ValueError(f"a circuit is a file {', '.join(readers)}, got {path}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return readers[ending](Path(path))
    except (OSError, ImportError):
        raise
    except pickle.UnpicklingError as error:  # whose own advice is to run the code in the file
        raise ValueError(
            f"{path} is no file of a circuit: it is damaged, or holds more than tensors and plain values"
        ) from error
    except Exception as error:  # anybody may have made the file, so that anything may be wrong with it
        raise ValueError(f"{path} is no file of a circuit ({type(error).__name__}: {error})") from error


def _from_parquet(path: Path) -> Circuit:
    arrow, parquet = need("pyarrow", "circuits"), need("pyarrow.parquet", "circuits")
    with path.open("rb") as file:
        try:
            table = parquet.read_table(file)
        except (arrow.ArrowException, OSError) as error:  # the latter of a damaged page
            raise ValueError(f"not a Parquet file, or a damaged one: {error}") from error
    said = json.loads((table.schema.metadata or {})[KEY])
    graph = _graph(said["graph"])
    values = torch.tensor(table.column("score").to_pylist(), dtype=torch.float64, device="cpu")
    is_edges = "reader" in table.column_names
    _check_size("scores", len(values), graph.edge_count if is_edges else graph.writers)
    if not is_edges:
        scores, names = values, [("writer", graph.writer_names)]
    else:
        scores = torch.zeros(graph.writers, graph.readers, dtype=torch.float64, device="cpu")
        scores[graph.edges] = values
        rows, columns = (one.tolist() for one in graph.edges.nonzero().unbind(1))
        names = [
            ("writer", [graph.writer_names[row] for row in rows]),
            ("reader", [graph.reader_names[column] for column in columns]),
        ]
    for column, wanted in names:
        if table.column(column).to_pylist() != wanted:
            raise ValueError(f"its {column}s are not those of its graph, in their order")
    return _circuit(graph, scores, said["settings"])


def _graph(said: Mapping[str, Any]) -> Graph:
    numbers = {name: said[name] for name in ("layers", "heads", "width")}
    if not all(type(one) is int and 0 < one < 2**20 for one in numbers.values()):
        raise TypeError(f"layers, heads and width must be whole numbers, got {numbers}")
    groups, parallel = said.get("groups"), said["parallel"]
    if groups is not None and (type(groups) is not int or groups < 1 or numbers["heads"] % groups):
        raise TypeError(f"groups must be a whole number that the heads are a multiple of, got {groups!r:.80}")
    if not isinstance(parallel, bool):
        raise TypeError(f"whether attention and MLP are parallel must be true or false, got {parallel!r:.80}")
    return Graph(parallel=parallel, groups=groups, **numbers)


def _check_size(what: str, found: int, wanted: int) -> None:
    """Before anything of the graph's size is made: a file says any size."""
    if found != wanted:
        raise ValueError(f"it has {found:,} {what}, and its graph {wanted:,}")


def _circuit(graph: Graph, scores: torch.Tensor, settings: Mapping[str, Any]) -> Circuit:
    """A circuit whose scores came from a file."""
    if not scores.is_floating_point() or not bool(scores.isfinite().all()):
        raise ValueError("its scores are not all finite real numbers")
    return Circuit(graph, scores.double(), settings)


# ----------------------------------------------------------------------------------------------------------- MIB


def to_mib(circuit: Circuit, path: str | os.PathLike[str], n: int | None, *, absolute: bool) -> None:
    """What :meth:`Circuit.to_mib` does."""
    ending, graph = Path(path).suffix, circuit.graph
    if ending not in ENDINGS:
        raise ValueError(f"path must end in {' or '.join(ENDINGS)}, got {path}")
    if graph.groups is not None:
        raise ValueError("the exchange format counts k and v for each query head: find the circuit with grouped=False")
    kept = graph.edges if n is None else circuit.kept(n, absolute=absolute)
    nodes = graph.nodes(kept)
    config = {
        "n_layers": graph.layers,
        "n_heads": graph.heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": graph.width,
    }
    write = _json if ending == ".json" else _tensors
    write_atomically(path, write(circuit, config, kept, nodes))


def _json(circuit: Circuit, config: dict[str, Any], kept: torch.Tensor, nodes: torch.Tensor) -> bytes:
    graph = circuit.graph
    of_nodes: dict[str, dict[str, Any]] = {
        name: {"in_graph": is_in} for name, is_in in zip(graph.writer_names, nodes.tolist(), strict=True)
    }
    if circuit.level == "node":
        for name, score in zip(graph.writer_names, circuit.scores.tolist(), strict=True):
            of_nodes[name]["score"] = score
    of_nodes["logits"] = {"in_graph": True}
    scores = _of_edges(circuit)
    of_edges = {
        name: {"score": float(scores[row, column]), "in_graph": bool(kept[row, column])}
        for name, row, column in graph.names()
    }
    return json.dumps({"cfg": config, "nodes": of_nodes, "edges": of_edges}).encode("ascii")


def _tensors(circuit: Circuit, config: dict[str, Any], kept: torch.Tensor, nodes: torch.Tensor) -> bytes:
    graph = circuit.graph
    found = {
        "cfg": config,
        "src_nodes": graph.writer_names,
        "dst_nodes": graph.reader_names,
        "edges_scores": _of_edges(circuit).float(),
        "edges_in_graph": kept.clone(),
        "nodes_in_graph": nodes,
    }
    if circuit.level == "node":
        found["nodes_scores"] = circuit.scores.float()
    out = io.BytesIO()
    torch.save(found, out)
    return out.getvalue()


def _of_edges(circuit: Circuit) -> torch.Tensor:
    graph = circuit.graph
    return circuit.scores if circuit.level == "edge" else torch.zeros(graph.writers, graph.readers, device="cpu")


def _from_json(path: Path) -> Circuit:
    held = read_json(path, LONGEST)
    graph = _of_config(held["cfg"])
    _check_size("edges", len(held["edges"]), graph.edge_count)
    of_nodes = [held["nodes"].get(name, {}).get("score") for name in graph.writer_names]
    if all(one is not None for one in of_nodes):
        return _circuit(graph, torch.tensor(of_nodes, dtype=torch.float64, device="cpu"), {})
    scores = torch.zeros(graph.writers, graph.readers, dtype=torch.float64, device="cpu")
    for name, row, column in graph.names():
        scores[row, column] = held["edges"][name]["score"]
    return _circuit(graph, scores, {})


def _from_tensors(path: Path) -> Circuit:
    held = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, dict):
        raise TypeError(f"it holds {type(held).__name__}")
    graph = _of_config(held["cfg"])
    writers, readers = list(held["src_nodes"]), list(held["dst_nodes"])
    _check_size("writers", len(writers), graph.writers)
    _check_size("readers", len(readers), graph.readers)
    if (writers, readers) != (graph.writer_names, graph.reader_names):
        raise ValueError("its nodes are not those of its cfg, in EAP-IG's order")
    is_nodes = "nodes_scores" in held
    scores = held["nodes_scores" if is_nodes else "edges_scores"]
    shape = (graph.writers,) if is_nodes else (graph.writers, graph.readers)
    if scores.shape != shape:
        raise ValueError(f"its scores have the shape {tuple(scores.shape)}, and its graph {shape}")
    return _circuit(graph, scores if is_nodes else scores.masked_fill(~graph.edges, 0), {})


def _of_config(config: Mapping[str, Any]) -> Graph:
    names = {"layers": "n_layers", "heads": "n_heads", "parallel": "parallel_attn_mlp", "width": "d_model"}
    return _graph({ours: config[theirs] for ours, theirs in names.items()})


# ------------------------------------------------------------------------------------------------------- networkx


def to_networkx(circuit: Circuit, n: int | None, *, absolute: bool) -> networkx.MultiDiGraph:
    """What :meth:`Circuit.to_networkx` gives."""
    found = need("networkx", "circuits").MultiDiGraph()
    graph, scores = circuit.graph, _of_edges(circuit)
    kept = graph.edges if n is None else circuit.kept(n, absolute=absolute)
    if circuit.level == "node":
        for name, score in zip(graph.writer_names, circuit.scores.tolist(), strict=True):
            found.add_node(name, score=score)
    for row, column in kept.nonzero().tolist():
        reader, _, branch = graph.reader_names[column].partition("<")
        score = float(scores[row, column])
        found.add_edge(graph.writer_names[row], reader, key=branch.rstrip(">") or "in", score=score)
    return found
