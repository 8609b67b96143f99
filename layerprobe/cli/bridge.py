"""`layerprobe bridge`: random-label training under a freeze plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from layerprobe import choices
from layerprobe.cli import options
from layerprobe.cli.launch import LaunchOptions
from layerprobe.cli.memory import check_plan, count_images, training_facts
from layerprobe.cli.options import option
from layerprobe.cli.output import Output
from layerprobe.locks import n_processes

if TYPE_CHECKING:
    from layerprobe.training.bridge_run import BridgeRun
    from layerprobe.training.config import BridgeConfig


@dataclass(frozen=True, kw_only=True)
class BridgeOptions(options.TrainingOptions):
    """All that a bridge training can be told."""

    lrs: str = option(
        "1e-3", "Peak learning rate; of several, such as 3e-4,1e-3, the one of lowest random-label loss."
    )
    label_seed: int | None = option(None, "Seed of the labels; default: --seed.")
    micro_batch: int | None = option(None, "Images per forward pass and process; accumulates the rest.")
    stem_steps: int = option(0, "Train the stem alone for so many steps, then leave it.")
    weight_decay: float = option(0.05, "Decoupled; of matrices only.")
    warmup: float = option(0.1, "Share of the steps.")
    clip: float = option(1.0, "Largest gradient norm; 0 leaves gradients alone.")
    gradient_checkpointing: bool = option(False, "Less memory, more time.", "--gradient-checkpointing")
    compile: bool = option(False, "Run through torch.compile.", "--compile")
    checkpoint_every: int | None = option(None, "Steps; default: ten checkpoints a run.")
    keep: int = option(2, "Checkpoints kept.")
    save: str = option(
        "full",
        "Keep whole models, or what was trained and the name of its base.",
        choices=choices.SAVES,
    )
    shard: bool = option(
        False, "Spread the model over the processes of a launch while it is read (FSDP).", "--shard"
    )
    trackers: str | None = option(None, "Comma-separated, such as tensorboard,wandb.")

    def config(self, *, seed: int) -> BridgeConfig:
        from layerprobe.training import BridgeConfig

        given = asdict(self)
        given["clip_norm"] = given.pop("clip") or None
        rates = options.learning_rates(self.lrs)
        given["lr"], given["lrs"] = (rates[0], ()) if len(rates) == 1 else (BridgeConfig.lr, rates)
        given["trackers"] = tuple(options.name_list(self.trackers))
        return BridgeConfig(**given, seed=seed)


@options.shardable_backbone_options(model="gpt2")
@options.task_options(task="cifar100")
@options.training_options(BridgeOptions)
@options.output_options("bridge")
@options.option_group("launch", LaunchOptions)
def bridge(
    backbone: options.ShardableBackboneOptions,
    task: options.TaskOptions,
    training: BridgeOptions,
    out: Output,
    launch: LaunchOptions,
    plan: Path | None = option(None, "Freeze plan (plan.json); default: everything trains."),
) -> None:
    """Teach a backbone random labels of a task's images; frozen layers stay bit-identical.

    Without -o the run is kept in runs/bridge-MODEL-TASK. The same command continues there, and another run gets a
    folder with a number. The folder then serves every other command as model. Several devices: accelerate launch -m
    layerprobe bridge …

    Example: layerprobe bridge minilm --task digits --patch-size 4 --steps 20
    """
    from layerprobe.plans import FreezePlan

    out.own_folder(backbone.model, task.task)
    config = training.config(seed=backbone.seed)
    freeze_plan = FreezePlan.load(plan) if plan is not None else None
    length = f"{config.epochs:g} epochs" if config.steps is None else f"{config.steps:,} steps"
    out.start(
        f"{length} of {config.random_classes} random labels, {backbone.model} on images of {task.task}; "
        + ("everything trains" if plan is None else f"what {plan} trains")
    )
    backbone = backbone.of_this_process()
    seen = backbone.meta_backbone(task, out, plan=freeze_plan)
    check_folder(out.folder, config)
    from layerprobe.training.loop import tracker_options

    tracker_options(config.trackers, out.folder)
    check_plan(freeze_plan, seen)
    if out.dry_run:
        facts = training_facts(
            seen,
            freeze_plan,
            images=config.micro_batch * n_processes() if config.micro_batch else config.batch_size,
            n_images=sum(count_images(task, out).values()),
            shard=backbone.shard,
        )
        out.show_facts({**facts, "output": str(out.folder)})
        return

    if launch.submit(out):
        return
    from layerprobe.training import bridge_train

    def draw(run: BridgeRun) -> None:
        from layerprobe.plotting.bridge import plot_bridge_curve, plot_weight_drift

        frame = run.to_frame()
        out.draw(
            {
                "curve": lambda: plot_bridge_curve(run.history, guess=1 / config.random_classes),
                "drift": lambda: plot_weight_drift(frame),
            }
        )

    images = task.load(out)
    network = backbone.load()
    out.keep_settings()
    run = bridge_train(
        network,
        images,
        plan=freeze_plan,
        config=config,
        output=out.folder,
        quiet=out.quiet,
        finish=draw,
    )
    if run.is_main:
        out.finish(run)


def check_folder(folder: Path | None, config: BridgeConfig) -> None:
    """UsageError where the folder holds a bridge run that was begun with other settings."""
    from layerprobe.training.checkpoints import find_checkpoint, refuse_other_settings

    if folder is not None and (found := find_checkpoint(folder)) is not None:
        refuse_other_settings(found, folder, config)
