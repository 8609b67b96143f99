"""Which of the states in a training checkpoint is the model: not the optimizer's moments, not a copy of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerprobe.errors import BrokenFileError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

Named = list[tuple[str, "Tensor"]]

_COPY = re.compile(
    r"(?:^|_)(?:ema|swa|avg|averaged?|best|shadow|teacher|target|old|prev|previous|backup|initial)(?:_|$)"
)
_TRAINER = re.compile(
    r"optim|(?:^|_)opt(?:_|$)|sched|scaler|(?:^|_)rng|random_state|callbacks|(?:^|_)loops?(?:_|$)|loss|criterion"
)
_MOMENT = re.compile(r"(?:^|\.)(?:exp_avg(?:_sq)?|max_exp_avg_sq|momentum_buffer|exp_inf)$")


@dataclass(frozen=True)
class State:
    """The named tensors that were chosen, and what else was there: name → what it is."""

    tensors: Named
    left_out: dict[str, str]


def choose_state(loaded: object, wanted: str | None, file: Path) -> State:
    """The model's own state of whatever a file held; with `wanted` the state of that name.

    A mapping is a state as a whole where it holds weights itself. Else each of its values is one: those of an
    optimizer or trainer are left out, and of several with the same tensors (an average, the best so far) the first
    is kept that is not named as a copy. Names keep the path to the state, as `model.` or `state_dict.`.

    Raises
    ------
    UnknownNameError
        There is no state `wanted`.
    BrokenFileError
        Nothing but an optimizer.
    """
    if not isinstance(loaded, Mapping):
        if wanted is not None:
            raise UnknownNameError(f"{file} has no named states, so --state {wanted} names none")
        return State(list(flatten(loaded)), {})
    loose = {str(key): value.detach() for key, value in loaded.items() if _is_tensor(value)}
    states: dict[str, Named] = {}
    left: dict[str, str] = {}
    for name, value in _opened(loaded):
        if name in loose:
            continue
        found = list(flatten(value, name))
        if _is_optimizer(value) or _TRAINER.search(name.lower()) or any(_MOMENT.search(n) for n, _ in found):
            if found:
                left[name] = f"of the optimizer or trainer, {len(found)} tensors"
        elif any(tensor.dim() for _, tensor in found if tensor.is_floating_point() or tensor.dim() > 1):
            states[name] = found
    if wanted is None and not states and left and not any(tensor.dim() for tensor in loose.values()):
        raise BrokenFileError(f"cannot read {file}: no weights of a model are in it, only: {', '.join(left)}")
    is_state = any(tensor.dim() > 1 or "." in name for name, tensor in loose.items())
    if wanted is not None:
        return _wanted(states, left, wanted, file)
    if not states:
        return State(list(loose.items()), left)
    kept = _without_copies(states, {name: safe_shape(t) for name, t in loose.items()} if is_state else None)
    left |= {
        name: f"another state, {len(found)} tensors: --state {name}"
        for name, found in states.items()
        if name not in kept
    }
    if not is_state:
        left |= dict.fromkeys(loose, "a single value")
    own: Named = list(loose.items()) if is_state else []
    return State(own + [pair for name in kept for pair in states[name]], left)


def flatten(value: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in mappings and lists, named by its path."""
    if _is_tensor(value):
        yield prefix, value.detach()  # type: ignore[attr-defined]
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))


def _opened(loaded: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    """The entries by name; one that holds the trainer's state beside the model's (Composer) entry by entry."""
    for key, value in loaded.items():
        inner = value if isinstance(value, Mapping) and not _is_optimizer(value) else {}
        if any(
            _TRAINER.search(str(name).lower()) and isinstance(v, Mapping | list) for name, v in inner.items()
        ):
            yield from ((f"{key}.{name}", v) for name, v in inner.items())
        else:
            yield str(key), value


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _is_optimizer(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_optimizer, value))
    return isinstance(value, Mapping) and "param_groups" in value


def _wanted(states: dict[str, Named], left: dict[str, str], wanted: str, file: Path) -> State:
    fitting = [name for name in states if name == wanted] or [name for name in states if wanted in name]
    if len(fitting) != 1:
        known = ", ".join(states) or "none"
        raise UnknownNameError(f"{file} has no state '{wanted}'; its states: {known}")
    others = {
        name: f"another state, {len(found)} tensors" for name, found in states.items() if name != fitting[0]
    }
    return State(states[fitting[0]], left | others)


def _without_copies(states: dict[str, Named], root: dict[str, tuple[int, ...]] | None) -> list[str]:
    """The states that are no copy of another: parts of one model (encoder, decoder) are all kept."""
    named = [name for name in states if not _COPY.search(name.lower())]
    if root is not None:
        return [name for name in named if _shape_of(states[name], name) != root]
    kept: list[str] = []
    seen: list[dict[str, tuple[int, ...]]] = []
    for name in named or list(states)[:1]:
        shapes = _shape_of(states[name], name)
        # Modules that merely look alike have plain names inside; whole models have dotted ones.
        if shapes in seen and any("." in inner for inner in shapes):
            continue
        seen.append(shapes)
        kept.append(name)
    return kept


def _shape_of(found: Named, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(f"{prefix}."): safe_shape(tensor) for name, tensor in found}


def safe_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape, or () where it is none of numbers (nested tensors)."""
    try:
        return tuple(int(n) for n in tensor.shape)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return ()
