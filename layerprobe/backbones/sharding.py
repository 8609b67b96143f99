"""A model spread over processes while it is read (FSDP2): each keeps its part of every weight."""

from __future__ import annotations

import contextlib
import ctypes
import re
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from layerprobe.backbones.layout import find_layout, image_or_text_tower
from layerprobe.errors import NotAvailableError, UsageError
from layerprobe.locks import n_processes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FREED = "free_full_weight"
"""transformers' word for a module whose weights are gathered for its own pass and freed after it."""

M_MMAP_THRESHOLD, OWN_MAPPING_BYTES = -3, 1 << 20
"""glibc's name for the size from which memory is mapped for one tensor alone and given back with it."""


def sharding(skeleton: nn.Module, config: PretrainedConfig) -> dict[str, Any]:
    """The arguments by which `from_pretrained` reads no more than this process's part of every weight.

    Blocks and the table of token embeddings are gathered one at a time, what else there is with the whole tower.
    `skeleton` is the model without values.

    Raises
    ------
    UsageError
        There is one process alone.
    NotAvailableError
        This transformers does not shard while it loads.
    """
    if n_processes() == 1:
        raise UsageError(
            "--shard spreads the model over several processes; start them with: accelerate launch"
        )
    from transformers.distributed import DistributedConfig

    # glibc raises the threshold to the largest size it has seen freed, and then keeps as much freed memory as gathered
    # blocks have taken: more than the parts of the other processes together.
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of other systems' C libraries
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, OWN_MAPPING_BYTES)
    tower = image_or_text_tower(skeleton)
    modules = [*find_layout(tower, config).blocks(tower), tower]
    with contextlib.suppress(AttributeError, NotImplementedError):
        modules.append(tower.get_input_embeddings())
    names = {id(module): name for name, module in skeleton.named_modules()}
    plan = {re.sub(r"\.\d+(?=\.|$)", ".*", names[id(m)]): FREED for m in modules if names.get(id(m))}
    config.base_model_fsdp_plan = {}  # type: ignore[misc]  # else Llama's names
    try:
        return {"distributed_config": DistributedConfig(fsdp_size=n_processes(), fsdp_plan=plan)}
    except TypeError as error:
        raise NotAvailableError(
            "this transformers does not shard a model while it loads it; pip install -U transformers"
        ) from error


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights lie in several processes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def settle(model: nn.Module) -> None:
    """Let no module keep what it gathered, as the outermost does by default, and the configuration say nothing of it.

    What it says there, saving would follow: transformers gathers once more, which one process alone waits for forever.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(True, recurse=False)
    vars(getattr(model, "config", model)).pop("distributed_config", None)


def shard_beside(module: nn.Module, model: nn.Module) -> None:
    """Spread `module` (a stem, a head) over the processes that hold the sharded `model`."""
    if not isinstance(module, FSDPModule):
        # FSDP warns of what later in-place operations on its output would break; there are none.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        mesh = next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def run_whole(module: nn.Module, ids: Tensor) -> Tensor:
    """What one module alone makes of `ids`, its own weights gathered for it; tied ones lie in another's group."""
    if isinstance(module, FSDPModule):
        module.unshard()
        try:
            found: Tensor = module.forward(ids)
        finally:
            module.reshard()
        return found
    weights = {name: p.full_tensor() for name, p in module.named_parameters() if isinstance(p, DTensor)}
    alone: Tensor = functional_call(module, weights, (ids,))
    return alone
