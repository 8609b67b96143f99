"""One feature store filled by several processes, which need not know of one another.

The rows are cut into stripes of whole batches, each a small feature store in `stripes/` of the folder. Every process
takes the stripes that nobody works on, one after the other, and then waits for those that others hold: the lock of a
dead process is free, and its stripe is continued at its last record. When all are whole, one process copies them into
the store, through the writer that a single process uses, so that the bytes are the same; the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from layerprobe.files import cannot_write
from layerprobe.hooks.feature_store import STRIPES, FeatureStore
from layerprobe.layers import LayerRef
from layerprobe.locks import open_lock

MOST_STRIPES = 64
"""More than the processes of one launch, so that the last ones do not wait long for the slowest."""

FillStripe = Callable[[FeatureStore, slice, bool], None]
"""Fills the store of these rows; where another process has it, waits for it or, with False, does nothing."""


def fill_together(
    store: FeatureStore, layers: Sequence[LayerRef], batch_size: int, fill: FillStripe, *, first: int = 0
) -> None:
    """Fill `store` beside any other process that does the same; on return it is whole.

    Parameters
    ----------
    fill : FillStripe
        What computes a stripe.
    first : int
        Number of this process, so that processes begin at different stripes.
    """
    with _sharing(store.folder):
        if all(store.has(layer) for layer in layers):
            return
        stripes = [(_stripe(store, rows, batch_size), rows) for rows in stripe_rows(store.n_rows, batch_size)]
        start = first % len(stripes)
        for wait in (False, True):
            for stripe, rows in stripes[start:] + stripes[:start]:
                if not all(stripe.has(layer) for layer in layers):
                    fill(stripe, rows, wait)
        with store.writer(layers, batch_size=batch_size) as writer:
            for stripe, rows in stripes if writer.layers else ():
                stored = {layer: stripe.stored(layer) for layer in writer.layers}
                for row in range(max(rows.start, writer.rows), rows.stop, batch_size):
                    part = slice(row - rows.start, min(row + batch_size, rows.stop) - rows.start)
                    writer.append({layer: array[part] for layer, array in stored.items()})


def begun(store: FeatureStore) -> bool:
    """Whether stripes of an earlier run lie there."""
    return (store.folder / STRIPES).is_dir()


def stripe_rows(n_rows: int, batch_size: int) -> list[slice]:
    """At most `MOST_STRIPES` runs of whole batches, whoever computes them.

    >>> stripe_rows(10, 4)
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    n_batches = -(-n_rows // batch_size)
    step = batch_size * -(-n_batches // MOST_STRIPES)
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def _stripe(store: FeatureStore, rows: slice, batch_size: int) -> FeatureStore:
    key = {**store.key, "stripe": [rows.start, rows.stop], "batch_size": batch_size}
    return FeatureStore(store.folder / STRIPES, key, n_rows=rows.stop - rows.start, dtype=store.dtype)


@contextlib.contextmanager
def _sharing(folder: Path) -> Iterator[None]:
    """Nobody deletes the stripes inside; whoever leaves last does, where the work came to its end."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(open_lock(folder / "stripes.lock"), "rb")
        fcntl.flock(lock, fcntl.LOCK_SH)
    except OSError as error:
        raise cannot_write(folder, error) from error
    with lock:
        yield
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder / STRIPES, ignore_errors=True)
