"""How an attention module cuts its fused projection, measured: the model's own code runs on row numbers.

The model is built on the meta device. Its linear layers answer with zeros and the one in question with the numbers of
its rows; at position 0 nothing is rotated, and so the operands of the attention products are the rows of q, k and v.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Rows = dict[str, tuple[int, ...]]
"""Part (q, k, v) → the output rows it has in the fused matrix, ascending."""

_PRODUCTS = {
    torch.matmul, torch.bmm, torch.baddbmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm,
    torch.Tensor.baddbmm, nn.functional.scaled_dot_product_attention,
}  # fmt: skip
_MAX_FILLED = 1 << 20
_LINEAR = ("Linear", "Conv1D")
_INDEX = re.compile(r"\.\d+\.")


def measure_fused_rows(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Rows]:
    """The rows of q, k and v of these fused matrices (name → outputs × inputs), as far as they can be measured.

    What transformers does not know, cannot be built, or computes attention otherwise is left out.
    """
    from transformers import AutoConfig, AutoModel

    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModel.from_config(config, trust_remote_code=False).eval()
    except Exception:  # whatever the class raises for a configuration it cannot build: nothing is measured
        return {}
    stand_ins = _stand_in(model)
    found: dict[str, Rows] = {}
    measured: dict[str, Rows | None] = {}
    for name, shape in shapes.items():
        module = _module_of(name, stand_ins)
        if module is None:
            continue
        # The blocks of one model are alike: one of each kind is measured.
        kind = f"{_INDEX.sub('.*.', name)} {shape}"
        if kind not in measured:
            measured[kind] = _rows_of(model, stand_ins[module], shape[0])
        if (rows := measured[kind]) is not None:
            found[name] = rows
    return found


class _StandIn:
    """Answers for a linear layer: zeros, or its row numbers from 1 while it is `asked`."""

    def __init__(self, outputs: int) -> None:
        self.outputs, self.asked = outputs, False

    def __call__(self, values: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        shape = (*values.shape[:-1], self.outputs)
        if not self.asked:
            return torch.zeros(shape)
        return torch.arange(1.0, self.outputs + 1).expand(shape)


def _stand_in(model: nn.Module) -> dict[str, _StandIn]:
    """Take the weights out of the way of a model on the meta device; module name → its stand-in."""
    stand_ins = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        weight = getattr(module, "weight", None)
        if kind.endswith(_LINEAR) and isinstance(weight, torch.Tensor) and weight.ndim == 2:
            stand_ins[name] = _StandIn(weight.shape[1] if kind == "Conv1D" else weight.shape[0])
            _answer(module, stand_ins[name])
        elif isinstance(module, nn.Embedding):
            width = module.embedding_dim
            _answer(module, lambda ids, *_, width=width, **__: torch.zeros(*ids.shape, width))
        elif kind.lower().endswith("norm"):
            _answer(module, lambda values, *_, **__: values)
        for key, value in [*module._parameters.items()]:
            if value is not None and value.numel() <= _MAX_FILLED and name not in stand_ins:
                module._parameters[key] = nn.Parameter(torch.zeros(value.shape), requires_grad=False)
        for key, value in [*module._buffers.items()]:
            if value is not None and value.numel() <= _MAX_FILLED:
                module._buffers[key] = torch.zeros(value.shape, dtype=value.dtype)
    return stand_ins


def _answer(module: nn.Module, function: Callable[..., torch.Tensor]) -> None:
    module.__dict__["forward"] = function


def _module_of(tensor: str, modules: Iterable[str]) -> str | None:
    """The module of the bare model that a tensor of a checkpoint, perhaps with a prefix, is the weight of."""
    name = tensor.removesuffix(".weight")
    return next((m for m in modules if name == m or name.endswith("." + m)), None)


class _Operands(TorchFunctionMode):
    """Notes which of the row numbers stand in the operands of each product."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.found: list[tuple[int, ...]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _PRODUCTS:
            for operand in (*args, *(kwargs or {}).values()):
                if isinstance(operand, torch.Tensor) and operand.is_floating_point():
                    self._note(operand)
        return func(*args, **(kwargs or {}))

    def _note(self, operand: torch.Tensor) -> None:
        values = operand.detach().double().unique()
        if len(values) < 2 or values[0] <= 0:
            return
        # Queries may have been scaled: neighbouring rows then differ by the scale.
        rows = values / (values[1:] - values[:-1]).min()
        if (rows - rows.round()).abs().max() < 1e-2 and rows[-1] < self.outputs + 0.5:
            self.found.append(tuple(int(row) - 1 for row in rows.round()))


def _rows_of(model: nn.Module, stand_in: _StandIn, outputs: int) -> Rows | None:
    if stand_in.outputs != outputs:
        return None
    operands = _Operands(outputs)
    stand_in.asked = True
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with operands:
                model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=False)
    except Exception:  # a model that needs other inputs, or whose code looks at weights
        pass
    finally:
        stand_in.asked = False
    parts = list(dict.fromkeys(operands.found))[:3]
    if len(parts) < 3 or sorted(row for part in parts for row in part) != list(range(outputs)):
        return None
    return dict(zip("qkv", parts, strict=True))
