"""`layerprobe bridge`: random-label training under a freeze plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.loading import load_pair, sketch
from layerprobe.cli.memory import check_plan, training_facts
from layerprobe.cli.output import Output
from layerprobe.errors import UsageError


def bridge(
    ctx: typer.Context,
    model: options.Model = "gpt2",
    task: options.TaskName = "cifar100",
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Freeze plan (plan.json); default: everything trains.")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the training images.")] = 10.0,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps, instead of --epochs.")
    ] = None,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-3,
    lrs: Annotated[
        str | None,
        typer.Option(
            "--lrs", help="Comma-separated rates to choose from by random-label loss, such as 3e-4,1e-3."
        ),
    ] = None,
    random_classes: Annotated[
        int, typer.Option("--random-classes", help="Number K of random labels; our own default.")
    ] = 10,
    label_seed: Annotated[
        int | None, typer.Option("--label-seed", help="Seed of the labels; default: --seed.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Images per optimizer step, all processes.")
    ] = 128,
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", help="Images per forward pass and process; accumulates the rest."),
    ] = None,
    stem_steps: Annotated[
        int, typer.Option("--stem-steps", help="Train the stem alone for so many steps, then leave it.")
    ] = 0,
    weight_decay: Annotated[float, typer.Option("--weight-decay")] = 0.05,
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps.")] = 0.1,
    clip: Annotated[
        float, typer.Option("--clip", help="Largest gradient norm; 0 leaves gradients alone.")
    ] = 1.0,
    augment: Annotated[
        str, typer.Option("--augment", help="weak (shift by a pixel, mirror) or none.")
    ] = "weak",
    precision: Annotated[
        str, typer.Option("--precision", help="float32, or bfloat16 for autocast over float32 weights.")
    ] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="Run through torch.compile.")] = False,
    checkpoint_every: Annotated[
        int | None, typer.Option("--checkpoint-every", help="Steps; default: ten checkpoints a run.")
    ] = None,
    keep: Annotated[int, typer.Option("--keep", help="Checkpoints kept.")] = 2,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Spread the model over the processes (FSDP); a copy on each otherwise."),
    ] = False,
    trackers: Annotated[
        str | None, typer.Option("--trackers", help="Comma-separated, such as tensorboard,wandb.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the unfinished run in the output folder.")
    ] = False,
    revision: options.Revision = None,
    init: options.Init = "pretrained",
    stem: options.Stem = "random",
    patch_size: options.Patch = None,
    image_size: options.ImageSize = None,
    attention: options.Attention = None,
    pooling: options.Pooling = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    output: options.OutDir = None,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
) -> None:
    """Teach a backbone random labels of a task's images; frozen layers stay bit-identical.

    Several devices: accelerate launch -m layerprobe bridge …  The output folder then serves every other
    command as --model.

    Example: layerprobe bridge --model minilm --task digits --steps 200 -o run
    """
    from layerprobe.cli.training import learning_rates, own_device
    from layerprobe.plans import FreezePlan
    from layerprobe.training.config import BridgeConfig

    out = Output("bridge", as_json=as_json, folder=output, quiet=quiet)
    candidates = learning_rates(lrs) if lrs else ()
    device = own_device(device)
    config = BridgeConfig(
        lr=lr,
        lrs=candidates,
        epochs=epochs,
        steps=steps,
        random_classes=random_classes,
        label_seed=label_seed,
        batch_size=batch_size,
        micro_batch=micro_batch,
        stem_steps=stem_steps,
        weight_decay=weight_decay,
        warmup=warmup,
        clip_norm=clip or None,
        augment=augment,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile_model,
        checkpoint_every=checkpoint_every,
        keep=keep,
        shard=shard,
        trackers=tuple(name.strip() for name in trackers.split(",")) if trackers else (),
        seed=seed,
    )
    freeze_plan = FreezePlan.load(plan) if plan is not None else None
    check_folder(out, resume=resume)
    if dry_run:
        from layerprobe.training.loop import tracker_options

        tracker_options(config.trackers, output)
        seen = sketch(ctx.params, device=device)
        check_plan(freeze_plan, seen)
        facts = training_facts(seen, freeze_plan, images=micro_batch or batch_size)
        out.dry_run({**facts, "output": str(output) if output else "none: pass -o to keep the model"})
        return

    from layerprobe.plotting.bridge import plot_bridge_curve, plot_weight_drift
    from layerprobe.training import bridge_train

    backbone, loaded = load_pair(ctx.params, device=device)
    run = bridge_train(
        backbone, loaded, plan=freeze_plan, config=config, output=output, resume=resume, quiet=quiet
    )
    if not run.is_main:
        return
    frame = run.to_frame()
    out.finish(
        run,
        table=run.table(),
        figures={
            "curve": lambda: plot_bridge_curve(run.history, guess=1 / config.random_classes),
            "drift": lambda: plot_weight_drift(frame),
        },
    )


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
