"""Circuits as users meet them: pairs, top-n and pruning, curves, files, resuming, the command line."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pyarrow import parquet
from scipy import stats
from typer.testing import CliRunner

import gim
import gim.demo
from gim.circuits import Circuit, Curve, CurveInterrupted, Graph, Pair, attribute, read, scores
from gim.circuits.curve import MIB_SIZES
from gim.cli import app
from gim.evaluation import tasks
from tests.families import make, text_model, tokenizer
from tests.oracle import assert_close64

FACT = "The password of Irene is {}. The password of Irene is"
WORDS = ("lantern", "copper", "silver")
PAIRS = [
    Pair(FACT.format(a), FACT.format(b), f" {a}", f" {b}") for a, b in zip(WORDS, (*WORDS[1:], WORDS[0]), strict=True)
]
DEMO = Path(gim.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return gim.demo.load()


@pytest.fixture(scope="module")
def circuit(demo: tuple[Any, Any]) -> Circuit:
    return attribute(demo[0], PAIRS, tokenizer=demo[1])


# ---------------------------------------------------------------------------------------------------------- graphs


def eap_ig(layers: int, heads: int, parallel: bool) -> tuple[list[str], list[str], set[tuple[str, str]]]:
    """Writers, readers and edges of EAP-IG's graph, by walking through the model as its code does."""
    stream, writers, readers, edges = ["input"], ["input"], [], set()
    for layer in range(layers):
        own = [f"a{layer}.h{head}" for head in range(heads)]
        columns = [f"{name}<{branch}>" for branch in "qkv" for name in own]
        edges |= {(writer, reader) for writer in stream for reader in columns}
        if not parallel:
            stream += own
        edges |= {(writer, f"m{layer}") for writer in stream}
        stream += [*(own if parallel else ()), f"m{layer}"]
        writers += [*own, f"m{layer}"]
        readers += [*columns, f"m{layer}"]
    return writers, [*readers, "logits"], edges | {(writer, "logits") for writer in stream}


def pruned(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Edges left once those without a way from the input and to the logits are taken away, one at a time."""
    while True:
        into = {reader.partition("<")[0] for _, reader in edges} | {"input"}
        out = {writer for writer, _ in edges} | {"logits"}
        wrong = {(w, r) for w, r in edges if w not in into or r.partition("<")[0] not in out}
        if not wrong:
            return edges
        edges = edges - {min(wrong)}


@pytest.mark.parametrize("parallel", [False, True])
def test_the_graph_and_its_circuits_are_eap_igs(parallel: bool) -> None:
    graph = Graph(3, 2, parallel, 8)
    writers, readers, edges = eap_ig(3, 2, parallel)
    assert (graph.writer_names, graph.reader_names) == (writers, readers)
    assert {tuple(name.split("->")) for name, _, _ in graph.names()} == edges and graph.edge_count == len(edges)
    # Whole numbers, so that many are equal: of those the first in the rows of the matrix is stronger.
    drawn = torch.randint(-4, 5, (graph.writers, graph.readers), generator=torch.Generator().manual_seed(0)).double()
    flat = [(w, r) for w in writers for r in readers if (w, r) in edges]
    places = {edge: place for place, edge in enumerate(flat)}
    for absolute in (False, True):
        values = drawn.abs() if absolute else drawn
        value = {(w, r): float(values[writers.index(w), readers.index(r)]) for w, r in flat}
        order = sorted(flat, key=lambda edge: (-value[edge], places[edge]))
        for count in (0, 1, 7, 20, 41, len(flat)):
            kept = graph.top(drawn, count, absolute=absolute)
            found = {(writers[row], readers[column]) for row, column in kept.nonzero().tolist()}
            assert found == pruned(set(order[:count])), (absolute, count)
    nodes = torch.arange(graph.writers).double()
    kept = graph.top_nodes(nodes, 4)
    chosen = set(writers[-4:])
    assert {(writers[r], readers[c]) for r, c in kept.nonzero().tolist()} == pruned(
        {(w, r) for w, r in edges if w in chosen}
    )
    with pytest.raises(ValueError, match=f"n must be in 0..{len(edges)}"):
        graph.top(drawn, len(edges) + 1)


# ------------------------------------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize(
    ("pair", "error", "reason"),
    [
        (Pair("The cat sat", "The cat", " a", " b"), ValueError, r"pairs\[1\]: clean and corrupted must have as many"),
        (Pair([], [1], 1, 2), TypeError, r"pairs\[1\].clean must be text or a list of token ids that is not empty"),
        (Pair("The", "cat", "catcat", "a"), ValueError, r"pairs\[1\].answer must be one token, but 'catcat' is"),
        (Pair("a", "b", "a", ["b", "catcat"]), ValueError, r"pairs\[1\].wrong must be one token"),
        (Pair("a", "b", "a", []), ValueError, r"pairs\[1\].wrong must hold at least one token"),
        (Pair("a", "b", "a", ["b", "a"]), ValueError, r"pairs\[1\]: answer and wrong hold the same token"),
        (Pair([1, 999], [1, 2], 1, 2), ValueError, r"pairs\[1\].clean must be a token id in 0..319, got 999"),
        (Pair([1, 2], [1, 2], 1, 999), ValueError, r"pairs\[1\].wrong must be a token id in 0..319, got 999"),
        (Pair(torch.ones(2, 3), [1, 2], 1, 2), ValueError, r"pairs\[1\].clean must have shape \[T\], got \(2, 3\)"),
        (Pair([1] * 600, [2] * 600, 1, 2), ValueError, r"pairs\[1\].clean: the prompt has 600 tokens"),
        (("a", "b"), TypeError, r"pairs\[1\] must be a gim.circuits.Pair, got \('a', 'b'\)"),
    ],
)
def test_bad_pairs_are_refused_by_place_and_argument(pair: Any, error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        attribute(text_model(), [Pair([1, 2], [1, 3], 4, 5), pair], tokenizer=tokenizer())


def test_bad_arguments_are_refused() -> None:
    model, pairs = text_model(), [Pair([1, 2], [1, 3], 4, 5)]
    for named, reason in (
        ({"level": "neuron"}, "level must be one of"),
        ({"ig_steps": 0}, "ig_steps must be a whole number >= 1"),
        ({"batch_tokens": True}, "batch_tokens must be a whole number >= 1 or None, got True"),
        ({"seed": None}, "seed must be a whole number >= 0, got None"),
        ({"rules": "none such"}, "rules must be Rules or one of"),
        (
            {"metric": "logits"},
            "metric must be a function or one of logit_difference, probability_difference, got 'logits'",
        ),
    ):
        with pytest.raises(ValueError, match=reason):
            attribute(model, pairs, **named)
    with pytest.raises(ValueError, match="pairs must hold at least one pair"):
        attribute(model, [])
    with pytest.raises(TypeError, match=r"pairs\[0\].clean is text, which needs a tokenizer"):
        attribute(model, [Pair("a", "b", 1, 2)])
    for named, reason in (
        ({"memory": 5}, "memory must be a MemoryPlan or a plan's name, got 5"),
        ({"metric": 5}, "metric must be a function of logits and answers, or its name, got 5"),
    ):
        with pytest.raises(TypeError, match=reason):
            attribute(model, pairs, **named)
    with pytest.raises(TypeError, match="pairs: agreement is text, which needs a tokenizer"):
        attribute(model, "agreement")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        attribute("model", pairs)
    with pytest.raises(ValueError, match="causal language model"):
        attribute(make("bert"), pairs)
    found = attribute(model, pairs)
    assert torch.equal(attribute(model, pairs, metric="logit_difference").scores, found.scores)
    by_name = found.faithfulness(pairs, metric="logit_difference")
    assert by_name.to_dict() == found.faithfulness(pairs).to_dict()
    with pytest.raises(FileNotFoundError, match="no task: those are indirect-objects, greater-than, agreement$"):
        attribute(model, "nope", tokenizer=1)
    for sizes in ((0.5, 0.1), None, (0.1, float("nan"))):
        with pytest.raises(ValueError, match="sizes must be two shares"):
            found.faithfulness(pairs, sizes=sizes)
    for named in ({"skip": -1}, {"limit": 0}, {"batch_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(named))} must be a whole number >= "):
            found.faithfulness(pairs, **named)
    two = np.int64(2)
    assert found.top(two) == found.top(2) and torch.equal(found.kept(two), found.kept(2))
    assert found.faithfulness(pairs, limit=two, seed=np.int64(0)).to_dict() == found.faithfulness(pairs).to_dict()
    for wrong in (-1, 1.5, True, found.count + 1):
        for call, bounds in (
            (found.kept, f"0..{found.count}, as many edges"),
            (found.top, f"1..{found.count}, as many edges"),
            (found.top_nodes, f"1..{found.graph.writers}, as many nodes"),
        ):
            with pytest.raises(ValueError, match=re.escape(f"n must be in {bounds} as there are, got {wrong!r}")):
                call(wrong)
    with pytest.raises(ValueError, match="the metric is the same on clean and corrupted prompts"):
        found.faithfulness([Pair([1, 2], [1, 2], 4, 5)])
    with pytest.raises(ValueError, match="model has other writers and readers than the circuit"):
        Circuit(Graph(1, 1, False, 8), torch.zeros(3, 5), {}).faithfulness(pairs, model=model)
    with pytest.raises(ValueError, match="from a file has no model"):
        Circuit(found.graph, found.scores, {}).faithfulness(pairs)


class Words:
    """Cuts text into words with the space in front of them, digits and signs."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        return re.findall(r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9]", text)


@pytest.mark.parametrize("name", tasks.PAIRED)
def test_a_tasks_pairs_are_its_prompts_with_another_answer(name: str) -> None:
    cut = Words()
    drawn = list(tasks.draw_pairs(name, cut, 20, 0))
    assert len(drawn) == len({text for text, *_ in drawn}) == 20
    for text, other, right, wrong in drawn:
        apart = [pair for pair in zip(cut.encode(text), cut.encode(other), strict=True) if pair[0] != pair[1]]
        assert 1 <= len(apart) <= 2 and right and wrong and not set(right) & set(wrong)
        if name == "indirect-objects":  # the giver's second mention becomes the receiver
            assert apart == [(wrong[0], right[0])]
    # The prompts are those of an evaluation.
    assert [(text, right, wrong) for text, _, right, wrong in drawn] == list(tasks.draw(name, cut, 20, 0))
    with pytest.raises(ValueError, match="task facts: its prompts come in no pairs"):
        next(tasks.draw_pairs("facts", cut, 1, 0))


def test_files_of_eap_ig_and_mib_load_as_they_are(tmp_path: Path, demo: tuple[Any, Any]) -> None:
    cut = demo[1]
    one, other = FACT.format("lantern"), FACT.format("copper")
    ids = [cut.encode(f" {word}", add_special_tokens=False)[0] for word in ("lantern", "copper")]
    rows: dict[str, list[dict[str, Any]]] = {
        "ours": [{"clean": one, "corrupted": other, "answer": " lantern", "wrong": [" copper"]}],
        "names": [
            {
                "prompt": one, "metadata": {"indirect_object": "lantern", "subject": "copper"},
                "s2_io_flip_counterfactual": {"prompt": other}, "abc_counterfactual": {"prompt": "x"},
            },
            # Of other lengths on this tokenizer: passed by, and counted.
            {
                "prompt": one, "metadata": {"indirect_object": "lantern", "subject": "copper"},
                "s2_io_flip_counterfactual": {"prompt": "short"},
            },
        ],
        "choices": [
            {
                "prompt": one, "choices": {"label": [" lantern", " silver"]}, "answerKey": 0,
                "symbol_counterfactual": {"prompt": other, "choices": {"label": [" a", " copper"]}, "answerKey": 1},
            }
        ],
        "sums": [{"prompt": one, "label": " lantern", "random_counterfactual": {"prompt": other, "label": " copper"}}],
    }  # fmt: skip
    want = (one, other, [ids[0]], [ids[1]])

    def tokens(given: Any) -> list[int]:
        several = given if isinstance(given, list) else [given]
        return [one if isinstance(one, int) else cut.encode(one, add_special_tokens=False)[0] for one in several]

    for name, several in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in several))
        found = read(path, cut)
        (pair,) = found.pairs
        assert (pair.clean, pair.corrupted, tokens(pair.answer), tokens(pair.wrong)) == want, name
        assert found.passed_by == (name == "names")
    path = tmp_path / "eap.csv"
    path.write_text(f"clean,corrupted,correct_idx,incorrect_idx\n{one},{other},{ids[0]},{ids[1]}\n")
    (pair,) = read(path, cut).pairs
    assert (pair.clean, pair.corrupted, tokens(pair.answer), tokens(pair.wrong)) == want
    content = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert read(path, cut).pairs == [pair]
    path.write_bytes(content + b"\xff")
    with pytest.raises(ValueError, match="eap.csv is not CSV in UTF-8"):
        read(path, cut)
    path.write_text("clean,corrupted\na,b\n")
    with pytest.raises(ValueError, match="eap.csv, row 0: neither clean, corrupted, answer and wrong, nor a row of"):
        read(path, cut)


def test_eap_igs_years_are_those_after_the_one_in_the_prompt(tmp_path: Path, demo: tuple[Any, Any]) -> None:
    path = tmp_path / "years.csv"
    prompt, other = "It lasted from the year 1604 to the year 16", "It lasted from the year 1601 to the year 16"
    path.write_text(f"clean,corrupted,label\n{prompt},{other},4\n")
    with pytest.raises(ValueError, match="years.csv holds 0 pairs"):  # a year is two tokens
        read(path, demo[1])
    cut = copy.deepcopy(demo[1])
    cut.add_tokens([f"{year:02d}" for year in range(100)])
    (pair,) = read(path, cut).pairs
    assert (pair.clean, pair.corrupted) == (prompt, other)
    assert pair.wrong == ["00", "01", "02", "03", "04"]
    assert pair.answer == [f"{year:02d}" for year in range(5, 100)]
    for line in (f"{prompt},{other},5", f"{prompt.replace('04', '99')},{other},99", "no,year,4"):
        path.write_text(f"clean,corrupted,label\n{line}\n")
        with pytest.raises(ValueError, match=r"years.csv, row 0: .* is no year of its prompt that another"):
            read(path, cut)


def test_a_row_is_named_as_the_file_has_it(tmp_path: Path, demo: tuple[Any, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    sums = [
        {
            "prompt": one.clean,
            "label": one.answer,
            "random_counterfactual": {"prompt": one.corrupted, "label": one.wrong},
        }
        for one in PAIRS
    ]

    def written(*rows: Any) -> None:
        path.write_text("\n\n".join(map(json.dumps, rows)))

    written({**sums[0], "prompt": "too short"}, *sums)
    assert read(path, demo[1]).places == [f"{path}, row {row}" for row in (1, 2, 3)]
    written(*({"clean": one.clean, "corrupted": one.corrupted, "answer": " two words", "wrong": 1} for one in PAIRS))
    with pytest.raises(ValueError, match="rows.jsonl, row 0: answer must be one token"):
        attribute(demo[0], path, tokenizer=demo[1])
    found = Circuit(Graph(1, 1, False, 8), torch.zeros(3, 5), {})
    with pytest.raises(ValueError, match="rows.jsonl, row 2: answer must be one token"):
        found.faithfulness(path, model=demo[0], tokenizer=demo[1], skip=2)
    with pytest.raises(ValueError, match=r"pairs\[2\].answer must be one token"):
        found.faithfulness([*PAIRS[:2], Pair("a", "b", " two words", 1)], model=demo[0], tokenizer=demo[1], skip=2)
    written({**sums[0], "prompt": "too short"})
    with pytest.raises(ValueError, match="holds 0 pairs, 1 rows make none with this tokenizer"):
        read(path, demo[1])
    for change in ({"prompt": None}, {"prompt": ""}, {"label": None}, {"label": [" lantern"]}):
        written({**sums[0], **change})
        with pytest.raises(ValueError, match="row 0: .* a prompt or an answer must be text that is not empty, got"):
            read(path, demo[1])


# ----------------------------------------------------------------------------------------------------------- curves


def test_areas_and_intervals_are_those_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    clean, corrupted = rng.normal(3, 1, 12), rng.normal(-2, 1, 12)
    values = {order: rng.normal(1, 2, (12, 3)) for order in ("signed", "absolute")}
    sizes = (0.1, 0.4, 1.0)
    curve = Curve(clean, corrupted, values, sizes, (1, 2, 3), dict.fromkeys(values, (1, 2, 3)), seed=3)

    def shares(order: str, places: Any = slice(None)) -> Any:
        means = values[order][places].mean(0)
        return (means - corrupted[places].mean()) / (clean[places].mean() - corrupted[places].mean())

    def area(heights: Any) -> float:
        return float(0.3 * (heights[0] + heights[1]) / 2 + 0.6 * (heights[1] + heights[2]) / 2)

    assert curve.cpr.mean == pytest.approx(area(shares("signed")), rel=1e-12)
    assert curve.cmd.mean == pytest.approx(area(abs(1 - shares("absolute"))), rel=1e-12)
    assert [point.faithfulness.mean for point in curve.points[:3]] == pytest.approx(list(shares("signed")), rel=1e-12)
    want = stats.bootstrap(
        (np.arange(12),),
        lambda places: area(shares("signed", places)),
        vectorized=False,
        n_resamples=9999,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert (curve.cpr.low, curve.cpr.high) == pytest.approx((want.low, want.high), rel=1e-9)


def test_faithfulness_of_circuits_is_measured_on_pairs(demo: tuple[Any, Any], circuit: Circuit, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sizes = (0.0, 0.1, 0.3, 1.0)
    file = tmp_path / "score.jsonl"
    named: dict[str, Any] = {"progress": lambda done, total, _: seen.append((done, total)), "resume": file}
    curve = circuit.faithfulness(PAIRS, sizes, batch_tokens=1, **named)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for order in ("signed", "absolute"):
        shares = [point.faithfulness.mean for point in curve.points if point.order == order]
        assert shares[0] == 0 and shares[-1] == pytest.approx(1, rel=1e-5) and shares[1] < shares[2]
    # The random circuit of that size keeps less.
    drawn = Circuit(circuit.graph, torch.rand(circuit.scores.shape, generator=torch.Generator().manual_seed(0)), {})
    other = drawn.faithfulness(PAIRS, sizes, model=demo[0], tokenizer=demo[1])
    assert other.cmd.mean > curve.cmd.mean and curve.to_dataframe()["edges"].tolist()[0] == 0
    # Another call goes on from the file, whose pairs are not run again; another circuit is refused.
    again = circuit.faithfulness(PAIRS, sizes, **{**named, "progress": None}, model=demo[0])
    assert again.to_dict() == curve.to_dict()
    with pytest.raises(ValueError, match="was made with other circuit"):
        drawn.faithfulness(PAIRS, sizes, model=demo[0], tokenizer=demo[1], resume=file)


# ------------------------------------------------------------------------------------------------------------ files


def test_files_hold_every_score(tmp_path: Path, circuit: Circuit, demo: tuple[Any, Any]) -> None:
    nodes = attribute(demo[0], PAIRS, tokenizer=demo[1], level="node")
    for one in (circuit, nodes):
        for name in ("a.parquet", "a.json", "a.pt"):
            path = tmp_path / name
            one.save(path) if name == "a.parquet" else one.to_mib(path)
            found = Circuit.load(path)
            assert found.graph == one.graph and found.level == one.level
            # What EAP-IG keeps as tensors is float32.
            want = one.scores.float().double() if name == "a.pt" else one.scores
            assert torch.equal(found.scores, want), name
        assert len(one.to_dataframe()) == one.count
    assert Circuit.load(tmp_path / "a.parquet").settings == nodes.settings
    assert circuit.settings["rules_name"] == "GIM" and circuit.settings["pairs"] == 3
    for name, content in (("b.json", b"{}"), ("b.json", b"no"), ("b.pt", b"no"), ("b.parquet", b"no")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            Circuit.load(tmp_path / name)
    with pytest.raises(ValueError, match="a circuit is a file .parquet, .json, .pt, got a.txt"):
        Circuit.load("a.txt")
    with pytest.raises(ValueError, match="path must end in .parquet, by which load knows it, got .*a.txt"):
        circuit.save(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="counts k and v for each query head"):
        Circuit(Graph(1, 2, False, 8, 1), torch.zeros(4, 6), {}).to_mib(tmp_path / "c.json")


def test_what_a_file_says_is_proved_before_it_is_believed(tmp_path: Path) -> None:
    """Another order, another size, numbers that are none: each is refused by the file's name, and at once."""
    circuit = Circuit(Graph(1, 2, False, 8), torch.arange(32, dtype=torch.float64).view(4, 8) + 1, {})
    circuit.scores *= circuit.graph.edges

    def refused(name: str, reason: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is no file of a circuit.*{reason}"):
            Circuit.load(tmp_path / name)

    circuit.save(tmp_path / "a.parquet")
    table = parquet.read_table(tmp_path / "a.parquet")
    huge = {**json.loads(table.schema.metadata[b"gim.circuits"])["graph"], "layers": 2**19, "heads": 2**10}
    for change, reason in (
        (lambda: table.sort_by([("score", "descending")]), "its writers are not those of its graph, in their order"),
        (lambda: table.take(list(range(table.num_rows - 1))), "it has 12 scores, and its graph 13"),
        (lambda: _with_graph(table, huge), r"it has 13 scores, and its graph [0-9]+,[0-9]+,"),
        (lambda: _with_graph(table, {**huge, "layers": 1, "heads": 2, "groups": 0}), "groups must be a whole number"),
        (lambda: table.set_column(2, "score", [[float("nan")] * 13]), "its scores are not all finite real numbers"),
    ):
        parquet.write_table(change(), tmp_path / "b.parquet")
        refused("b.parquet", reason)
    circuit.to_mib(tmp_path / "a.json")
    held = json.loads((tmp_path / "a.json").read_text())
    for entry, reason in (
        (
            {"cfg": {**held["cfg"], "n_layers": 2**19, "n_heads": 2**10}},
            r"it has 13 edges, and its graph [0-9]+,[0-9]+,",
        ),
        ({"cfg": {**held["cfg"], "n_layers": True}}, "must be whole numbers"),
        ({"cfg": {**held["cfg"], "parallel_attn_mlp": "false"}}, "must be true or false, got 'false'"),
        ({"nodes": {name: {"score": "1"} for name in held["nodes"]}}, "too many dimensions 'str'"),
    ):
        (tmp_path / "b.json").write_text(json.dumps({**held, **entry}))
        refused("b.json", reason)
    circuit.to_mib(tmp_path / "a.pt")
    kept = torch.load(tmp_path / "a.pt", weights_only=True)
    scores = kept["edges_scores"]
    for changed, reason in (
        (
            {**kept, "edges_scores": scores.T.contiguous()},
            r"its scores have the shape \(8, 4\), and its graph \(4, 8\)",
        ),
        ({**kept, "edges_scores": scores * float("inf")}, "its scores are not all finite real numbers"),
        ({**kept, "edges_scores": scores + 0j}, "its scores are not all finite real numbers"),
        (
            {**kept, "cfg": {**kept["cfg"], "n_layers": 2**19, "n_heads": 2**10}},
            "it has 4 writers, and its graph 53[0-9],",
        ),
        (scores, "it holds Tensor"),
        ({**kept, "more": Path("x")}, "it is damaged, or holds more than tensors and plain values"),
    ):
        torch.save(changed, tmp_path / "b.pt")
        refused("b.pt", reason)
    (tmp_path / "b.pt").write_bytes(b"")
    refused("b.pt", "EOFError")


def _with_graph(table: Any, graph: dict[str, Any]) -> Any:
    metadata = {b"gim.circuits": json.dumps({"graph": graph, "settings": {}}).encode()}
    return table.replace_schema_metadata(metadata)


def test_the_exchange_format_is_eap_igs(tmp_path: Path) -> None:
    """A graph of one layer with one head, as its code writes it."""
    scores = torch.tensor([[0.5, -0.25, 2.0, 1.0, 0.125], [0, 0, 0, 3.0, -1.0], [0, 0, 0, 0, 4.0]], dtype=torch.float64)
    circuit = Circuit(Graph(1, 1, False, 8), scores, {})
    circuit.to_mib(tmp_path / "a.json", 3)
    config = {"n_layers": 1, "n_heads": 1, "parallel_attn_mlp": False, "d_model": 8}
    edges = {
        "input->a0.h0<q>": (0.5, False), "input->a0.h0<k>": (-0.25, False), "input->a0.h0<v>": (2.0, True),
        "input->m0": (1.0, False), "input->logits": (0.125, False), "a0.h0->m0": (3.0, True),
        "a0.h0->logits": (-1.0, False), "m0->logits": (4.0, True),
    }  # fmt: skip
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "cfg": config,
        "nodes": {name: {"in_graph": True} for name in ("input", "a0.h0", "m0", "logits")},
        "edges": {name: {"score": score, "in_graph": kept} for name, (score, kept) in edges.items()},
    }
    circuit.to_mib(tmp_path / "a.pt", 3)
    held = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(held) == {"cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph"}
    assert held["cfg"] == config and held["src_nodes"] == ["input", "a0.h0", "m0"]
    assert held["dst_nodes"] == ["a0.h0<q>", "a0.h0<k>", "a0.h0<v>", "m0", "logits"]
    assert torch.equal(held["edges_scores"].double(), scores) and held["edges_in_graph"].sum() == 3
    assert held["nodes_in_graph"].tolist() == [True, True, True]


def test_networkx_holds_the_kept_edges(circuit: Circuit) -> None:
    kept = circuit.kept(60)
    graph = circuit.to_networkx(60)
    assert graph.number_of_edges() == int(kept.sum()) and set(graph.nodes) >= {"input", "logits"}
    name = circuit.graph.writer_names
    for writer, reader, branch, score in graph.edges(keys=True, data="score"):
        column = circuit.graph.reader_names.index(reader if branch == "in" else f"{reader}<{branch}>")
        assert score == circuit.scores[name.index(writer), column] and kept[name.index(writer), column]


# --------------------------------------------------------------------------------------------------------- resuming


def test_a_search_goes_on_from_its_file(
    demo: tuple[Any, Any], circuit: Circuit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "find.safetensors"
    named: dict[str, Any] = {"tokenizer": demo[1], "resume": file, "batch_tokens": 1}
    scored = scores.Scorer.scores
    calls: list[Any] = []

    def interrupted(self: Any, batch: Any) -> torch.Tensor:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(batch)
        return scored(self, batch)

    monkeypatch.setattr(scores.Scorer, "scores", interrupted)
    with pytest.raises(gim.circuits.CircuitInterrupted) as caught:
        attribute(demo[0], PAIRS, **named)
    assert caught.value.circuit is not None and caught.value.circuit.settings["pairs"] == 2
    monkeypatch.setattr(scores.Scorer, "scores", scored)
    seen: list[tuple[int, int]] = []
    found = attribute(demo[0], PAIRS, **named, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    assert_close64(found.scores.float().double(), circuit.scores, "resumed", relative=1e-5)
    for change, what in (({"rules": "GRADIENT"}, "rules"), ({"level": "node"}, "level"), ({"ig_steps": 2}, "ig_steps")):
        with pytest.raises(ValueError, match=f"was made with other {what}"):
            attribute(demo[0], PAIRS, **{**named, **change})
    with pytest.raises(ValueError, match="was made with other pairs"):
        attribute(demo[0], PAIRS[:2], **named)
    content, sums = file.read_bytes(), safetensors.torch.load_file(file)
    with safetensors.safe_open(file, "pt") as held:
        metadata = held.metadata()
    for total, change in (
        (sums["total"][:3], {}),
        (sums["total"].float(), {}),
        (sums["total"], {"done": "[0, 7]"}),
    ):
        safetensors.torch.save_file({"total": total.contiguous()}, file, {**metadata, **change})
        with pytest.raises(ValueError, match="does not hold the sum over some of these 3 pairs"):
            attribute(demo[0], PAIRS, **named)
    for total, change in ((sums["total"] + 1e-9, {}), (sums["total"], {"done": "[0]"})):
        safetensors.torch.save_file({"total": total}, file, {**metadata, **change})
        with pytest.raises(ValueError, match="is not as it was written"):
            attribute(demo[0], PAIRS, **named)
    for change in ({"settings": "[1]"}, {"done": "1"}):
        safetensors.torch.save_file(sums, file, {**metadata, **change})
        with pytest.raises(ValueError, match="is no file of a search for a circuit"):
            attribute(demo[0], PAIRS, **named)
    file.write_bytes(content)
    assert attribute(demo[0], PAIRS, **named).settings["pairs"] == 3
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no file of a search for a circuit"):
        attribute(demo[0], PAIRS, **named)
    assert file.read_bytes() == b"something else"


def test_another_metric_of_one_name_is_another(demo: tuple[Any, Any], tmp_path: Path) -> None:
    def of(token: int) -> Any:
        return lambda logits, answers: logits[:, token]

    named: dict[str, Any] = {"tokenizer": demo[1], "resume": tmp_path / "find"}
    first = attribute(demo[0], PAIRS, metric=of(3), **named)
    assert torch.equal(attribute(demo[0], PAIRS, metric=of(3), **named).scores, first.scores)
    with pytest.raises(ValueError, match="was made with other metric"):
        attribute(demo[0], PAIRS, metric=of(4), **named)
    assert first.settings["metric"].endswith("<lambda>")
    with pytest.raises(ValueError, match="metric must let a gradient through from the logits"):
        attribute(demo[0], PAIRS, tokenizer=demo[1], metric=lambda logits, answers: logits.detach()[:, 0])


@pytest.mark.slow
def test_a_measurement_goes_on_from_its_file(demo: tuple[Any, Any], circuit: Circuit, tmp_path: Path) -> None:
    sizes, file = (0.1, 1.0), tmp_path / "score.jsonl"
    named: dict[str, Any] = {"sizes": sizes, "batch_tokens": 1, "resume": file}

    def stop_after(pairs: int) -> Any:
        def stop(done: int, total: int, left: float | None) -> None:
            if done == pairs:
                raise KeyboardInterrupt

        return stop

    whole = circuit.faithfulness(PAIRS, sizes, batch_tokens=1).to_dict()
    with pytest.raises(CurveInterrupted) as caught:
        circuit.faithfulness(PAIRS, progress=stop_after(2), **named)
    found = caught.value.curve
    assert found is not None and found.to_dict()["values"] == {
        order: several[:2] for order, several in whole["values"].items()
    }
    seen: list[int] = []
    again = circuit.faithfulness(PAIRS, progress=lambda done, *_: seen.append(done), **named)
    assert seen == [2, 3] and again.to_dict() == whole
    with pytest.raises(CurveInterrupted) as caught:
        circuit.faithfulness(PAIRS, sizes, batch_tokens=1, progress=stop_after(1))
    assert caught.value.curve is not None and caught.value.curve.cpr.n == 1


@pytest.mark.slow
def test_an_interrupt_stays_one_where_the_finished_pairs_make_no_curve() -> None:
    model = text_model()
    same, other = Pair([1, 2], [1, 2], 4, 5), Pair([1, 2, 3], [1, 7, 3], 4, 5)
    found = attribute(model, [other])

    def stopped(pairs: list[Pair], after: int) -> Curve | None:
        def stop(done: int, total: int, left: float | None) -> None:
            if done == after:
                raise KeyboardInterrupt

        with pytest.raises(CurveInterrupted) as caught:
            found.faithfulness(pairs, progress=stop, batch_tokens=1)
        return caught.value.curve

    assert stopped([same, other], 0) is None and stopped([same, other], 1) is None
    # Of two such pairs, one of which has no share alone, there are areas and no intervals; nothing warns of that.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curve = stopped([same, other, other], 2)
        assert curve is not None and len(curve.points) == 2 * len(MIB_SIZES)
        assert np.isfinite((curve.cpr.mean, curve.cmd.mean)).all()
        assert np.isnan((curve.cpr.low, curve.cpr.high, curve.cmd.low, curve.cmd.high)).all()


def test_an_interrupted_measurement_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, circuit: Circuit) -> None:
    measured, saved = Circuit.faithfulness, tmp_path / "circuit.parquet"
    circuit.save(saved)
    finished: list[Any] = []

    def stopped(self: Circuit, data: Any, **named: Any) -> Any:
        raise CurveInterrupted(measured(self, PAIRS[:2], **named) if finished else None)

    monkeypatch.setattr(Circuit, "faithfulness", stopped)
    call = ["circuit", "score", str(saved), "agreement", "--model", str(DEMO), "--device", "cpu"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 130 and "CPR" not in result.output
    finished.append(True)
    result = CliRunner().invoke(app, [*call, "--save", str(tmp_path / "curve.json")])
    assert result.exit_code == 130 and "CPR" in result.output and (tmp_path / "curve.json").exists()


def test_a_constant_softmax_warns_and_is_said_in_the_result(demo: tuple[Any, Any]) -> None:
    with pytest.warns(UserWarning, match="every edge into a q or a k has the score 0"):
        found = attribute(demo[0], PAIRS[:1], tokenizer=demo[1], rules="GIM_CONSTANT")
    assert "the softmax is constant" in repr(found) and found.settings["notes"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(demo[0], PAIRS[:1], tokenizer=demo[1])


# ------------------------------------------------------------------------------------------------------ command line


def test_the_command_finds_scores_exports_and_shows(tmp_path: Path) -> None:
    pairs, found, runner = tmp_path / "pairs.jsonl", str(tmp_path / "found.parquet"), CliRunner()
    rows = [{"clean": p.clean, "corrupted": p.corrupted, "answer": p.answer, "wrong": p.wrong} for p in PAIRS[:2]]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = ("--model", str(DEMO), "--device", "cpu")

    def call(*arguments: str, code: int = 0) -> str:
        done = runner.invoke(app, ["circuit", *arguments])
        assert done.exit_code == code, done.output
        return done.output

    out = call("find", str(pairs), *model, "--save", found, "--html", str(tmp_path / "page.html"))
    assert "479 edges" in out and "2 pairs" in out and (tmp_path / "page.html").exists()
    out = call("score", found, str(pairs), *model, "--save", str(tmp_path / "curve.json"))
    assert "CPR" in out and "CMD" in out
    assert json.loads((tmp_path / "curve.json").read_text())["sizes"] == list(MIB_SIZES)
    for name in ("a.json", "a.pt", "a.graphml"):
        call("export", found, str(tmp_path / name), "-n", "40")
        assert (tmp_path / name).stat().st_size > 500
    shown = call("show", str(tmp_path / "a.pt"), "--top", "3", "--html", str(tmp_path / "a.html"), "--paths", "2")
    assert "m3" in shown and (tmp_path / "a.html").read_text(encoding="utf-8").count("<tr><td>") == 2
    assert "must end in" in call("export", found, str(tmp_path / "a.txt"), code=2)
    for name in ("b.html", "b.parquet"):
        assert "-n is not for" in call("export", found, str(tmp_path / name), "-n", "40", code=2)
    assert "give -n too" in call("export", found, str(tmp_path / "b.json"), "--absolute", code=2)
    # Said before the model is looked for.
    out = call("find", str(pairs), "--model", "none", "--save", str(tmp_path / "b.json"), code=2)
    assert "--save: must end in .parquet, got" in out
    assert "a circuit is a file" in call("show", str(tmp_path / "a.graphml"), code=2)
    assert "row 0: neither clean" in call("score", found, str(_bad(tmp_path)), *model, code=2)


def _bad(folder: Path) -> Path:
    path = folder / "bad.jsonl"
    path.write_text('{"clean": "a"}\n')
    return path
