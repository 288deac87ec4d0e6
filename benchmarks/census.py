"""How many of the installed transformers' causal language models are fully covered, refused, or neither.

Every class of the causal-LM mapping that builds from a small config runs one forward and one backward inside
:class:`gim.GIM`, watched operator by operator. Covered: it ran, and the watch saw nothing that a rule should have acted
on. Refused: an error named what is not covered. Partial: neither, which must not happen.
"""

from __future__ import annotations

import datetime
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import gim
from gim.applied import UnsupportedModelError

#: Small values for the fields that configs have, where they have them.
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "embedding_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "n_inner": 48,
    "d_inner": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "num_attention_heads": 4,
    "n_head": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 8,
    "attention_head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "sliding_window": 8,
    "local_attention": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: What single types need besides, or in place of that.
NEEDS: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 5},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "llama4_text": {"attention_chunk_size": 8},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2},
    "falcon_mamba": {"state_size": 8},
    "granitemoehybrid": {"layer_types": ["attention", "attention"], "num_hidden_layers": 2},
}
TOKENS = 19
#: More parameters than this are not a small model.
MOST_PARAMETERS = 40_000_000


@dataclass(frozen=True)
class Row:
    """One class: ``status`` is covered, refused, partial, not built or not run; ``reason`` says why."""

    model_type: str
    model_class: str
    status: str
    reason: str = ""
    counts: dict[str, Any] | None = None


def _is_property(config_class: Any, name: str) -> bool:
    """Whether a field of a config follows from others."""
    return any(
        isinstance(getattr(config_class, one, None), property)
        for one in (name, config_class.attribute_map.get(name, name))
    )


def build(model_type: str) -> Any:
    """A small random model of a type, in evaluation mode."""
    config_class = CONFIG_MAPPING[model_type]
    plain = config_class()
    fields = {
        key: value
        for key, value in SMALL.items()
        if getattr(plain, key, None) is not None
        and getattr(getattr(config_class, key, value), "fset", True) is not None
    }
    if "qk_rope_head_dim" in fields:
        # Latent attention: the size of a head follows from its parts, and every head has its own key.
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    fields.update(NEEDS.get(model_type, {}))
    layers = fields.get("num_hidden_layers", 2)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(plain, name, None)
        if isinstance(kinds, list) and name not in fields and not _is_property(config_class, name):
            # One of each kind, so that none stays unseen.
            fields[name] = (list(dict.fromkeys(kinds)) * layers)[: max(layers, len(set(kinds)))]
            fields["num_hidden_layers"] = len(fields[name])
    config = config_class(**fields)
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise MemoryError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    return model_class(config_class(**fields)).eval()


def examine(model_type: str) -> Row:
    """Build one model and see what becomes of it inside a context."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    name = name if isinstance(name, str) else name[0]
    try:
        model = build(model_type)
        ids = torch.randint(5, 90, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        model(ids, use_cache=False)
    except Exception as error:
        return Row(model_type, name, "not built", f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    try:
        with gim.GIM(model) as report:
            logits = model(ids, use_cache=False).logits
        logits[0, -1].sum().backward()
    except UnsupportedModelError as error:
        lines = str(error).splitlines()
        return Row(model_type, name, "refused", (lines[1] if len(lines) > 1 else lines[0]).strip()[:240])
    except Exception as error:
        return Row(model_type, name, "refused", f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    counts = report.counts()
    if not report.watched:
        return Row(model_type, name, "partial", "the forward pass was not watched", counts)
    return Row(model_type, name, "covered", "; ".join(report.notes), counts)


def main(
    output: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only these model types.")] = None,
) -> None:
    """Walk the mapping and print what became of each class."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    console = Console()
    rows = [examine(one) for one in track(only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), console=console)]
    for row in sorted(rows, key=lambda row: (row.status, row.model_type)):
        console.print(f"{row.status:9} {row.model_type:26} {row.reason}", highlight=False, soft_wrap=True)
    for status in ("covered", "refused", "partial", "not built"):
        console.print(f"{status}: {sum(row.status == status for row in rows)}")
    if output is not None:
        results = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "rows": [asdict(row) for row in rows],
        }
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
