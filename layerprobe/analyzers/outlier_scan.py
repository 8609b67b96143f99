"""A checkpoint is opened and every tensor counted: one thread a tensor, one reused buffer a thread."""

from __future__ import annotations

import dataclasses
import mmap
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from layerprobe.backbones.resolve import RUN_FILE, resolve_model, weights_hash
from layerprobe.checkpoints import (
    CHUNK_BYTES,
    Checkpoint,
    FusedMatrices,
    StoredTensor,
    TensorRole,
    open_checkpoint,
    tensor_roles,
)
from layerprobe.checkpoints.parameters import DeclaredNames, in_doubt, no_parameters
from layerprobe.errors import UsageError
from layerprobe.locks import usable_cores
from layerprobe.metrics.outliers import OutlierRules, TensorOutliers
from layerprobe.metrics.outliers.codes import decoded
from layerprobe.metrics.outliers.counting import make_engine
from layerprobe.metrics.outliers.summary import needs_engine, summarize
from layerprobe.progress import progress_bar
from layerprobe.reading import is_folder, is_plain, is_there


@dataclass(kw_only=True, slots=True)
class ScannedTensor:
    """One tensor's identity and numbers. `found` is None where it was skipped, and `skip` says why.

    `tied_to` names the tensor that is the same weight, `part_of` the fused matrix that this is a part of. `counts`
    is true where it enters the roll-ups of the model: fused matrices whole, stacks of experts expert by expert, as
    if each were stored alone.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    place: TensorRole
    found: TensorOutliers | None = None
    skip: str | None = None
    tied_to: str | None = None
    part_of: str | None = None
    counts: bool = True


MOST_THREADS = 8


def open_model(
    model: str | Path, revision: str | None, offline: bool, state: str | None = None
) -> tuple[str, str, Checkpoint, str]:
    """Name, model id, checkpoint and revision; of a training checkpoint the model's state, or the one named."""
    path = Path(model).expanduser()
    if is_plain(path) or (is_folder(path) and not is_there(path / RUN_FILE)):
        # Weights without a configuration are enough here, unlike for everything that builds a model; and
        # the checkpoint's own check of a broken folder names the tensor.
        checkpoint = open_checkpoint(path, state=state)
        found = weights_hash(path) if is_there(path / "config.json") else "local"
        return str(model), path.resolve().name, checkpoint, found
    source = resolve_model(str(model), revision=revision, offline=offline)
    return source.name, source.model_id, open_checkpoint(source.folder, state=state), source.revision


def checkpoint_facts(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    state: str | None = None,
) -> dict[str, Any]:
    """What a report would read, from the headers alone: folder, files, tensors, bytes, dtypes."""
    name, model_id, checkpoint, _ = open_model(model, revision, offline, state)
    checkpoint = checkpoint.select(list(include or []), list(exclude or []))
    return {
        "model": name,
        "model_id": model_id,
        "folder": str(checkpoint.folder),
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "skipped": sum(tensor.skip is not None for tensor in checkpoint.tensors),
        "dtypes": dict(Counter(tensor.stored_as or tensor.dtype for tensor in checkpoint.tensors)),
        "bytes": checkpoint.nbytes,
        **({"left_out": checkpoint.left_out} if checkpoint.left_out else {}),
    }


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
    BrokenFileError
        A file that ends early or cannot be read.
    UsageError
        Fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    rows, work = _located(checkpoint)
    # The largest first, so that no thread is left alone with a big one at the end.
    work.sort(key=lambda pair: -pair[0].nbytes)
    n_threads = max(1, min(threads or min(usable_cores(), MOST_THREADS), len(work) or 1))
    counted = any(needs_engine(tensor.dtype, tensor.size) for tensor, _ in work)
    if engine != "auto":
        make_engine(engine)  # that it exists is checked even where all tensors are small
    total = sum(tensor.nbytes for tensor, _ in work)
    waiting = deque(work)
    with (
        _one_torch_thread(engine, counted) as name,
        ThreadPoolExecutor(n_threads) as pool,
        progress_bar(total=total, unit="B", unit_scale=True, quiet=quiet, desc="weights") as bar,
    ):

        def measure() -> None:
            own_engine, buffer = make_engine(name) if counted else None, mmap.mmap(-1, CHUNK_BYTES)
            while waiting:
                try:
                    tensor, row = waiting.popleft()
                except IndexError:  # another thread took the last one
                    return
                try:
                    row.found = summarize(
                        partial(tensor.chunks, buffer),
                        tensor.dtype,
                        tensor.shape,
                        rules=rules,
                        engine=own_engine,
                        axes=axes,
                    ).compact()
                except BaseException:
                    waiting.clear()
                    raise
                bar.update(tensor.nbytes)

        for done in [pool.submit(measure) for _ in range(n_threads)]:
            done.result()
    _find_tied(checkpoint, rows)
    by_name = {row.name: row for row in rows}
    for row in rows:
        if row.tied_to in by_name and row.found is None:
            row.found = by_name[row.tied_to].found
    return rows


def _located(checkpoint: Checkpoint) -> tuple[list[ScannedTensor], list[tuple[StoredTensor, ScannedTensor]]]:
    """All rows, still without numbers, and those of them that are to be measured with their tensors."""
    rows: list[ScannedTensor] = []
    work: list[tuple[StoredTensor, ScannedTensor]] = []

    def add(tensor: StoredTensor, place: TensorRole, **how: Any) -> ScannedTensor:
        row = ScannedTensor(
            name=tensor.name, dtype=tensor.stored_as or tensor.dtype, shape=tensor.shape, place=place, **how
        )
        rows.append(row)
        return row

    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    located = tensor_roles(shapes)
    fused = _fused_matrices(checkpoint, shapes, located)
    in_block = {name: role.block is not None for name, role in located.items()}
    no_weights = no_parameters(shapes, in_block, _declared_names(checkpoint, located))
    for tensor in checkpoint.tensors:
        place = located[tensor.name]
        skip = tensor.skip or no_weights.get(tensor.name)
        if skip is None and place.kind == "buffer":
            # Named like a table, and a parameter of the model's class all the same.
            place = dataclasses.replace(
                place, kind="other", group="blocks" if place.block is not None else "other"
            )
        row = add(tensor, place, skip=skip, tied_to=tensor.alias_of)
        if skip is not None or tensor.alias_of is not None:
            continue
        work.append((tensor, row))
        for part in fused.parts(tensor, place):
            own = dataclasses.replace(place, kind=part.kind, transposed=part.transposed)
            row.counts = row.counts and not part.is_expert
            made = add(part.tensor, own, part_of=tensor.name, counts=part.is_expert)
            work.append((part.tensor, made))
    return rows, work


def _fused_matrices(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], located: Mapping[str, TensorRole]
) -> FusedMatrices:
    """What cuts the fused matrices; asks the model's own code about those of an architecture that is not known."""
    fused = FusedMatrices(shapes, checkpoint.config)
    whole = {
        tensor.name: tensor.shape[::-1] if located[tensor.name].transposed else tensor.shape
        for tensor in checkpoint.tensors
        if located[tensor.name].kind == "qkv" and len(tensor.shape) == 2
        if tensor.skip is None and not fused.parts(tensor, located[tensor.name])
    }
    if not whole or not checkpoint.config.get("model_type"):
        return fused
    from layerprobe.backbones.fused_layout import measure_fused_rows

    return FusedMatrices(shapes, checkpoint.config, measure_fused_rows(checkpoint.folder, whole))


def _declared_names(checkpoint: Checkpoint, located: Mapping[str, TensorRole]) -> DeclaredNames | None:
    """What the model's class declares, where the names alone leave open what is a parameter."""
    doubt = any(
        tensor.skip is None and in_doubt(tensor.name, located[tensor.name].kind)
        for tensor in checkpoint.tensors
    )
    if not doubt or not checkpoint.config.get("model_type"):
        return None
    from layerprobe.backbones.skeleton import class_skeleton

    found = class_skeleton(checkpoint.folder)
    if found is None:
        return None
    model, whole = found
    return DeclaredNames(
        model=type(model).__name__,
        parameters=frozenset(name for name, _ in model.named_parameters(remove_duplicate=False)),
        once=frozenset(name for name, _ in model.named_parameters()),
        buffers=frozenset(name for name, _ in model.named_buffers(remove_duplicate=False)),
        whole=whole,
    )


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
    """Mark what is, byte for byte, another tensor outside the blocks, such as a head that is the embedding.

    Vectors, constants and what lies in blocks may merely start equal, and are not tied; but the bias of a head's
    own matrix is tied to the bias of the head (BERT).
    """
    stored = {tensor.name: tensor for tensor in checkpoint.tensors}
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    originals: dict[tuple[object, ...], list[ScannedTensor]] = {}
    # An embedding is the original of a head, and the shortest name that of the others.
    order = sorted(rows, key=lambda row: (row.place.kind != "embedding", row.name.count("."), row.name))
    for row in order:
        bias_of = _head_with_bias(row.name, shapes)
        if row.found is None or row.place.block is not None or row.part_of or row.tied_to:
            continue
        if bias_of is None and (len(row.shape) < 2 or not row.found.values.get("std")):
            continue
        alike = originals.setdefault((row.shape, row.dtype, bias_of), [])
        same = (
            other
            for other in alike
            if other.found == row.found and _same_bytes(stored[other.name], stored[row.name])
        )
        if (original := next(same, None)) is not None:
            row.tied_to = original.name
        else:
            alike.append(row)


def _head_with_bias(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The head whose bias this is, where a matrix with one output per entry stands in it: its name, else None."""
    module, _, leaf = name.rpartition(".")
    if leaf != "bias":
        return None
    head, _, _ = module.rpartition(".")
    for found in (head, module):
        matrix = shapes.get(f"{found}.decoder.weight")
        if found and matrix is not None and matrix[:1] == shapes[name]:
            return found
    return None


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    pairs = zip(one.chunks(bytearray(CHUNK_BYTES)), other.chunks(bytearray(CHUNK_BYTES)), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs)
