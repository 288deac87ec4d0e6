"""Which forwards are watched, and what is said of those that are not."""

from __future__ import annotations

import contextvars
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gim
from gim.applied import AppliedReport, UnsupportedModelError
from gim.context import inspect
from gim.intercept.watch import Watch
from tests.gim.test_watch import GATES, IDS, MLP, SOFTMAXES, WIDTH, Net, _sigmoid_gate, llama


class Counting(TorchDispatchMode):
    """How many modes of the watch are on while operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        self.watched += any(isinstance(mode, Watch) for mode in modes)
        return func(*args, **(kwargs or {}))


def watches(model: Any, run: Callable[[], Any] | None = None) -> bool:
    """Whether a forward of a model starts a watch."""
    started: list[Watch] = []
    enter = Watch.__enter__

    def entered(self: Watch) -> Watch:
        started.append(self)
        return enter(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "__enter__", entered)
        (run or (lambda: model(IDS)))()
    return bool(started)


def test_a_forward_is_watched_once_and_again_after_a_change() -> None:
    model = llama(layers=2)

    def both() -> tuple[bool, bool]:
        first: list[bool] = []
        for _ in range(2):
            with gim.GIM(model, strict=False) as report:
                first.append(watches(model))
            assert report.watched
        return first[0], first[1]

    once = (True, False)
    assert both() == once
    assert both() == (False, False)  # another session of the same rules
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert both() == once
    model.model.layers[1].mlp = MLP(GATES["by hand"])
    assert both() == once
    model.bfloat16()
    assert both() == once
    model.model.layers[0].mlp.forward = lambda x: x
    assert both() == once
    model.config.update({"some_switch": True})
    assert both() == once
    with gim.GIM(model, strict=False):
        assert watches(model, lambda: model(IDS, attention_mask=torch.ones_like(IDS)))
        assert watches(model, lambda: model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False))
        assert not watches(model)
    with gim.GIM(model, strict=False, rules="ATTNLRP"):
        assert watches(model)


def test_what_was_seen_is_not_copied_with_a_model() -> None:
    model = llama()
    with gim.GIM(model):
        model(IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with gim.GIM(other):
            assert watches(other)


def test_what_was_found_stands_for_later_forwards() -> None:
    model = Net(attend=SOFTMAXES["exp"])
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="Net: softmax over keys"), gim.GIM(model, rules="TSG_ONLY"):
            model(IDS)


def test_a_forward_that_reaches_another_part_is_watched_again() -> None:
    calls: list[int] = []

    class Switching(Net):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            x = F.layer_norm(self.embed(input_ids), (WIDTH,))
            if len(calls) > 1:
                x = F.silu(x) * self.key(x)
                x = SOFTMAXES["exp"](x @ self.query(x).mT, x)
            return self.head(x)

    model = Switching()
    with gim.GIM(model) as report:
        watched = []
        for _ in range(2):
            model(IDS)
            watched.append(report.watched)
        assert watched == [True, False]
        assert any("which no watched one did" in note for note in report.notes)
        with pytest.raises(UnsupportedModelError, match="Switching: softmax over keys"):
            model(IDS)


def test_a_forward_that_leaves_a_part_out_where_its_module_ran_is_watched_again() -> None:
    scripted = torch.jit.script(_sigmoid_gate)
    calls: list[int] = []

    def gate(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.silu(g) * u if len(calls) == 1 else scripted(g, u)

    model = Net(gate=gate)
    with gim.GIM(model) as report:
        model(IDS)
        assert report.watched
        with pytest.raises(UnsupportedModelError, match="mlp: a rule was applied here in a forward that was watched"):
            model(IDS)
        with pytest.raises(UnsupportedModelError, match="mlp: gated product"):
            model(IDS)


def test_both_ways_through_a_module_are_known_once_both_were_watched() -> None:
    calls: list[int] = []

    def gate(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.silu(g) * u if len(calls) % 2 else g + u

    model = Net(gate=gate)
    with gim.GIM(model) as report:
        model(IDS)
        with pytest.raises(UnsupportedModelError, match="run it again to watch it"):
            model(IDS)
        for _ in range(4):
            model(IDS)
            assert report.watched


def test_a_part_that_need_not_run_is_not_missed() -> None:
    class Skipping(Net):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            return self.head(x + self.mlp(x) if bool((input_ids > 3).any()) else x)

    model = Skipping(gate=GATES["silu"])
    with gim.GIM(model) as report:
        for ids in (IDS + 4, IDS.clamp(max=3), IDS + 4):
            model(ids)
            assert report.watched and not any("are watched again" in note for note in report.notes)


def test_a_checkpoints_second_run_is_not_watched() -> None:
    model = llama(layers=2).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with gim.GIM(model) as report:
        loss = model(IDS, use_cache=False).logits.sum()
        with Counting() as counting:
            loss.backward()
    assert report.watched and counting.watched == 0


def test_an_error_in_a_forward_ends_the_watch() -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model = llama()
    model.model.norm.register_forward_hook(stop)
    with gim.GIM(model), pytest.raises(KeyboardInterrupt):
        model(IDS)
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_a_report_says_whether_it_was_watched() -> None:
    model = llama()
    with gim.GIM(model) as report:
        assert not report.watched and report.summary().endswith("; not watched")
    ran = inspect(model, "GIM", IDS)
    assert ran.watched and ran.summary().endswith("; watched")
    assert AppliedReport.from_dict(ran.to_dict()) == ran


def _below_the_mode(x: torch.Tensor) -> torch.Tensor:
    """A norm that no handler hears of."""
    return torch.ops.aten.mul.Tensor(x, torch.ops.aten.rsqrt.default(x.pow(2).mean(-1, keepdim=True)))


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


class Switched(torch.nn.Module):
    """Code that is another by what no key of a forward can hold."""

    function: Callable[[torch.Tensor], torch.Tensor] = staticmethod(_as_it_is)
    variant = 0

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = torch.nn.Embedding(10, WIDTH), MLP(GATES["silu"])
        self.held = [_as_it_is]

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.held[0](type(self).function(self.embed(input_ids)))
        if self.variant:
            x = _below_the_mode(x)
        return self.mlp(x)


SWITCHES: dict[str, Callable[[Switched], Any]] = {
    "a number": lambda model: setattr(model, "variant", 1),
    "a function in a list": lambda model: model.held.__setitem__(0, _below_the_mode),
    "a function of the class": lambda model: setattr(type(model), "function", staticmethod(_below_the_mode)),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_code_that_calls_what_it_never_did_is_watched(name: str) -> None:
    cls = type("Switched", (Switched,), {})
    explained, entered = cls().eval(), cls().eval()
    gim.explain(explained, IDS, baseline_token_id=0)
    with gim.GIM(entered):
        entered(IDS)
    SWITCHES[name](explained)
    SWITCHES[name](entered)
    with pytest.raises(UnsupportedModelError, match="norm"):
        gim.explain(explained, IDS, baseline_token_id=0)
    with gim.GIM(entered) as report:
        entered(IDS)
    assert not report.watched and any("are watched again" in note for note in report.notes)
    with pytest.raises(UnsupportedModelError, match="norm"), gim.GIM(entered):
        entered(IDS)


def test_memory_that_is_asked_for_is_no_new_code() -> None:
    """As torch's checkpoints ask for some in the place of a module."""
    model = Switched().eval()
    with gim.GIM(model):
        model(IDS)
    model.held[0] = lambda x: (torch.empty(3), x)[1]
    with gim.GIM(model) as report:
        model(IDS)
    assert report.watched and not any("are watched again" in note for note in report.notes)


def test_forwards_on_two_threads_of_one_context_are_both_watched() -> None:
    begun, ended = threading.Event(), threading.Event()
    model = Switched().eval()

    def wait(x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is threading.main_thread():
            return _below_the_mode(x)
        begun.set()
        assert ended.wait(60)
        return x

    model.held[0] = wait
    with gim.GIM(model) as report:
        other = threading.Thread(target=contextvars.copy_context().run, args=(model, IDS))
        other.start()
        assert begun.wait(60)
        with pytest.raises(UnsupportedModelError, match="norm"):
            model(IDS)
        ended.set()
        other.join()
    assert report.counts()["gated_mlp"] == (1, 2)


class StoppedError(Exception):
    """What a hook ends a forward by."""


class Attending(torch.nn.Module):
    """Attention that no rule reaches, unless it is told to attend in another way, and a map that can be hooked."""

    def __init__(self, attend: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.attend, self.map = attend, torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(self.attend(x))


def _by_hand(x: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(x @ x.mT)
    return weights / weights.sum(-1, keepdim=True) @ x


def _by_torch(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ x.mT, -1) @ x


def attending(attend: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """A model, its input, and what went into its map when a hook there stopped the forward."""
    model, seen = torch.nn.Sequential(Attending(attend), torch.nn.Linear(WIDTH, 1)), list[torch.Tensor]()

    def stop(_: Any, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0])
        raise StoppedError

    model[0].map.register_forward_pre_hook(stop)
    return model, torch.randn(1, 4, WIDTH, requires_grad=True), seen


def test_what_a_stopped_forward_left_unreached_is_an_error_on_closing() -> None:
    model, x, seen = attending(_by_hand)
    with pytest.raises(UnsupportedModelError, match="0: softmax over keys"), gim.GIM(model) as report:
        with pytest.raises(StoppedError):
            model(x)
        assert not report.complete and report.unsupported[0][0] == "0"
        seen[0].sum().backward()
    assert any("ended by StoppedError" in note for note in report.notes)
    with pytest.raises(StoppedError), gim.GIM(model) as report:  # an error that leaves the context is not hidden
        model(x)
    assert not report.complete
    with gim.GIM(model, strict=False) as report:
        for _ in range(2):
            with pytest.raises(StoppedError):
                model(x)
            assert [name for name, _ in report.unsupported] == ["0"]
    model[0].map._forward_pre_hooks.clear()
    with pytest.raises(UnsupportedModelError, match="0: softmax over keys"), gim.GIM(model):
        model(x)


def test_a_forward_that_was_stopped_stands_for_no_other() -> None:
    """Not even after one of its context was reported: the whole one is watched, and is an error."""
    model, x, _ = attending(_by_torch)
    model[1] = Attending(_by_hand)
    with pytest.raises(UnsupportedModelError, match="1: softmax over keys"), gim.GIM(model) as report:
        with pytest.raises(StoppedError):
            model(x)
        assert report.complete
        model[0].map._forward_pre_hooks.clear()
        model(x)
    model[1] = torch.nn.Linear(WIDTH, 1)
    model[0].map.register_forward_pre_hook(lambda *_: None)
    with gim.GIM(model) as report:
        assert watches(model, lambda: model(x)) and not watches(model, lambda: model(x))
    assert report.complete


@pytest.mark.parametrize("warm", [False, True])
def test_a_forward_that_is_stopped_within_a_part_lacks_nothing(warm: bool) -> None:
    """Weights that were yet to meet their values, and a norm that was yet to come."""

    class Halves(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.going = torch.nn.Identity(), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.layer_norm(self.drop(torch.softmax(x @ x.mT, -1)) @ x, (WIDTH,))

    halves = Halves()

    def stop(*_: Any) -> None:
        if not halves.going:
            raise StoppedError

    halves.drop.register_forward_hook(stop)
    model, x = torch.nn.Sequential(halves), torch.randn(1, 4, WIDTH, requires_grad=True)
    with gim.GIM(model) as report:
        if warm:
            halves.going = True
            model(x)
            halves.going = False
        with pytest.raises(StoppedError):
            model(x)
        halves.going = True
        model(x)
    assert report.complete and report.watched


def test_a_model_that_was_refused_and_put_right_passes() -> None:
    for put_right in (_by_torch, _by_hand):
        model, x, _ = attending(_by_hand)
        model[0].map._forward_pre_hooks.clear()
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match="softmax over keys"), gim.GIM(model):
                model(x)
        model[0].attend = put_right
        if put_right is _by_hand:
            with pytest.raises(UnsupportedModelError, match="softmax over keys"), gim.GIM(model):
                model(x)
            continue
        with gim.GIM(model) as report:
            assert [watches(model, lambda model=model, x=x: model(x)) for _ in range(3)] == [True, False, False]
        assert report.complete and report.watched


def test_a_module_that_ran_in_no_watched_forward_is_watched() -> None:
    """No rule acts in it and it calls what its like has called, so nothing else tells."""
    model = torch.nn.Sequential(
        Attending(_by_torch), torch.nn.ModuleList([torch.nn.Linear(WIDTH, WIDTH) for _ in "ab"])
    )
    x, which = torch.randn(1, 4, WIDTH, requires_grad=True), [0]
    maps: Any = model[1]
    maps.forward = lambda x: maps[which[0]](x)
    with gim.GIM(model) as report:
        model(x)
        which[0] = 1
        model(x)
        assert not report.watched
        assert watches(model, lambda: model(x)) and not watches(model, lambda: model(x))
        which[0] = 0
        assert not watches(model, lambda: model(x)) and report.watched


def test_hooks_made_anew_for_each_forward_are_one_kind() -> None:
    def scaled(by: float, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return lambda _, __, out: by * function(out)

    model = llama()
    with gim.GIM(model):
        seen = []
        for step in range(4):
            with model.model.norm.register_forward_hook(scaled(1.0 + step, _as_it_is)):
                seen.append(watches(model))
        assert seen == [True, False, False, False]
        with model.model.norm.register_forward_hook(scaled(1.0, _by_torch)):
            assert watches(model)
        with model.lm_head.register_forward_pre_hook(lambda *_: None):
            assert watches(model)


def test_a_context_in_which_nothing_ran_says_so() -> None:
    with gim.GIM(llama()) as report:
        pass
    assert report.notes == ["no forward of LlamaForCausalLM ran inside: nothing was looked at"]
