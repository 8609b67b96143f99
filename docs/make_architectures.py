"""Write docs/what-runs.md: every architecture of transformers with a text or vision backbone, tiny, run once.

python docs/make_architectures.py [model_type ...]

Each is built small with random weights, saved, loaded by layerprobe, checked, and its features are extracted.
With model types as arguments, only these are run and their rows replaced.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import layerprobe
from layerprobe.errors import LayerprobeError
from layerprobe.layers import SITES

PAGE = Path(__file__).parent / "what-runs.md"
WORKS, REFUSED, BROKEN, UNBUILT = "works", "refused", "broken", "unbuilt"
SECTIONS = {WORKS: "Works", REFUSED: "Refused in one sentence", BROKEN: "Broken", UNBUILT: "Not built here"}
LARGEST = 40_000_000
"""Parameters; what cannot be made smaller than this is a fault of this script."""

LAYERS, WIDTH, HEADS, HEAD_WIDTH = 3, 32, 4, 8
SMALL: dict[int, str] = {
    LAYERS: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers depth encoder_num_hidden_layers decoder_num_hidden_layers n_encoder_layers",
    WIDTH: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size encoder_hidden_size "
    "decoder_hidden_size projection_dim out_hidden_size word_embed_proj_dim text_hidden_size "
    "embedding_dim hidden_dim d_embed projector_hidden_size mm_hidden_size lm_hidden_size latent_dim "
    "project_dim decoder_dim decoder_embed_dim output_dim encoder_dim image_text_hidden_size "
    "image_size pretrain_image_size input_size lru_width d_inner_ width",
    HEADS: "rotary_dim num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
    "decoder_num_attention_heads encoder_num_attention_heads num_key_value_heads num_local_experts num_experts "
    "n_routed_experts moe_num_experts swa_num_attention_heads linear_num_value_heads "
    "index_n_heads num_global_attention_heads linear_num_heads",
    2: "num_kv_heads num_experts_per_tok moe_topk moe_k num_experts_per_token "
    "top_k_experts swa_num_key_value_heads linear_num_key_heads n_head_kv num_global_key_value_heads",
    1: "n_group topk_group num_shared_experts n_shared_experts first_k_dense_replace num_dense_layers mamba_n_groups "
    "mamba_ngroups num_kv_shared_layers n_groups moe_layer_start_index",
    HEAD_WIDTH: "mamba_n_heads mamba_num_heads head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "attention_head_dim kv_channels linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim swa_head_dim "
    "global_head_dim index_head_dim attention_head_size patch_size state_size mamba_d_state linear_head_dim "
    "hidden_size_per_layer_input index_topk qk_head_dim encoder_stride",
    16: "q_lora_rank kv_lora_rank num_frames time_step_rank mamba_dt_rank lru_width_",
    64: "intermediate_size ffn_dim n_inner d_ff d_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "moe_intermediate_size mlp_dim shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "decoder_intermediate_size intermediate_size_mlp shared_intermediate_size dim_ff expert_ffn_hidden_size "
    "num_mel_bins ssm_intermediate_size",
    128: "vocab_size max_2d_position_embeddings vocab_size_per_layer_input entity_vocab_size text_vocab_size_",
    512: "max_position_embeddings n_positions max_seq_len max_sequence_length",
}
SIZES = {name: size for size, names in SMALL.items() for name in names.split()}

LEFT_OUT = (
    "transformers_version", "architectures", "model_type_", "dtype", "out_features", "out_indices", "stage_names",
    "per_layer_config", "backbone_config_",
)  # fmt: skip
"""What a configuration works out by itself."""

EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": {"num_heads": [2, 2, 4, 4]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "glm5_next_text": {"index_topk": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8},
    "maskformer-swin": {"num_heads": [2, 2, 4, 4]},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "feed_forward_size": 64},
    "swin2sr": {"num_heads": [2, 2, 4, 4]},
    "swinv2": {"num_heads": [2, 2, 4, 4]},
    "xlnet": {"d_head": 8},
}
"""Values that must agree with one another in ways that names do not tell."""


class Row(NamedTuple):
    """What became of one architecture."""

    model_type: str
    model_class: str
    verdict: str
    modality: str
    sites: str
    remark: str


def candidates() -> list[str]:
    """Model types whose base model takes `inputs_embeds` or images."""
    found = []
    for model_type in sorted(MODEL_MAPPING_NAMES):
        model = model_class(model_type)
        if model is None:
            continue
        try:
            takes = inspect.signature(model.forward).parameters
        except ImportError:
            continue
        if "inputs_embeds" in takes or "pixel_values" in takes:
            found.append(model_type)
    return found


def model_class(model_type: str) -> Any:
    """The base model's class; None where it needs a package that is not here."""
    name = MODEL_MAPPING_NAMES[model_type]
    name = name if isinstance(name, str) else name[0]
    try:
        return getattr(transformers, name)
    except (AttributeError, ImportError):
        return None


def shrink(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's values with every size made small; nested configurations likewise."""
    layers = next(
        (values[n] for n in SMALL[LAYERS].split() if isinstance(values.get(n), int) and values[n]), None
    )
    small = {}
    for name, value in values.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, dict):
            value = shrink(value) | ({"mrope_section": [2, 1, 1]} if "rope_type" in value else {})
        elif name == "mrope_section" and value:
            value = [2, 1, 1]
        elif name in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
            value = [SIZES[name]] * len(value)
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers and layers > 4:
            kinds = list(dict.fromkeys(value)) if all(isinstance(v, (str, int)) for v in value) else []
            value = sorted([*kinds, *value][:LAYERS], key=[*value].index)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = small_number(name, value)
        small[name] = value
    return small


def small_number(name: str, value: int) -> int:
    """The size of that name, where the default is larger."""
    if name.endswith(("token_id", "_token_index")) and value > 100:
        return 100 + sum(map(ord, name)) % 28
    return min(value, SIZES[name]) if name in SIZES and value > 0 else value


def tiny_config(model_type: str) -> Any:
    """The architecture's configuration, small."""
    made = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    values = made().to_dict()
    values.pop("model_type", None)
    return made(**shrink(values) | EXTRA.get(model_type, {}))


def build(model_type: str) -> Any:
    """The tiny model with random weights."""
    config = tiny_config(model_type)
    made = model_class(model_type)
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in made(config).parameters())
    if n_parameters > LARGEST:
        raise MemoryError(f"{n_parameters:,} parameters are not tiny")
    transformers.set_seed(0)
    return made(config).eval()


def run(model_type: str) -> Row:
    """Build, load, check and extract features of one architecture."""
    name = model_class(model_type).__name__
    facts = {"model_type": model_type, "model_class": name, "modality": "", "sites": "", "remark": ""}
    try:
        model = build(model_type)
    except Exception as error:
        return Row(**facts | {"verdict": UNBUILT, "remark": one_line(error)})
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(f"{folder}/model")
            backbone = layerprobe.load_backbone(f"{folder}/model", device="cpu")
            task = layerprobe.load_task("digits", limit=20)
            layerprobe.extract_features(backbone, task, cache_dir=folder, quiet=True)
        except LayerprobeError as error:
            said = one_line(error).replace(f"{folder}/model", "the model")
            return Row(**facts | {"verdict": REFUSED, "remark": said})
        except Exception as error:
            return Row(**facts | {"verdict": BROKEN, "remark": f"{type(error).__name__}: {one_line(error)}"})
    return Row(**facts | {"verdict": WORKS, "modality": backbone.modality, "sites": sites_of(backbone)})


def sites_of(backbone: Any) -> str:
    """The sites that every block offers."""
    writers = {"attn_out": backbone.layout.attention_outputs, "mlp_out": backbone.layout.mlp_outputs}
    return " ".join(site for site in SITES if None not in writers.get(site, ()))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No remarks of transformers on models made of random numbers."""
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run_all(model_types: Iterable[str]) -> Iterator[Row]:
    """The rows, one after another, each said on stderr as it comes."""
    with silence():
        for model_type in model_types:
            row = run(model_type)
            sys.stderr.write(f"{row.verdict:8} {model_type}: {row.sites or row.remark}\n")
            yield row


def page(rows: Iterable[Row]) -> str:
    """The documentation page."""
    rows = sorted(rows)
    count = {verdict: sum(row.verdict == verdict for row in rows) for verdict in SECTIONS}
    lines = [
        "<!-- Made by docs/make_architectures.py; a slow test runs all of it again. -->",
        "",
        "# What runs",
        "",
        f"Every architecture of transformers {transformers.__version__} whose base model takes images or token "
        "embeddings, built small with random weights, saved, loaded by name, put through the self-check, and its "
        f"features extracted: {count[WORKS]} work, {count[REFUSED]} are refused in one sentence, {count[BROKEN]} "
        "break. A trained checkpoint of an architecture runs as its small sibling does, as long as its "
        "configuration does not switch on parts that the default one leaves off; the self-check looks again each time.",
        "",
        "Sites are what every block offers; `attn_out` and `mlp_out` are offered where they add up to what the block "
        "adds. Where a checkpoint holds several models, the one for images is run.",
        "",
        f"Not built here, for want of a package or of a small configuration: {count[UNBUILT]} more, at the end.",
    ]
    for verdict, title in SECTIONS.items():
        lines += ["", f"## {title}", ""]
        found = [row for row in rows if row.verdict == verdict]
        heads = ("architecture", "class", "runs as", "sites") if verdict == WORKS else (
            "architecture", "class", "what it says"
        )  # fmt: skip
        lines += [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)] if found else ["None."]
        for row in found:
            told = (row.modality, row.sites) if verdict == WORKS else (row.remark,)
            cells = [
                f"`{row.model_type}`",
                f"`{row.model_class}`",
                *(cell.replace("|", "/") for cell in told),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def read_page(text: str) -> list[Row]:
    """The rows of a page."""
    rows = []
    verdict = ""
    for line in text.splitlines():
        if line.startswith("## "):
            verdict = {title: name for name, title in SECTIONS.items()}[line[3:]]
        elif line.startswith("| `"):
            cells = [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
            last = {"modality": cells[2], "sites": cells[3]} if verdict == WORKS else {"remark": cells[2]}
            facts = {"modality": "", "sites": "", "remark": "", **last}
            rows.append(Row(model_type=cells[0], model_class=cells[1], verdict=verdict, **facts))
    return rows


def main(model_types: list[str]) -> None:
    """Run all architectures, or those named, and write their rows."""
    old = read_page(PAGE.read_text(encoding="utf-8")) if model_types and PAGE.is_file() else []
    rows = {row.model_type: row for row in old}
    for row in run_all(model_types or candidates()):
        rows[row.model_type] = row
        PAGE.write_text(page(rows.values()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
