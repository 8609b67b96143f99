"""Attributions of all blocks at once: one forward and one backward pass per step of the path, and ablations.

Axis letters: B images, T tokens, D width, L + 1 places (the embedding output and each block's output).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerprobe.backbones.backbone import Backbone

Score = Callable[[Tensor], Tensor]
"""Pixels B×C×H×W → one number an image, B."""


class Taps:
    """Gives every place of the residual stream a module of its own, while the `with` block lasts.

    `modules[0]` passes what enters block 0, `modules[i + 1]` what block i hands on, as a bare tensor, also where
    the block itself returns a tuple (with or without None in it). Whatever a tap returns goes on into the model,
    so hooks on a tap can read, replace or differentiate.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._blocks = backbone.blocks
        self.modules = [nn.Identity() for _ in range(len(self._blocks) + 1)]
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        def enters(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self.modules[0](args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self.modules[0](kwargs["hidden_states"])}

        self._handles.append(self._blocks[0].register_forward_pre_hook(enters, with_kwargs=True))
        for block, tap in zip(self._blocks, self.modules[1:], strict=True):
            self._handles.append(block.register_forward_hook(_passing(tap)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _passing(tap: nn.Module) -> Callable[..., Any]:
    def leaves(_block: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, (tuple, list)):
            return type(output)((tap(output[0]), *output[1:]))
        return tap(output)

    return leaves


@dataclass
class PathAttribution:
    """What the path from a baseline to the images says about every place.

    Attributes
    ----------
    conductance : per place, B×T×D. Summed over T and D it is f(x) − f(baseline) for *every* place, up to the
        error of the steps; only its spread over units tells places apart.
    update : per block, B×T: the part of the block's conductance that runs through what the block adds
        (output − input), summed over D. The rest would pass the block on the residual stream alone.
    start, end : f at the first and last step, B.
    step_errors : per step, the error |Σ ĝ·Δa − Δf| at the worst place, summed over images; None unless asked for.
    """

    conductance: list[Tensor]
    update: list[Tensor]
    start: Tensor
    end: Tensor
    step_errors: Tensor | None = None


def path_conductance(
    score: Score,
    taps: Taps,
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
    score : pixels → B numbers. Parameters should not require gradients; the graph starts at the first tap.
    pixels : B×C×H×W. baseline : C×H×W. alphas : rising, in [0, 1], at least two.
    embed : False leaves out the embedding output (its list entry is then empty) and the backward pass through
        block 0.
    with_step_errors : also tell where on the path the error arises, for refining `alphas`.

    References
    ----------
    Dhamdhere, Sundararajan, Yan, How important is a neuron?, ICLR 2019, arXiv 1805.12233.
    """
    places = list(range(0 if embed else 1, len(taps.modules)))
    seen: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[..., Tensor]:
        def hook(_tap: nn.Module, _args: Any, output: Tensor) -> Tensor:
            if place == places[0] and torch.is_grad_enabled():
                output = output.detach().requires_grad_()
            seen[place] = output
            return output

        return hook

    handles = [taps.modules[place].register_forward_hook(keep(place)) for place in places]
    sums: dict[int, Tensor] = {}
    updates: dict[int, Tensor] = {}
    before: list[Tensor] = []
    slopes: list[Tensor] = []
    start: Tensor | None = None
    reached = torch.zeros(0)
    factor = 0.5 if rule == "trapezoid" else 1.0
    step_errors: list[Tensor] = []
    try:
        for number, alpha in enumerate(alphas):
            last = number == len(alphas) - 1
            with torch.set_grad_enabled(rule == "trapezoid" or not last):
                value = score(torch.lerp(baseline.expand_as(pixels), pixels, alpha))
                now = [seen[place] for place in places]
                fresh = list(torch.autograd.grad(value.sum(), now)) if torch.is_grad_enabled() else slopes
            now = [activation.detach() for activation in now]
            start = value.detach() if start is None else start
            if before:
                worst = torch.zeros_like(start)
                moved = [a.sub(b) for a, b in zip(now, before, strict=True)]
                for index, place in enumerate(places):
                    slope = slopes[index] + fresh[index] if rule == "trapezoid" else slopes[index]
                    if place not in sums:
                        sums[place] = slope * moved[index]
                    else:
                        sums[place].addcmul_(slope, moved[index])
                    if with_step_errors:
                        covered = factor * torch.einsum("btd,btd->b", slope, moved[index])
                        worst = torch.maximum(worst, (covered - (value.detach() - reached)).abs())
                    if index:
                        through = torch.einsum("btd,btd->bt", slope, moved[index - 1])
                        updates[place] = through if place not in updates else updates[place].add_(through)
                step_errors.append(worst.double().sum())
            before, slopes, reached = now, fresh, value.detach()
    finally:
        for handle in handles:
            handle.remove()
    assert start is not None
    everywhere = range(len(taps.modules))
    nothing = value.new_empty(0)
    conductance = [sums[place].mul_(factor) if place in sums else nothing for place in everywhere]
    update = [
        conductance[place].sum(dim=2) - updates[place].mul_(factor) if place in updates else nothing
        for place in everywhere[1:]
    ]
    return PathAttribution(
        conductance, update, start, value.detach(), torch.stack(step_errors) if with_step_errors else None
    )


def refined(alphas: Sequence[float], errors: Sequence[float], allowed: float) -> list[float]:
    """`alphas` with a point in the middle of every step whose error is above `allowed`, at least of the worst."""
    threshold = min(allowed, max(errors))
    points = [alphas[0]]
    for low, high, error in zip(alphas[:-1], alphas[1:], errors, strict=True):
        points += [(low + high) / 2, high] if error >= threshold else [high]
    return points


class Ablation:
    """Replaces what one block adds to the residual stream, while the `with` block lasts.

    With `update` None the block is skipped: its output is its input. Otherwise it adds `update` (T×D), the same for
    every image.
    """

    def __init__(self, block: nn.Module, update: Tensor | None = None) -> None:
        self._block = block
        self._update = update
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> Ablation:
        def replaced(_block: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if self._update is not None:
                hidden = hidden + self._update.to(hidden.dtype)
            if isinstance(output, (tuple, list)):
                return type(output)((hidden, *output[1:]))
            return hidden

        self._handle = self._block.register_forward_hook(replaced, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()


@torch.no_grad()
def mean_updates(backbone: Backbone, batches: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """What each block adds on average over images, per token (L times T×D), and the mean image (C×H×W)."""
    seen: list[Tensor] = []
    totals: list[Tensor] = []
    image: Tensor | None = None
    count = 0
    with Taps(backbone) as taps:
        handles = [
            tap.register_forward_hook(lambda _m, _a, output: seen.append(output)) for tap in taps.modules
        ]
        try:
            for pixels in batches:
                seen.clear()
                backbone(pixels)
                added = [(b.double() - a.double()).sum(dim=0) for a, b in itertools.pairwise(seen)]
                totals = added if not totals else [t + a for t, a in zip(totals, added, strict=True)]
                summed = pixels.double().sum(dim=0)
                image = summed if image is None else image + summed
                count += len(pixels)
        finally:
            for handle in handles:
                handle.remove()
    assert image is not None
    return [(total / count).float() for total in totals], (image / count).float()
