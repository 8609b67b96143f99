"""Matrices that hold several modules in one, cut as the model's own code cuts them.

What the parts are is the tensor's role. How they lie is known for an architecture (`model_type` and the numbers of
heads in `config.json`), by a name that means the same cut wherever it is used, or because the caller has measured it;
a matrix of which nothing is known stays whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerprobe.checkpoints.safetensors import StoredTensor
from layerprobe.checkpoints.tensor_roles import TensorRole
from layerprobe.checkpoints.view import Range, View

_HEAD_BY_HEAD = frozenset(
    {"bloom", "gpt_neox", "gpt_neox_japanese", "persimmon", "deberta", "minimax", "gpt_bigcode", "falcon"}
)
"""Rows are heads × (q, k, v) × head size; of GPTBigCode and Falcon where the heads do not share k and v."""

_GROUP_BY_GROUP = frozenset({"internlm2", "falcon"})
"""Rows are groups × (queries of the group, k, v) × head size; Falcon in its new decoder architecture."""

_SIDE_BY_SIDE = frozenset({"phi3", "phi4_multimodal", "chatglm", "qwen", "baichuan", "gpt_bigcode", "falcon"})
"""Rows are all queries, then k, then v; GPTBigCode and Falcon with one k and v for all heads."""

_ALWAYS_SIDE_BY_SIDE = re.compile(
    r"(?:^|\.)(?:qkv|to_qkv|wqkv|in_proj_weight|att_proj|qkv_linear|w_pack)(?:\.weight)?$", re.I
)
"""Names that mean q, k, v one after the other in every architecture that uses them."""

_PHI_LIKE = re.compile(r"self_attn\.qkv_proj(?:\.weight)?$")
_HALVES = re.compile(r"(?:^|\.)(?:c_attn|to_kv)(?:\.weight)?$")
_CODEGEN_RANKS = 4
"""CodeGen's rows lie in 4 parts (the processors it was trained on), each q, v, k."""

_SYNONYMS = {
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "head_size": ("head_dim", "kv_channels"),
    "experts": ("num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts"),
    "k_size": ("qk_nope_head_dim",),
    "v_size": ("v_head_dim",),
}
_ALIASES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}


Half = tuple[str, tuple[int, ...], tuple[Range, ...]]
"""Kind, axes and ranges of a part of one expert."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One module of a fused matrix. `is_expert` where it is one of a stack and stands for itself in every sum."""

    kind: str
    tensor: StoredTensor
    transposed: bool
    is_expert: bool


class FusedMatrices:
    """Cuts the fused matrices of one checkpoint.

    Parameters
    ----------
    shapes : Mapping[str, tuple[int, ...]]
        All tensors of the checkpoint: how a stack of experts lies shows only beside its siblings.
    config : Mapping[str, Any]
        The model's `config.json`, or nothing.
    measured : Mapping[str, Mapping[str, Sequence[int]]] | None
        Tensor name → part → its outputs in ascending order, for matrices that nothing else is known of.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: Mapping[str, Any],
        measured: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    ) -> None:
        self._shapes = shapes
        self._sections = list(_sections(config))
        self._measured = measured or {}

    def parts(self, tensor: StoredTensor, role: TensorRole) -> list[Part]:
        """The modules that this tensor holds, in their order; none where it is one module, or nobody knows.

        A part is named like the whole with its kind, of a stack of experts its index, in brackets.
        """
        if tensor.skip is not None or tensor.alias_of is not None or not tensor.size:
            return []
        if role.kind in ("gate", "up", "gate_up", "fc", "down") and role.block is not None:
            experts = self._experts(tensor, role)
            if experts:
                return experts
        if len(tensor.shape) != 2:
            return []
        inputs, outputs = tensor.shape if role.transposed else tensor.shape[::-1]
        cut = self._cut(tensor.name, role.kind, outputs, inputs) or self._measured_cut(tensor.name, outputs)
        # The cut is one of the outputs, which a transposed matrix has along its columns.
        before: tuple[int, ...] = (inputs,) if role.transposed else ()
        after: tuple[int, ...] = () if role.transposed else (inputs,)
        made = []
        for kind, view in cut:
            axes, ranges = (*before, *view.axes, *after), (*_all(before), *view.ranges, *_all(after))
            part = tensor.part(kind, View(axes, ranges), (*before, view.size, *after))
            made.append(Part(kind=kind, tensor=part, transposed=role.transposed, is_expert=False))
        return made

    def _cut(self, name: str, kind: str, outputs: int, inputs: int) -> list[tuple[str, View]]:
        """(kind, view of the outputs) of each part."""
        section = self._section(name)
        if kind == "qkv":
            return self._attention_cut(name, section, outputs, inputs)
        if kind == "kv":
            return _kv_cut(name, section, outputs)
        if kind == "gate_up" and outputs % 2 == 0:
            order = ("up", "gate") if _is_up_first(name, section) else ("gate", "up")
            return _one_after_another(order, [outputs // 2] * 2)
        return []

    def _measured_cut(self, name: str, outputs: int) -> list[tuple[str, View]]:
        found = {kind: _view_of(rows, outputs) for kind, rows in self._measured.get(name, {}).items()}
        views = [(kind, view) for kind, view in found.items() if view is not None]
        return views if len(views) == len(found) else []

    def _attention_cut(
        self, name: str, section: _Section, outputs: int, inputs: int
    ) -> list[tuple[str, View]]:
        layout = section.layout()
        heads, groups = section.number("heads"), section.number("kv_heads")
        if layout == "codegen" and outputs % (3 * _CODEGEN_RANKS) == 0:
            return _interleaved("qvk", _CODEGEN_RANKS, outputs // (3 * _CODEGEN_RANKS))
        if layout == "heads" and heads and outputs % (3 * heads) == 0:
            return _interleaved("qkv", heads, outputs // (3 * heads))
        if layout == "groups" and heads and groups and heads % groups == 0:
            size = outputs // (heads + 2 * groups)
            if size * (heads + 2 * groups) == outputs:
                return _grouped(groups, heads // groups, size)
        known = layout == "side" or _ALWAYS_SIDE_BY_SIDE.search(name) is not None
        known = known or (not section.model_type and _PHI_LIKE.search(name) is not None)
        # A `c_attn` is GPT-2's where it lies inputs × outputs; others of that name are cut otherwise.
        is_gpt2 = name.endswith("c_attn.weight") and self._shapes[name][1] == 3 * self._shapes[name][0]
        return _side_by_side(section, outputs, inputs) if known or is_gpt2 else []

    def _experts(self, tensor: StoredTensor, role: TensorRole) -> list[Part]:
        """The experts of a stack (experts × rows × columns, or all their rows in one matrix)."""
        section = self._section(tensor.name)
        shape = tensor.shape
        if len(shape) == 2 and section.model_type == "dbrx" and "experts" in tensor.name:
            experts = section.number("experts")
            if not experts or shape[0] % experts:
                return []
            shape = (experts, shape[0] // experts, shape[1])
        if len(shape) != 3 or min(shape) < 2:
            return []
        known = self._is_transposed(tensor.name, role.kind, shape)
        if section.model_type == "dbrx":
            known = role.kind == "down"
        transposed = bool(known)
        rows, columns = shape[1:]
        halves: list[Half] = [(role.kind, (rows, columns), _all((rows, columns)))]
        if role.kind == "gate_up" and known is not None:
            halves = self._halves(tensor.name, section, (rows, columns), transposed) or halves
        made = []
        for index in range(shape[0]):
            for kind, axes, ranges in halves:
                kept = tuple(stop - start for start, stop in ranges)
                label = str(index) if kind == role.kind else f"{index}.{kind}"
                view = View((shape[0], *axes), ((index, index + 1), *ranges))
                part = tensor.part(label, view, (kept[0], math.prod(kept[1:])))
                made.append(Part(kind=kind, tensor=part, transposed=transposed, is_expert=True))
        return made

    def _halves(self, name: str, section: _Section, shape: tuple[int, int], transposed: bool) -> list[Half]:
        """Gate and up of one expert."""
        rows, columns = shape
        outputs = columns if transposed else rows
        if outputs % 2:
            return []
        half = outputs // 2
        if self._is_interleaved(name, section, transposed):
            return [
                (part, (rows, half, 2), ((0, rows), (0, half), (i, i + 1)))
                for i, part in enumerate(("gate", "up"))
            ]
        bounds = ((0, half), (half, outputs))
        return [
            (part, (rows, columns), ((0, rows), kept) if transposed else (kept, (0, columns)))
            for part, kept in zip(("gate", "up"), bounds, strict=True)
        ]

    def _is_interleaved(self, name: str, section: _Section, transposed: bool) -> bool:
        """Whether gate and up alternate (gpt-oss, the one model whose experts are transposed and have a bias)."""
        if section.model_type:
            return section.model_type == "gpt_oss"
        return transposed and f"{name}_bias" in self._shapes

    def _is_transposed(self, name: str, kind: str, shape: tuple[int, ...]) -> bool | None:
        """Whether the experts lie inputs × outputs, as the shapes of first and last layer tell together.

        None where one of them is not here, and the width of the model is not known either.
        """
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        for partner in _FIRST if kind == "down" else _LAST:
            other = self._shapes.get(f"{module}.{partner}{name[len(module) + 1 + len(leaf) :]}", ())
            if len(other) == 3:
                first, last = (other, shape) if kind == "down" else (shape, other)
                return first[1] == last[2] and first[2] != last[1]
        width = self._section(name).number("width")
        if width in shape[1:] and shape[1] != shape[2]:
            return (shape[1] == width) != (kind == "down")
        return None

    def _section(self, name: str) -> _Section:
        """The part of the configuration that speaks of this tensor."""
        return max(self._sections, key=lambda section: section.fits(name))


_FIRST = ("gate_up_proj", "input_linear", "fc1", "gate_proj", "up_proj", "w1")
_LAST = ("down_proj", "output_linear", "fc2", "w2")


@dataclass(frozen=True)
class _Section:
    """One dictionary of a configuration that describes a stack of blocks, with its path in it."""

    path: str
    settings: Mapping[str, Any]
    model_type: str

    def number(self, what: str) -> int | None:
        nested = (self.settings.get(key) for key in ("attn_config", "ffn_config"))
        for settings in (self.settings, *(found for found in nested if isinstance(found, Mapping))):
            for key in _SYNONYMS[what]:
                value = settings.get(key)
                if type(value) is int and value > 0:
                    return value
        return None

    def fits(self, name: str) -> int:
        """How well the path of the section and the words of a tensor's name agree."""
        for words in (("vision", "visual", "image"), ("audio", "speech"), ("decoder",), ("encoder",)):
            if any(word in name for word in words):
                return 2 * any(word in self.path for word in words) + (self.path == "")
        return 2 * any(word in self.path for word in ("text", "llm", "language")) + (self.path == "")

    def layout(self) -> str:
        """How q, k and v lie: "heads", "groups", "side" (by side), "codegen", or "" where it is not known."""
        kind = self.model_type
        if kind == "falcon":
            if self.settings.get("new_decoder_architecture", False):
                return "groups"
            return "side" if self.settings.get("multi_query", True) else "heads"
        if kind == "gpt_bigcode":
            return "side" if self.settings.get("multi_query", True) else "heads"
        if kind == "chatglm" and "position_encoding_2d" in self.settings:
            return "heads"
        named = {
            "heads": _HEAD_BY_HEAD,
            "groups": _GROUP_BY_GROUP,
            "side": _SIDE_BY_SIDE,
            "codegen": {"codegen"},
        }
        return next((layout for layout, kinds in named.items() if kind in kinds), "")


def _sections(config: Mapping[str, Any], path: str = "", kind: str = "") -> Iterator[_Section]:
    own = str(config.get("model_type") or kind)
    yield _Section(path, config, _ALIASES.get(own, own))
    for key, value in config.items():
        if isinstance(value, Mapping) and ("config" in key or "encoder" in key or "decoder" in key):
            yield from _sections(value, f"{path}.{key}", own)


def _side_by_side(section: _Section, outputs: int, inputs: int) -> list[tuple[str, View]]:
    heads, groups, size = (section.number(what) for what in ("heads", "kv_heads", "head_size"))
    if heads and (groups or size):
        groups = 1 if section.model_type in ("falcon", "gpt_bigcode") else groups or heads
        each = size or outputs // (heads + 2 * groups)
        if (heads + 2 * groups) * each == outputs:
            return _one_after_another("qkv", [heads * each, groups * each, groups * each])
    rest = outputs - inputs
    if 0 < rest <= 2 * inputs and rest % 2 == 0:
        # Queries have as many outputs as inputs; keys and values share what is left.
        return _one_after_another("qkv", [inputs, rest // 2, rest // 2])
    if outputs % 3 == 0 and section.model_type and not (groups and groups != heads):
        # Stages that widen (Hiera, SAM 2): thirds of another width than the inputs'.
        return _one_after_another("qkv", [outputs // 3] * 3)
    return []


def _kv_cut(name: str, section: _Section, outputs: int) -> list[tuple[str, View]]:
    heads, k, v = (section.number(what) for what in ("heads", "k_size", "v_size"))
    if "kv_b_proj" in name and heads and k and v and heads * (k + v) == outputs:
        axes = (heads, k + v)
        return [("k", View(axes, ((0, heads), (0, k)))), ("v", View(axes, ((0, heads), (k, k + v))))]
    is_halved = _HALVES.search(name) or (section.model_type == "jetmoe" and "kv_proj" in name)
    return _one_after_another("kv", [outputs // 2] * 2) if is_halved and outputs % 2 == 0 else []


def _is_up_first(name: str, section: _Section) -> bool:
    return "up_gate_proj" in name or (section.model_type.startswith("phi4_multimodal") and "audio" in name)


def _one_after_another(kinds: Sequence[str], sizes: Sequence[int]) -> list[tuple[str, View]]:
    total, start, made = sum(sizes), 0, []
    for kind, size in zip(kinds, sizes, strict=True):
        made.append((kind, View((total,), ((start, start + size),))))
        start += size
    return made


def _view_of(rows: Sequence[int], outputs: int) -> View | None:
    """The view that keeps these outputs, where they are one run or one run in each period."""
    first = rows[0]
    run = next((i for i, row in enumerate(rows) if row != first + i), len(rows))
    times, left = divmod(len(rows), run)
    if left or outputs % times:
        return None
    period = outputs // times
    if [*rows] != [first + i * period + j for i in range(times) for j in range(run)]:
        return None
    return View((times, period), ((0, times), (first, first + run)))


def _interleaved(kinds: str, times: int, size: int) -> list[tuple[str, View]]:
    """`times` over, `size` outputs of each kind."""
    axes = (times, len(kinds), size)
    found = {kind: View(axes, ((0, times), (i, i + 1), (0, size))) for i, kind in enumerate(kinds)}
    return [(kind, found[kind]) for kind in "qkv"]


def _grouped(groups: int, queries: int, size: int) -> list[tuple[str, View]]:
    axes = (groups, queries + 2, size)
    bounds = {"q": (0, queries), "k": (queries, queries + 1), "v": (queries + 1, queries + 2)}
    return [(kind, View(axes, ((0, groups), kept, (0, size)))) for kind, kept in bounds.items()]


def _all(axes: Sequence[int]) -> tuple[Range, ...]:
    return tuple((0, size) for size in axes)
