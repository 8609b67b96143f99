"""Judging a backbone on a task: fine-tuned, with few images, by a linear probe, or by its own head.

Every arm takes its own learning rate, chosen on validation images; test images are judged at that rate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerprobe.errors import BrokenFileError, UnknownNameError, UsageError, did_you_mean
from layerprobe.files import output_folder, read_json, write_json
from layerprobe.plans import FreezePlan
from layerprobe.progress import note, progress_bar
from layerprobe.provenance import provenance
from layerprobe.training.config import BridgeConfig, FineTuneConfig
from layerprobe.training.data import TaskTensors, task_facts
from layerprobe.training.evaluation import Evaluation, Trial
from layerprobe.training.finetune import train_and_score
from layerprobe.training.guard import all_trainable, block_plan
from layerprobe.training.probe import judge_own_head, judge_probe

MODES = ("finetune", "fewshot", "probe", "own-head")
SCOPES = ("arm", "plan", "all")
FEW_SHOTS = 5


@dataclass(frozen=True)
class Arm:
    """A way from an initialisation to a fine-tuned model.

    `bridge` and `finetune` say what trains in the stage: the `plan`'s parameters, `all`, `none` (stem and
    head alone); `bridge` None leaves the stage out.
    """

    init: str
    bridge: str | None
    finetune: str
    meaning: str


ARMS = {
    "language": Arm("pretrained", None, "all", "published weights, fine-tuned as a whole"),
    "bridge": Arm("pretrained", "plan", "plan", "bridge and fine-tuning under the plan"),
    "full-bridge": Arm("pretrained", "all", "all", "bridge and fine-tuning of everything"),
    "partial": Arm("pretrained", None, "plan", "no bridge, fine-tuning under the plan"),
    "none": Arm("pretrained", "none", "none", "bridge and fine-tuning of stem and head alone"),
    "random": Arm("random", None, "all", "random weights, fine-tuned as a whole"),
    "random-bridge": Arm("random", "all", "all", "random weights, bridge and fine-tuning of everything"),
}


def check_mode(mode: str) -> None:
    """UnknownNameError for what is not in `MODES`."""
    if mode not in MODES:
        raise UnknownNameError(f"unknown mode '{mode}'.{did_you_mean(mode, MODES)} Modes: {', '.join(MODES)}")


def check_scope(scope: str) -> None:
    """UnknownNameError for what is not in `SCOPES`."""
    if scope not in SCOPES:
        raise UnknownNameError(
            f"unknown fine-tuning scope '{scope}'.{did_you_mean(scope, SCOPES)} "
            f"Choose one of: {', '.join(SCOPES)}"
        )


def check_arms(arms: Sequence[str], scope: str, plan: FreezePlan | None) -> None:
    """UnknownNameError for an arm or scope that does not exist, UsageError for an arm that lacks its plan."""
    if wrong := [arm for arm in arms if arm not in ARMS]:
        raise UnknownNameError(
            f"unknown arm '{wrong[0]}'.{did_you_mean(wrong[0], ARMS)} Arms: {', '.join(ARMS)}"
        )
    check_scope(scope)
    if plan is None and (needs := planned_arms(arms, scope)):
        raise UsageError(f"the arm '{needs[0]}' trains a freeze plan; give one with --plan")


def planned_arms(arms: Sequence[str], scope: str) -> list[str]:
    """The arms of which a stage trains the freeze plan."""
    return [a for a in arms if "plan" in (ARMS[a].bridge, ARMS[a].finetune if scope == "arm" else scope)]


def check_seeds(seeds: Sequence[int]) -> None:
    """UsageError for no seed, or one that is there twice."""
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"seeds must be one or more different numbers, not {list(seeds)}")


def evaluate(
    run_or_backbone: Any,
    task: Any,
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
    run_or_backbone : a `BridgeRun`, or a backbone; it is handed back bit for bit as it was.
    mode : "finetune" (under `plan`, or everything), "fewshot" (the same on `config.shots` images per class),
        "probe" (logistic regression on frozen features) or "own-head" (the checkpoint's own classifier).
    plan : stays frozen in fine-tuning; None takes the run's own plan, or trains everything.
    seeds : each trains anew; the learning rate is chosen on validation with the first.

    Raises
    ------
    UnknownNameError : another mode.
    UsageError : a head of its own that does not fit the task.
    """
    check_mode(mode)
    backbone = getattr(run_or_backbone, "backbone", run_or_backbone)
    plan = plan or getattr(run_or_backbone, "plan", None)
    backbone.prepare(task)
    config = config or FineTuneConfig()
    if mode == "fewshot" and config.shots is None:
        config = config.replace(shots=FEW_SHOTS)
    about = {**backbone.describe(), **task_facts(task)}
    if mode in ("probe", "own-head"):
        judge = judge_probe if mode == "probe" else judge_own_head
        validation, test = judge(backbone, task)
        trial = Trial(
            arm="model",
            lr=None,
            seed=seeds[0],
            validation_accuracy=validation,
            test_accuracy=float(test.mean()),
            n_validation=len(task.splits["validation"]),
            n_test=len(test),
            trainable_parameters=0,
            train_flops=0.0,
            train_seconds=0.0,
        )
        result = Evaluation(mode, [trial], {"model": None}, about)
    else:
        tensors = TaskTensors.of(backbone, task)
        chosen_plan = plan or all_trainable(backbone)

        def run(lr: float, seed: int) -> Trial:
            return _trial("model", backbone, tensors, chosen_plan, chosen_plan, None, config, lr, seed)

        store = _Store(
            output, {"mode": mode, "config": config.to_dict(), "about": about, "plan": _plan_key(chosen_plan)}
        )
        result = _compare({"model": run}, mode, config.lrs, seeds, about, store, quiet)
    result.provenance = provenance(
        "evaluate",
        {"mode": mode, "seeds": list(seeds), **config.to_dict()},
        backbone=about,
        plan=None if plan is None else {"blocks": list(plan.blocks), "states": plan.states},
    )
    if output is not None:
        result.save(output)
    return result


def evaluate_arms(
    load: Callable[[str, int], Any],
    task: Any,
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
    load : ("pretrained" or "random", seed) → a backbone; the seed draws its stem and random weights, so that
        trainings with one seed are paired and differ between seeds in all that is drawn.
    arms : names of `ARMS`.
    plan : for the arms that train a plan.
    scope : what fine-tuning trains: "arm" as `ARMS` says, "plan" or "all" for every arm alike.
    bridge, finetune : budgets and settings; one learning rate of `finetune.lrs` serves both stages of an arm.
    output : folder; finished trainings are kept there and not done again.

    Raises
    ------
    UnknownNameError : an arm that does not exist. UsageError : an arm that needs a plan, without one.
    """
    check_arms(arms, scope, plan)
    bridge, finetune = bridge or BridgeConfig(), finetune or FineTuneConfig()
    bridge_size = bridge.random_classes
    if any(ARMS[a].bridge for a in arms) and bridge_size > len(task.train):
        raise UsageError(f"{bridge_size} random classes are more than the {len(task.train)} training images")
    held: dict[tuple[str, int], Any] = {}
    shared: list[TaskTensors] = []

    def backbone_of(init: str, seed: int) -> tuple[Any, TaskTensors]:
        if (init, seed) not in held:
            held.clear()
            held[init, seed] = load(init, seed).prepare(task)
            if not shared:  # preprocessing belongs to the architecture, so all arms see the same pixels
                shared.append(TaskTensors.of(held[init, seed], task))
        return held[init, seed], shared[0]

    def plans_of(arm: Arm, backbone: Any) -> tuple[FreezePlan | None, FreezePlan]:
        made: dict[str | None, FreezePlan | None] = {
            None: None,
            "plan": plan,
            "all": all_trainable(backbone),
            "none": block_plan(backbone, []),
        }
        return made[arm.bridge], made[arm.finetune if scope == "arm" else scope]  # type: ignore[return-value]

    def runner(name: str) -> Callable[[float, int], Trial]:
        def run(lr: float, seed: int) -> Trial:
            backbone, tensors = backbone_of(ARMS[name].init, seed)
            first, second = plans_of(ARMS[name], backbone)
            return _trial(name, backbone, tensors, first, second, bridge, finetune, lr, seed)

        return run

    sample, _ = backbone_of(ARMS[arms[0]].init, seeds[0])
    about = {**sample.describe(), **task_facts(task)}
    settings: dict[str, Any] = {
        "bridge": bridge.to_dict(),
        "finetune": finetune.to_dict(),
        "scope": scope,
        "about": {k: v for k, v in about.items() if k not in ("init", "seed", "stem_hash")},
        "plan": _plan_key(plan),
    }
    result = _compare(
        {name: runner(name) for name in arms},
        "finetune" if finetune.shots is None else "fewshot",
        finetune.lrs,
        seeds,
        about,
        _Store(output, settings),
        quiet,
    )
    result.provenance = provenance(
        "evaluate",
        {"arms": {name: asdict(ARMS[name]) for name in arms}, "seeds": list(seeds), **settings},
        backbone=about,
        plan=None if plan is None else {"blocks": list(plan.blocks), "states": plan.states},
    )
    if output is not None:
        result.save(output)
    return result


def _trial(
    name: str,
    backbone: Any,
    tensors: TaskTensors,
    bridge_plan: FreezePlan | None,
    finetune_plan: FreezePlan,
    bridge: BridgeConfig | None,
    finetune: FineTuneConfig,
    lr: float,
    seed: int,
) -> Trial:
    n = len(tensors.labels["train"])
    shots = None if finetune.shots is None else finetune.shots * tensors.n_classes
    if bridge is not None and bridge_plan is not None:
        bridge = bridge.replace(lr=lr, steps=bridge.n_steps(n), seed=seed)
    else:
        bridge = None
    outcome = train_and_score(
        backbone,
        tensors,
        bridge_plan if bridge_plan is not None else finetune_plan,
        bridge=bridge,
        finetune=finetune.replace(lr=lr, steps=finetune.n_steps(shots or n), seed=seed),
        finetune_plan=finetune_plan,
        test=True,
    )
    return Trial(
        arm=name,
        lr=lr,
        seed=seed,
        validation_accuracy=outcome.validation_accuracy,
        test_accuracy=outcome.test_accuracy,
        n_validation=outcome.n_validation or 0,
        n_test=outcome.n_test or 0,
        trainable_parameters=finetune_plan.counts["trainable_parameters"],
        train_flops=outcome.train_flops,
        train_seconds=outcome.train_seconds,
        bridge_accuracy=outcome.bridge_accuracy,
        reason=outcome.reason,
    )


def _compare(
    runners: Mapping[str, Callable[[float, int], Trial]],
    mode: str,
    lrs: Sequence[float],
    seeds: Sequence[int],
    about: dict[str, Any],
    store: _Store,
    quiet: bool,
) -> Evaluation:
    """Per arm: every rate with the first seed, the best on validation, the other seeds at that rate."""
    check_seeds(seeds)
    trials: list[Trial] = []
    chosen: dict[str, float | None] = {}
    per_arm = len(lrs) + len(seeds) - 1
    with progress_bar(total=per_arm * len(runners), unit="training", quiet=quiet) as bar:
        for name, run in runners.items():

            def one(lr: float, seed: int, name: str = name, run: Any = run) -> Trial:
                bar.set_description(f"{name}, lr {lr:g}, seed {seed}")
                trial = store.get(name, lr, seed) or store.put(run(lr, seed))
                bar.update(1)
                return trial

            tried = [one(lr, seeds[0]) for lr in lrs]
            finished = [t for t in tried if t.validation_accuracy is not None]
            trials += tried
            if not finished:
                chosen[name] = lrs[0]
                continue
            best = max(finished, key=lambda t: t.validation_accuracy or 0.0)
            chosen[name] = best.lr
            assert best.lr is not None
            trials += [one(best.lr, seed) for seed in seeds[1:]]
            if not quiet and len(lrs) > 1 and best.lr in (min(lrs), max(lrs)):
                note(f"{name}: the best learning rate, {best.lr:g}, is at the end of the grid; widen --lrs")
    return Evaluation(mode, trials, chosen, about)


class _Store:
    """Finished trainings of one evaluation on disk, found again when exactly the same is asked."""

    def __init__(self, output: str | Path | None, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self._key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._path = output_folder(output) / "trials.json" if output is not None else None
        self._found: dict[str, dict[str, Any]] = {}
        if self._path is not None and self._path.exists():
            kept = read_json(self._path, what="trials")
            if not isinstance(kept, dict) or not isinstance(kept.get("trials"), dict):
                raise BrokenFileError(f"{self._path} holds no trials of an evaluation")
            if kept.get("settings") != self._key:
                raise UsageError(
                    f"{self._path.parent} holds an evaluation with other settings; choose another folder"
                )
            self._found = kept["trials"]

    def get(self, arm: str, lr: float, seed: int) -> Trial | None:
        found = self._found.get(f"{arm}/{lr:g}/{seed}")
        try:
            return Trial(**found) if found is not None else None
        except TypeError as error:
            raise BrokenFileError(f"{self._path} holds a trial that cannot be read: {error}") from error

    def put(self, trial: Trial) -> Trial:
        self._found[f"{trial.arm}/{trial.lr:g}/{trial.seed}"] = asdict(trial)
        if self._path is not None:
            write_json(self._path, {"settings": self._key, "trials": self._found})
        return trial


def _plan_key(plan: FreezePlan | None) -> str | None:
    if plan is None:
        return None
    states = json.dumps(plan.states, sort_keys=True)
    return hashlib.blake2b("\n".join([states, *plan.trainable]).encode(), digest_size=16).hexdigest()
