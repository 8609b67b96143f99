"""`layerprobe evaluate`: test accuracy of a backbone, or of several arms beside one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.loading import load_images, load_model, sketch
from layerprobe.cli.memory import check_plan, training_facts
from layerprobe.cli.output import Output
from layerprobe.errors import UsageError

TRAINING_MODES = ("finetune", "fewshot")


def evaluate(
    ctx: typer.Context,
    model: options.Model = "gpt2",
    task: options.TaskName = "cifar100",
    mode: Annotated[
        str,
        typer.Option("--mode", help="finetune, fewshot, probe, or own-head (the checkpoint's classifier)."),
    ] = "finetune",
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms",
            help="Comma-separated: language, bridge, full-bridge, partial, none, random, random-bridge.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", help="Freeze plan (plan.json); default: a bridge run's own, else all trains."),
    ] = None,
    scope: Annotated[
        str, typer.Option("--finetune", help="What fine-tuning trains: as the arm says (arm), plan, or all.")
    ] = "arm",
    seeds: Annotated[str, typer.Option("--seeds", help="How many (3), or which (0,5,7).")] = "1",
    lrs: Annotated[
        str, typer.Option("--lrs", help="Learning rates to choose from on validation, each arm its own.")
    ] = "3e-4,1e-3,3e-3",
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the training images.")] = 10.0,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps, instead of --epochs.")
    ] = None,
    bridge_epochs: Annotated[
        float | None,
        typer.Option("--bridge-epochs", help="Passes of the bridge, for --arms; default: --epochs."),
    ] = None,
    bridge_steps: Annotated[
        int | None, typer.Option("--bridge-steps", help="Optimizer steps of the bridge; default: --steps.")
    ] = None,
    random_classes: Annotated[
        int, typer.Option("--random-classes", help="Number K of random labels; our own default.")
    ] = 10,
    shots: Annotated[
        int | None, typer.Option("--shots", help="Images per class; default in mode fewshot: 5.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per optimizer step.")] = 128,
    augment: Annotated[
        str, typer.Option("--augment", help="weak (shift by a pixel, mirror) or none.")
    ] = "weak",
    precision: Annotated[
        str, typer.Option("--precision", help="float32, or bfloat16 for autocast over float32 weights.")
    ] = "float32",
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
    """Fine-tune or probe a backbone on a task and report test accuracy with an interval.

    With --arms, several ways to the same task stand in one table, each at its own learning rate (chosen on
    validation), with paired differences over common seeds. --seed draws the split and the first of --seeds.

    Example: layerprobe evaluate --model minilm --task digits --steps 100

    Example: layerprobe evaluate --model minilm --task digits --arms language,random --seeds 3 --steps 100
    """
    from layerprobe.cli.training import learning_rates, seeds_of
    from layerprobe.plans import FreezePlan
    from layerprobe.training import BridgeConfig, FineTuneConfig, evaluate_arms
    from layerprobe.training import evaluate as evaluate_one
    from layerprobe.training.arms import (
        FEW_SHOTS,
        check_arms,
        check_mode,
        check_scope,
        check_seeds,
        planned_arms,
    )

    out = Output("evaluate", as_json=as_json, folder=output, quiet=quiet)
    rates = learning_rates(lrs)
    chosen_seeds = [seed + number for number in seeds_of(seeds)]
    names = [name.strip() for name in arms.split(",") if name.strip()] if arms else []
    shared: dict[str, Any] = {"batch_size": batch_size, "augment": augment, "precision": precision}
    finetune = FineTuneConfig(lrs=rates, epochs=epochs, steps=steps, shots=shots, **shared)
    bridge = BridgeConfig(
        epochs=bridge_epochs or epochs,
        steps=bridge_steps or (steps if bridge_epochs is None else None),
        random_classes=random_classes,
        **shared,
    )
    freeze_plan = FreezePlan.load(plan) if plan is not None else None
    check_mode(mode)
    check_scope(scope)
    check_seeds(chosen_seeds)
    if names:
        check_arms(names, scope, freeze_plan)
        if mode not in TRAINING_MODES:
            raise UsageError(
                f"--arms compares trainings; it goes with --mode {' or '.join(TRAINING_MODES)}, not {mode}"
            )
    if mode == "fewshot" and shots is None:
        finetune = finetune.replace(shots=FEW_SHOTS)
    if dry_run:
        seen = sketch(ctx.params)
        used = freeze_plan if names else freeze_plan or run_plan(seen, scope)
        if planned_arms(names, scope) if names else mode in TRAINING_MODES:
            check_plan(used, seen)
        facts = training_facts(seen, used, images=batch_size)
        trainings = len(rates) + len(chosen_seeds) - 1 if mode in TRAINING_MODES else 0
        out.dry_run({**facts, "trainings": trainings * max(1, len(names)), "output": str(output or "none")})
        return

    from layerprobe.plotting.bridge import plot_accuracy_against

    loaded = load_images(ctx.params)

    def load(which: str, draw: int) -> Any:
        return load_model(ctx.params, init=which, seed=draw)

    if names:
        record = evaluate_arms(
            load,
            loaded,
            names,
            plan=freeze_plan,
            scope=scope,
            bridge=bridge,
            finetune=finetune,
            seeds=chosen_seeds,
            output=output,
            quiet=quiet,
        )
    else:
        backbone = load(init, seed)
        record = evaluate_one(
            backbone,
            loaded,
            mode=mode,
            plan=freeze_plan or run_plan(backbone, scope),
            config=finetune,
            seeds=chosen_seeds,
            output=output,
            quiet=quiet,
        )
    frame = record.to_frame()
    figures = {
        "accuracy_cost": lambda: plot_accuracy_against(frame, "train_flops"),
        "accuracy_parameters": lambda: plot_accuracy_against(frame, "trainable_parameters"),
    }
    out.finish(record, table=record.table(), figures=figures if names else None)


def run_plan(backbone: Any, scope: str) -> Any:
    """The freeze plan that lies beside a bridge run, where the backbone came from one."""
    from layerprobe.plans import FreezePlan

    run = backbone.source.run
    if run is None or scope == "all" or not run.get("plan"):
        return None
    return FreezePlan.load(Path(backbone.source.name).expanduser() / str(run["plan"]))
