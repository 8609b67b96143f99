"""A bridge run on disk: the backbone in its own class's format, everything else beside it, no pickle.

    RUN/
      layerprobe_run.json     what this is, and where its newest good backbone and stem are
      plan.json  labels.csv   the freeze plan; the random label of every training image
      history.csv             one row per optimizer step
      checkpoints/step-00000400/   (the newest few)
        backbone/             loads with from_pretrained of the class that its config names (`architectures`) and
                              with AutoModel; of an encoder-decoder the encoder alone, under the whole model's names
        trained.safetensors   instead of backbone/ with save="trained": what was trained of the base model
        adapters.safetensors  where the plan places adapters; backbone/ is then the model without them
        stem.safetensors  head.safetensors  optimizer.safetensors  state.json
      final/                  the same at the end of a finished run

A checkpoint folder is written under another name and renamed, and only then does `layerprobe_run.json` name
it: whenever a run is killed, the run file points to a whole checkpoint or to none. `state.json` holds a digest of every
file beside it; a checkpoint that was damaged later gives way to the one before. The run file says that the run is
finished only when its tables and figures are there; until then finishing is done again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from layerprobe.backbones.pretrained import place_in_whole_model
from layerprobe.backbones.trained_parts import ADAPTERS_FILE, TRAINED_FILE
from layerprobe.errors import BrokenFileError, LayerprobeError, UsageError, first_line, shortened
from layerprobe.files import cannot_write, read_json, sync, write_json
from layerprobe.plans.names import adapter_part, clean_name
from layerprobe.progress import note
from layerprobe.reading import Schema, check_fields, is_there, open_file
from layerprobe.tables import strict_value
from layerprobe.training.classifier import Classifier, state_tensors, whole
from layerprobe.training.config import text_hash
from layerprobe.training.parts import base_of, no_transformers_bars, put_back, save_model, split_weights

if TYPE_CHECKING:
    from layerprobe.backbones.backbone import Backbone
    from layerprobe.plans import FreezePlan
    from layerprobe.training.config import BridgeConfig
    from layerprobe.training.data import TaskTensors
    from layerprobe.training.freeze_check import FrozenCheck

RUN_FILE = "layerprobe_run.json"
RUN_SCHEMA = "layerprobe.bridge-run/v1"
STATE_SCHEMA = "layerprobe.bridge-state/v1"
FINAL = "final"
BACKBONE = ("model_id", "revision", "init", "n_blocks", "patch_size", "image_size", "attention", "pooling")
"""What of `Backbone.describe()` must be the same when a run is continued."""
STATE_FIELDS: dict[str, Schema] = {
    "step": int, "n_steps": int, "lr": float, "config": dict, "data": dict, "backbone": dict, "origin": dict,
    "trainable_digest": str, "processes": int, "threads": int, "files?": dict,
}  # fmt: skip
MAY_CHANGE = {"checkpoint_every", "keep", "trackers", "compile"}
"""Settings that a continued run may have otherwise than it began with."""
TRY = "; name another folder with --output"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found on disk."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["step"])


def save_checkpoint(
    run_folder: Path,
    backbone: Backbone,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor] | None,
    state: dict[str, Any],
    *,
    about: dict[str, Any],
    plan: FreezePlan,
    keep: int,
    final: bool = False,
) -> Path:
    """Write one checkpoint, point the run file at it, and remove all but the newest `keep`.

    `weights` and `moments` come from `classifier_tensors` and `optimizer_tensors`; `state` and `about` are JSON
    values for `state.json` (with "step") and for the run file. LayerprobeError where the disk is full or cannot
    be written; the checkpoint before is untouched then.
    """
    base = base_of(backbone) if about["config"]["save"] == "trained" else None
    folder = run_folder / FINAL if final else run_folder / "checkpoints" / f"step-{state['step']:08d}"
    temporary = folder.with_name(f".{folder.name}.part")
    with _disk_errors(temporary, run_folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        parts = split_weights(weights)
        model = parts.pop("model")
        if base is None:
            save_model(backbone, model, temporary / "backbone")
        else:
            parts["trained"] = {name: model[name] for name in plan.trainable}
        for name, tensors in {**parts, "optimizer": moments}.items():
            if tensors is not None and (tensors or name in ("optimizer", "trained")):
                plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
                save_file(plain, temporary / f"{name}.safetensors")
        written = sorted(path for path in temporary.rglob("*") if path.is_file())
        digests = {path.relative_to(temporary).as_posix(): _digest(path) for path in written}
        write_json(temporary / "state.json", {"schema": STATE_SCHEMA, **state, "files": digests})
        for path in temporary.rglob("*"):
            sync(path)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
        sync(folder.parent)
    where = folder.relative_to(run_folder)
    run = {
        "schema": RUN_SCHEMA,
        **about,
        **({"backbone": str(where / "backbone")} if base is None else {"base": base}),
        "trained_file": None if base is None else str(where / TRAINED_FILE),
        "adapters_file": str(where / ADAPTERS_FILE) if plan.adapters else None,
        "adapter_scale": plan.adapter_scale,
        "stem_file": str(where / "stem.safetensors") if backbone.stem is not None else None,
        "checkpoint": str(where),
        "step": state["step"],
        "finished": False,
    }
    write_json(run_folder / RUN_FILE, run)
    remove_others(run_folder, folder, keep=keep)
    return folder


def remove_others(run_folder: Path, folder: Path, *, keep: int) -> None:
    """Delete all checkpoints but `folder` and, unless that is the final one, the newest before it up to `keep` in all.

    What killed processes left behind goes as well.
    """
    final = folder.name == FINAL
    # A later step can lie there if a kill fell between its renaming and the run file: this run goes over it again.
    others = set((run_folder / "checkpoints").glob("step-*")) - {folder}
    earlier = sorted(p for p in others if final or p.name < folder.name)
    kept = [] if final or keep <= 1 else earlier[1 - keep :]
    halves = {*run_folder.glob(f".{FINAL}.part"), *(run_folder / "checkpoints").glob(".step-*.part")}
    for old in halves | others.difference(kept):
        shutil.rmtree(old, ignore_errors=True)
    if final:
        with contextlib.suppress(OSError):  # not empty: somebody else's
            (run_folder / "checkpoints").rmdir()


def mark_finished(run_folder: Path) -> None:
    """Say in the run file that tables and figures are there too."""
    write_json(run_folder / RUN_FILE, {**_read_run(run_folder), "finished": True})


def _read_run(run_folder: Path) -> dict[str, Any]:
    run_file = run_folder / RUN_FILE
    run = read_json(run_file, what="bridge run")
    if not isinstance(run, dict) or run.get("schema") != RUN_SCHEMA:
        raise BrokenFileError(f"{run_file} is no bridge run that this version reads")
    return check_fields(run, {"checkpoint": str, "step": int, "finished": bool}, run_file)


def find_checkpoint(run_folder: Path, *, check_bytes: bool = False) -> Checkpoint | None:
    """The newest good checkpoint of a run, None where there is none yet.

    One whose state cannot be read, or (with `check_bytes`) whose files are not those that were written, gives way to
    the one before, and that is said. BrokenFileError where none is left.
    """
    if not is_there(run_folder / RUN_FILE):
        return None
    run = _read_run(run_folder)
    named = (run_folder / run["checkpoint"]).resolve()
    if not named.is_relative_to(run_folder.resolve()):
        raise BrokenFileError(f"{run_folder / RUN_FILE} points outside its folder: {run['checkpoint']!r}")
    earlier = sorted((path.resolve() for path in (run_folder / "checkpoints").glob("step-*")), reverse=True)
    broken: BrokenFileError | None = None
    for folder in [named, *(path for path in earlier if path != named)]:
        try:
            state = _read_state(folder, check_bytes=check_bytes)
        except BrokenFileError as error:
            broken = broken or error
            continue
        if broken is not None:
            note(f"{broken}; the checkpoint at step {state['step']} is taken instead")
        return Checkpoint(folder, {**state, "finished": run["finished"] and broken is None})
    assert broken is not None
    raise broken


def _read_state(folder: Path, *, check_bytes: bool) -> dict[str, Any]:
    file = folder / "state.json"
    state = read_json(file, what="state of the checkpoint", inside=folder)
    if not isinstance(state, dict) or state.get("schema") != STATE_SCHEMA:
        raise BrokenFileError(f"{file} is no state that this version reads")
    check_fields(state, STATE_FIELDS, file)
    for name, digest in state.get("files", {}).items() if check_bytes else ():
        if _digest(folder / name, inside=folder) != digest:
            raise BrokenFileError(f"the checkpoint {folder} is damaged: {name} is not what was written")
    return state


def _digest(path: Path, *, inside: Path | None = None) -> str:
    with open_file(path, what="file of the checkpoint", inside=inside) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_weights(checkpoint: Checkpoint, classifier: Classifier, plan: FreezePlan) -> None:
    """Put a checkpoint's weights into `classifier`, bit for bit; BrokenFileError where they cannot be read.

    Where it holds trained tensors alone, the others are those that the classifier has: the base model's.
    """
    backbone, folder = classifier.backbone, checkpoint.folder
    model: Any = backbone.model
    _, prefix = place_in_whole_model(model)
    # A model may mix dtypes: read in the widest, every tensor gets its own back exactly.
    widest = functools.reduce(
        torch.promote_types, {p.dtype for p in model.parameters() if p.is_floating_point()}
    )
    try:
        only, saved = None, {}
        if (folder / TRAINED_FILE).is_file():
            only, saved = plan.trainable, load_file(folder / TRAINED_FILE)
        else:
            with no_transformers_bars():
                kept = type(model).from_pretrained(
                    folder / "backbone",
                    dtype=widest,
                    local_files_only=True,
                    key_mapping={f"^{re.escape(prefix)}": ""} if prefix else None,
                )
            saved = state_tensors(kept)
        if plan.adapters:
            saved = {**saved, **load_file(folder / ADAPTERS_FILE)}
        put_back(saved, backbone, only=only)
        if backbone.stem is not None:
            _copy(load_file(folder / "stem.safetensors"), backbone.stem)
        _copy(load_file(folder / "head.safetensors"), classifier.head)
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise BrokenFileError(f"cannot read the checkpoint {folder}: {first_line(error)}") from error


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: nn.Module) -> None:
    for name, tensor in state_tensors(target).items():
        if source[name].shape != tensor.shape:
            raise ValueError(f"{name} has shape {tuple(source[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(source[name])


def classifier_tensors(
    classifier: Classifier, *, only: Collection[str] | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """The classifier's state, sharded tensors gathered, one after the other.

    `only` are the names of the model's tensors that are wanted; None: all. With `keep` False this process takes part
    in gathering and keeps nothing.
    """
    found = {}
    for full, tensor in classifier.state_dict().items():
        name = full.removeprefix("backbone.model.")
        if only is None or name == full or adapter_part(name) or clean_name(name) in only:
            gathered = whole(tensor)
            if keep:
                found[full] = gathered
    return found


def optimizer_tensors(optimizer: Optimizer, classifier: Classifier) -> dict[str, Tensor]:
    """AdamW's state as "<parameter name>/<moment>" → whole tensor; parameters not stepped yet have none."""
    return {
        f"{name}/{key}": whole(torch.as_tensor(value))
        for name, parameter in classifier.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(checkpoint: Checkpoint, optimizer: Optimizer, classifier: Classifier) -> None:
    """Give AdamW the moments it had; BrokenFileError for a file that is unreadable or of other parameters."""
    path = checkpoint.folder / "optimizer.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BrokenFileError(f"cannot read the optimizer's state {path}: {error}") from error
    parameters = {name: p for name, p in classifier.named_parameters() if p.requires_grad}
    for key_name, value in tensors.items():
        name, _, key = key_name.rpartition("/")
        if name not in parameters:
            raise BrokenFileError(f"{path} holds the state of {name}, which is not trained in this run")
        parameter = parameters[name]
        if key != "step" or optimizer.defaults.get("fused"):  # else the step is counted on the CPU
            value = value.to(parameter.device)
        if key != "step" and isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        optimizer.state[parameter][key] = value


def refuse_other_settings(found: Checkpoint, run_folder: Path | None, config: BridgeConfig) -> None:
    """UsageError where the run that was `found` in `run_folder` was begun with other settings."""
    settings = strict_value(config.to_dict())
    for key, value in found.state["config"].items():
        if key not in MAY_CHANGE and settings.get(key) != value:
            raise UsageError(
                f"the run in {run_folder} was begun with {key}={_short(value)}, not {settings.get(key)}{TRY}"
            )


def identity(
    tensors: TaskTensors, labels: np.ndarray, plan: FreezePlan, about: dict[str, Any], check: FrozenCheck
) -> dict[str, Any]:
    """What `state.json` holds and must be the same when the run is continued, besides the settings."""
    return {
        "data": {
            "images": len(labels),
            "ids": text_hash("\n".join(map(str, tensors.ids["train"]))),
            "labels": text_hash(labels.tobytes().hex()),
            "revision": tensors.facts["task_revision"],
        },
        "backbone": {key: about[key] for key in BACKBONE},
        "origin": check.origin(),
        "trainable_digest": text_hash("\n".join([*plan.trainable, *_adapter_lines(plan)])),
    }


def _adapter_lines(plan: FreezePlan) -> list[str]:
    return [f"{module} {rank} {plan.adapter_scale}" for module, rank in plan.adapters.items()]


def refuse_other_run(
    found: Checkpoint, run_folder: Path | None, config: BridgeConfig, now: dict[str, Any]
) -> None:
    """UsageError unless `now`, the `identity` of the run that continues, and its settings are those of `found`."""
    state = found.state
    data, then = now["data"], state["data"]
    if data != then:
        what = next(key for key in data if data[key] != then.get(key))
        raise UsageError(
            f"the training images changed since the checkpoint at step {found.step}: {what} is not the same "
            f"({then.get('images')} images then, {data['images']} now); use the same --task, --limit and --seed"
        )
    refuse_other_settings(found, run_folder, config)
    for key, value in state["backbone"].items():
        if now["backbone"].get(key) != value:
            raise UsageError(
                f"the run in {run_folder} trains a backbone with {key}={_short(value)}, not {now['backbone'].get(key)}"
                + TRY
            )
    if state["trainable_digest"] != now["trainable_digest"]:
        raise UsageError(
            f"the run in {run_folder} was begun with another freeze plan, see its plan.json{TRY}"
        )
    if state["origin"] != now["origin"]:
        raise UsageError(f"the run in {run_folder} started from other weights than these{TRY}")


@contextlib.contextmanager
def _disk_errors(temporary: Path, run_folder: Path) -> Iterator[None]:
    """Turn a full disk or missing permission into one line, and leave no half checkpoint."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        good = None
        with contextlib.suppress(BrokenFileError):
            good = find_checkpoint(run_folder)
        left = f"the last good checkpoint is {good.folder}" if good else "there is no checkpoint yet"
        why = cannot_write(temporary, error if isinstance(error, OSError) else OSError(str(error)))
        raise LayerprobeError(f"{why}; {left}") from error


def _short(value: object) -> str:
    return shortened(str(value), 60)
