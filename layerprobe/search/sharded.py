"""A search of a model that is spread over processes (FSDP): the first decides and says what comes, all compute it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch.distributed as dist

from layerprobe.backbones.sharding import is_sharded
from layerprobe.errors import LayerprobeError, UsageError

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.search.settings import Settings
    from layerprobe.search.space import Trial

PROBES = "probes"
"""What is announced before the probes of frozen features; before a training it is the trial."""


def check_sharded(backbone: Backbone, settings: Settings, workers: int) -> None:
    """UsageError for what a search of a sharded backbone cannot do."""
    if not is_sharded(backbone.model):
        return
    for asked, instead in (
        (workers > 1, "all processes of the launch train one plan; leave --workers out"),
        (settings.use_scores, "transfer scores need the whole model in one process; pass --no-scores"),
        (settings.keep_bridge, "train the bridge afterwards: layerprobe bridge --shard --plan …"),
    ):
        if asked:
            raise UsageError(f"a search with --shard: {instead}")


def announce(backbone: Backbone, what: Trial | str | None) -> None:
    """Tell the other processes that hold parts of the backbone what comes next; None: nothing more."""
    if is_sharded(backbone.model):
        dist.broadcast_object_list([what])


@contextmanager
def leading(backbone: Backbone) -> Iterator[None]:
    """Within: this process searches; at the end, or after a known mistake, the others are let go."""
    try:
        yield
    except LayerprobeError:
        with suppress(RuntimeError):  # they may have met it, too, and be gone
            announce(backbone, None)
        raise
    announce(backbone, None)


def follow(known: Mapping[str, Callable[[], object]], train: Callable[[Trial], object]) -> None:
    """Compute what the first process announces, until it has its answer; it is the one that meets errors."""
    while True:
        told: list[Trial | str | None] = [None]
        dist.broadcast_object_list(told)
        what = told[0]
        if what is None:
            return
        with suppress(LayerprobeError):
            if isinstance(what, str):
                known[what]()
            else:
                train(what)
