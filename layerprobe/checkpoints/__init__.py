"""Weights as files: shards, dtypes, names. Streams what it reads and never builds a model."""

from layerprobe.checkpoints.folder import Checkpoint, open_checkpoint
from layerprobe.checkpoints.fused import FusedMatrices
from layerprobe.checkpoints.safetensors import CHUNK_BYTES, RAW_DTYPES, StoredTensor
from layerprobe.checkpoints.tensor_roles import GROUPS, KINDS, TensorRole, tensor_roles

__all__ = [
    "CHUNK_BYTES",
    "GROUPS",
    "KINDS",
    "RAW_DTYPES",
    "Checkpoint",
    "FusedMatrices",
    "StoredTensor",
    "TensorRole",
    "open_checkpoint",
    "tensor_roles",
]
