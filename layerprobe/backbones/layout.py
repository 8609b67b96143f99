"""Where a transformer keeps its blocks, and where in a block attention and MLP write to the residual stream.

Everything is read off the module tree, so that a new architecture works without an entry anywhere:

- *blocks*: the outermost `ModuleList` with as many members as `config.num_hidden_layers` says, all of one
  class; the largest when there are several.
- *attention output*: in a block, the outermost submodule with "Attention" in its class name; in it the last
  linear map that writes vectors of the model's width.
- *MLP output*: the last such linear map of the block outside attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.layers import UNITS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from layerprobe.backbones.backbone import Backbone


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names inside one base model (all dotted, relative to it)."""

    block_names: tuple[str, ...]
    attention_outputs: tuple[str | None, ...]
    """Per block, the linear map whose output attention adds; None where none was found."""
    mlp_outputs: tuple[str | None, ...]
    parameter_groups: dict[str, str]
    """Parameter name → "block.<i>", "embeddings", "positions", "norm" or "other"."""
    norm_names: frozenset[str]
    """Parameters of normalisation layers, inside the blocks and outside."""
    tokens_first: bool = False
    """Whether the blocks' hidden states are T×B×D instead of B×T×D (XLNet)."""
    withheld: str | None = None
    """Why attention and MLP outputs are not offered although modules for them were found."""

    @property
    def n_blocks(self) -> int:
        return len(self.block_names)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The block modules of `model`, in order."""
        return [model.get_submodule(name) for name in self.block_names]


def image_or_text_tower(model: nn.Module) -> PreTrainedModel:
    """The part that images go through: the image tower of a two-tower model, the encoder of an
    encoder-decoder, else the base model under a task head."""
    base: Any = getattr(model, "base_model", model)
    if not hasattr(base, "config"):  # timm's own class, in the wrapper of transformers
        if type(model).__name__ == "TimmWrapperForImageClassification":
            raise UsageError(
                "TimmWrapperForImageClassification returns scores alone; give TimmWrapperModel, which loads the same "
                "checkpoint"
            )
        base = model
    for candidate in (model, base):
        tower: Any = getattr(candidate, "vision_model", None)
        if takes_images_or_embeddings(tower):
            found: PreTrainedModel = tower
            return found
    if base.config.is_encoder_decoder:
        return base.get_encoder()
    return _inner_model(base if takes_images_or_embeddings(base) else model)


def _inner_model(model: Any) -> PreTrainedModel:
    """The model itself, or a model inside it where it is made of several or ends in scores over a vocabulary.

    `base_model` goes by a name in the class, which may stop too early (Llama-4 text) or go too deep (DINOv3). Of
    several models inside (vision and language, in any order) the one for images comes first.
    """
    inner = [child for child in model.children() if takes_images_or_embeddings(child)]
    scores = getattr(model, "get_output_embeddings", lambda: None)
    if inner and (len(inner) > 1 or scores() is not None or _width(model.config) is None):
        return min(inner, key=lambda child: child.main_input_name != "pixel_values")
    return model


def takes_images_or_embeddings(module: Any) -> bool:
    """Whether it is a model of transformers that runs on `pixel_values` or `inputs_embeds` alone."""
    if not hasattr(module, "main_input_name") or not hasattr(module, "config"):
        return False
    accepted = inspect.signature(module.forward).parameters
    needed = {name for name, item in accepted.items() if item.default is item.empty and item.kind in (0, 1)}
    return any(name in accepted and needed <= {name} for name in ("pixel_values", "inputs_embeds"))


def sees_pixels(model: PreTrainedModel) -> bool:
    """Whether images enter it by its own stem."""
    accepted = inspect.signature(model.forward).parameters
    return model.main_input_name == "pixel_values" or (
        "pixel_values" in accepted and "inputs_embeds" not in accepted
    )


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a block was called on."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise UsageError("the blocks are not called on hidden states, so what enters them cannot be read")
    return hidden


def tied_names(full: nn.Module, tower: nn.Module) -> dict[str, tuple[str, ...]]:
    """Of each parameter of the tower that the whole model lists under another name: its names in the whole model.

    T5's encoder calls `embed_tokens.weight` what the model around lists as `shared.weight`, because both are one
    tensor. First the name by way of the tower, then the others in the whole model's order.
    """
    listed: dict[int, list[str]] = {}
    for name, parameter in full.named_parameters(remove_duplicate=False):
        listed.setdefault(id(parameter), []).append(name)
    place = next((name + "." for name, module in full.named_modules() if module is tower and name), "")
    found = {}
    for name, parameter in tower.named_parameters():
        names = listed.get(id(parameter), [])
        if place + name in names[1:]:
            found[name] = (place + name, *(other for other in names if other != place + name))
    return found


def find_layout(model: nn.Module, config: PretrainedConfig) -> Layout:
    """Read the layout off a Hugging Face base model.

    Raises
    ------
    UsageError
        No list of blocks fits; the message says what was looked for and what was there.
    """
    list_name, blocks = _find_block_list(model, config)
    width = hidden_size(config, model)
    names = tuple(f"{list_name}.{index}" if list_name else str(index) for index in range(len(blocks)))
    attention: list[str | None] = []
    mlp: list[str | None] = []
    for name, block in zip(names, blocks, strict=True):
        inside, outside = _last_writers(block, width)
        attention.append(f"{name}.{inside}" if inside else None)
        mlp.append(f"{name}.{outside}" if outside else None)
    groups, norms = _group_parameters(model, names, config)
    return Layout(
        block_names=names,
        attention_outputs=tuple(attention),
        mlp_outputs=tuple(mlp),
        parameter_groups=groups,
        norm_names=norms,
    )


def hidden_size(config: PretrainedConfig, model: nn.Module) -> int:
    """Width d of the residual stream, as the configuration says, or the timm model inside."""
    width = _width(config) or getattr(getattr(model, "timm_model", None), "num_features", None)
    if not isinstance(width, int):
        raise UsageError(
            f"the configuration {type(config).__name__} names no hidden_size, d_model, n_embd or dim"
        )
    return width


def _width(config: PretrainedConfig) -> int | None:
    named = (getattr(config, name, None) for name in ("hidden_size", "d_model", "n_embd", "dim"))
    return next((width for width in named if isinstance(width, int)), None)


def _find_block_list(model: nn.Module, config: PretrainedConfig) -> tuple[str, nn.ModuleList | nn.Sequential]:
    expected = getattr(config, "num_hidden_layers", None)
    found: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        # timm keeps the blocks of a transformer, and much else, in a Sequential.
        listed = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and len(module) > 0 and attention_path(module[0]) is not None
        )
        if listed and not nested and _of_one_class(module):
            found[name] = module
    fitting = [item for item in found.items() if expected in (None, len(item[1]))]
    if not fitting:
        seen = ", ".join(
            f"{name} ({len(list_)} × {type(list_[0]).__name__})" for name, list_ in found.items()
        )
        raise UsageError(
            f"no transformer blocks found in {type(model).__name__}: looked for a ModuleList of "
            f"{expected if expected is not None else 'equal'} modules of one class "
            f"(config.num_hidden_layers = {expected}); there is {seen or 'no ModuleList'}"
        )
    chosen = max(fitting, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    _refuse_parallel_lists(model, chosen[0], dict(fitting))
    return chosen


def _refuse_parallel_lists(
    model: nn.Module, chosen: str, fitting: dict[str, nn.ModuleList | nn.Sequential]
) -> None:
    """Attentions in one list and MLPs in another beside it (XLM, FlauBERT) make no blocks."""
    beside = {
        name: list_
        for name, list_ in fitting.items()
        if name != chosen and name.rpartition(".")[0] == chosen.rpartition(".")[0]
    }
    attentions = [name for name, list_ in beside.items() if "attention" in type(list_[0]).__name__.lower()]
    if attentions and attention_path(fitting[chosen][0]) is None:
        raise UsageError(
            f"{type(model).__name__} keeps the parts of its blocks in lists side by side ({chosen}, "
            f"{', '.join(beside)}); there is no module for a block whose input and output could be read"
        )


def _of_one_class(modules: nn.ModuleList | nn.Sequential) -> bool:
    """Whether they have parameters and one class."""
    return len({type(member) for member in modules}) == 1 and any(True for _ in modules.parameters())


def attention_path(block: nn.Module) -> str | None:
    """The outermost submodule with "Attention" in its class name, relative to the block."""
    named = (path for path, module in block.named_modules() if "attention" in type(module).__name__.lower())
    return next((path for path in named if path), None)


def _last_writers(block: nn.Module, width: int) -> tuple[str | None, str | None]:
    """Paths of the last linear maps that write `width` features, in the block's attention and outside it."""
    attention = attention_path(block)
    inside = outside = None
    adapted: list[str] = []
    for path, module in block.named_modules():
        if path.startswith(tuple(adapted)):
            continue
        if hasattr(module, "base_layer"):  # a layer of PEFT writes the sum of its own layer and its adapters
            adapted.append(f"{path}.")
            module = module.base_layer
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
            continue
        # nn.Linear keeps (out, in); GPT-2's Conv1D keeps (in, out) and says so in `nf`.
        if (getattr(module, "nf", None) or weight.shape[0]) != width:
            continue
        if attention is not None and f"{path}.".startswith(f"{attention}."):
            inside = path
        else:
            outside = path
    return inside, outside


def is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear or GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or hasattr(module, "nf")


def longest_sequence(model: nn.Module, config: PretrainedConfig) -> int | None:
    """How many positions the model has; None where it names no limit.

    Position tables that set rows aside for padding (RoBERTa: `padding_idx` and all before it) hold fewer.
    """
    for name in ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len", "n_ctx"):
        longest = getattr(config, name, None)
        if isinstance(longest, int) and longest > 0:
            break
    else:
        return None
    for name, module in model.named_modules():
        padded = isinstance(module, nn.Embedding) and module.padding_idx is not None
        if padded and "position" in name.lower() and module.num_embeddings == longest:
            return longest - int(module.padding_idx) - 1
    return longest


def _group_parameters(
    model: nn.Module, block_names: tuple[str, ...], config: PretrainedConfig
) -> tuple[dict[str, str], frozenset[str]]:
    """The group of every parameter, and the names of those that belong to norms."""
    try:
        token_embedding = model.get_input_embeddings()  # type: ignore[operator]
        token_embedding = getattr(token_embedding, "base_layer", token_embedding)  # under an adapter
    except (AttributeError, NotImplementedError):
        token_embedding = None
    groups: dict[str, str] = {}
    norms: set[str] = set()
    for name, _ in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_norm = "norm" in type(owner).__name__.lower()
        if is_norm:
            norms.add(name)
        block = next((i for i, b in enumerate(block_names) if name.startswith(b + ".")), None)
        if block is not None:
            groups[name] = f"block.{block}"
        elif is_norm:
            groups[name] = "norm"
        else:
            groups[name] = _group_outside(name, owner, token_embedding, config)
    return groups, frozenset(norms)


def _group_outside(
    name: str, owner: nn.Module, token_embedding: nn.Module | None, config: PretrainedConfig
) -> str:
    """The group of a parameter that is in no block and no norm."""
    longest = getattr(config, "max_position_embeddings", None)
    is_token_embedding = owner is token_embedding
    is_position_table = (
        isinstance(owner, nn.Embedding)
        and not is_token_embedding
        and isinstance(longest, int)
        and owner.num_embeddings >= longest
    )
    if "position" in name.lower() or is_position_table:
        return "positions"
    leaf = name.rpartition(".")[2]
    if is_token_embedding or "embed" in name.lower() or leaf in ("cls_token", "mask_token"):
        return "embeddings"
    return "other"


def parameter_units(backbone: Backbone, by: str = "block") -> dict[str, tuple[str, ...]]:
    """Unit -> names of its parameters, from input to output: `0`, `1`, … or `0.attention`, `0.mlp`, `1.attention`, …

    The two halves of a block are all of it: what lies outside its attention module, norms included, is `mlp`.

    Raises
    ------
    UnknownNameError
        `by` is none of `UNITS`.
    """
    if by not in UNITS:
        raise UnknownNameError(f"unknown units '{by}'; choose one of: {', '.join(UNITS)}")
    units: dict[str, list[str]] = {}
    for index, (name, block) in enumerate(zip(backbone.layout.block_names, backbone.blocks, strict=True)):
        inside = attention_path(block) if by != "block" else None
        for part in ("attention", "mlp") if by != "block" else ("",):
            units[f"{index}.{part}" if part else str(index)] = []
        for parameter, _ in block.named_parameters():
            part = "attention" if inside and f"{parameter}.".startswith(f"{inside}.") else "mlp"
            units[str(index) if by == "block" else f"{index}.{part}"].append(f"{name}.{parameter}")
    return {unit: tuple(names) for unit, names in units.items()}


def linear_modules(backbone: Backbone, names: Iterable[str]) -> list[str]:
    """The linear maps among the modules that hold parameters of these names: where adapters can be."""
    holders = dict.fromkeys(name.rpartition(".")[0] for name in names)
    model = backbone.model
    return [name for name in holders if is_linear(model.get_submodule(name))]
