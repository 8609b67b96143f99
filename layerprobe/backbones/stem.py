"""The stem of a language backbone: images → patches → tokens of the backbone's width.

Axis letters: B images, C channels, H × W pixels, T patches, P = p·p·C pixel values of a patch, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerprobe.errors import UsageError

PIXEL_MEAN = 0.5
PIXEL_STD = 0.25
"""Pixels in [0, 1] are shifted and divided by these, which brings natural images near unit variance."""

STEM_KINDS = ("random", "pca")


class PatchStem(nn.Module):
    """Patchify p×p×C, then one linear map to the width of the token embeddings.

    No positions are added: the language backbone adds its own (learned, rotary or relative).
    """

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.patch_size = patch_size
        self.projection = nn.Linear(channels * patch_size * patch_size, width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels B×C×H×W → tokens B×T×D, patches in reading order."""
        weight = self.projection.weight
        tokens: Tensor = self.projection(patchify(pixels, self.patch_size).to(weight.dtype))
        return tokens

    @torch.no_grad()
    def init_random(self, token_std: float, *, seed: int) -> None:
        """Gaussian weights that turn patches of unit variance into tokens of deviation `token_std`."""
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.projection.weight.shape, generator=generator)
        fan_in = weight.shape[1]
        self.projection.weight.copy_(weight * (token_std / fan_in**0.5))
        self.projection.bias.zero_()

    @torch.no_grad()
    def init_pca(self, pixels: Tensor, token_std: float) -> None:
        """Whitened patch principal components in the first min(P, D) coordinates, the others zero.

        Deterministic and free of labels. Each component has deviation `token_std` times √(D / components),
        so that the token as a whole has the mean square of a token embedding. Components below a millionth of
        the largest variance are left at zero: whitening would only amplify rounding noise.
        """
        patches = patchify(pixels, self.patch_size).flatten(0, 1).double()
        mean = patches.mean(0)
        covariance = (patches - mean).T @ (patches - mean) / max(len(patches) - 1, 1)
        variances, vectors = torch.linalg.eigh(covariance)
        variances, vectors = variances.flip(0), vectors.flip(1)
        width = self.projection.weight.shape[0]
        kept = int((variances > variances[0].clamp_min(1e-30) * 1e-6).sum().clamp(max=width))
        if variances[0] <= 0:
            raise UsageError("stem 'pca' needs images that differ: all patches are equal; use --stem random")
        # A principal component has no sign of its own; the largest coefficient is made positive.
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign().squeeze(0)
        scale = token_std * (width / kept) ** 0.5
        rows = (vectors * signs)[:, :kept].T / variances[:kept, None].sqrt() * scale
        weight = torch.zeros(self.projection.weight.shape, dtype=torch.float64)
        weight[:kept] = rows
        self.projection.weight.copy_(weight)
        self.projection.bias.copy_(-(weight @ mean))


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """B×C×H×W → B×T×P, patches row by row, each flattened as rows × columns × channels.

    Raises
    ------
    UsageError : height or width is no multiple of `patch_size`.
    """
    b, c, h, w = pixels.shape
    p = patch_size
    count_patches(h, w, p)
    return pixels.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)


def count_patches(height: int, width: int, patch_size: int) -> int:
    """Patches of an image; UsageError where `patch_size` does not divide it."""
    if height % patch_size or width % patch_size:
        raise UsageError(
            f"patch size {patch_size} does not divide images of {height}×{width}; "
            "choose a divisor or --image-size"
        )
    return (height // patch_size) * (width // patch_size)


def default_patch_size(image_size: int) -> int:
    """The divisor of `image_size` that gives a grid nearest to 8 × 8, the finer one on a tie.

    >>> default_patch_size(32), default_patch_size(8), default_patch_size(224)
    (4, 1, 28)
    """
    divisors = [p for p in range(1, image_size + 1) if image_size % p == 0]
    return min(divisors, key=lambda p: (abs(image_size / p - 8), p))
