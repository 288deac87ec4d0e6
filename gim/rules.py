"""The backward rules of GIM and its neighbours, as values.

Every number of the paper that the package uses stands here, once. GIM is defined in Edin et al. 2025,
arXiv 2505.17630; transformer LRP in Ali et al. 2022, arXiv 2202.07304; AttnLRP in Achtibat et al. 2024,
arXiv 2402.05602.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

SoftmaxRule = Literal["temperature", "constant", "exact"]
ActivationRule = Literal["exact", "ratio"]

SOFTMAX_RULES: tuple[SoftmaxRule, ...] = ("temperature", "constant", "exact")
ACTIVATION_RULES: tuple[ActivationRule, ...] = ("exact", "ratio")

#: Temperature of the softmax backward in the GIM paper.
PAPER_TEMPERATURE = 2.0
#: Gradient factors of the query, key and value branches in the GIM paper.
PAPER_QKV = (0.25, 0.25, 0.5)
#: Gradient factors of the gate and up branches of a gated MLP in the GIM paper.
PAPER_GATE_UP = (0.5, 0.5)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


@dataclass(frozen=True)
class Rules:
    """One complete choice of backward rules; the forward never depends on it.

    Args:
        softmax: rule of the attention softmax. ``"temperature"``: the Jacobian of
            ``softmax(S / temperature)`` without its factor ``1 / temperature``; ``"constant"``: no gradient
            through the softmax; ``"exact"``: the ordinary gradient.
        temperature: the temperature, > 0; used by ``softmax="temperature"`` only.
        freeze_norm: treat the statistic of every norm (rms, or standard deviation) as a constant.
        q_scale, k_scale, v_scale: factors of the gradients of queries, keys and values; 1 leaves them.
        gate_scale, up_scale: factors of the gradients of the two branches of a gated MLP; 1 leaves them.
        activation: derivative of the gate's activation: ``"exact"``, or ``"ratio"`` for ``act(x) / x``.

    Raises:
        ValueError: a name that is not a rule, a temperature that is not positive and finite, a factor that
            is not finite.
    """

    softmax: SoftmaxRule = "temperature"
    temperature: float = PAPER_TEMPERATURE
    freeze_norm: bool = True
    q_scale: float = PAPER_QKV[0]
    k_scale: float = PAPER_QKV[1]
    v_scale: float = PAPER_QKV[2]
    gate_scale: float = PAPER_GATE_UP[0]
    up_scale: float = PAPER_GATE_UP[1]
    activation: ActivationRule = "exact"

    def __post_init__(self) -> None:
        if self.softmax not in SOFTMAX_RULES:
            raise ValueError(f"softmax must be one of {SOFTMAX_RULES}, got {self.softmax!r}")
        if self.activation not in ACTIVATION_RULES:
            raise ValueError(f"activation must be one of {ACTIVATION_RULES}, got {self.activation!r}")
        for field in dataclasses.fields(self):
            if field.name in ("softmax", "activation"):
                continue
            value = getattr(self, field.name)
            if field.name == "freeze_norm":
                if not isinstance(value, bool):
                    raise ValueError(f"freeze_norm must be True or False, got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
                raise ValueError(f"{field.name} must be a finite number, got {value!r:.40}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature!r}")

    @property
    def qkv_scale(self) -> tuple[float, float, float]:
        """The factors of queries, keys and values, in that order."""
        return (self.q_scale, self.k_scale, self.v_scale)

    @property
    def gate_up_scale(self) -> tuple[float, float]:
        """The factors of the gate and the up branch, in that order."""
        return (self.gate_scale, self.up_scale)

    @property
    def modifies_attention(self) -> bool:
        """Whether attention's backward differs from the ordinary gradient."""
        softmax_is_exact = self.softmax == "exact" or (self.softmax == "temperature" and self.temperature == 1.0)
        return not softmax_is_exact or self.qkv_scale != (1.0, 1.0, 1.0)

    @property
    def modifies_gated_mlps(self) -> bool:
        """Whether a gated MLP's backward differs from the ordinary gradient."""
        return self.gate_up_scale != (1.0, 1.0) or self.activation != "exact"

    @property
    def name(self) -> str:
        """The preset's name where the rules equal one, else ``"custom"``."""
        return next((name for name, rules in PRESETS.items() if rules == self), "custom")

    def describe(self) -> str:
        """One line for a person: the name and each rule that is not the ordinary gradient."""
        parts = []
        if self.softmax == "temperature":
            parts.append(f"softmax temperature {self.temperature:g}")
        elif self.softmax == "constant":
            parts.append("softmax constant")
        if self.freeze_norm:
            parts.append("norms frozen")
        if self.qkv_scale != (1.0, 1.0, 1.0):
            parts.append("q/k/v " + "/".join(f"{factor:g}" for factor in self.qkv_scale))
        if self.gate_up_scale != (1.0, 1.0):
            parts.append("gate/up " + "/".join(f"{factor:g}" for factor in self.gate_up_scale))
        if self.activation == "ratio":
            parts.append("activation ratio")
        return f"{self.name}: {', '.join(parts) if parts else 'ordinary gradient'}"

    def of_part(self, part: str) -> str:
        """In words, the rule of the backward of ``"attention"``, of a ``"norm"`` or of a ``"gated_mlp"``."""
        if part == "norm":
            return "statistic constant" if self.freeze_norm else "ordinary gradient"
        if part == "attention" and self.modifies_attention:
            softmax = f"at temperature {self.temperature:g}" if self.softmax == "temperature" else self.softmax
            return f"softmax {softmax}; q, k, v times " + ", ".join(f"{factor:g}" for factor in self.qkv_scale)
        if part == "gated_mlp" and self.modifies_gated_mlps:
            words = "gate, up times " + ", ".join(f"{factor:g}" for factor in self.gate_up_scale)
            return words + ("; act(x) / x for act'(x)" if self.activation == "ratio" else "")
        return "ordinary gradient"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Rules:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: a field that is unknown or missing, for a default would make other rules of it, or has a value
                that no rule allows.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        for what, wrong in (("unknown", set(fields) - names), ("missing", names - set(fields))):
            if wrong:
                raise ValueError(f"{what} fields of Rules: {sorted(wrong)}")
        return cls(**fields)


#: The method of the paper.
GIM = Rules()
#: GIM with constant softmax outputs: only the value path of attention, the cheapest backward.
GIM_CONSTANT = dataclasses.replace(GIM, softmax="constant")
#: Nothing modified.
GRADIENT = Rules(
    softmax="exact", freeze_norm=False, q_scale=1.0, k_scale=1.0, v_scale=1.0, gate_scale=1.0, up_scale=1.0
)
#: Ali et al. 2022: frozen norms and constant attention weights.
TRANSFORMER_LRP = dataclasses.replace(GRADIENT, softmax="constant", freeze_norm=True)
#: Achtibat et al. 2024: frozen norms, exact softmax, products shared between their factors, act(x) / x.
ATTNLRP = dataclasses.replace(GIM, softmax="exact", activation="ratio")
#: Ablation: only the softmax temperature.
TSG_ONLY = dataclasses.replace(GRADIENT, softmax="temperature")
#: Ablation: only the frozen norms.
FREEZE_ONLY = dataclasses.replace(GRADIENT, freeze_norm=True)
#: Ablation: only the factors of the branches.
SCALES_ONLY = dataclasses.replace(GIM, softmax="exact", freeze_norm=False)

#: Every preset by name.
PRESETS: dict[str, Rules] = {
    "GIM": GIM,
    "GIM_CONSTANT": GIM_CONSTANT,
    "GRADIENT": GRADIENT,
    "TRANSFORMER_LRP": TRANSFORMER_LRP,
    "ATTNLRP": ATTNLRP,
    "TSG_ONLY": TSG_ONLY,
    "FREEZE_ONLY": FREEZE_ONLY,
    "SCALES_ONLY": SCALES_ONLY,
}


def get(rules: Rules | str) -> Rules:
    """Rules as they are, or the preset of that name (any case, ``-`` for ``_``).

    Raises:
        ValueError: no preset has that name; the message lists those that exist.
        TypeError: neither ``Rules`` nor a string.
    """
    if isinstance(rules, Rules):
        return rules
    if isinstance(rules, str):
        preset = PRESETS.get(rules.upper().replace("-", "_"))
        if preset is None:
            raise ValueError(f"rules must be Rules or one of {', '.join(PRESETS)}, got {rules!r}")
        return preset
    raise TypeError(f"rules must be Rules or the name of a preset, got {type(rules).__name__}")


def resolve(
    rules: Rules | str | None, *, freeze_norm: bool, softmax_temperature: float | None, **factors: float | None
) -> Rules:
    """The rules that an argument ``rules`` or gim-explain's single arguments mean, of which None switches a rule off.

    Raises:
        ValueError: both were given; a value that no rule allows.
    """
    scales: dict[str, Any] = {name: 1.0 if factor is None else factor for name, factor in factors.items()}
    single = Rules(
        softmax="exact" if softmax_temperature is None else "temperature",
        temperature=PAPER_TEMPERATURE if softmax_temperature is None else softmax_temperature,
        freeze_norm=freeze_norm,
        **scales,
    )
    if rules is None:
        return single
    chosen = get(rules)
    if single not in (GIM, chosen):
        raise ValueError(f"rules={chosen.name} and single rule arguments contradict each other: give one of the two")
    return chosen
