"""Bridge training: random labels, a freeze plan, and a run folder that can be continued exactly."""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from layerprobe.errors import UsageError
from layerprobe.files import output_folder
from layerprobe.plans import FreezePlan
from layerprobe.plans.apply import Fingerprint
from layerprobe.plans.plan import TRAINABLE
from layerprobe.progress import note, progress_bar
from layerprobe.provenance import provenance
from layerprobe.tables import write_frame
from layerprobe.tasks.random_labels import random_labels
from layerprobe.training import checkpoints
from layerprobe.training.classifier import Classifier, Prefix, set_training
from layerprobe.training.config import BridgeConfig
from layerprobe.training.data import Pixels, TaskTensors
from layerprobe.training.drift import drift_rows, initial_weights
from layerprobe.training.guard import Guard, all_trainable
from layerprobe.training.history import History
from layerprobe.training.loop import (
    DivergedError,
    Step,
    make_accelerator,
    make_optimizer,
    make_prefix,
    own_random_state,
    predict,
    training_steps,
)
from layerprobe.training.rates import choose_rate
from layerprobe.training.run import BridgeRun
from layerprobe.training.sharding import full, shard
from layerprobe.training.watching import flat_settings, interrupts, tracking

_MAY_CHANGE = {"checkpoint_every", "keep", "trackers", "compile"}
"""Settings that a continued run may have otherwise than it began with."""


def bridge_train(
    backbone: Any,
    task: Any,
    *,
    plan: FreezePlan | None = None,
    config: BridgeConfig | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    quiet: bool = True,
) -> BridgeRun:
    """Teach `backbone` random labels of the task's training images, under a freeze plan. Trains in place.

    The label of an image is a keyed hash of (seed, its id) modulo K. Stem, head and exactly the plan's
    parameters are trained; that every other tensor is bit-identical is proven at every checkpoint and at
    the end. A run that was stopped and continued ends with the weights of one that was not, bit for bit, on
    the CPU with the same number of threads and processes.

    Parameters
    ----------
    backbone : from `load_backbone`; a language backbone gets its stem for `task` if it has none yet.
    plan : None trains everything.
    output : run folder (see `layerprobe.training.checkpoints`); None keeps nothing on disk.
    resume : continue the unfinished run in `output`, if there is one.
    quiet : no bar and no remarks.

    Raises
    ------
    UsageError : more random classes than images, nothing to train, a run folder in use, other settings or
        data than the run to be continued.
    PlanError : the plan is for another model, or a frozen tensor changed.
    DivergedError : the loss left the finite numbers or stays far above a guess's.
    LayerprobeError : the disk is full.
    KeyboardInterrupt : Ctrl-C, after a checkpoint was saved.
    """
    config = config or BridgeConfig()
    n_images = len(task.train)
    if config.random_classes > n_images:
        raise UsageError(
            f"{config.random_classes} random classes are more than the {n_images} training images; "
            "choose fewer with --random-classes"
        )
    folder = output_folder(output) if output is not None else None
    backbone.prepare(task)
    if folder is not None:
        checkpoints.refuse_used_folder(folder, resume=resume)
    plan = plan or all_trainable(backbone)
    _refuse_idle(plan, n_images)
    tensors = TaskTensors.of(backbone, task, ("train",))
    label_seed = config.seed if config.label_seed is None else config.label_seed
    labels = random_labels(tensors.ids["train"], config.random_classes, label_seed)
    with own_random_state():
        return _Training(backbone, tensors, labels, plan, config, folder, resume, quiet).run()


class _Training:
    """The parts of one run, so that each method reads from top to bottom."""

    def __init__(
        self,
        backbone: Any,
        tensors: TaskTensors,
        labels: np.ndarray,
        plan: FreezePlan,
        config: BridgeConfig,
        folder: Path | None,
        resume: bool,
        quiet: bool,
    ) -> None:
        self.backbone, self.tensors, self.labels = backbone, tensors, labels
        self.plan, self.config, self.folder, self.quiet = plan, config, folder, quiet
        self.pixels: Pixels = tensors.pixels["train"]
        self.n_steps = config.n_steps(len(self.pixels))
        self.accelerator = make_accelerator(backbone.device, **tracking(config.trackers, folder))
        if self.accelerator.num_processes > 1:
            backbone.to(self.accelerator.device)
        self.is_main = self.accelerator.is_main_process
        self.about = {**backbone.describe(), **tensors.facts}
        found = checkpoints.find_checkpoint(folder) if folder is not None and resume else None
        self.lr = self._rate(found)
        self.classifier = Classifier(backbone, config.random_classes, seed=config.seed)
        # Digests before any training: a continued run is held to these too.
        self.guard = Guard(plan, self.classifier)
        self.before = initial_weights(backbone)
        self.start = 0
        if found is not None:
            self._refuse_other_run(found)
            checkpoints.load_weights(found, self.classifier)
            self.start = found.step
        if config.shard:
            shard(self.classifier, self.accelerator.device)
            self.guard.look_again()
        self.optimizer = make_optimizer(self.classifier, config)
        if found is not None:
            checkpoints.load_optimizer(found, self.optimizer, self.classifier)
        self.history = History(folder if self.is_main else None, keep=self.start)
        self.phase: str | None = None
        self.prefix: Prefix | None = None

    # -- the run -----------------------------------------------------------------------------------------

    def run(self) -> BridgeRun:
        config = self.config.replace(lr=self.lr)
        every = config.checkpoint_every or max(1, math.ceil(self.n_steps / 10))
        if config.gradient_checkpointing:
            _checkpoint_gradients(self.backbone.model, True)
        self._enter(self.start)
        model, optimizer = self._prepared()
        if config.compile:
            model = torch.compile(model)
        self._first_files()
        if config.trackers:
            self.accelerator.init_trackers("layerprobe-bridge", config=flat_settings(config.to_dict()))
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
            prepare_step=self._enter,
        )
        done = self.start
        with (
            interrupts() as interrupted,
            progress_bar(
                total=self.n_steps * config.batch_size,
                initial=self.start * config.batch_size,
                unit="img",
                unit_scale=True,
                desc="bridge",
                quiet=self.quiet or not self.is_main,
            ) as bar,
            self._last_good_in_errors(),
        ):
            for step in steps:
                done = step.index + 1
                self._tell(step, bar)
                stop = self._agree(bool(interrupted))
                if stop or (done % every == 0 and done < self.n_steps):
                    self._save(done)
                if stop:
                    raise KeyboardInterrupt
        return self._finish(done)

    def _prepared(self) -> tuple[Any, Any]:
        if self.config.shard:
            return self.classifier, self.accelerator.prepare(self.optimizer)
        model, optimizer = self.accelerator.prepare(self.classifier, self.optimizer)
        return model, optimizer

    def _enter(self, step: int) -> Prefix | None:
        """Set what trains at `step`: all of the plan, or stem first and then the plan without the stem."""
        stems = self.config.stem_steps
        phase = "all" if not stems else "stem" if step < stems else "blocks"
        if phase == self.phase:
            return self.prefix
        self.phase = phase
        model, stem = self.backbone.model, self.backbone.stem
        self.plan.apply(model, remember=False)
        if phase == "stem":
            model.requires_grad_(False)
        if stem is not None:
            stem.requires_grad_(self.plan.states["stem"] == TRAINABLE and phase != "blocks")
        set_training(self.classifier)
        self.optimizer.zero_grad()
        if not self.config.shard:
            device = self.accelerator.device
            self.prefix = make_prefix(self.classifier, self.pixels, self.config, device=device)
        return self.prefix

    def _tell(self, step: Step, bar: Any) -> None:
        self.history.add(step, self.config.batch_size, len(self.pixels))
        bar.update(self.config.batch_size)
        guess = 1 / self.config.random_classes
        bar.set_postfix_str(f"loss {step.loss:.3f}, accuracy {step.accuracy:.1%} (guess {guess:.1%})", False)
        if self.config.trackers:
            values = {
                "loss": step.loss,
                "accuracy": step.accuracy,
                "lr": step.lr,
                "grad_norm": step.grad_norm,
            }
            self.accelerator.log(values, step=step.index)

    def _agree(self, interrupted: bool) -> bool:
        """Whether any process was interrupted; all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return interrupted
        flag = torch.tensor([float(interrupted)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _finish(self, done: int) -> BridgeRun:
        self.classifier.zero_grad()
        proof = self._verify(done)
        self._save(done, final=True)
        if self.config.trackers:
            self.accelerator.end_training()
        last = self.history.frame().tail(max(1, self.n_steps // 10))
        right = predict(self.classifier, self.pixels, precision=self.config.precision) == self.labels
        self.classifier.eval()
        if self.config.gradient_checkpointing:
            _checkpoint_gradients(self.backbone.model, False)
        rows = [
            _row("random_label_accuracy", float(right.mean()), len(right)),
            _row("random_label_guess", 1 / self.config.random_classes, len(right)),
            _row("random_label_loss", float(last["loss"].mean()), len(last)),
            _row("learning_rate", self.lr, None),
            _row("images_per_second", float(last["images_per_second"].median()), len(last)),
            _row(
                "frozen_tensors_verified", float(proof.frozen + proof.buffers), proof.frozen + proof.buffers
            ),
            _row("trained_tensors_changed", float(len(proof.changed)), len(self.plan.trainable)),
            *drift_rows(self.backbone, self.before),
        ]
        facts = provenance(
            "bridge",
            self.config.replace(lr=self.lr).to_dict(),
            backbone=self.about,
            plan={"blocks": list(self.plan.blocks), "states": self.plan.states, "counts": self.plan.counts},
            verified=proof.summary(),
            processes=self.accelerator.num_processes,
        )
        run = BridgeRun(
            backbone=self.backbone,
            plan=self.plan,
            config=self.config,
            labels=self.labels,
            history=self.history.frame(),
            rows=rows,
            about=self.about,
            folder=self.folder,
            is_main=self.is_main,
            provenance=facts,
        )
        if self.folder is not None and self.is_main:
            run.save(self.folder)
        return run

    def _rate(self, found: checkpoints.Checkpoint | None) -> float:
        """The learning rate given, the one a continued run had, or the best of the candidates."""
        config = self.config
        if found is not None:
            return float(found.state["lr"])
        if len(config.lrs) < 2:
            return config.lrs[0] if config.lrs else config.lr
        if self.accelerator.num_processes > 1:
            raise UsageError("choose the learning rate with one process first, then pass one --lr")
        return choose_rate(self.backbone, self.tensors, self.labels, self.plan, config, quiet=self.quiet)

    # -- files -------------------------------------------------------------------------------------------

    def _first_files(self) -> None:
        if self.folder is None or not self.is_main or self.start:
            return
        self.plan.save(self.folder / "plan.json")
        table = pd.DataFrame({"id": self.tensors.ids["train"], "label": self.labels})
        write_frame(table, self.folder / "labels.csv")

    def _verify(self, done: int) -> Any:
        return self.guard.verify(after=f"{done} steps")

    def _save(self, done: int, *, final: bool = False) -> None:
        self._verify(done)
        weights = moments = None
        if self.config.shard and self.folder is not None:  # gathered by all processes, written by one
            weights = {name: full(tensor).cpu() for name, tensor in self.classifier.state_dict().items()}
            moments = checkpoints.optimizer_tensors(self.optimizer, self.classifier)
        if self.folder is not None and self.is_main:
            self.history.write()
            state = {
                "step": done,
                "n_steps": self.n_steps,
                "lr": self.lr,
                "config": self.config.to_dict(),
                "data": self._data(),
                "backbone": self._kind(),
                "origin": self.guard.before.to_dict(),
                "trainable_digest": _digest("\n".join(self.plan.trainable)),
                "processes": self.accelerator.num_processes,
                "threads": torch.get_num_threads(),
                "random_state": "every draw is a function of seed, step, process and micro-batch",
            }
            checkpoints.save_checkpoint(
                self.folder,
                self.classifier,
                None if final else self.optimizer,
                state,
                about={**self.about, "config": self.config.to_dict(), "plan": "plan.json"},
                keep=self.config.keep,
                final=final,
                weights=weights,
                moments=None if final else moments,
            )
        self.accelerator.wait_for_everyone()

    def _data(self) -> dict[str, Any]:
        ids = _digest("\n".join(map(str, self.tensors.ids["train"])))
        labels = _digest(self.labels.tobytes().hex())
        revision = self.tensors.facts["task_revision"]
        return {"images": len(self.labels), "ids": ids, "labels": labels, "revision": revision}

    def _kind(self) -> dict[str, Any]:
        keys = (
            "model_id",
            "revision",
            "init",
            "n_blocks",
            "patch_size",
            "image_size",
            "attention",
            "pooling",
        )
        return {key: self.about[key] for key in keys}

    def _refuse_other_run(self, found: checkpoints.Checkpoint) -> None:
        """Continue only what is the same run: data, labels, plan, model, settings."""
        state = found.state
        now, then = self._data(), state["data"]
        if now != then:
            what = next(key for key in now if now[key] != then.get(key))
            raise UsageError(
                f"the training images changed since the checkpoint at step {found.step}: {what} is not the same "
                f"({then.get('images')} images then, {now['images']} now); use the same --task, --limit and --seed"
            )
        config = self.config.to_dict()
        for key, value in state["config"].items():
            ours = list(config[key]) if isinstance(config.get(key), tuple) else config.get(key)
            if key not in _MAY_CHANGE and ours != value:
                raise UsageError(f"the run in {self.folder} was begun with {key}={value}, not {ours}")
        for key, value in state["backbone"].items():
            if self._kind()[key] != value:
                raise UsageError(
                    f"the run in {self.folder} trains a backbone with {key}={value}, not {self._kind()[key]}"
                )
        if state["trainable_digest"] != _digest("\n".join(self.plan.trainable)):
            raise UsageError(
                f"the run in {self.folder} was begun with another freeze plan, see its plan.json"
            )
        if Fingerprint.from_dict(state["origin"]) != self.guard.before:
            raise UsageError(f"the run in {self.folder} started from other weights than these")
        world = self.accelerator.num_processes
        if state["processes"] != world and self.is_main:
            note(
                f"continuing with {world} processes what {state['processes']} began: images, labels and effective "
                "batch stay the same, but sums are taken in another order, so the last bits will differ"
            )
        if state["threads"] != torch.get_num_threads() and self.is_main and not self.quiet:
            note(
                f"continuing with {torch.get_num_threads()} threads what {state['threads']} began: last bits differ"
            )

    @contextlib.contextmanager
    def _last_good_in_errors(self) -> Iterator[None]:
        try:
            yield
        except DivergedError as error:
            good = checkpoints.find_checkpoint(self.folder) if self.folder is not None else None
            left = f"; the last good checkpoint is {good.folder}" if good else ""
            raise DivergedError(f"{error}{left}") from error


def _refuse_idle(plan: FreezePlan, n_images: int) -> None:
    if not plan.trainable and plan.states["stem"] != TRAINABLE and plan.states["head"] != TRAINABLE:
        raise UsageError(f"nothing to train: {plan.source} freezes the blocks, the stem and the head")
    if n_images < 2:
        raise UsageError(f"{n_images} training images are too few for random labels")


def _checkpoint_gradients(model: Any, on: bool) -> None:
    with warnings.catch_warnings():
        # Newer transformers have another name for it, which the oldest supported ones lack.
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()


def _row(metric: str, value: float, n: int | None) -> dict[str, Any]:
    return {"block": None, "metric": metric, "value": value, "n": n}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
