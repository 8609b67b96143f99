"""Does language pretraining help, does the random-label bridge help, does partial beat full?

    python analyses/bridge_arms.py --data ../shared               # all models, into results/bridge/arms
    python analyses/bridge_arms.py --data ../shared --model stories260k
    python analyses/bridge_arms.py --data ../shared --device cuda --steps 2000 --batch 128 --limit 30000

CIFAR-100, patch 8 (16 tokens) unless said otherwise, five arms, one budget for all, three seeds, each arm
its own learning rate from one grid, chosen on validation. The plan is fixed beforehand (the first half of the
blocks), so nothing about it was selected on these images. A call that is interrupted continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from study import Size, run, setup, short

from layerprobe.backbones import Backbone
from layerprobe.cli.output import save_figure
from layerprobe.plotting.bridge import plot_accuracy_against
from layerprobe.training import BridgeConfig, FineTuneConfig, block_plan, evaluate_arms

QUICK = Size(("minilm",), ("digits",), 200, 4)
FULL = Size(("stories260k", "babyllama-char105", "minilm"), ("cifar100",), 4000, 8)
ARMS = ("language", "bridge", "full-bridge", "random", "random-bridge")
SEEDS = (0, 1, 2)
LRS = {
    "stories260k": (1e-3, 3e-3, 1e-2),
    "babyllama-char105": (1e-3, 3e-3, 1e-2),
    "minilm": (1e-4, 3e-4, 1e-3),
}
STEPS = {"stories260k": 200, "babyllama-char105": 200, "minilm": 100}


def main(argv: Sequence[str] | None = None) -> None:
    more = {
        "steps": "of each stage; default: what two CPU cores allow",
        "batch": "images per step, default 32",
    }
    s = setup("bridge_arms", __doc__, QUICK, FULL, argv, **more)
    output = Path(s.arguments.output or (s.output if s.quick else "results/bridge/arms"))
    task = s.task(s.tasks[0])
    for model in s.models:

        def load(init: str, seed: int, model: str = model) -> Backbone:
            return s.load(model, task, init=init, seed=seed, stem="random")

        backbone = load("pretrained", 0)
        name = short(model)
        steps = 2 if s.quick else STEPS.get(name, 200)
        budget = {"steps": int(s.arguments.steps or steps), "batch_size": int(s.arguments.batch or 32)}
        record = evaluate_arms(
            load,
            task,
            ARMS,
            plan=block_plan(backbone, range(backbone.n_blocks // 2)),
            bridge=BridgeConfig(random_classes=10, **budget),
            finetune=FineTuneConfig(lrs=LRS.get(name, LRS["minilm"]), **budget),
            seeds=SEEDS,
            output=output / name,
            quiet=False,
        )
        frame = record.to_frame()
        for x in ("train_flops", "trainable_parameters"):
            save_figure(
                lambda x=x, frame=frame: plot_accuracy_against(frame, x), output / name / f"accuracy_{x}.png"
            )
        print(f"{name}\n{record.summary()}\n")


if __name__ == "__main__":
    run(main)
