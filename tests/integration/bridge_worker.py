"""Run by test_bridge_processes.py: bridge training in one or several forked processes, killed or left alone.

Forking after the imports makes a start cost milliseconds, so many kills fit into one test.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

TASKS: dict[int, Any] = {}


def train(settings: dict[str, Any], output: str, *, rank: int, world: int, port: int) -> None:
    """One process of a run; writes the digests of its weights to OUTPUT.rank<r>.json at the end."""
    if world > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            ACCELERATE_USE_CPU="true",
            **settings.get("environment", {}),
        )
    torch.set_num_threads(1)
    task = TASKS[settings["images"]]
    loading = settings.get("loading", {})
    backbone = load_backbone(settings["model"], device="cpu", patch_size=4, **loading).prepare(task)
    plan = block_plan(backbone, settings["blocks"])
    config = BridgeConfig(**settings["config"])
    run = bridge_train(backbone, task, plan=plan, config=config, output=output)
    answer = {
        "digests": {n: tensor_digest(whole(p)) for n, p in backbone.named_parameters()},
        "labels": run.labels.tolist(),
        "loss": run.history["loss"].tolist(),
        "verified": run.provenance["verified"],
    }
    Path(f"{output}.rank{rank}.json").write_text(json.dumps(answer))


def start(settings: dict[str, Any], output: str, world: int) -> list[int]:
    """Fork the processes of a run; their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            try:
                train(settings, output, rank=rank, world=world, port=port)
                os._exit(0)
            except BaseException as error:
                sys.stderr.write(f"rank {rank}: {type(error).__name__}: {error}\n")
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    return children


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def step_reached(output: str) -> int:
    """Step of the newest checkpoint, 0 before the first."""
    try:
        return int(json.loads((Path(output) / "layerprobe_run.json").read_text())["step"])
    except FileNotFoundError:
        return 0


def kill_somewhere_after(step: int, children: list[int], output: str, draw: random.Random) -> bool:
    """SIGKILL all processes at a random moment after a checkpoint at `step` or later; whether one was alive."""
    while step_reached(output) < step:
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
            break  # ended by itself
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.15))
    for child in children:
        os.kill(child, signal.SIGKILL)
    return -signal.SIGKILL in wait(children)


def main() -> None:
    settings = json.loads(sys.argv[1])
    output, world, kills = settings["output"], settings["processes"], settings.get("kills", 0)
    draw = random.Random(0)
    killed = 0
    # Before the forks, so that they inherit the images and the model's code.
    TASKS[settings["images"]] = load_task("digits", limit=settings["images"], offline=True)
    load_backbone(settings["model"], device="cpu", patch_size=4)
    if kills:
        codes = wait(start(settings, output + "-whole", world))
        assert codes == [0] * world
        total = settings["config"]["steps"]
        for number in range(kills):
            target = int(total * (number + draw.random()) / (kills + 1))
            killed += kill_somewhere_after(target, start(settings, output, world), output, draw)
    codes = wait(start(settings, output, world))
    sys.stdout.write(json.dumps({"codes": codes, "killed": killed}) + "\n")


if __name__ == "__main__":
    import torch

    from layerprobe.backbones import load_backbone
    from layerprobe.files import tensor_digest
    from layerprobe.tasks import load_task
    from layerprobe.training import BridgeConfig, block_plan, bridge_train
    from layerprobe.training.classifier import whole

    main()
