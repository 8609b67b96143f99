"""Forward passes of `extract_features`: what is not in the store yet is computed, alone or by many processes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from layerprobe.backbones.backbone import Backbone, evaluating, pool
from layerprobe.backbones.sharding import is_sharded
from layerprobe.errors import LayerprobeError
from layerprobe.hooks.capture import capture
from layerprobe.hooks.feature_store import FeatureStore, InUse, StoreWriter, encode
from layerprobe.hooks.stripes import begun, fill_together
from layerprobe.layers import LayerRef
from layerprobe.locks import n_processes, process_number
from layerprobe.progress import progress_bar
from layerprobe.tasks import ImageSplit

if TYPE_CHECKING:
    from tqdm import tqdm

TOKENS = "tokens"
"""Pooling that pools nothing: n × tokens × d, asked for by name because of its size."""
TRIM_BYTES = 256 << 20
"""Freed memory is handed back after so many bytes of pixels: glibc keeps it in pieces that fit later tensors badly, and
a process would grow by half over some thousand images."""


def fill_store(
    store: FeatureStore,
    backbone: Backbone,
    images: ImageSplit,
    wanted: Sequence[LayerRef],
    pooling: str,
    batch_size: int,
    quiet: bool,
) -> None:
    """Compute what is not there yet, alone or beside the other processes of a launch."""
    with progress_bar(total=len(images), unit="image", desc=backbone.name, quiet=quiet) as bar:

        def fill(part: FeatureStore, rows: slice, wait: bool) -> None:
            chosen = images.subset(range(rows.start, rows.stop))
            with contextlib.suppress(InUse), part.writer(wanted, batch_size=batch_size, wait=wait) as writer:
                _append(writer, backbone, chosen, pooling, batch_size, bar)

        if is_sharded(backbone.model):
            _fill_in_step(store, backbone, images, wanted, pooling, batch_size, bar)
        elif n_processes() > 1 or begun(store):
            fill_together(store, wanted, batch_size, fill, first=process_number())
        else:
            fill(store, slice(0, len(images)), True)


def _append(
    writer: StoreWriter, backbone: Backbone, images: ImageSplit, pooling: str, batch_size: int, bar: tqdm[Any]
) -> None:
    """Run the images that are not in the store yet through the backbone."""

    if not writer.layers:
        return
    bar.update(writer.rows)
    with evaluating(backbone), torch.inference_mode():
        for rows, pixels in pixel_batches(backbone, images, batch_size, start=writer.rows):
            writer.append(
                _run(backbone, pixels, writer.layers, pooling, writer.store.dtype, images.ids[rows])
            )
            bar.update(len(pixels))
            del pixels  # before the next ones are made


def _fill_in_step(
    store: FeatureStore,
    backbone: Backbone,
    images: ImageSplit,
    wanted: Sequence[LayerRef],
    pooling: str,
    batch_size: int,
    bar: tqdm[Any],
) -> None:
    """Processes that hold one model together: each runs a batch at the same time, the first process writes all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(store.writer(wanted, batch_size=batch_size)) if rank == 0 else None
        todo = [(writer.layers, writer.rows) if writer is not None else None]
        dist.broadcast_object_list(todo)
        assert todo[0] is not None, "the first process always says"
        layers, done = todo[0]
        stack.enter_context(evaluating(backbone))
        stack.enter_context(torch.no_grad())  # what FSDP gathers in inference mode no training can use later
        bar.update(done if rank == 0 else 0)
        for start in range(done, len(images), world * batch_size) if layers else ():
            # Every process takes part in every pass; one that has no batch left runs the first one again.
            own = start + rank * batch_size
            first = own if own < len(images) else start
            rows = np.arange(first, min(first + batch_size, len(images)))
            pixels = backbone.preprocess_rows(images, rows)
            found = _run(backbone, pixels, layers, pooling, store.dtype, images.ids[rows], stop_early=False)
            parts: list[Any] | None = [None] * world if rank == 0 else None
            dist.gather_object(found if first == own else None, parts)
            for part in parts or ():
                if writer is not None and part is not None:
                    writer.append(part)
                    bar.update(len(next(iter(part.values()))))
    dist.barrier()


def _run(
    backbone: Backbone,
    pixels: Tensor,
    layers: Sequence[LayerRef],
    pooling: str,
    dtype: str,
    ids: np.ndarray,
    *,
    stop_early: bool = True,
) -> dict[LayerRef, np.ndarray]:
    """One forward pass; what is kept of every layer, as it is stored."""

    def pooled(hidden: Tensor) -> Tensor:
        if pooling == TOKENS:
            return hidden
        return pool(hidden, pooling, n_prefix=backbone.n_prefix(hidden.shape[1]))

    with capture(backbone, layers, pool=pooled, stop_early=stop_early) as seen:
        backbone(pixels)
    for layer, values in seen.items():
        _check_finite(layer, values, ids)
    return {layer: encode(values, dtype) for layer, values in seen.items()}


def _check_finite(layer: LayerRef, values: Tensor, ids: np.ndarray) -> None:
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    bad = (~finite).flatten(1).any(dim=1).nonzero().flatten()
    hint = (
        "float16 overflow is likely, try --dtype bfloat16"
        if values.dtype == torch.float16
        else ("the weights may be damaged; see: layerprobe outliers")
    )
    raise LayerprobeError(
        f"{layer} holds {int((~finite).sum())} non-finite values (first: image {ids[int(bad[0])]}); {hint}"
    )


def pixel_batches(
    backbone: Backbone, split: ImageSplit, batch_size: int, *, start: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the split and their preprocessed pixels B×C×H×W on the backbone's device, batch by batch."""
    recipe, on_gpu = backbone.recipe, backbone.device.type == "cuda"
    handed_out = 0
    for first, batch in zip(
        range(start, len(split), batch_size),
        split.resized_batches(recipe, batch_size, start=start, pin=on_gpu),
        strict=True,
    ):
        pixels = recipe.scaled(batch.to(backbone.device, non_blocking=on_gpu))
        handed_out += pixels.nbytes
        yield slice(first, first + len(batch)), pixels
        del batch, pixels  # before the next ones are made
        if handed_out >= TRIM_BYTES:
            handed_out = 0
            with contextlib.suppress(AttributeError, OSError):  # not every C library can
                ctypes.CDLL(None).malloc_trim(0)
