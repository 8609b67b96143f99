"""Bridge training: random labels, a freeze plan, and a run folder that can be continued exactly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm import tqdm

from layerprobe.backbones.sharding import is_sharded
from layerprobe.errors import UsageError, stopped_by
from layerprobe.files import output_folder
from layerprobe.locks import folder_lock
from layerprobe.plans import FreezePlan
from layerprobe.plans.plan import TRAINABLE
from layerprobe.plans.verify import Verification
from layerprobe.progress import note, progress_bar
from layerprobe.provenance import provenance
from layerprobe.tables import percent, write_frame
from layerprobe.training import checkpoints
from layerprobe.training.block_plans import all_trainable
from layerprobe.training.bridge_run import BridgeRun, History, drift_rows, initial_weights
from layerprobe.training.classifier import (
    Classifier,
    gradient_checkpointing,
    predict,
    shard,
    without_layerdrop,
)
from layerprobe.training.config import BridgeConfig
from layerprobe.training.data import TaskTensors
from layerprobe.training.finetune import choose_rate
from layerprobe.training.freeze_check import FrozenCheck, Phases
from layerprobe.training.loop import (
    DivergedError,
    Step,
    interrupts,
    make_accelerator,
    make_optimizer,
    preserved_rng,
    tracker_options,
    training_steps,
)
from layerprobe.training.parts import check_save

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.tasks import Task


def bridge_train(
    backbone: Backbone,
    task: Task,
    *,
    plan: FreezePlan | None = None,
    config: BridgeConfig | None = None,
    output: str | Path | None = None,
    quiet: bool = True,
    finish: Callable[[BridgeRun], None] | None = None,
) -> BridgeRun:
    """Teach `backbone` random labels of the task's training images, under a freeze plan. Trains in place.

    The label of an image is a keyed hash of (seed, its id) modulo K. Stem, head and exactly the plan's
    parameters are trained; that every other tensor is bit-identical is checked at every checkpoint and at
    the end. A run that was stopped and continued ends with the weights of one that was not, bit for bit, on
    the CPU with the same number of threads and processes.

    Parameters
    ----------
    backbone : Backbone
        From `load_backbone`; a language backbone gets its stem for `task` if it has none yet.
    plan : FreezePlan | None
        None trains everything.
    output : str | Path | None
        Run folder (see `layerprobe.training.checkpoints`). A run that was begun there with the same settings is
        continued; a finished one is read. None keeps nothing on disk.
    quiet : bool
        No bar and no remarks.
    finish : Callable[[BridgeRun], None] | None
        What else belongs to a finished run, figures say. A run that was stopped in it does it again.

    Raises
    ------
    UsageError
        More random classes than images, nothing to train, gradient checkpointing that the model lacks, a run folder
        that another process works in, or that holds a run with other settings or data.
    PlanError
        The plan is for another model, or a frozen tensor changed.
    DivergedError
        The loss left the finite numbers or stays far above a guess's.
    KeyboardInterrupt
        Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    config = config or BridgeConfig()
    n_images = len(task.train)
    if config.random_classes > n_images:
        raise UsageError(
            f"{config.random_classes} random classes are more than the {n_images} training images; "
            "choose fewer with --random-classes"
        )
    if config.gradient_checkpointing and not backbone.model.supports_gradient_checkpointing:
        raise UsageError(
            f"{type(backbone.model).__name__} cannot compute activations again; leave --gradient-checkpointing out"
        )
    folder = output_folder(output) if output is not None else None
    with folder_lock(folder, "layerprobe bridge"):
        backbone.prepare(task)
        if folder is not None:
            check_save(backbone, config.save)
        plan = plan or all_trainable(backbone)
        if not plan.trained_parameters and TRAINABLE not in (plan.states["stem"], plan.states["head"]):
            raise UsageError(f"nothing to train: {plan.source} freezes the blocks, the stem and the head")
        if n_images < 2:
            raise UsageError(f"{n_images} training images are too few for random labels")
        tensors = TaskTensors.of(backbone, task, ("train",))
        with preserved_rng():
            training = _Training(backbone, tensors, plan, config, folder, quiet=quiet)
            try:
                run = training.run(finish)
            except BaseException:
                if not config.shard:  # else not every process need come here
                    training.check.rename_if_trained()
                raise
            training.check.rename_if_trained()
            return run


class _Training:
    """The parts of one run, so that each method reads from top to bottom."""

    def __init__(
        self,
        backbone: Backbone,
        tensors: TaskTensors,
        plan: FreezePlan,
        config: BridgeConfig,
        folder: Path | None,
        *,
        quiet: bool,
    ) -> None:
        self.backbone, self.tensors, self.pixels = backbone, tensors, tensors.pixels["train"]
        self.plan, self.folder, self.quiet = plan, folder, quiet
        self.labels = tensors.random_labels(config)
        self.n_steps = config.n_steps(len(self.pixels))
        self.accelerator = make_accelerator(backbone.device, **tracker_options(config.trackers, folder))
        # Each process its own GPU. On CPUs nothing moves, and FSDP would copy all that is mapped from a file.
        if self.accelerator.num_processes > 1 and backbone.device.type != "cpu":
            backbone.to(self.accelerator.device)
        self.is_main = self.accelerator.is_main_process
        self.about = {**backbone.describe(), **tensors.facts}
        found = None
        if folder is not None:
            found = checkpoints.find_checkpoint(folder, check_bytes=True)
        self.config, self.lr = config, self._rate(config, found)
        self.classifier = Classifier(backbone, config.random_classes, seed=config.seed)
        # Digests before any training: a continued run is held to these too.
        self.check = FrozenCheck(plan, self.classifier)
        self.identity = checkpoints.identity(tensors, self.labels, plan, self.about, self.check)
        self.before = initial_weights(backbone)
        self.start = 0
        if found is not None:
            checkpoints.refuse_other_run(found, folder, config, self.identity)
            self._note_other_machine(found)
            checkpoints.load_weights(found, self.classifier, plan)
            self.start = found.step
        if is_sharded(backbone.model) and not config.shard:
            raise UsageError("the model was spread while it was loaded; the bridge needs shard as well")
        if config.shard:
            shard(self.classifier, self.accelerator.device)
            self.check.take_digests()
        self.optimizer = make_optimizer(self.classifier, config)
        if found is not None and found.step < self.n_steps:
            checkpoints.load_optimizer(found, self.optimizer, self.classifier)
        self.history = History(folder if self.is_main else None, keep=self.start)
        self.phases = Phases(
            plan, self.classifier, self.optimizer, self.pixels, config, self.accelerator.num_processes
        )

    def _rate(self, config: BridgeConfig, found: checkpoints.Checkpoint | None) -> float:
        """The learning rate given, the one a continued run had, or the best of the candidates."""
        if found is not None:
            return float(found.state["lr"])
        if len(config.lrs) < 2:
            return config.lrs[0] if config.lrs else config.lr
        if self.accelerator.num_processes > 1:
            raise UsageError("choose the learning rate with one process first, then pass one --lr")
        return choose_rate(self.backbone, self.tensors, self.labels, self.plan, config, quiet=self.quiet)

    def run(self, finish: Callable[[BridgeRun], None] | None) -> BridgeRun:
        config = self.config.replace(lr=self.lr)
        every = config.checkpoint_every or max(1, math.ceil(self.n_steps / 10))
        with (
            gradient_checkpointing(self.backbone.model, config.gradient_checkpointing),
            without_layerdrop(self.backbone.model),
        ):
            self.phases.enter(self.start)
            optimizer = self.accelerator.prepare(self.optimizer)
            model: Any = self.classifier if config.shard else self.accelerator.prepare(self.classifier)
            if config.compile:
                model = torch.compile(model)
            steps = training_steps(
                model,
                optimizer,
                self.pixels,
                self.labels,
                config,
                accelerator=self.accelerator,
                n_steps=self.n_steps,
                start=self.start,
                flip=self.tensors.flip,
                before_step=self.phases.enter,
            )
            if self.folder is not None and self.is_main and not self.start:
                self.plan.save(self.folder / "plan.json")
                table = pd.DataFrame({"id": self.tensors.ids["train"], "label": self.labels})
                write_frame(table, self.folder / "labels.csv")
            if config.trackers:
                settings = {
                    k: v if isinstance(v, (int, float, str)) else str(v) for k, v in config.to_dict().items()
                }
                self.accelerator.init_trackers("layerprobe-bridge", config=settings)
            bar = progress_bar(
                total=self.n_steps * config.batch_size,
                initial=self.start * config.batch_size,
                unit="img",
                unit_scale=True,
                desc="bridge",
                quiet=self.quiet or not self.is_main,
            )
            done = self.start
            with bar, interrupts() as interrupted, self._last_good_in_errors():
                for step in steps:
                    done = step.index + 1
                    self._record(step, bar)
                    stop = self._any_process(bool(interrupted))
                    if stop or (done % every == 0 and done < self.n_steps):
                        self._save(done)
                    if stop:
                        raise stopped_by(interrupted[0]) if interrupted else KeyboardInterrupt
            return self._finish(done, finish)

    def _record(self, step: Step, bar: tqdm[Any]) -> None:
        self.history.add(step, self.config.batch_size, len(self.pixels))
        bar.update(self.config.batch_size)
        guess = 1 / self.config.random_classes
        bar.set_postfix_str(
            f"loss {step.loss:.3f}, accuracy {percent(step.accuracy)} (guess {percent(guess)})", False
        )
        if self.config.trackers:
            values = {key: getattr(step, key) for key in ("loss", "accuracy", "lr", "grad_norm")}
            self.accelerator.log(values, step=step.index)

    def _any_process(self, interrupted: bool) -> bool:
        """Whether any process was interrupted; all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return interrupted
        flag = torch.tensor([float(interrupted)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _finish(self, done: int, finish: Callable[[BridgeRun], None] | None) -> BridgeRun:
        """Save the model, unless that was done before; then the tables and what `finish` makes; then say so."""
        self.classifier.zero_grad()
        if self.start < self.n_steps:
            verified = self._save(done, final=True)
        else:
            verified = self.check.verify(after=f"{done} steps")
        if self.config.trackers:
            self.accelerator.end_training()
        last = self.history.frame().tail(max(1, self.n_steps // 10))
        right = predict(self.classifier, self.pixels, precision=self.config.precision) == self.labels
        self.classifier.eval()
        n_frozen, n_trained = verified.frozen + verified.buffers, len(verified.changed + verified.unchanged)
        figures: list[tuple[str, float, int | None]] = [
            ("random_label_accuracy", float(right.mean()), len(right)),
            ("random_label_guess", 1 / self.config.random_classes, len(right)),
            ("random_label_loss", float(last["loss"].mean()), len(last)),
            ("learning_rate", self.lr, None),
            ("images_per_second", float(last["images_per_second"].median()), len(last)),
            ("frozen_tensors_verified", float(n_frozen), n_frozen),
            ("trained_tensors_changed", float(len(verified.changed)), n_trained),
        ]
        rows = [{"block": None, "metric": metric, "value": value, "n": n} for metric, value, n in figures]
        run = BridgeRun(
            backbone=self.backbone,
            plan=self.plan,
            config=self.config,
            labels=self.labels,
            history=self.history.frame(),
            rows=[*rows, *drift_rows(self.backbone, self.before)],
            about=self.about,
            folder=self.folder,
            is_main=self.is_main,
            provenance=provenance(
                "bridge",
                self.config.replace(lr=self.lr).to_dict(),
                backbone={**self.backbone.provenance(), **self.about},
                plan={k: getattr(self.plan, k) for k in ("blocks", "states", "counts")},
                verified=verified.summary(),
                processes=self.accelerator.num_processes,
            ),
        )
        if self.folder is not None and self.is_main:
            run.save(self.folder)
            if finish is not None:
                finish(run)
            checkpoints.remove_others(self.folder, self.folder / checkpoints.FINAL, keep=1)
            checkpoints.mark_finished(self.folder)
        return run

    def _save(self, done: int, *, final: bool = False) -> Verification:
        """Check the frozen tensors, then write history and checkpoint where there is a folder."""
        verified = self.check.verify(after=f"{done} steps")
        if self.folder is not None and (self.is_main or self.config.shard):
            # Sharded tensors are gathered by all processes and written by one.
            only = self.plan.trainable if self.config.save == "trained" else None
            weights = checkpoints.classifier_tensors(self.classifier, only=only, keep=self.is_main)
            moments = None if final else checkpoints.optimizer_tensors(self.optimizer, self.classifier)
            if self.is_main:
                self.history.write()
                state = {
                    "step": done,
                    "n_steps": self.n_steps,
                    "lr": self.lr,
                    "config": self.config.to_dict(),
                    **self.identity,
                    "processes": self.accelerator.num_processes,
                    "threads": torch.get_num_threads(),
                    "random_state": "every draw is a function of seed, step, process and micro-batch",
                }
                checkpoints.save_checkpoint(
                    self.folder,
                    self.backbone,
                    weights,
                    moments,
                    state,
                    about={**self.about, "config": self.config.to_dict(), "plan": "plan.json"},
                    plan=self.plan,
                    keep=self.config.keep,
                    final=final,
                )
        self.accelerator.wait_for_everyone()
        return verified

    def _note_other_machine(self, found: checkpoints.Checkpoint) -> None:
        """Say where a continued run cannot end with the same bits."""
        state, world, threads = found.state, self.accelerator.num_processes, torch.get_num_threads()
        if state["processes"] != world and self.is_main:
            note(
                f"continuing with {world} processes what {state['processes']} began: images, labels and effective "
                "batch stay the same, but sums are taken in another order, so the last bits will differ"
            )
        if state["threads"] != threads and self.is_main and not self.quiet:
            note(f"continuing with {threads} threads what {state['threads']} began: last bits differ")

    @contextlib.contextmanager
    def _last_good_in_errors(self) -> Iterator[None]:
        try:
            yield
        except DivergedError as error:
            good = checkpoints.find_checkpoint(self.folder) if self.folder is not None else None
            left = f"; the last good checkpoint is {good.folder}" if good else ""
            raise DivergedError(f"{error}{left}") from error
