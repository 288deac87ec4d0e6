"""Files that anybody may have made, and files that a killed process left: what is read, refused and removed."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import gim
import gim.demo
from gim import files, rules
from gim.applied import Application, AppliedReport
from gim.attribution import Attribution
from gim.cli import errors, models, options
from gim.files import write_atomically
from gim.loading import INDEX, check_weights
from gim.targets import Explained
from tests.families import make


def example() -> Attribution:
    """A result with something in every field."""
    text = "The cat\u2028 sat\ud800 \U0001f642"
    report = AppliedReport(
        "GIM",
        [Application("attention", "layers.0.attn", "Attention", "temperature", "interface", "blockwise", 1)],
        [("layers.0.norm", "odd")],
        ["no gates"],
        1,
    )
    return Attribution(
        text=text,
        tokens=("<s>", "The cat", text[7:]),
        token_ids=(0, 7, 8),
        offsets=((0, 0), (0, 7), (7, len(text))),
        scores=torch.tensor([0.1, -1e-38, 3e5]),
        special=(True, False, False),
        target=Explained("contrast", "' a' minus ' b'", (1, 2), (" a", " b"), (2, 2), "logit", -1.25),
        rules=rules.GIM,
        engine="blockwise",
        report=report,
        model="Model (tiny)",
        baseline=(0, " "),
        versions={"torch": "2"},
        memory="all kept",
    )


# --------------------------------------------------- attributions as JSON

#: What stands in for a value, one of every kind that JSON has, at the edges of each.
VALUES: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, -0.0, 1e39, 1e308, "", "a", "\ud800", [], {},
    [None], [[]], [1, 2, 3], {"a": 1}, [["a", "b"]], "9" * 50, [10**400], [1e39], ["a"] * 3,
]  # fmt: skip
#: What stands in for a piece of the text.
PIECES = [
    b"", b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\ud800", b"\\u00", b"NaN", b"-Infinity", b"1e999", b"null",
    b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"-", b"true",
]  # fmt: skip


def mutated(random_: random.Random, document: bytes) -> bytes:
    """A document with one to three changes to its values, or to its bytes."""
    if random_.random() < 0.5:
        fields = json.loads(document)
        for _ in range(random_.randint(1, 3)):
            change_a_value(random_, fields)
        return json.dumps(fields).encode()
    for _ in range(random_.randint(1, 3)):
        start = random_.randrange(len(document) + 1)
        end = min(len(document), start + random_.choice((0, 0, 1, 1, 2, 8, 200, len(document))))
        piece = random_.choice((random_.choice(PIECES), random_.randbytes(2), document[start:end] * 2))
        document = document[:start] + piece + document[end:]
    return document


def change_a_value(random_: random.Random, fields: Any) -> None:
    """Replace, remove or repeat something somewhere in lists and objects."""
    while True:
        keys = list(fields) if isinstance(fields, dict) else list(range(len(fields)))
        if not keys:
            return
        key = random_.choice(keys)
        if isinstance(fields[key], dict | list) and fields[key] and random_.random() < 0.7:
            fields = fields[key]
            continue
        action = random_.randrange(4)
        if action == 0:
            del fields[key]
        elif action == 1 and isinstance(fields, dict):
            fields[f"{key}_"] = fields.pop(key)
        elif action == 1:
            fields.append(fields[key])
        else:
            fields[key] = copy.deepcopy(random_.choice(VALUES))
        return


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 3000), pytest.param(1, 100_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_a_mutated_file_is_read_or_is_a_value_error(tmp_path: Path, seed: int, count: int) -> None:
    random_ = random.Random(seed)
    document = example().to_json().encode()
    path = tmp_path / "a.json"
    read = 0
    for index in range(count):
        content = mutated(random_, document)
        path.write_bytes(content)
        try:
            found = Attribution.from_json(path)
        except ValueError:
            continue
        except BaseException as error:
            raise AssertionError(f"mutation {index} of seed {seed}: {content[:300]!r}") from error
        read += 1
        # What is read holds values of the declared types: all of it can be written, shown and read again.
        assert Attribution.from_json(found.to_json()) == found
        repr(found)
        found.to_words()
    assert 0 < read < count / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "abc"}, "field 'tokens' must be a list, got 'abc'"),
        ({"tokens": ["a", 1, "b"]}, "field 'tokens' entry 1 must be text, got 1"),
        ({"token_ids": [0, True, 2]}, "field 'token_ids' entry 1 must be a whole number >= 0, got True"),
        ({"token_ids": [0, 7]}, "token_ids must have one entry for each of the 3 tokens, got 2"),
        ({"offsets": [[0, 0], [0, 7], [7]]}, r"field 'offsets' entry 2 must be a list of two, got \[7\]"),
        ({"offsets": [[0, 0], [0, 7], [7, 99]]}, "offsets of token 2 must satisfy"),
        ({"scores": [0.5, "1", 2]}, "field 'scores' entry 1 must be a finite number, got '1'"),
        ({"scores": [0.5, 10**400, 2]}, "field 'scores' entry 1 must be a finite number"),
        ({"scores": [0.5, 1e39, 2]}, "scores must be finite, but token 1 .* has inf"),
        ({"special": [0, 1, 0]}, "field 'special' entry 0 must be true or false, got 0"),
        ({"baseline": [0]}, "field 'baseline' must be a list of two"),
        ({"versions": {"torch": 2}}, "field 'versions' must be an object of texts"),
        ({"rules": rules.GIM.to_dict() | {"temperature": 10**400}}, "temperature must be a finite number"),
        ({"rules": rules.GIM.to_dict() | {"softmax": ["exact"]}}, "softmax must be one of"),
        ({"rules": {}}, r"missing fields of Rules: \['activation', 'freeze_norm', 'gate_scale', .*'v_scale'\]"),
        (
            {"rules": {name: value for name, value in rules.ATTNLRP.to_dict().items() if name != "activation"}},
            r"missing fields of Rules: \['activation'\]",
        ),
        ({"report": {"rules": ""}}, "field 'report' must have the fields rules, applications, .*, got 'rules'"),
        ({"schema_version": 1.0}, "schema version 1.0; this version of gim-kernels reads version 1"),
        ({"schema_version": True}, "schema version True; this version of gim-kernels reads version 1"),
        (
            {"next_tokens": [{"token_id": 1, "token": "a", "probability": 7.0}]},
            "field 'next_tokens' entry 0 probability must be from 0 to 1, got 7.0",
        ),
        ({"target": {}}, "field 'target' must have the fields kind, label"),
        ({"report": []}, r"field 'report' must be an object, got \[\]"),
        ({"text": None}, "field 'text' must be text, got None"),
    ],
    ids=str,
)
def test_a_field_of_another_type_or_length_is_named(change: dict[str, Any], message: str) -> None:
    document = json.dumps(json.loads(example().to_json()) | change)
    with pytest.raises(ValueError, match=message):
        Attribution.from_json(document)


@pytest.mark.parametrize("source", ["", " ", "[]", "null", "3", '"a"', f"[{'1,' * 5000}1]"])
def test_a_text_that_is_no_document_is_no_path_either(source: str) -> None:
    with pytest.raises(ValueError, match="the text is not (an attribution: it has no field schema|JSON)"):
        Attribution.from_json(source)


def test_a_file_may_have_the_name_of_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example().to_json("[1]")
    assert Attribution.from_json("[1]") == example()
    with pytest.raises(FileNotFoundError):
        Attribution.from_json("[1] or so")


def test_a_target_has_as_many_ids_as_tokens_and_positions() -> None:
    fields = json.loads(example().to_json())
    fields["target"]["positions"] = [2]
    with pytest.raises(ValueError, match="field 'target' must have as many token_ids as tokens and positions"):
        Attribution.from_json(json.dumps(fields))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(example().to_json().encode(encoding))
    assert Attribution.from_json(path) == example()
    assert Attribution.from_json("\ufeff" + example().to_json()) == example()


def test_a_result_of_the_first_version_loads(tmp_path: Path) -> None:
    """As commit 85ce4cd, which made the form, wrote it."""
    fields = {
        "schema": "gim-kernels/attribution", "schema_version": 1, "model": "M", "engine": "blockwise", "memory": "",
        "target": {"kind": "token", "label": "' a'", "token_ids": [1], "tokens": [" a"], "positions": [0],
                   "measure": "logprob", "value": -2},
        "rules": rules.ATTNLRP.to_dict(), "rules_name": "ATTNLRP", "baseline": [3, " "], "versions": {"torch": "2.11"},
        "text": "a", "tokens": ["a"], "token_ids": [1], "offsets": [[0, 1]], "special": [False], "scores": [1],
        "report": {"rules": "ATTNLRP", "applications": [{"part": "norm", "module": "n", "module_class": "N",
                   "rule": "r", "recognised": "p", "engine": "", "calls": 0}], "unsupported": [], "notes": [],
                   "forwards": 1},
    }  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(fields))
    found = Attribution.from_json(tmp_path / "old.json")
    assert (found.scores.tolist(), found.rules, found.target.value) == ([1.0], rules.ATTNLRP, -2)
    assert found.report.applications[0] == Application("norm", "n", "N", "r", "p")


def test_a_file_beyond_the_limit_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    size = len(example().to_json(path))
    assert Attribution.from_json(path, max_bytes=size) == example()
    for source in (path, path.read_text()):
        with pytest.raises(ValueError, match=f"is longer than {size - 1:,} bytes"):
            Attribution.from_json(source, max_bytes=size - 1)
    with pytest.raises(ValueError, match="/dev/zero is longer than 1,000 bytes"):
        Attribution.from_json("/dev/zero", max_bytes=1000)


# --------------------------------------------------- files of weights


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The folder of a model in two shards with an index."""
    model = make("llama", torch.float32)
    folder = tmp_path / "model"
    model.save_pretrained(folder, max_shard_size=sum(p.numel() * 4 for p in model.parameters()) // 2)
    assert len(shards(folder)) >= 2
    return folder


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def name_in_index(folder: Path, old: str, new: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: new if value == old else value for key, value in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def check(folder: Path) -> None:
    check_weights(str(folder), AutoConfig.from_pretrained(folder))


def test_a_model_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    folder = gim.demo.model_folder()
    model, tokenizer = gim.load(folder, device="cpu")
    own, _ = gim.demo.load()
    assert type(model) is type(own) and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), own.parameters(), strict=True))
    want = gim.attribute(own, tokenizer, "The password of Irene is").scores
    torch.testing.assert_close(gim.attribute(model, tokenizer, "The password of Irene is").scores, want, rtol=0, atol=0)
    for dtype in ("bfloat16", torch.bfloat16):
        assert gim.load(str(folder), dtype=dtype, device=torch.device("cpu"))[0].dtype == torch.bfloat16
    # A checkpoint is in half precision as it was saved, and a classifier is one.
    for kind in (hf.BertForSequenceClassification, hf.BertForMaskedLM):
        bert = kind(hf.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
        bert.to(torch.bfloat16).save_pretrained(tmp_path / kind.__name__)
        tokenizer.save_pretrained(tmp_path / kind.__name__)
        found, _ = gim.load(tmp_path / kind.__name__)
        assert type(found) is kind and found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name_or_path": 3}, TypeError, "name_or_path must be a str or a Path, got int"),
        ({"name_or_path": "./none"}, FileNotFoundError, r"there is no folder '\./none'"),
        ({"dtype": "float"}, None, ""),
        ({"dtype": "int8"}, ValueError, "dtype must be a floating point dtype, got 'int8'"),
        ({"dtype": "bf16"}, ValueError, "dtype must be a floating point dtype, got 'bf16'"),
        ({"dtype": 16}, TypeError, "dtype must be a torch.dtype, its name or None, got 16"),
        ({"device": "abacus"}, ValueError, "'abacus' is not a device that is there: "),
        ({"device": "xla"}, ValueError, r"'xla' is not a device that is there: .{1,120}$"),
        ({"device": 0}, TypeError, "device must be a torch.device, its name or None, got 0"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments: Any, error: type[Exception] | None, message: str) -> None:
    given = {"name_or_path": gim.demo.model_folder(), "device": "cpu", **arguments}
    if error is None:
        gim.load(**given)
        return
    with pytest.raises(error, match=message):
        gim.load(**given)


def test_a_model_that_lacks_weights_is_not_loaded(tmp_path: Path) -> None:
    model, tokenizer = gim.demo.load()
    kept = {k: v.contiguous() for k, v in model.state_dict().items() if "layers.0.mlp.up_proj" not in k}
    kept.pop("lm_head.weight", None)
    model.save_pretrained(tmp_path, state_dict=kept)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 1 weights, such as model\.layers\.0\.mlp\.up_proj\.weight"):
        gim.load(tmp_path)


TINY: dict[str, Any] = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 320, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def token_classifier() -> Any:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return hf.Qwen2ForTokenClassification(hf.Qwen2Config(**TINY, **heads, tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (token_classifier, "it was saved as Qwen2ForTokenClassification, and Qwen2ForCausalLM has no place for 2 of"),
        (lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ)), "BartForConditionalGeneration is an enc"),
    ],
    ids=["tied head", "encoder-decoder"],
)
def test_a_checkpoint_of_another_kind_is_not_loaded_as_a_language_model(
    tmp_path: Path, build: Any, message: str
) -> None:
    """Part of its weights would make one: the tied embeddings as a head, or the decoder without its encoder."""
    model, (_, tokenizer) = build(), gim.demo.load()
    held = {name: weight.clone() for name, weight in model.state_dict().items()}  # embeddings under each of their names
    model.save_pretrained(tmp_path)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        gim.load(tmp_path)


class Marks:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_shards_load_and_each_must_be_there(sharded: Path) -> None:
    check(sharded)
    loaded, _ = models.load(str(sharded), "cpu", options.Dtype.AUTO, False, with_tokenizer=False)
    want = make("llama", torch.float32).parameters()
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), want, strict=True))
    (sharded / shards(sharded)[-1]).unlink()
    with pytest.raises(FileNotFoundError, match="which holds weights, is not in the model's folder"):
        check(sharded)


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize(
    "kind", ["pickled", "pickled, renamed", "absolute", "above", "link", "drive", "number", "text"]
)
def test_an_index_names_safetensors_files_inside_its_folder_only(sharded: Path, kind: str, where: str) -> None:
    old = shards(sharded)[0 if where == "first" else -1]
    outside = sharded.parent / "outside.safetensors"
    outside.write_bytes((sharded / old).read_bytes())
    marked = sharded.parent / "ran"
    new: Any = old
    message = "which is not inside the model's folder"
    if kind.startswith("pickled"):
        new = "weights.bin" if kind == "pickled" else "weights.safetensors"
        torch.save(Marks(marked), sharded / new)
        message = "is not a safetensors file"
    elif kind == "absolute":
        new = str(outside)
    elif kind == "above":
        new = f"part/../../{outside.name}"
    elif kind == "drive":
        new = r"C:weights.safetensors"
    elif kind == "number":
        new, message = 3, "names 3, which is not a safetensors file"
    elif kind == "text":
        (sharded / old).write_text("{}" * 50)
        message = "is not a safetensors file"
    else:
        (sharded / old).unlink()
        (sharded / old).symlink_to(outside)
        message = f"is a link out of the model's folder, to {outside}"
    name_in_index(sharded, old, new)
    with pytest.raises(ValueError, match=message):
        check(sharded)
    with pytest.raises(errors.UserError, match=message):
        models.load(str(sharded), "cpu", options.Dtype.AUTO, False, with_tokenizer=False)
    assert not marked.exists()


def test_nothing_is_loaded_before_every_shard_is_known(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded too early")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(AssertionError, match="loaded too early"):
        models.load(str(sharded), "cpu", options.Dtype.AUTO, False, with_tokenizer=False)
    name_in_index(sharded, shards(sharded)[-1], "../x.safetensors")
    with pytest.raises(errors.UserError, match="not inside the model's folder"):
        models.load(str(sharded), "cpu", options.Dtype.AUTO, False, with_tokenizer=False)


def test_links_inside_the_folder_and_a_folder_that_is_a_link_load(sharded: Path, tmp_path: Path) -> None:
    (sharded / "data").mkdir()
    for name in shards(sharded):
        (sharded / name).rename(sharded / "data" / name)
        (sharded / name).symlink_to(Path("data") / name)
    check(sharded)
    (tmp_path / "link").symlink_to(sharded)
    check(tmp_path / "link")
    name_in_index(sharded, shards(sharded)[0], f"data/{shards(sharded)[0]}")
    check(sharded)
    models.load(str(sharded), "cpu", options.Dtype.AUTO, False, with_tokenizer=False)


@pytest.mark.parametrize("shared", [False, True], ids=["blobs of the repository", "blobs of the cache"])
def test_a_snapshot_in_the_hubs_cache_loads(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """By its folder and by the model's id, laid out as huggingface_hub does it: links to blobs, the blobs links too."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    repository = cache / "models--somebody--tiny"
    revision = "a" * 40
    snapshot = repository / "snapshots" / revision
    for folder in (snapshot, repository / "blobs", repository / "refs", cache / "blobs" / "ab"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for number, path in enumerate(sorted(sharded.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        if shared:
            store = cache / "blobs" / "ab" / f"{number:064x}"
            store.write_bytes(path.read_bytes())
            blob.symlink_to(os.path.relpath(store, blob.parent))
        else:
            blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    for name in (str(snapshot), "somebody/tiny"):
        loaded, _ = models.load(name, "cpu", options.Dtype.AUTO, False, with_tokenizer=False)
        assert torch.equal(loaded.lm_head.weight, make("llama", torch.float32).lm_head.weight)
    first = snapshot / shards(snapshot)[0]
    first.unlink()
    first.symlink_to(sharded / first.name)
    for name in (str(snapshot), "somebody/tiny"):
        with pytest.raises(errors.UserError, match="is a link out of the model's folder"):
            models.load(name, "cpu", options.Dtype.AUTO, False, with_tokenizer=False)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": {}, "metadata": {}}', '{"weight_map": {"a": "b.safetensors"}}',
     '{"weight_map": ["a"], "metadata": {}}', "[" * 100_000, "\x00", '{"weight_map": {"a": ["b"]}, "metadata": {}}'],
    ids=lambda content: content[:30],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        check(sharded)


def test_weights_that_the_config_names_are_safetensors_too(sharded: Path) -> None:
    config = AutoConfig.from_pretrained(sharded)
    save_file({"a": torch.zeros(1)}, sharded.parent / "outside.safetensors")
    for name in ("adapter_model.bin", "../outside.safetensors", "pytorch_model.bin.index.json", 3):
        config.transformers_weights = name
        with pytest.raises(ValueError, match=r"config\.json names .* is not "):
            check_weights(str(sharded), config)
    config.transformers_weights = INDEX
    check_weights(str(sharded), config)


# --------------------------------------------------- files that are written

#: The module alone: the package would take seconds to import.
WRITER = """
import os, runpy, sys
files = runpy.run_path(sys.argv[1])
def wait(_):
    print("writing", flush=True)
    sys.stdin.read()
os.fsync = wait
files["write_atomically"](sys.argv[2], b"of another process")
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing ``tmp_path / "a"``; it goes on when its input is closed."""
    command = [sys.executable, "-c", WRITER, str(files.__file__), str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "writing\n"
        yield started
        started.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_write_left_goes_with_the_next(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (left,) = names(tmp_path)
    write_atomically(tmp_path / "b", b"another file")
    assert names(tmp_path) == sorted([left, "b"])
    write_atomically(tmp_path / "a", b"mine")
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "a").read_bytes() == b"mine"


def test_what_another_process_is_writing_stays(tmp_path: Path, writer: subprocess.Popen[str]) -> None:
    write_atomically(tmp_path / "a", b"mine")
    assert (tmp_path / "a").read_bytes() == b"mine"
    assert len(names(tmp_path)) == 2
    assert writer.stdin is not None
    writer.stdin.close()
    assert writer.wait() == 0
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"of another process"


def test_many_writers_of_one_file_leave_one_whole_content(tmp_path: Path) -> None:
    contents = [bytes([65 + number]) * 100_000 for number in range(8)]
    failed: list[BaseException] = []
    end = time.monotonic() + 1.0

    def write(content: bytes) -> None:
        try:
            while time.monotonic() < end:
                write_atomically(tmp_path / "a", content)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() in contents


def test_only_ordinary_files_of_that_name_are_leftovers(tmp_path: Path) -> None:
    stem = files._stem(tmp_path / "a")
    kept = [f"{stem}folder.tmp", f"{stem}link.tmp", f"{stem}pipe.tmp", ".0123456789abcdef.tmp", "b.tmp"]
    (tmp_path / kept[0]).mkdir()
    (tmp_path / kept[1]).symlink_to(tmp_path / "b.tmp")
    os.mkfifo(tmp_path / kept[2])
    (tmp_path / kept[3]).touch()
    (tmp_path / kept[4]).write_text("somebody's")
    (tmp_path / f"{stem}0.tmp").touch()
    write_atomically(tmp_path / "a", b"mine")
    assert names(tmp_path) == sorted(["a", *kept])
    assert (tmp_path / "b.tmp").read_text() == "somebody's"


def test_the_longest_name_a_folder_allows_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"mine")
    assert names(tmp_path) == [path.name]


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    left = tmp_path / f"{files._stem(tmp_path / 'a')}0.tmp"
    left.touch()
    monkeypatch.setattr("gim.files.fcntl.flock", refuse)
    write_atomically(tmp_path / "a", b"mine")
    assert names(tmp_path) == sorted(["a", left.name])  # nothing tells whether somebody is writing it
