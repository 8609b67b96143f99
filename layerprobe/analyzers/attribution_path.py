"""Attributions of all blocks at once: one forward and one backward pass per step of the path, and ablations.

Axis letters: B images, T tokens, D width, L + 1 places (the embedding output and each block's output).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerprobe.analyzers.attribution_choices import FIRST_STEPS
from layerprobe.backbones.backbone import Backbone

Score = Callable[[Tensor], Tensor]
"""Pixels B×C×H×W → one number an image, B."""


@contextmanager
def residual_taps(backbone: Backbone) -> Iterator[list[nn.Identity]]:
    """Gives every place of the residual stream a module of its own, while the `with` block lasts.

    The first passes what enters block 0, number i + 1 what block i hands on, as a bare tensor, also where the
    block itself returns a tuple (with or without None in it). Whatever a tap returns goes on into the model, so
    hooks on a tap can read, replace or differentiate.
    """
    blocks = backbone.blocks
    taps = [nn.Identity() for _ in range(len(blocks) + 1)]

    def enters(
        _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if args:
            return (taps[0](args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": taps[0](kwargs["hidden_states"])}

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(enters, with_kwargs=True).remove)
        for block, tap in zip(blocks, taps[1:], strict=True):

            def leaves(_block: nn.Module, _args: object, output: Any, tap: nn.Identity = tap) -> object:
                return _replaced(output, tap(output[0] if isinstance(output, (tuple, list)) else output))

            stack.callback(block.register_forward_hook(leaves).remove)
        yield taps


@contextmanager
def ablated(block: nn.Module, update: Tensor | None = None) -> Iterator[None]:
    """Replaces what one block adds to the residual stream, while the `with` block lasts.

    With `update` None the block is skipped: its output is its input. Otherwise it adds `update` (T×D), the same for
    every image.
    """

    def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        hidden = args[0] if args else kwargs["hidden_states"]
        return _replaced(output, hidden if update is None else hidden + update.to(hidden.dtype))

    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _replaced(output: object, hidden: Tensor) -> object:
    """A block's output with other hidden states, in the form the block returns."""
    return type(output)((hidden, *output[1:])) if isinstance(output, (tuple, list)) else hidden


@contextmanager
def _recorded(taps: Sequence[nn.Module], *, cut: bool = False) -> Iterator[dict[int, Tensor]]:
    """What passes the taps in the last forward pass; with `cut` the autograd graph starts at the first."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index, tap in enumerate(taps):

            def hook(_tap: nn.Module, _args: object, output: Tensor, index: int = index) -> Tensor:
                if cut and index == 0 and torch.is_grad_enabled():
                    output = output.detach().requires_grad_()
                seen[index] = output
                return output

            stack.callback(tap.register_forward_hook(hook).remove)
        yield seen


@dataclass(kw_only=True)
class PathAttribution:
    """What the path from a baseline to the images says about every place.

    Attributes
    ----------
    conductance : list[Tensor]
        Per place, B×T×D. Summed over T and D it is f(x) − f(baseline) for *every* place, up to the error of
        the steps; only its spread over units tells places apart.
    update : list[Tensor]
        Per block, B×T: the part of the block's conductance that runs through what the block adds (output −
        input), summed over D. The rest would pass the block on the residual stream alone.
    start, end : Tensor
        f at the first and last step, B.
    step_errors : Tensor | None
        Per step, the error |Σ ĝ·Δa − Δf| at the worst place, summed over images; None unless asked for.
    """

    conductance: list[Tensor]
    update: list[Tensor]
    start: Tensor
    end: Tensor
    step_errors: Tensor | None = None


@dataclass(kw_only=True)
class _Point:
    """One point of the path: activations and gradients of all places, and f."""

    activations: list[Tensor]
    gradients: list[Tensor]
    value: Tensor


class _PathSums:
    """Σ_k ĝ_k·(a_{k+1} − a_k), place by place."""

    def __init__(self, *, trapezoid: bool, with_step_errors: bool) -> None:
        self.trapezoid, self.with_step_errors = trapezoid, with_step_errors
        self.factor = 0.5 if trapezoid else 1.0
        self.conductance: list[Tensor] = []
        self.passed: list[Tensor] = []  # by the residual stream alone, B×T, from the second place on
        self.step_errors: list[Tensor] = []

    def add(self, before: _Point, now: _Point) -> None:
        worst = torch.zeros_like(now.value)
        moved = [a.sub(b) for a, b in zip(now.activations, before.activations, strict=True)]
        first = not self.conductance
        for index, change in enumerate(moved):
            slope = before.gradients[index]
            if self.trapezoid:
                slope = slope + now.gradients[index]
            if first:
                self.conductance.append(slope * change)
            else:
                self.conductance[index].addcmul_(slope, change)
            if index:
                through = torch.einsum("btd,btd->bt", slope, moved[index - 1])
                if first:
                    self.passed.append(through)
                else:
                    self.passed[index - 1].add_(through)
            if self.with_step_errors:
                covered = self.factor * torch.einsum("btd,btd->b", slope, change)
                worst = torch.maximum(worst, (covered - (now.value - before.value)).abs())
        self.step_errors.append(worst.double().sum())


def path_conductance(
    score: Score,
    taps: Sequence[nn.Module],
    pixels: Tensor,
    baseline: Tensor,
    alphas: Sequence[float],
    *,
    rule: str = "trapezoid",
    embed: bool = True,
    with_step_errors: bool = False,
) -> PathAttribution:
    """Conductance of all places along baseline + α(pixels − baseline), from one pass per step.

    A place's activations a and gradients g = ∂f/∂a give Σ_k ĝ_k·(a_{k+1} − a_k), unit by unit. `rule` says what
    ĝ_k is: "trapezoid", the mean of g_k and g_{k+1} (error of second order in the step), or "left", g_k alone
    (first order; the sum that captum's LayerConductance forms).

    Parameters
    ----------
    score : Score
        Pixels → B numbers. Parameters should not require gradients; the graph starts at the first tap.
    taps : Sequence[nn.Module]
        Of `residual_taps`.
    pixels : Tensor
        B×C×H×W.
    baseline : Tensor
        C×H×W.
    alphas : Sequence[float]
        Rising, in [0, 1], at least two.
    embed : bool
        False leaves out the embedding output (its list entry is then empty) and the backward pass through
        block 0.
    with_step_errors : bool
        Also tell where on the path the error arises, for refining `alphas`.

    References
    ----------
    Dhamdhere, Sundararajan, Yan, How important is a neuron?, ICLR 2019, arXiv 1805.12233.
    """
    sums = _PathSums(trapezoid=rule == "trapezoid", with_step_errors=with_step_errors)
    values: list[Tensor] = []
    before: _Point | None = None
    with _recorded(taps if embed else taps[1:], cut=True) as seen:
        for number, alpha in enumerate(alphas):
            with torch.set_grad_enabled(sums.trapezoid or number < len(alphas) - 1):
                value = score(torch.lerp(baseline.expand_as(pixels), pixels, alpha))
                places = [seen[place] for place in sorted(seen)]
                gradients = torch.autograd.grad(value.sum(), places) if torch.is_grad_enabled() else ()
            activations = [place.detach() for place in places]
            now = _Point(activations=activations, gradients=list(gradients), value=value.detach())
            if before is not None:
                sums.add(before, now)
            before = now
            values.append(now.value)
    conductance = [part.mul_(sums.factor) for part in sums.conductance]
    update = [
        part.sum(dim=2) - passed.mul_(sums.factor)
        for part, passed in zip(conductance[1:], sums.passed, strict=True)
    ]
    if not embed:
        nothing = values[0].new_empty(0)
        conductance, update = [nothing, *conductance], [nothing, *update]
    return PathAttribution(
        conductance=conductance,
        update=update,
        start=values[0],
        end=values[-1],
        step_errors=torch.stack(sums.step_errors) if with_step_errors else None,
    )


def refined(alphas: Sequence[float], errors: Sequence[float], allowed: float) -> list[float]:
    """`alphas` with a point in the middle of every step whose error is above `allowed`, at least of the worst."""
    threshold = min(allowed, max(errors))
    points = [alphas[0]]
    for low, high, error in zip(alphas[:-1], alphas[1:], errors, strict=True):
        points += [(low + high) / 2, high] if error >= threshold else [high]
    return points


def adaptive_steps(
    score: Score,
    taps: Sequence[nn.Module],
    pixels: Tensor,
    baseline: Tensor,
    tolerance: float,
    max_steps: int,
) -> list[float]:
    """Points of the path that keep the completeness error of these images within `tolerance`.

    They stand close where the error arises, usually near the baseline, and far apart elsewhere. Where that takes
    more than `max_steps`, the last points within it.
    """
    alphas = np.linspace(0.0, 1.0, FIRST_STEPS + 1).tolist()
    while True:
        found = path_conductance(score, taps, pixels, baseline.to(pixels), alphas, with_step_errors=True)
        missed, moved = completeness(found)
        if missed.max() <= tolerance * moved:
            return alphas
        assert found.step_errors is not None
        finer = refined(alphas, found.step_errors.tolist(), tolerance * moved / (len(alphas) - 1))
        if len(finer) - 1 > max_steps:
            return alphas
        alphas = finer


def completeness(found: PathAttribution) -> tuple[np.ndarray, float]:
    """Σ over images of |Σ conductance − (f(x) − f(baseline))| per place, and of |f(x) − f(baseline)|."""
    change = (found.end - found.start).double()
    sums = torch.stack([c.double().sum(dim=(1, 2)) for c in found.conductance], dim=1)
    missed = (sums - change[:, None]).abs().sum(dim=0)
    return missed.cpu().numpy(), float(change.abs().sum())


@torch.no_grad()
def mean_updates(backbone: Backbone, batches: Iterable[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What each block adds on average over images, per token (L times T×D), and the mean image (C×H×W)."""
    totals: list[Tensor] = []
    count = 0
    with residual_taps(backbone) as taps, _recorded(taps) as seen:
        for pixels in batches:
            backbone(pixels)
            places = [seen[place] for place in sorted(seen)]
            summed = [(b.double() - a.double()).sum(dim=0) for a, b in itertools.pairwise(places)]
            summed.append(pixels.double().sum(dim=0))
            totals = summed if not totals else [t + s for t, s in zip(totals, summed, strict=True)]
            count += len(pixels)
    *updates, image = [(total / count).float() for total in totals]
    return updates, image
