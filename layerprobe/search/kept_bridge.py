"""The bridge-trained model of the chosen plan, kept beside a search on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerprobe.errors import UsageError
from layerprobe.plans import FreezePlan
from layerprobe.progress import note
from layerprobe.search.result import SearchResult
from layerprobe.search.settings import Settings


def keep_bridge(
    backbone: Any, task: Any, found: SearchResult, settings: Settings, folder: Path, *, quiet: bool
) -> None:
    """Bridge-train the chosen plan and save it into `folder`/bridge; a finished one is left as it is.

    Raises
    ------
    UsageError : the finished one was trained under another plan or at another rate.
    """
    from layerprobe.training import bridge_train
    from layerprobe.training.checkpoints import find_checkpoint

    if not settings.bridge_steps:
        return
    target = folder / "bridge"
    checkpoint = find_checkpoint(target) if target.is_dir() else None
    config = settings.chain.bridge_config(
        lr=found.facts["plan"]["lr"], steps=settings.bridge_steps, seed=settings.seed
    )
    if checkpoint is not None and checkpoint.state["finished"]:
        kept, lr = FreezePlan.load(target / "plan.json"), checkpoint.state["config"]["lr"]
        if kept.trainable != found.plan.trainable or lr != config.lr:
            raise UsageError(
                f"{target} holds the bridge of another plan or learning rate (lr {lr:g}, now {config.lr:g}); move it "
                "away and repeat the command"
            )
        return
    if not quiet:
        note(f"bridge training under the chosen plan, {settings.bridge_steps} steps")
    run = bridge_train(
        backbone,
        task,
        plan=found.plan,
        config=config,
        output=target,
        resume=checkpoint is not None,
        quiet=quiet,
    )
    run.save(target)
