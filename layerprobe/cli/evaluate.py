"""`layerprobe evaluate`: test accuracy of a backbone, or of several arms beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.choices import MODES, SCOPES, TRAINING_MODES
from layerprobe.cli import options
from layerprobe.cli.memory import check_plan, count_images, training_facts
from layerprobe.cli.options import option
from layerprobe.cli.output import Draw, Output
from layerprobe.errors import UsageError
from layerprobe.locks import folder_lock, n_processes, process_number

if TYPE_CHECKING:
    from layerprobe.backbones import Backbone
    from layerprobe.plans import FreezePlan
    from layerprobe.records import Record
    from layerprobe.training import BridgeConfig, FineTuneConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(options.TrainingOptions):
    """Fine-tuning, and the bridge before it where --arms asks for one."""

    lrs: str = option("3e-4,1e-3,3e-3", "Learning rates to choose from on validation, each arm its own.")
    bridge_epochs: float | None = option(None, "Passes of the bridge, for --arms; default: --epochs.")
    bridge_steps: int | None = option(None, "Optimizer steps of the bridge; default: --steps.")
    shots: int | None = option(None, "Images per class; default in mode fewshot: 5.")
    mode: str = option("finetune", "own-head: the checkpoint's classifier, as it is.", choices=MODES)
    arms: str | None = option(
        None,
        "Comma-separated: language, bridge, full-bridge, partial, none, random, shuffled, matched, random-bridge.",
    )
    plan: Path | None = option(None, "Freeze plan (plan.json); default: a bridge run's own, else all trains.")
    scope: str = option(
        "arm", "What fine-tuning trains: what the arm says, the plan, or all.", "--finetune", choices=SCOPES
    )
    seeds: str = option("1", "How many (3), or which (0,5,7).")

    def _shared(self) -> dict[str, Any]:
        names = ("batch_size", "augment", "precision", "stem_lr", "head_lr")
        return {name: getattr(self, name) for name in names}

    def finetune_config(self) -> FineTuneConfig:
        from layerprobe.training import FineTuneConfig
        from layerprobe.training.arms import FEW_SHOTS

        shots = FEW_SHOTS if self.mode == "fewshot" and self.shots is None else self.shots
        rates = options.learning_rates(self.lrs)
        return FineTuneConfig(lrs=rates, epochs=self.epochs, steps=self.steps, shots=shots, **self._shared())

    def bridge_config(self) -> BridgeConfig:
        from layerprobe.training import BridgeConfig

        return BridgeConfig(
            epochs=self.bridge_epochs or self.epochs,
            steps=self.bridge_steps or (self.steps if self.bridge_epochs is None else None),
            random_classes=self.random_classes,
            random_labels=self.random_labels,
            **self._shared(),
        )


@options.shardable_backbone_options(model="gpt2")
@options.task_options(task="cifar100")
@options.training_options(EvaluateOptions)
@options.output_options("evaluate")
def evaluate(
    backbone: options.ShardableBackboneOptions,
    task: options.TaskOptions,
    training: EvaluateOptions,
    out: Output,
) -> None:
    """Fine-tune or probe a backbone on a task and report test accuracy with an interval.

    With --arms, several ways to the same task stand in one table, each at its own learning rate (chosen on
    validation), with paired differences over common seeds. --seed draws the split and the first of --seeds.
    Without -o the trainings are kept in runs/evaluate-MODEL-TASK, where the same command continues; with more seeds
    or arms it adds them.

    Example: layerprobe evaluate minilm --task digits --patch-size 4 --steps 20 --arms language,random --seeds 2
    """
    from layerprobe.plans import FreezePlan
    from layerprobe.training.arms import check_arms, check_seeds, planned_arms

    mode, scope, arms = training.mode, training.scope, options.name_list(training.arms)
    seeds = [backbone.seed + number for number in options.seed_list(training.seeds)]
    finetune, bridge = training.finetune_config(), training.bridge_config()
    plan = FreezePlan.load(training.plan) if training.plan is not None else None
    check_seeds(seeds)
    trains = mode in TRAINING_MODES
    if arms:
        check_arms(arms, scope, plan)
    follows = bool(planned_arms(arms, scope)) if arms else trains
    check_mode_goes_with(mode, arms=arms, seeds=seeds, shard=backbone.shard)
    if trains:
        out.own_folder(backbone.model, task.task, may_differ={"seeds", "arms"} if arms else {"seeds"})
    n_trainings = (len(finetune.lrs) + len(seeds) - 1 if trains else 0) * max(1, len(arms))
    ways = f"{', '.join(arms)} of {backbone.model}" if arms else backbone.model
    length = f"; {n_trainings} trainings" if trains else ""
    out.start(f"test accuracy of {ways} on {task.task}, by {mode}{length}")
    seen = backbone.meta_backbone(task, out, plan=plan if follows else None)
    used = plan if arms else plan or run_plan(seen, scope)
    if follows:
        check_plan(used, seen)
    if out.dry_run:
        facts = training_facts(
            seen,
            used,
            images=training.batch_size,
            n_images=sum(count_images(task, out).values()),
            shard=backbone.shard,
        )
        facts["trainings"] = n_trainings
        out.show_facts({**facts, "output": str(out.folder or "none")})
        return

    from layerprobe.training import evaluate as evaluate_one
    from layerprobe.training import evaluate_arms

    is_first = process_number() == 0
    backbone = backbone.of_this_process()
    images = task.load(out)
    if out.folder is not None and is_first:
        out.keep_settings()
    # Of several processes only the first writes; what one alone finds in a folder the others could not follow.
    folder = out.folder if n_processes() == 1 else None
    with folder_lock(out.folder, "layerprobe evaluate"):
        shared: dict[str, Any] = {"seeds": seeds, "output": folder, "quiet": out.quiet or not is_first}
        if not arms:
            network = backbone.load()
            plan = plan or run_plan(network, scope)
            found = evaluate_one(network, images, mode=mode, plan=plan, config=finetune, **shared)
            if is_first:
                out.finish(found)
            return

        def load(init: str, seed: int) -> Backbone:
            return replace(backbone, init=init, seed=seed).load()

        record = evaluate_arms(
            load, images, arms, plan=plan, scope=scope, bridge=bridge, finetune=finetune, **shared
        )
        if is_first:
            out.finish(record, figures=lambda: figures(record))


def check_mode_goes_with(mode: str, *, arms: Sequence[str], seeds: Sequence[int], shard: bool) -> None:
    """UsageError for options that a mode, or arms, have no use for."""
    trains = mode in TRAINING_MODES
    if arms and not trains:
        raise UsageError(
            f"--arms compares trainings; it goes with --mode {' or '.join(TRAINING_MODES)}, not {mode}"
        )
    if arms and shard:
        raise UsageError("--arms trains in one process; --shard goes with a single evaluation")
    if not trains and len(seeds) > 1:
        raise UsageError(f"--mode {mode} trains nothing that a seed changes; leave --seeds out")


def figures(record: Record) -> dict[str, Draw]:
    from layerprobe.plotting.bridge import plot_accuracy_against

    frame = record.to_frame()
    return {
        "accuracy_cost": lambda: plot_accuracy_against(frame, "train_flops"),
        "accuracy_parameters": lambda: plot_accuracy_against(frame, "trainable_parameters"),
    }


def run_plan(backbone: Backbone, scope: str) -> FreezePlan | None:
    """The freeze plan that lies beside a bridge run, where the backbone came from one."""
    from layerprobe.plans import FreezePlan

    run = backbone.source.run
    if run is None or scope == "all" or not run.get("plan"):
        return None
    return FreezePlan.load(Path(backbone.source.name).expanduser() / str(run["plan"]))
