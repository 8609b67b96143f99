"""`layerprobe bridge`: random-label training under a freeze plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerprobe.cli import options
from layerprobe.cli.launch import LaunchOptions
from layerprobe.cli.memory import check_plan, count_images, training_facts
from layerprobe.cli.options import option
from layerprobe.cli.output import Output
from layerprobe.cli.processes import own_device
from layerprobe.errors import UsageError
from layerprobe.locks import n_processes

if TYPE_CHECKING:
    from layerprobe.training.bridge_run import BridgeRun
    from layerprobe.training.config import BridgeConfig


@dataclass(frozen=True, kw_only=True)
class BridgeOptions(options.TrainingOptions):
    """All that a bridge training can be told."""

    lr: float = option(1e-3, "Peak learning rate.")
    lrs: str | None = option(
        None, "Comma-separated rates to choose from by random-label loss, such as 3e-4,1e-3."
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
        "full", "full keeps whole models; trained only what was trained, beside the base's name."
    )
    shard: bool = option(
        False, "Spread the model over the processes of a launch while it is read (FSDP).", "--shard"
    )
    trackers: str | None = option(None, "Comma-separated, such as tensorboard,wandb.")

    def config(self, *, seed: int) -> BridgeConfig:
        from layerprobe.training import BridgeConfig

        given = asdict(self)
        given["clip_norm"] = given.pop("clip") or None
        given["lrs"] = options.learning_rates(self.lrs)
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
    resume: bool = option(False, "Continue the unfinished run in the output folder.", "--resume"),
) -> None:
    """Teach a backbone random labels of a task's images; frozen layers stay bit-identical.

    Several devices: accelerate launch -m layerprobe bridge …  The output folder then serves every other
    command as --model.

    Example: layerprobe bridge --model minilm --task digits --steps 200 -o run
    """
    from layerprobe.plans import FreezePlan

    config = training.config(seed=backbone.seed)
    freeze_plan = FreezePlan.load(plan) if plan is not None else None
    check_folder(out, resume=resume)
    backbone = replace(backbone, device=own_device(backbone.device))
    if out.dry_run:
        from layerprobe.training.loop import tracker_options

        tracker_options(config.trackers, out.folder)
        seen = backbone.sketch(task)
        check_plan(freeze_plan, seen)
        facts = training_facts(
            seen,
            freeze_plan,
            images=config.micro_batch * n_processes() if config.micro_batch else config.batch_size,
            n_images=sum(count_images(task, out).values()),
            shard=backbone.shard,
        )
        out.show_facts({**facts, "output": str(out.folder or "none: pass -o to keep the model")})
        return

    if launch.submit(out, *([] if resume else ["--resume"])):
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
    run = bridge_train(
        backbone.load(),
        images,
        plan=freeze_plan,
        config=config,
        output=out.folder,
        resume=resume,
        quiet=out.quiet,
        finish=draw,
    )
    if run.is_main:
        out.finish(run)


def check_folder(out: Output, *, resume: bool) -> None:
    """Refuse a run folder that is in use, and say where --resume finds nothing.

    Not an error there: a command that is sent again until it is done begins with an empty folder.
    """
    from layerprobe.training.checkpoints import find_checkpoint, refuse_used_folder

    if out.folder is None:
        if resume:
            raise UsageError("--resume continues the run in a folder; name that with -o")
        return
    refuse_used_folder(out.folder, resume=resume)
    if resume and find_checkpoint(out.folder) is None:
        out.say(f"nothing to resume in {out.folder}, starting anew")
