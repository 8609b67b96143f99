"""Test accuracy of a backbone: fine-tuned, with few images, by a linear probe, or by its own head.

Every arm takes its own learning rate, chosen on validation images; test accuracy is taken at that rate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerprobe.backbones.backbone import evaluating
from layerprobe.backbones.own_head import own_head
from layerprobe.errors import BrokenFileError, UsageError
from layerprobe.files import output_folder, read_json, write_json
from layerprobe.locks import folder_lock
from layerprobe.metrics.probing.logistic import select_probe
from layerprobe.plans import FreezePlan
from layerprobe.progress import note, progress_bar
from layerprobe.provenance import provenance
from layerprobe.reading import check_fields
from layerprobe.training.arms import ARMS, FEW_SHOTS, ArmRun, Evaluation, check_arms, check_mode, check_seeds
from layerprobe.training.block_plans import all_trainable, block_plan
from layerprobe.training.bridge_run import BridgeRun
from layerprobe.training.classifier import in_batches
from layerprobe.training.config import BridgeConfig, FineTuneConfig, text_hash
from layerprobe.training.data import ImageTensors, TaskTensors, task_facts
from layerprobe.training.finetune import train_and_score
from layerprobe.training.outcome import OUTCOME_FIELDS, Outcome

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.tasks import ImageSplit, Task


def evaluate(
    run_or_backbone: BridgeRun | Backbone,
    task: Task,
    *,
    mode: str = "finetune",
    plan: FreezePlan | None = None,
    config: FineTuneConfig | None = None,
    seeds: Sequence[int] = (0,),
    output: str | Path | None = None,
    quiet: bool = True,
) -> Evaluation:
    """Test accuracy of one backbone, with an interval.

    Parameters
    ----------
    run_or_backbone : BridgeRun | Backbone
        A `BridgeRun`, or a backbone; it is restored bit for bit.
    mode : str
        "finetune" (under `plan`, or everything), "fewshot" (the same on `config.shots` images per class),
        "probe" (logistic regression on frozen features) or "own-head" (the checkpoint's own classifier).
    plan : FreezePlan | None
        Stays frozen in fine-tuning; None takes the run's own plan, or trains everything.
    seeds : Sequence[int]
        Each trains anew; the learning rate is chosen on validation with the first.

    Raises
    ------
    UnknownNameError
        Another mode.
    UsageError
        A head of its own that does not fit the task.
    """
    check_mode(mode)
    with folder_lock(None if output is None else output_folder(output), "layerprobe evaluate"):
        return _evaluate(run_or_backbone, task, mode, plan, config, seeds, output, quiet)


def _evaluate(
    run_or_backbone: BridgeRun | Backbone,
    task: Task,
    mode: str,
    plan: FreezePlan | None,
    config: FineTuneConfig | None,
    seeds: Sequence[int],
    output: str | Path | None,
    quiet: bool,
) -> Evaluation:
    if isinstance(run_or_backbone, BridgeRun):
        backbone, plan = run_or_backbone.backbone, plan or run_or_backbone.plan
    else:
        backbone = run_or_backbone
    backbone.prepare(task)
    config = config or FineTuneConfig()
    if mode == "fewshot" and config.shots is None:
        config = config.replace(shots=FEW_SHOTS)
    about = {**backbone.describe(), **task_facts(task)}
    if mode in ("probe", "own-head"):
        trial = (_score_probe if mode == "probe" else _score_own_head)(backbone, task, seeds[0])
        result = Evaluation(mode=mode, trials=[trial], chosen={"model": None}, about=about)
    else:
        tensors = TaskTensors.of(backbone, task)
        used = plan or all_trainable(backbone)

        def run(_arm: str, lr: float, seed: int) -> Outcome:
            finetune = _finetune_at(config, tensors, lr, seed)
            return train_and_score(backbone, tensors, used, bridge=None, finetune=finetune, test=True)

        settings = {"mode": mode, "config": config.to_dict(), "about": about, "plan": used.content_hash()}
        store = _TrialStore(output, settings)
        result = _compare(run, ["model"], mode, config.lrs, seeds, about, store, quiet)
    arguments = {"mode": mode, "seeds": list(seeds), **config.to_dict()}
    return _with_provenance(result, arguments, backbone, plan, output)


def evaluate_arms(
    load: Callable[[str, int], Backbone],
    task: Task,
    arms: Sequence[str],
    *,
    plan: FreezePlan | None = None,
    scope: str = "arm",
    bridge: BridgeConfig | None = None,
    finetune: FineTuneConfig | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    output: str | Path | None = None,
    quiet: bool = True,
) -> Evaluation:
    """Several arms under one budget, each with its own learning rate, over common seeds.

    Parameters
    ----------
    load : Callable[[str, int], Backbone]
        ("pretrained" or "random", seed) → a backbone; the seed draws its stem and random weights, so that
        trainings with one seed are paired and differ between seeds in all that is drawn.
    arms : Sequence[str]
        Names of `ARMS`.
    plan : FreezePlan | None
        For the arms that train a plan.
    scope : str
        What fine-tuning trains: "arm" as `ARMS` says, "plan" or "all" for every arm alike.
    bridge, finetune
        Budgets and settings; one learning rate of `finetune.lrs` serves both stages of an arm.
    output : str | Path | None
        Folder; finished trainings are kept there and not done again.

    Raises
    ------
    UnknownNameError
        An arm that does not exist.
    UsageError
        An arm that needs a plan, without one.
    """
    check_arms(arms, scope, plan)
    bridge, finetune = bridge or BridgeConfig(), finetune or FineTuneConfig()
    if any(ARMS[arm].bridge for arm in arms) and bridge.random_classes > len(task.train):
        raise UsageError(
            f"{bridge.random_classes} random classes are more than the {len(task.train)} training images"
        )
    trainer = _ArmTrainer(load=load, task=task, plan=plan, scope=scope, bridge=bridge, finetune=finetune)
    sample, tensors = trainer.backbone(ARMS[arms[0]].init, seeds[0])
    about = {**sample.describe(), **tensors.facts}
    settings: dict[str, Any] = {
        "bridge": bridge.to_dict(),
        "finetune": finetune.to_dict(),
        "scope": scope,
        "about": {k: v for k, v in about.items() if k not in ("init", "seed", "stem_hash")},
        "plan": None if plan is None else plan.content_hash(),
    }
    mode = "finetune" if finetune.shots is None else "fewshot"
    with folder_lock(None if output is None else output_folder(output), "layerprobe evaluate"):
        store = _TrialStore(output, settings)
        result = _compare(trainer, arms, mode, finetune.lrs, seeds, about, store, quiet)
        arguments = {"arms": {name: asdict(ARMS[name]) for name in arms}, "seeds": list(seeds), **settings}
        return _with_provenance(result, arguments, sample, plan, output)


@dataclass(kw_only=True)
class _ArmTrainer:
    """Trains an arm at a learning rate and seed; holds one backbone at a time, and the task's tensors."""

    load: Callable[[str, int], Backbone]
    task: Task
    plan: FreezePlan | None
    scope: str
    bridge: BridgeConfig
    finetune: FineTuneConfig

    def __post_init__(self) -> None:
        self._held: dict[tuple[str, int], Backbone] = {}
        self._tensors: TaskTensors | None = None

    def backbone(self, init: str, seed: int) -> tuple[Backbone, TaskTensors]:
        if (init, seed) not in self._held:
            self._held.clear()
            self._held[init, seed] = self.load(init, seed).prepare(self.task)
        backbone = self._held[init, seed]
        if self._tensors is None:  # preprocessing belongs to the architecture: the same for all arms
            self._tensors = TaskTensors.of(backbone, self.task)
        return backbone, self._tensors

    def __call__(self, name: str, lr: float, seed: int) -> Outcome:
        arm = ARMS[name]
        backbone, tensors = self.backbone(arm.init, seed)
        finetune_plan = self._plan(arm.finetune if self.scope == "arm" else self.scope, backbone)
        return train_and_score(
            backbone,
            tensors,
            finetune_plan if arm.bridge is None else self._plan(arm.bridge, backbone),
            bridge=None if arm.bridge is None else self.bridge.replace(lr=lr, seed=seed),
            finetune=_finetune_at(self.finetune, tensors, lr, seed),
            finetune_plan=finetune_plan,
            test=True,
        )

    def _plan(self, trains: str, backbone: Backbone) -> FreezePlan:
        """The plan of a stage that trains the `plan`, `all` or `none`."""
        if trains == "plan":
            assert self.plan is not None, "check_arms"
            return self.plan
        return all_trainable(backbone) if trains == "all" else block_plan(backbone, [])


def _finetune_at(config: FineTuneConfig, tensors: TaskTensors, lr: float, seed: int) -> FineTuneConfig:
    n = len(tensors.labels["train"]) if config.shots is None else config.shots * tensors.n_classes
    return config.replace(lr=lr, seed=seed, steps=config.n_steps(n))


def _compare(
    train: Callable[[str, float, int], Outcome],
    arms: Sequence[str],
    mode: str,
    lrs: Sequence[float],
    seeds: Sequence[int],
    about: dict[str, Any],
    store: _TrialStore,
    quiet: bool,
) -> Evaluation:
    """Per arm: every rate with the first seed, the best on validation, the other seeds at that rate."""
    check_seeds(seeds)
    trials: list[ArmRun] = []
    chosen: dict[str, float | None] = {}
    total = (len(lrs) + len(seeds) - 1) * len(arms)
    with progress_bar(total=total, unit="training", quiet=quiet) as bar:

        def trial(arm: str, lr: float, seed: int) -> ArmRun:
            bar.set_description(f"{arm}, lr {lr:g}, seed {seed}")
            found = store.get(arm, lr, seed) or store.put(ArmRun(arm=arm, **vars(train(arm, lr, seed))))
            bar.update(1)
            trials.append(found)
            return found

        for arm in arms:
            scores = {lr: trial(arm, lr, seeds[0]).validation_accuracy for lr in lrs}
            finished = {lr: score for lr, score in scores.items() if score is not None}
            chosen[arm] = best = max(finished, key=lambda lr: finished[lr], default=lrs[0])
            if finished:
                for seed in seeds[1:]:
                    trial(arm, best, seed)
                if not quiet and len(lrs) > 1 and best in (min(lrs), max(lrs)):
                    note(f"{arm}: the best learning rate, {best:g}, is at the end of the grid; widen --lrs")
    return Evaluation(mode=mode, trials=trials, chosen=chosen, about=about)


def _with_provenance(
    result: Evaluation,
    arguments: dict[str, Any],
    backbone: Backbone,
    plan: FreezePlan | None,
    output: str | Path | None,
) -> Evaluation:
    """The record with what it was made from, saved where there is a folder."""
    shown: dict[str, Any] | None = None
    if plan is not None:
        shown = {"blocks": list(plan.blocks), "states": plan.states}
        shown |= {"adapters": dict(plan.adapters)} if plan.adapters else {}
    result.provenance = provenance(
        "evaluate", arguments, backbone={**backbone.provenance(), **result.about}, plan=shown
    )
    if output is not None:
        result.save(output)
    return result


class _TrialStore:
    """Finished trainings of one evaluation on disk, reused for exactly the same settings."""

    def __init__(self, output: str | Path | None, settings: Mapping[str, Any]) -> None:
        self._key = text_hash(json.dumps(settings, sort_keys=True, default=str))
        self._path = output_folder(output) / "trials.json" if output is not None else None
        self._found: dict[str, dict[str, Any]] = {}
        if self._path is not None and self._path.exists():
            kept = read_json(self._path, what="trials", inside=self._path.parent)
            check_fields(kept, {"settings": str, "trials": dict}, self._path)
            for name, entry in kept["trials"].items():
                check_fields(entry, {"arm": str, **OUTCOME_FIELDS}, f"{self._path}, trial {name}")
            if kept.get("settings") != self._key:
                raise UsageError(
                    f"{self._path.parent} holds an evaluation with other settings; choose another folder"
                )
            self._found = kept["trials"]

    def get(self, arm: str, lr: float, seed: int) -> ArmRun | None:
        found = self._found.get(f"{arm}/{lr:g}/{seed}")
        try:
            return ArmRun.from_dict(found) if found is not None else None
        except (TypeError, ValueError, KeyError) as error:
            raise BrokenFileError(f"{self._path} holds a trial that cannot be read: {error}") from error

    def put(self, trial: ArmRun) -> ArmRun:
        self._found[f"{trial.arm}/{trial.lr:g}/{trial.seed}"] = {"arm": trial.arm, **trial.to_dict()}
        if self._path is not None:
            write_json(self._path, {"settings": self._key, "trials": self._found})
        return trial


# -- without training the backbone -------------------------------------------------------------------------


def _score_probe(backbone: Backbone, task: Task, seed: int) -> ArmRun:
    """Logistic regression on the pooled output of the frozen backbone, with its C chosen on validation."""

    def data(split: ImageSplit) -> tuple[np.ndarray, np.ndarray]:
        with evaluating(backbone):
            features = in_batches(backbone.features, ImageTensors(backbone, split), device=backbone.device)
        return features.double().numpy(), np.asarray(split.labels)

    train, validation, test = (data(task.splits[name]) for name in ("train", "validation", "test"))
    found = select_probe(train, validation, test, task.n_classes)
    best = list(found.Cs).index(found.best_C)
    return _untrained(task, seed, float(found.val_accuracy[best]), float(found.correct.mean()))


def _score_own_head(backbone: Backbone, task: Task, seed: int) -> ArmRun:
    """The checkpoint's own classifier, its outputs matched to the task's classes by name."""
    head = own_head(backbone, task)

    def accuracy(split: ImageSplit) -> float:
        pixels = ImageTensors(backbone, split)
        guesses = in_batches(lambda x: head(x).argmax(1), pixels, device=backbone.device)
        return float((guesses.numpy() == split.labels).mean())

    return _untrained(task, seed, accuracy(task.splits["validation"]), accuracy(task.splits["test"]))


def _untrained(task: Task, seed: int, validation: float, test: float) -> ArmRun:
    return ArmRun(
        arm="model",
        seed=seed,
        validation_accuracy=validation,
        test_accuracy=test,
        n_validation=len(task.splits["validation"]),
        n_test=len(task.splits["test"]),
        trainable_parameters=0,
    )
