"""Methods that captum computes: of each, what it is given here and why.

Those that replace tokens replace the ones that an evaluation replaces: the first and the last token stay, and score 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gim.evaluation.case import Case
from gim.evaluation.extras import need
from gim.evaluation.perturbation import Forwards
from gim.parts import anatomy
from gim.parts.parameters import frozen_parameters

#: Embeddings of one step of integrated gradients are differentiated this many tokens at a time.
GRADIENT_TOKENS = 2048
#: Samples of KernelSHAP for each token, where no number is given, as in the GIM paper's code.
SAMPLES_PER_TOKEN = 3
#: Width of LIME's kernel over the cosine distance of what is kept, that of the package lime for text.
LIME_WIDTH = 0.25
#: Up to here DeepLIFT is gradient x difference in other words: rounding of float32 through a model.
SAME = 1e-4


class _TargetLogit(nn.Module):
    """From ids ``[B, T]`` to the target's logit ``[B]``, with a gradient; a module, as DeepLIFT wants one."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = case.model
        self._forwards = Forwards(case.model)
        self._target = case.target

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._forwards.logits(ids)[:, self._target]


@contextmanager
def _differentiated(case: Case) -> Iterator[tuple[_TargetLogit, nn.Module]]:
    """The target's logit and the embedding that it is differentiated by; no weight asks for a gradient inside."""
    with frozen_parameters(case.model), torch.enable_grad():
        yield _TargetLogit(case), anatomy.of(case.model).embedding


def _baseline(case: Case) -> torch.Tensor:
    """A prompt ``[1, T]`` of baseline tokens."""
    return torch.full_like(case.ids, case.baseline_id)[None]


def gradient_x_input(case: Case, _: int | None = None) -> torch.Tensor:
    """Embedding times gradient, without a baseline."""
    with _differentiated(case) as (logit, embedding):
        found = need("captum.attr").LayerGradientXActivation(logit, embedding).attribute(case.ids[None])
    return found[0].sum(-1)


def integrated_gradients(case: Case, steps: int | None) -> torch.Tensor:
    """From all tokens replaced to none, Gauss-Legendre points, the steps' gradients in batches."""
    with _differentiated(case) as (logit, embedding):
        found = (
            need("captum.attr")
            .LayerIntegratedGradients(logit, embedding)
            .attribute(
                case.ids[None],
                baselines=_baseline(case),
                n_steps=steps,
                internal_batch_size=max(1, GRADIENT_TOKENS // len(case.ids)),
            )
        )
    return found[0].sum(-1)


def deep_lift(case: Case, _: int | None = None) -> torch.Tensor:
    """DeepLIFT, where captum's rules reach the model's nonlinearities.

    They act on modules of torch's own classes. Where none of those is in the model, what captum computes is the
    gradient times the difference, under another name.

    Raises:
        ValueError: on this model it is no other than gradient x difference.
    """
    with _differentiated(case) as (logit, embedding):
        attr = need("captum.attr")
        ids, base = case.ids[None], _baseline(case)
        found = attr.LayerDeepLift(logit, embedding).attribute(ids, baselines=base)[0].sum(-1)
        whole = embedding(ids).detach()
        gradient = attr.LayerGradientXActivation(logit, embedding, multiply_by_inputs=False).attribute(ids)
        plain = (gradient * (whole - embedding(base).detach()))[0].sum(-1)
    found, plain = found.detach(), plain.detach()
    if float((found - plain).abs().max()) <= SAME * float(plain.abs().max()):
        raise ValueError(
            f"method DeepLIFT: on {type(case.model).__name__} captum's rules reach no module, and what it computes is "
            "gradient x difference: ask for gradient_x_difference"
        )
    return found


# ------------------------------------------------------------------------------------------- by replacing tokens


def _logits_of(case: Case) -> Any:
    """From the tokens between first and last ``[B, T - 2]`` to the target's logit ``[B]``."""
    start, end = case.ids[:1], case.ids[-1:]

    def logits(inner: torch.Tensor) -> torch.Tensor:
        count = inner.shape[0]
        rows = torch.cat([start.expand(count, 1), inner.to(case.ids.dtype), end.expand(count, 1)], dim=1)
        said = [one.logit for one in case.masked.of_rows(rows)]
        return torch.tensor(said, dtype=torch.float64, device=case.ids.device)

    return logits


def _with_ends(inner: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(inner.reshape(-1).double().cpu(), (1, 1))


def occlusion(case: Case, _: int | None = None) -> torch.Tensor:
    """``f(x) - f(x without the token)``, one token at a time."""
    found = (
        need("captum.attr")
        .FeatureAblation(_logits_of(case))
        .attribute(case.ids[None, 1:-1], baselines=case.baseline_id, perturbations_per_eval=case.masked.rows_at_once)
    )
    return _with_ends(found)


def kernel_shap(case: Case, samples: int | None) -> torch.Tensor:
    """Shapley values by weighted least squares; three samples for each token where no number is given.

    That of a single token is what leaving it out does, and captum has no distribution to draw from.
    """
    if len(case.ids) == 3:
        return occlusion(case)
    return _sampled(case, "KernelShap", {}, samples or SAMPLES_PER_TOKEN * len(case.ids))


def lime(case: Case, samples: int | None) -> torch.Tensor:
    """A sparse linear model of what is kept (captum's lasso), samples weighted by how much is kept."""
    return _sampled(case, "Lime", {"similarity_func": _lime_weight}, samples)


def _lime_weight(_: torch.Tensor, __: torch.Tensor, kept: torch.Tensor, **___: Any) -> float:
    """The weight of a sample, by the cosine distance of what it keeps from keeping all.

    Captum's own default compares token ids as if they were quantities.
    """
    distance = 1 - math.sqrt(float(kept.double().mean()))
    return math.exp(-(distance**2) / (2 * LIME_WIDTH**2))


def _sampled(case: Case, name: str, settings: dict[str, Any], samples: int | None) -> torch.Tensor:
    """A method that draws what is kept. Captum draws from torch's global generator, which is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.draw(name))
        found = getattr(need("captum.attr"), name)(_logits_of(case), **settings).attribute(
            case.ids[None, 1:-1],
            baselines=case.baseline_id,
            n_samples=samples,
            perturbations_per_eval=case.masked.rows_at_once,
        )
    return _with_ends(found)
