"""Where a transformer keeps its blocks, and where in a block attention and MLP write to the residual stream.

Everything is read off the module tree, so that a new architecture works without an entry anywhere:

- *blocks*: the outermost `ModuleList` with as many members as `config.num_hidden_layers` says, all of one
  class; the largest when there are several.
- *attention output*: in a block, the outermost submodule with "Attention" in its class name; in it the last
  linear map that writes vectors of the model's width.
- *MLP output*: the last such linear map of the block outside attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from layerprobe.errors import UsageError


@dataclass(frozen=True)
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

    @property
    def n_blocks(self) -> int:
        return len(self.block_names)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The block modules of `model`, in order."""
        return [model.get_submodule(name) for name in self.block_names]


def find_layout(model: nn.Module, config: Any) -> Layout:
    """Read the layout off a Hugging Face base model.

    Raises
    ------
    UsageError : no list of blocks fits; the message says what was looked for and what was there.
    """
    list_name, blocks = _find_block_list(model, config)
    width = hidden_size(config)
    names = tuple(f"{list_name}.{index}" if list_name else str(index) for index in range(len(blocks)))
    attention: list[str | None] = []
    mlp: list[str | None] = []
    for name, block in zip(names, blocks, strict=True):
        attention_path = _outermost_attention(block)
        inside = _last_writer(block, width, lambda path, a=attention_path: _within(path, a))
        outside = _last_writer(block, width, lambda path, a=attention_path: not _within(path, a))
        attention.append(f"{name}.{inside}" if inside and attention_path is not None else None)
        mlp.append(f"{name}.{outside}" if outside else None)
    groups, norms = _group_parameters(model, names, config)
    return Layout(names, tuple(attention), tuple(mlp), groups, norms)


def hidden_size(config: Any) -> int:
    """Width d of the residual stream."""
    for attribute in ("hidden_size", "d_model", "n_embd", "dim"):
        value = getattr(config, attribute, None)
        if isinstance(value, int):
            return value
    raise UsageError(
        f"the configuration {type(config).__name__} names no hidden_size, d_model, n_embd or dim"
    )


def _find_block_list(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    expected = getattr(config, "num_hidden_layers", None)
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(outer + ".") for outer, _ in found):
            continue
        if len({type(member) for member in module}) == 1 and any(True for _ in module.parameters()):
            found.append((name, module))
    fitting = [item for item in found if expected is None or len(item[1]) == expected]
    if not fitting:
        seen = ", ".join(f"{name} ({len(module)} × {type(module[0]).__name__})" for name, module in found)
        raise UsageError(
            f"no transformer blocks found in {type(model).__name__}: looked for a ModuleList of "
            f"{expected if expected is not None else 'equal'} modules of one class "
            f"(config.num_hidden_layers = {expected}); there is {seen or 'no ModuleList'}"
        )
    return max(fitting, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _outermost_attention(block: nn.Module) -> str | None:
    for name, module in block.named_modules():
        if name and "attention" in type(module).__name__.lower():
            return name
    return None


def _within(path: str, ancestor: str | None) -> bool:
    return ancestor is not None and (path == ancestor or path.startswith(ancestor + "."))


def _last_writer(block: nn.Module, width: int, wanted: Any) -> str | None:
    """Path of the last linear map that writes `width` features, among paths `wanted` accepts."""
    last = None
    for path, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.ndim != 2 or isinstance(module, nn.Embedding) or not wanted(path):
            continue
        # nn.Linear keeps (out, in); GPT-2's Conv1D keeps (in, out) and says so in `nf`.
        written = getattr(module, "nf", None) or weight.shape[0]
        if written == width:
            last = path
    return last


def _group_parameters(
    model: nn.Module, block_names: tuple[str, ...], config: Any
) -> tuple[dict[str, str], frozenset[str]]:
    positions_at_least = getattr(config, "max_position_embeddings", None)
    get_embeddings = getattr(model, "get_input_embeddings", None)
    try:
        token_embedding = get_embeddings() if get_embeddings else None
    except NotImplementedError:
        token_embedding = None
    groups: dict[str, str] = {}
    norms: set[str] = set()
    for name, _ in model.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name) if owner_name else model
        is_norm = "norm" in type(owner).__name__.lower()
        if is_norm:
            norms.add(name)
        block = next((i for i, b in enumerate(block_names) if name.startswith(b + ".")), None)
        if block is not None:
            groups[name] = f"block.{block}"
        elif is_norm:
            groups[name] = "norm"
        elif "position" in name.lower() or (
            isinstance(owner, nn.Embedding)
            and owner is not token_embedding
            and isinstance(positions_at_least, int)
            and owner.num_embeddings >= positions_at_least
        ):
            groups[name] = "positions"
        elif owner is token_embedding or "embed" in name.lower() or leaf in ("cls_token", "mask_token"):
            groups[name] = "embeddings"
        else:
            groups[name] = "other"
    return groups, frozenset(norms)
