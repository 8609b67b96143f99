"""Weights as files: shards, dtypes, names. Streams what it reads and never builds a model."""

from layerprobe.checkpoints.folders import Checkpoint, open_checkpoint
from layerprobe.checkpoints.fused import fused_parts
from layerprobe.checkpoints.naming import GROUPS, KINDS, Place, places
from layerprobe.checkpoints.tensors import CHUNK_BYTES, RAW_DTYPES, StoredTensor

__all__ = [
    "CHUNK_BYTES",
    "GROUPS",
    "KINDS",
    "RAW_DTYPES",
    "Checkpoint",
    "Place",
    "StoredTensor",
    "fused_parts",
    "open_checkpoint",
    "places",
]
