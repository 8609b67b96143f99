"""What is measured of a backbone on two images before any number of it is believed.

Two forward passes, the second with one token (for a vision model: two corner patches) of the second image
altered and the last block's output put back to what it was in the first:

- the first image gives the same hidden states twice: nothing is masked, hashed or drawn at random;
- every block receives and returns the tokens that went in: none padded, dropped, merged or appended;
- the altered token changes earlier ones exactly where attention is not causal;
- the model's own output is that of the first pass again: it comes from the last block;
- what attention and MLP write adds up to what each block adds, in its own order of norms and scales. Where it does
  not with the writers that the module tree suggests, the modules around them are tried; where nothing fits, these
  two sites are not offered.

Noise is added to the images, so that no two patches are equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.block_sums import BlockRecorder, find_writers
from layerprobe.backbones.layout import Layout, first_tensor
from layerprobe.errors import LayerprobeError, UsageError, first_line

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone

N_IMAGES = 2
TOLERANCE = 1e-3
"""Largest relative difference between two numbers that should be one."""


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """What was found. A backbone that fails for another reason than its sites is refused instead."""

    n_tokens: int
    n_prefix: int
    """Tokens before the image's patches."""
    output_width: int
    causal: bool | None
    withheld: str | None
    """Why `attn_out` and `mlp_out` are not offered; None where they are."""

    def describe(self) -> dict[str, Any]:
        """Plain values for the provenance."""
        return {**asdict(self), "n_images": N_IMAGES, "tolerance": TOLERANCE}


def self_check(backbone: Backbone, pixels: Tensor) -> tuple[SelfCheck, Layout]:
    """Check a backbone, in evaluation mode, on the pixels of two images.

    Returns what was found, and the layout with the sites that can be offered.

    Raises
    ------
    UsageError
        One of the properties does not hold; the message says which.
    """
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    pixels = (pixels.cpu() + noise).to(backbone.device, backbone.dtype)
    model, layout = backbone.model, backbone.layout
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        first = _Pass(backbone)
        with first.watching(), BlockRecorder(model, layout) as recorder:
            first.final = _run(backbone, pixels)
        _check_tokens(backbone, first, pixels)
        second = _Pass(backbone, last=first.outputs[-1])
        with second.watching():
            second.final = _run(backbone, pixels, altered=True)
    layout = replace(layout, tokens_first=_tokens_first(backbone, first, pixels))
    if layout.tokens_first:
        first.swap_axes()
        second.swap_axes()
    _check_repeatable(backbone, first, second)
    n_prefix = _prefix(backbone, first, second, pixels)
    causal = _check_causal(backbone, first, second)
    if not _same(second.final, first.final):
        raise UsageError(
            f"{backbone.name}: the output of {layout.block_names[-1]} is not all that {_kind(backbone)} makes "
            "its own output of, so these are not its blocks; it cannot be read block by block"
        )
    if all(bool(torch.isfinite(output).all()) for output in first.outputs):  # else nothing adds up
        layout = find_writers(layout, recorder.records)
    found = SelfCheck(
        n_tokens=first.inputs[0].shape[1],
        n_prefix=n_prefix,
        output_width=first.final.shape[-1],
        causal=causal,
        withheld=layout.withheld,
    )
    return found, layout


def _kind(backbone: Backbone) -> str:
    return type(backbone.model).__name__


class _Pass:
    """The hidden states between the blocks in one forward pass, batch first."""

    def __init__(self, backbone: Backbone, *, last: Tensor | None = None) -> None:
        self.backbone = backbone
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.final = torch.empty(0)
        self._instead = last

    def swap_axes(self) -> None:
        """T×B×D becomes B×T×D."""
        self.inputs = [state.transpose(0, 1) for state in self.inputs]
        self.outputs = [state.transpose(0, 1) for state in self.outputs]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the blocks, while the `with` block lasts."""
        with contextlib.ExitStack() as stack:
            blocks = self.backbone.blocks
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                hook = self._leave_last if block is blocks[-1] else self._leave
                stack.callback(block.register_forward_hook(hook).remove)
            yield

    def _enter(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.append(first_tensor(args, kwargs).clone())

    def _leave(self, _block: nn.Module, _args: object, output: object) -> None:
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        self.outputs.append(hidden.clone() if isinstance(hidden, Tensor) else torch.empty(0))

    def _leave_last(self, block: nn.Module, args: object, output: object) -> object:
        self._leave(block, args, output)
        if self._instead is None:
            return None
        if isinstance(output, (tuple, list)):
            items = (self._instead.clone(), *output[1:])
            return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
        return self._instead.clone()


def _run(backbone: Backbone, pixels: Tensor, *, altered: bool = False) -> Tensor:
    """The model's own output; with `altered`, of the images with the second one changed."""
    try:
        if backbone.stem is None:
            if altered:
                pixels = _with_other_corners(pixels, _patch(backbone))
            return backbone(pixels)
        tokens = backbone.stem(pixels)
        if altered:
            tokens[-1, -1] = tokens[-1, -1].flip(0) + tokens.std()
        return backbone.forward_tokens(tokens)
    except (LayerprobeError, torch.OutOfMemoryError, MemoryError):
        raise  # which say nothing of what the model can take
    except Exception as error:
        raise cannot_run(backbone, error) from error


def cannot_run(backbone: Backbone, error: Exception) -> UsageError:
    """The one line for a model that stops with an error of its own."""
    entering = "images" if backbone.modality == "vision" else "embeddings of images in place of token ids"
    return UsageError(
        f"{backbone.name}: {_kind(backbone)} cannot take {entering} alone "
        f"({type(error).__name__}: {first_line(error)[:150]}); it may need inputs of its own"
    )


def _patch(backbone: Backbone) -> tuple[int, int]:
    """Height and width of a vision model's patch; 1 where its configuration names none."""
    return backbone.patch_shape or (1, 1)


def _with_other_corners(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """The same images but for the first and the last patch of the second one."""
    height, width = patch
    pixels = pixels.clone()
    for rows, columns in ((slice(height), slice(width)), (slice(-height, None), slice(-width, None))):
        pixels[-1, :, rows, columns] = pixels[-1, :, rows, columns].flip(-1, -2) + 1
    return pixels


def _check_tokens(backbone: Backbone, seen: _Pass, pixels: Tensor) -> None:
    """Whether all blocks see one token a patch, in one size."""
    n_images, n_blocks = len(pixels), backbone.n_blocks
    states = [*seen.inputs, *seen.outputs]
    if len(seen.inputs) != n_blocks:
        raise UsageError(
            f"{backbone.name}: {len(seen.inputs)} runs of {n_blocks} blocks in one forward pass of "
            f"{_kind(backbone)}; a block must run exactly once"
        )
    shapes = list(dict.fromkeys(tuple(state.shape) for state in states))
    if len(shapes) > 1 or len(shapes[0]) != 3:
        named = ", ".join("×".join(map(str, shape)) for shape in shapes[:3])
        raise UsageError(
            f"{backbone.name}: hidden states between the blocks of {_kind(backbone)} are {named} for {n_images} "
            "images; they must be images × tokens × width, the same in every block"
        )
    expected = _expected_tokens(backbone, pixels)
    b, t, d = shapes[0]
    if _tokens_first(backbone, seen, pixels):
        b, t = t, b
    wanted = (n_images, expected or t, backbone.hidden_size)
    if (b, t, d) != wanted or seen.final.shape[:2] != (b, t):
        raise UsageError(_wrong_tokens(backbone, (b, t, d), tuple(seen.final.shape), n_images, expected))


def _expected_tokens(backbone: Backbone, pixels: Tensor) -> int | None:
    """How many tokens the stem makes; None for a model's own stem."""
    if backbone.stem is None:
        return None
    side = backbone.stem.patch_size
    return (pixels.shape[-2] // side) * (pixels.shape[-1] // side)


def _tokens_first(backbone: Backbone, seen: _Pass, pixels: Tensor) -> bool:
    """Whether blocks see T×B×D where the model's own output is B×T×D."""
    size = (len(pixels), _expected_tokens(backbone, pixels))
    return seen.inputs[0].shape[:2] == size[::-1] != size and seen.final.shape[:2] == size


def _wrong_tokens(
    backbone: Backbone, inside: tuple[int, ...], final: tuple[int, ...], n_images: int, expected: int | None
) -> str:
    what = f"{backbone.name}: {_kind(backbone)}"
    if expected and inside[0] == n_images and inside[1] > expected:
        return (
            f"{what} pads or extends {expected} tokens to {inside[1]} inside, which would be averaged "
            f"into the features; choose --image-size and --patch-size so that there are {inside[1]}"
        )
    sizes = " and ".join("×".join(map(str, size)) for size in (inside, final))
    told = f"{n_images}×{expected or inside[1]}×{backbone.hidden_size}"
    return f"{what} holds {sizes} hidden states in its blocks and at its end where {told} went in"


def _check_repeatable(backbone: Backbone, first: _Pass, second: _Pass) -> None:
    if not all(
        a.shape == b.shape and _same(a[0], b[0]) for a, b in zip(first.outputs, second.outputs, strict=True)
    ):
        raise UsageError(
            f"{backbone.name}: two forward passes of {_kind(backbone)} over the same image differ, also in evaluation "
            "mode: it masks, hashes or samples at random, so its features would be chance"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to `TOLERANCE` of the second one's norm.

    What is not finite counts as 0: whoever reads the features is told layer and image, which says more.
    """
    if a.shape != b.shape:
        return False
    a, b = (torch.nan_to_num(side.float(), 0.0, 0.0, 0.0) for side in (a, b))
    return float((a - b).norm()) <= TOLERANCE * float(b.norm())


def _changed_tokens(first: Tensor, second: Tensor) -> list[int]:
    """Positions at which the second image's hidden states differ between two passes."""
    difference = (first[-1].float() - second[-1].float()).abs().amax(dim=-1)
    return torch.nonzero(difference > 1e-5 * first[-1].float().abs().amax()).flatten().tolist()


def _check_causal(backbone: Backbone, first: _Pass, second: _Pass) -> bool | None:
    """Whether the last token stays unknown to the earlier ones, where attention is said to be causal or not."""
    if backbone.modality == "vision":
        return False
    last = first.outputs[0].shape[1] - 1
    causal = all(
        set(_changed_tokens(a, b)) <= {last} for a, b in zip(first.outputs, second.outputs, strict=True)
    )
    if backbone.attention is not None and causal != (backbone.attention == "causal"):
        found = "causal" if causal else "not causal"
        raise UsageError(
            f"{backbone.name}: attention '{backbone.attention}' was chosen, but that of {_kind(backbone)} "
            f"over {last + 1} tokens is {found}"
        )
    return causal


def _prefix(backbone: Backbone, first: _Pass, second: _Pass, pixels: Tensor) -> int:
    """How many tokens stand before the image's, found by altering its first and last patch."""
    n_tokens = first.inputs[0].shape[1]
    if backbone.modality == "language":
        return 0
    height, width = _patch(backbone)
    expected = (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
    changed = _changed_tokens(first.inputs[0], second.inputs[0])
    if not changed:
        raise UsageError(f"{backbone.name}: the corners of an image do not reach {_kind(backbone)}'s blocks")
    start, end = changed[0], changed[-1] + 1
    if len(changed) == n_tokens > 2:  # tokens were already mixed: only their number can be told
        start, end = max(n_tokens - expected, 0), n_tokens
    if end - start != expected and backbone.patch_shape:
        raise UsageError(
            f"{backbone.name}: {n_tokens} tokens enter the blocks of {_kind(backbone)}, {end - start} of them from "
            f"the image, which has {expected} patches; it masks, merges or samples patches"
        )
    if end != n_tokens:
        raise UsageError(
            f"{backbone.name}: {_kind(backbone)} appends {n_tokens - end} tokens of its own after the image's "
            f"{end - start}, which would be averaged into the features"
        )
    return start
