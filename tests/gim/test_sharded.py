"""Sequences and weights that lie in parts are refused by name, on every rank; tensor parallelism is exact."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama import modeling_llama

import gim
from gim import UnsupportedModelError
from gim_kernels.budget import largest_error
from tests.families import ids, make
from tests.oracle import FLOAT64_MODEL_RELATIVE, assert_close64

WORLD = 2


def explain(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return gim.explain(model, tokens, target_token_id=11, baseline_token_id=3)


class Plain(nn.Module):
    """Attention outside transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y[:, None] for y in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


def ours(*inputs: Any, **named: Any) -> Any:
    """Somebody's attention, which could send heads to other ranks before and after."""
    return AttentionInterface().get("eager", modeling_llama.eager_attention_forward)(*inputs, **named)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Somebody's attention that says it is another."""

    @functools.wraps(function)
    def wrapper(*inputs: Any, **named: Any) -> Any:
        return function(*inputs, **named)

    return wrapper


class Callable_:  # noqa: N801
    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return ours(*inputs, **named)


REGISTERED = AttentionInterface()["sdpa"]
FOREIGN = {
    "function": ours,
    "partial": functools.partial(ours, group=None),
    "object": Callable_(),
    "wraps": decorated(REGISTERED),
    "no_grad": torch.no_grad()(ours),
}


@pytest.mark.parametrize("function", FOREIGN.values(), ids=FOREIGN)
def test_an_unknown_attention_is_refused_by_name(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "ulysses", function)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "ulysses", AttentionMaskInterface()["sdpa"])
    model = make("llama", torch.float32)
    model.set_attn_implementation("ulysses")
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM: .*'ulysses' runs tests\.gim\.test_sharded"):
        gim.GIM(model).__enter__()
    with pytest.raises(UnsupportedModelError, match="'ulysses' runs"):
        explain(model, ids(1))
    assert model.config._attn_implementation == "ulysses"


@pytest.mark.parametrize("function", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("everywhere", [False, True], ids=["one file", "everywhere"])
def test_a_replaced_attention_is_noticed(function: Any, everywhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = (
        AttentionInterface._global_mapping if everywhere else modeling_llama.ALL_ATTENTION_FUNCTIONS._local_mapping
    )
    monkeypatch.setitem(mapping, "sdpa", function)
    model = make("llama", torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"'sdpa' runs tests\.gim\.test_sharded"):
        gim.GIM(model, strict=False).__enter__()


def test_the_entry_of_the_package_itself_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS._local_mapping, "gim", ours)
    with pytest.raises(UnsupportedModelError, match=r"runs tests\.gim\.test_sharded\.ours"):
        gim.GIM(make("llama", torch.float32)).__enter__()


def test_a_replaced_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", ours)
    with pytest.raises(UnsupportedModelError, match="mask implementation 'sdpa' runs"):
        gim.GIM(make("llama", torch.float32)).__enter__()


def test_a_replaced_eager_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", torch.float32)
    model.set_attn_implementation("eager")
    with gim.GIM(model):
        pass
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", ours)
    with pytest.raises(UnsupportedModelError, match=r"'eager' runs tests\.gim\.test_sharded\.ours"):
        gim.GIM(model).__enter__()


def test_what_a_registered_function_calls_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ring attention is put below flash attention's entry."""
    from transformers.integrations import flash_attention

    model = make("llama", torch.float32)
    model.config._attn_implementation_internal = "flash_attention_2"
    with gim.GIM(model):
        pass
    monkeypatch.setattr(flash_attention, "_flash_attention_forward", ours)
    with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2' runs tests\.gim\.test_sharded\.ours"):
        gim.GIM(model).__enter__()


@pytest.mark.parametrize("name", ["ring", "ulysses_sdpa"])
def test_a_name_that_nobody_registered_is_refused(name: str) -> None:
    model = make("llama", torch.float32)
    model.config._attn_implementation_internal = name
    with pytest.raises(UnsupportedModelError, match=f"'{name}' is none that transformers has"):
        gim.GIM(model).__enter__()


@pytest.mark.parametrize("name", [*AttentionInterface._global_mapping, "eager", None, "kernels-community/flash-attn3"])
def test_the_implementations_of_transformers_are_known(name: str | None) -> None:
    if name == "tests":  # registered by the tests themselves
        return
    model = make("llama", torch.float64)
    want = explain(model, ids(1))
    model.config._attn_implementation_internal = name
    assert torch.equal(explain(model, ids(1)), want)


def replaced(*inputs: Any, **named: Any) -> torch.Tensor:
    return torch._C._nn.scaled_dot_product_attention(*inputs, **named)


@pytest.mark.parametrize("make_one", [Plain, lambda: make("llama", torch.float32)], ids=["plain", "llama"])
def test_a_replaced_function_of_torch_is_noticed(make_one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a context opens, and inside one."""
    model = make_one()
    tokens = torch.randn(1, 4, 8) if isinstance(model, Plain) else ids(1)
    with gim.GIM(model):
        monkeypatch.setattr(F, "scaled_dot_product_attention", replaced)
        with pytest.raises(UnsupportedModelError, match=r"replaced by tests\.gim\.test_sharded\.replaced"):
            model(tokens)
    with pytest.raises(UnsupportedModelError, match=r"replaced by tests\.gim\.test_sharded\.replaced"):
        gim.GIM(model).__enter__()


def test_weights_that_accelerate_offloads_are_refused_by_name(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
    want = explain(make("llama", torch.float64), ids(1))
    parts = ("embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb")
    everything = {**{f"model.{part}": "cpu" for part in parts}, "lm_head": "cpu"}
    whole = accelerate.dispatch_model(make("llama", torch.float64), everything, main_device="cpu", force_hooks=True)
    assert_close64(explain(whole, ids(1)), want, "hooks that offload nothing", FLOAT64_MODEL_RELATIVE)
    on_disk = accelerate.dispatch_model(
        make("llama", torch.float64),
        {**everything, "model.layers.1": "disk"},
        main_device="cpu",
        offload_dir=tmp_path,
        force_hooks=True,
    )
    elsewhere = accelerate.cpu_offload(make("llama", torch.float64), execution_device=torch.device("cpu"))
    for model, name in ((on_disk, r"model\.layers\.1\.self_attn\.q_proj"), (elsewhere, r"model\.embed_tokens")):
        for attempt in (lambda: gim.GIM(model).__enter__(), lambda: explain(model, ids(1))):  # noqa: B023
            with pytest.raises(UnsupportedModelError, match=rf"{name} is offloaded by accelerate \(AlignDevicesHook"):
                attempt()


def test_weights_that_deepspeed_partitions_are_refused_by_name() -> None:
    """As zero.Init leaves a parameter: empty here, its number and status beside it."""
    model = make("llama", torch.float32)
    weight: Any = model.model.layers[0].mlp.up_proj.weight
    weight.data, weight.ds_id, weight.ds_status = torch.empty(0), 7, "NOT_AVAILABLE"
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj\.weight is partitioned by ZeRO-3"):
        gim.GIM(model).__enter__()


# ---- on two ranks: each says what it saw, and one that hangs is a failure


def refusal(attempt: Callable[[], Any]) -> str:
    """The message with which a context refuses; what came instead where it does not."""
    try:
        attempt()
    except UnsupportedModelError as error:
        return str(error)
    except Exception:
        return "raised " + traceback.format_exc()
    return "ran"


def entered(model: nn.Module) -> str:
    return refusal(lambda: gim.GIM(model).__enter__())


def in_context_parallel(saved: str) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh, said = init_device_mesh("cpu", (WORLD,)), {}
    for name, model in (("llama", make("llama", torch.float32)), ("plain", Plain())):
        tokens = torch.zeros(1, 8, dtype=torch.int64) if name == "llama" else torch.zeros(1, 8, 8)
        with context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]):
            said[f"{name}: entered"] = entered(model)
            if name == "llama":
                said["explain"] = refusal(lambda: explain(model, tokens))  # noqa: B023
        with gim.GIM(model), context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]):
            said[f"{name}: inside"] = refusal(lambda: model(tokens))  # noqa: B023
        assert entered(model) == "ran"  # and outside it runs
    return said


def in_a_module_wrapped(saved: str) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import experimental
    from torch.distributed.tensor.parallel import parallelize_module

    mesh, api, said = init_device_mesh("cpu", (WORLD,)), experimental._attention, {}
    assert entered(Plain()) == "ran"  # it is imported, and nothing is sharded
    api._enable_context_parallel_dispatcher()
    said["dispatcher"] = entered(Plain())
    api._disable_context_parallel_dispatcher()
    assert entered(Plain()) == "ran"
    style = api._ContextParallel(seq_dim=2, attention_type=api._ContextParallel.AttentionType.SDPA)
    said["style"] = entered(parallelize_module(Plain(), mesh, style))
    return said


def fully_sharded(saved: str) -> dict[str, str]:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    said = {}
    for name in ("layers", "layers and root"):
        model = make("llama", torch.float32)
        for layer in model.model.layers:
            fully_shard(layer)
        if name != "layers":
            fully_shard(model)
        said[f"{name}: entered"] = entered(model)
        said[f"{name}: explain"] = refusal(lambda: explain(model, ids(1)))  # noqa: B023
    said["version 1"] = entered(FullyShardedDataParallel(make("llama", torch.float32), device_id=torch.device("cpu")))
    return said


def in_a_pipeline(saved: str) -> dict[str, str]:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    layer = Plain()
    stage = PipelineStage(layer, dist.get_rank(), WORLD, torch.device("cpu"))
    said = {"module": entered(layer), "module around": entered(nn.Sequential(layer))}
    assert entered(Plain()) == "ran" and stage.submod is layer
    parted = AutoModelForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(pp_size=WORLD)).eval()
    said["transformers: entered"] = entered(parted)
    said["transformers: explain"] = refusal(lambda: explain(parted, ids(1)))
    return said


def tensor_parallel(saved: str) -> dict[str, str]:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    whole = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64).eval()
    config = DistributedConfig(tp_size=WORLD)
    parted = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float64, distributed_config=config).eval()
    assert any("DTensor" in type(parameter).__name__ for parameter in parted.parameters())
    cases: list[tuple[str, str, Any]] = [(rules, "none", "auto") for rules in gim.rules.PRESETS]
    cases += [("GIM", "layer+attention+tile=8", "auto"), ("GIM", "none", "composed"), ("GIM", "none", "reference")]
    furthest = 0.0
    for rules, memory, engine in cases:
        options: Any = {"target_token_id": 11, "baseline_token_id": 3, "rules": rules, "memory": memory}
        want = gim.explain(whole, ids(1), **options)
        got = gim.explain(parted, ids(1), engine=engine, **options)
        # Two ranks sum each product in two parts, and nothing else may differ.
        assert_close64(got, want, f"{rules} {memory} {engine}")
        furthest = max(furthest, largest_error(got, want))
    return {"every rule, plan and engine": f"equal within {furthest:.1e}"}


CASES = {
    "in_context_parallel": "context_parallel of torch",
    "in_a_module_wrapped": "context parallelism of torch",
    "fully_sharded": "FSDP",
    "in_a_pipeline": "pipelin",
    "tensor_parallel": "equal",
}


def on_a_rank(rank: int, port: int, saved: str, answers: Any) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    for case in CASES:
        try:
            answers.put((rank, case, globals()[case](saved)))
        except Exception:
            answers.put((rank, case, {"failed": "raised " + traceback.format_exc()}))
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, str]]:
    """What each rank said of each case."""
    saved = tmp_path_factory.mktemp("llama")
    make("llama", torch.float32).save_pretrained(saved)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=on_a_rank, args=(rank, port, str(saved), answers)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    try:
        got = [answers.get(timeout=120) for _ in range(WORLD * len(CASES))]
        for process in ranks:
            process.join(timeout=30)
        assert [process.exitcode for process in ranks] == [0] * WORLD
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
    return {(rank, case): words for rank, case, words in got}


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize(("case", "name"), CASES.items(), ids=CASES)
def test_every_rank_says_the_same(case: str, name: str, rank: int, said: dict[tuple[int, str], dict[str, str]]) -> None:
    assert said[rank, case]
    for what, word in said[rank, case].items():
        assert name in word and not word.startswith("raised"), f"{what}: {word}"


@pytest.mark.slow
def test_looking_at_placement_imports_nothing() -> None:
    code = (
        "import sys, torch\n"
        "from torch import nn\n"
        "from gim import GIM\n"
        "before = set(sys.modules)\n"
        "with GIM(nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 4))): pass\n"
        "new = set(sys.modules) - before\n"
        "print([m for m in new if m.startswith(('accelerate', 'torch.distributed', 'deepspeed'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]", out.stdout
