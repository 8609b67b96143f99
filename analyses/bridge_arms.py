"""Does language pretraining help, does the random-label bridge help, does partial beat full?

    python analyses/bridge_arms.py --data ../shared               # all models, into results/bridge/arms
    python analyses/bridge_arms.py --data ../shared --models stories260k
    python analyses/bridge_arms.py --data ../shared --device cuda --steps 2000 --batch 128 --limit 30000

CIFAR-100, patch 8 (16 tokens) unless said otherwise, five arms, one budget for all, three seeds, each arm
its own learning rate from one grid, chosen on validation. The plan is fixed beforehand (the first half of the
blocks), so nothing about it was selected on these images. A call that is interrupted continues where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from layerprobe.backbones import load_backbone
from layerprobe.cli.output import save_figure
from layerprobe.plotting.bridge import plot_accuracy_against
from layerprobe.tasks import load_task
from layerprobe.training import BridgeConfig, FineTuneConfig, block_plan, evaluate_arms

ARMS = ("language", "bridge", "full-bridge", "random", "random-bridge")
SEEDS = (0, 1, 2)
LRS = {
    "stories260k": (1e-3, 3e-3, 1e-2),
    "babyllama-char105": (1e-3, 3e-3, 1e-2),
    "minilm": (1e-4, 3e-4, 1e-3),
}
STEPS = {"stories260k": 200, "babyllama-char105": 200, "minilm": 100}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and data/cifar100/")
    parser.add_argument("--models", default=",".join(STEPS))
    parser.add_argument("--output", type=Path, default=Path("results/bridge/arms"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="of each stage; default: what two CPU cores allow")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, default=4000, help="training images; the others in proportion")
    parser.add_argument("--patch", type=int, default=8)
    arguments = parser.parse_args()
    task = load_task(str(arguments.data / "data" / "cifar100"), limit=arguments.limit, seed=0)
    for name in arguments.models.split(","):
        local = arguments.data / "models" / name
        model = str(local) if local.is_dir() else name

        def load(init: str, seed: int, model: str = model) -> Any:
            return load_backbone(
                model, init=init, seed=seed, patch_size=arguments.patch, device=arguments.device
            )

        backbone = load("pretrained", 0).prepare(task)
        folder = arguments.output / name
        budget = {"steps": arguments.steps or STEPS[name], "batch_size": arguments.batch}
        record = evaluate_arms(
            load,
            task,
            ARMS,
            plan=block_plan(backbone, range(backbone.n_blocks // 2)),
            bridge=BridgeConfig(random_classes=10, **budget),
            finetune=FineTuneConfig(lrs=LRS[name], **budget),
            seeds=SEEDS,
            output=folder,
            quiet=False,
        )
        frame = record.to_frame()
        for x in ("train_flops", "trainable_parameters"):
            save_figure(
                lambda x=x, frame=frame: plot_accuracy_against(frame, x), folder / f"accuracy_{x}.png"
            )
        print(f"{name}\n{record.summary()}\n")


if __name__ == "__main__":
    main()
