"""Every tensor of a checkpoint through the outlier statistics: one thread a tensor, one reused buffer a thread."""

from __future__ import annotations

import dataclasses
import mmap
import os
import queue
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from layerprobe.checkpoints import (
    CHUNK_BYTES,
    Checkpoint,
    StoredTensor,
    TensorRole,
    fused_parts,
    tensor_roles,
)
from layerprobe.errors import UsageError
from layerprobe.metrics.outliers.codes import decoded
from layerprobe.metrics.outliers.counting import Engine, make_engine
from layerprobe.metrics.outliers.rules import OutlierRules, TensorOutliers
from layerprobe.metrics.outliers.summary import needs_engine, summarize
from layerprobe.progress import progress_bar


@dataclass
class ScannedTensor:
    """One tensor's identity and numbers. `found` is None where it was skipped, and `skip` says why.

    `tied_to` names the tensor that is the same weight, `part_of` the fused matrix that this is a part of; neither
    enters the roll-ups of the model a second time.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: TensorRole
    found: TensorOutliers | None = None
    skip: str | None = None
    tied_to: str | None = None
    part_of: str | None = None


def scan(
    checkpoint: Checkpoint,
    *,
    rules: OutlierRules,
    engine: str = "auto",
    threads: int | None = None,
    axes: bool = False,
    quiet: bool = False,
) -> list[ScannedTensor]:
    """The statistics of every tensor, in file order. Memory does not grow with the model.

    Fused matrices are followed by their parts. `axes` also measures rows and columns.

    Raises
    ------
    BrokenFileError : a file that ends early or cannot be read.
    UsageError : fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    rows: list[ScannedTensor] = []
    work: list[tuple[StoredTensor, ScannedTensor]] = []
    located = tensor_roles({tensor.name: tensor.shape for tensor in checkpoint.tensors})
    for tensor in checkpoint.tensors:
        place = located[tensor.name]
        skip = tensor.skip or ("a buffer, not a weight" if place.kind == "buffer" else None)
        row = ScannedTensor(
            tensor.name, tensor.dtype, tensor.shape, place, skip=skip, tied_to=tensor.alias_of
        )
        rows.append(row)
        if skip is not None or tensor.alias_of is not None:
            continue
        work.append((tensor, row))
        for kind, part in fused_parts(tensor, place):
            own = dataclasses.replace(place, kind=kind)
            rows.append(ScannedTensor(part.name, part.dtype, part.shape, own, part_of=tensor.name))
            work.append((part, rows[-1]))
    # The largest first, so that no thread is left alone with a big one at the end.
    work.sort(key=lambda pair: -pair[0].nbytes)
    n_threads = max(1, min(threads or _usable_cores(), len(work) or 1))
    counted = any(needs_engine(tensor.dtype, tensor.size) for tensor, _ in work)
    with _one_torch_thread(engine, counted) as engines, ThreadPoolExecutor(n_threads) as pool:
        benches: queue.SimpleQueue[tuple[Engine | None, mmap.mmap]] = queue.SimpleQueue()
        for _ in range(n_threads):
            benches.put((make_engine(engines) if counted else None, mmap.mmap(-1, CHUNK_BYTES)))

        def measure(tensor: StoredTensor, row: ScannedTensor) -> int:
            bench = benches.get()
            try:
                own_engine, buffer = bench
                row.found = summarize(
                    lambda: tensor.chunks(buffer),
                    tensor.dtype,
                    tensor.shape,
                    rules=rules,
                    engine=own_engine,
                    axes=axes,
                )
            finally:
                benches.put(bench)
            return tensor.nbytes

        total = sum(tensor.nbytes for tensor, _ in work)
        with progress_bar(total=total, unit="B", unit_scale=True, quiet=quiet, desc="weights") as bar:
            for nbytes in _all_or_first_error(pool, [pool.submit(measure, *pair) for pair in work]):
                bar.update(nbytes)
    _find_tied(checkpoint, rows)
    by_name = {row.name: row for row in rows}
    for row in rows:
        if row.tied_to is not None and row.found is None:
            row.found = by_name[row.tied_to].found if row.tied_to in by_name else None
    return rows


def read_norms(checkpoint: Checkpoint, rows: list[ScannedTensor]) -> dict[str, dict[str, np.ndarray]]:
    """The one-dimensional norm tensors inside blocks, as float64: "weight" and "bias" → name → values."""
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    found: dict[str, dict[str, np.ndarray]] = {"weight": {}, "bias": {}}
    for row in rows:
        if row.place.kind != "norm" or row.place.block is None or row.found is None or len(row.shape) != 1:
            continue
        role = "bias" if row.name.endswith(("bias", "beta")) else "weight"
        chunks = [chunk.copy() for chunk in stored[row.name].chunks(bytearray(CHUNK_BYTES))]
        if chunks:
            found[role][row.name] = decoded(np.concatenate(chunks), row.dtype)
    return found


def _all_or_first_error(pool: ThreadPoolExecutor, futures: list[Future[int]]) -> Iterator[int]:
    pending = set(futures)
    try:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@contextmanager
def _one_torch_thread(engine: str, counted: bool) -> Iterator[str]:
    """Keep torch from splitting one chunk over threads that are busy with other tensors."""
    name = make_engine(engine).name if counted else engine
    if name != "torch" or not counted:
        yield name
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield name
    finally:
        torch.set_num_threads(before)


def _find_tied(checkpoint: Checkpoint, rows: list[ScannedTensor]) -> None:
    """Mark a head that is, byte for byte, the embedding. Layers that merely start equal are not tied."""
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    embeddings = [row for row in rows if row.place.kind == "embedding" and row.found is not None]
    for head in rows:
        if head.place.kind != "head" or head.found is None or head.tied_to is not None:
            continue
        for embedding in embeddings:
            alike = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
            if (
                alike
                and embedding.found == head.found
                and _same_bytes(stored[embedding.name], stored[head.name])
            ):
                head.tied_to = embedding.name
                break


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    pairs = zip(one.chunks(bytearray(CHUNK_BYTES)), other.chunks(bytearray(CHUNK_BYTES)), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)
