"""From a name to a `Backbone`: configuration, weights, device, and the mistakes on the way."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerprobe.backbones.backbone import Backbone
from layerprobe.backbones.controls import replace_weights
from layerprobe.backbones.image_input import PatchStem, for_language
from layerprobe.backbones.layout import image_or_text_tower
from layerprobe.backbones.own_head import is_image_classifier
from layerprobe.backbones.own_model import memory_source, unwrap
from layerprobe.backbones.pretrained import (
    architecture_of,
    pretrained_model,
    remarks_in_one_line,
)
from layerprobe.backbones.resolve import ModelSource, inside, resolve_model
from layerprobe.backbones.sharding import sharding
from layerprobe.backbones.trained_parts import put_into
from layerprobe.choices import CONTROLS, DTYPES, check_choices
from layerprobe.errors import BrokenFileError, NotAvailableError, UnknownNameError, UsageError, first_line
from layerprobe.files import dtype_name, weight_files
from layerprobe.locks import n_processes
from layerprobe.model_config import read_model_config
from layerprobe.progress import note
from layerprobe.reading import check_plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.image_processing_backends import PilBackend


def load_backbone(
    name: str | nn.Module,
    *,
    tower: str | None = None,
    processor: PilBackend | None = None,
    revision: str | None = None,
    init: str = "pretrained",
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    stem: str = "random",
    patch_size: int | None = None,
    image_size: int | None = None,
    attention: str | None = None,
    pooling: str | None = None,
    self_check: bool = True,
    shard: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load any Hugging Face transformer as a backbone for images, or take one that is in memory.

    Parameters
    ----------
    name : str | nn.Module
        Alias (see `layerprobe ls models`), hub id, local folder, or the folder of a bridge run. Or a model of
        transformers: bare, with a head, compiled, or in a PEFT wrapper, whose adapters are then part of it. It is
        used where it is, not copied; only `bridge_train` changes it.
    tower : str | None
        Of a model in memory: the dotted name of the part that images go through, where it has several.
    processor : PilBackend | None
        Of a vision model in memory: its image processor; without one, images are resized to the model's size and
        their pixels mapped to ±1.
    revision : str | None
        Branch, tag or commit on the hub.
    init : str
        "pretrained", or a control of the same architecture, drawn with `seed`: "random" (as the constructor
        draws it), or one of `layerprobe.choices.CONTROLS`.
    device : str | None
        "cpu", "cuda", "cuda:1", "mps"; None takes the best one there is and says so. On "meta" it has names
        and shapes but no values, and takes no memory: what a dry run looks at.
    dtype : str | None
        "float32" (default), "bfloat16" or "float16".
    stem : str
        How the image stem of a language backbone starts: "random" or "pca".
    patch_size, image_size : int | None
        Pixels per side; defaults follow the task (about 8 × 8 patches) or the model.
    attention : str | None
        "causal" or "bidirectional"; None keeps what the model was pretrained with.
    pooling : str | None
        "mean" (default), "last" or "cls".
    self_check : bool
        Whether `Backbone.prepare` checks on two images that the model does what features rest on.
    shard : bool
        Spread the model over the processes of an `accelerate launch` while it is read.

    Raises
    ------
    UnknownNameError, NotAvailableError, BrokenFileError, UsageError
        See the messages.
    """
    check_choices(init=init, stem=stem, attention=attention, pooling=pooling)
    images: dict[str, Any] = {"stem": stem, "patch_size": patch_size, "image_size": image_size}
    images |= {"attention": attention, "pooling": pooling, "self_check": self_check}
    if isinstance(name, nn.Module):
        _refuse_loading(revision=revision, device=device, dtype=dtype, init=init)
        model = unwrap(name, tower)
        return Backbone(model, memory_source(model), processor=processor, seed=seed, **images)
    if tower is not None or processor is not None:
        raise UsageError("tower and processor are for a model in memory; a checkpoint brings its own")
    target = choose_device(device)
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError(f"unknown dtype '{dtype}'; choose one of: {', '.join(DTYPES)}")
    source = resolve_model(name, revision=revision, offline=offline)
    kind = getattr(torch, dtype or "float32")
    asked = {**images, "revision": revision, "init": init, "seed": seed, "device": device, "dtype": dtype}
    return _load(source, asked, target, kind, shard=shard, trust_remote_code=trust_remote_code)


def _load(
    source: ModelSource,
    asked: dict[str, Any],
    target: torch.device,
    dtype: torch.dtype,
    *,
    shard: bool,
    trust_remote_code: bool,
) -> Backbone:
    """The backbone of files; `asked` are arguments of `load_backbone`."""
    init, seed = asked["init"], asked["seed"]
    if shard and target.type != "meta":
        beside = [key for key in ("trained_file", "adapters_file") if (source.run or {}).get(key)]
        if init != "pretrained" or trust_remote_code or beside:
            raise UsageError(
                "--shard reads a whole pretrained model of transformers: no controls, no code of its own, "
                "no run that kept only what it trained"
            )
    with remarks_in_one_line(source):
        full, whole = _build(source, init, seed, target, dtype, shard, trust_remote_code)
        full.eval()
        # Without a classifier of its own, nothing beside the tower is used again.
        (full if is_image_classifier(full) else image_or_text_tower(full)).to(target)
        images = {
            key: asked[key] for key in asked if key not in ("revision", "init", "seed", "device", "dtype")
        }
        settings = _image_settings(full, source, **images)
        backbone = Backbone(full, source, init=init, seed=seed, **settings)
    if not whole:
        backbone.forget_own_head()
    if source.run is not None and source.run.get("stem_file") and init == "pretrained":
        _restore_stem(backbone, source.run)
    here = source.origin in ("local", "bridge")
    name = str(Path(source.name).expanduser().absolute()) if here else source.name
    found = source.revision if source.origin == "hub" else None
    backbone.loaded_with = {**asked, "name": name, "revision": found}
    return backbone.eval()


def _refuse_loading(**given: str | None) -> None:
    """UsageError for options that say how a model is loaded, beside one that is loaded already."""
    if said := [option for option, value in given.items() if value not in (None, "pretrained")]:
        raise UsageError(
            f"{said[0]} says how a model is loaded, but this one is in memory already: it is taken as it is"
        )


def load_for_dry_run(
    name: str,
    *,
    task_size: int | None,
    task_size_certain: bool = True,
    device: str | None = None,
    **options: Any,
) -> Backbone:
    """The backbone on the meta device: refuses what `load_backbone` and `prepare` would, as far as shapes tell.

    Parameters
    ----------
    task_size : int | None
        Pixels per side of the task's images, None where unknown. With `task_size_certain` False it is a
        guess, by which tokens are counted but nothing is refused.
    device : str | None
        Where the run would be; kept as `run_device`.
    options
        As of `load_backbone`.
    """
    run_device = choose_device(device)
    backbone = load_backbone(name, device="meta", **options)
    backbone.run_device = run_device
    backbone.loaded_with = {**(backbone.loaded_with or {}), "device": device}
    if task_size or backbone.image_size:
        try:
            backbone.expect_images(task_size)
        except UsageError:
            # The first image may be of another size than the others, which are then all resized.
            if task_size_certain or backbone.image_size:
                raise
    return backbone


def _image_settings(model: nn.Module, source: ModelSource, **asked: Any) -> dict[str, Any]:
    """How images enter: as asked, and what was left open as a bridge run had it."""
    run = source.run
    if run is None:
        return asked
    settings = {key: run.get(key) if value in (None, "random") else value for key, value in asked.items()}
    if image_or_text_tower(model).main_input_name == "pixel_values":
        return settings | {"attention": None, "stem": "random"}
    return settings | {"stem": settings["stem"] or "random"}


def _load_config(source: ModelSource, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration; remote code runs only when the user said so."""
    from transformers import AutoConfig

    read_model_config(source.folder, trust_remote_code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except ImportError:
        raise
    except Exception as error:  # classes check their own fields, each with errors of its own
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"'{source.name}' wants to run its own Python code; look at it, then pass --trust-remote-code"
            ) from error
        raise BrokenFileError(
            f"cannot read the configuration of '{source.name}' in {source.folder}: {first_line(error)}"
        ) from error


def _build(
    source: ModelSource,
    init: str,
    seed: int,
    target: torch.device,
    dtype: torch.dtype,
    shard: bool,
    trust_remote_code: bool,
) -> tuple[nn.Module, bool]:
    """The whole model, without values for the meta device, else on the CPU; and whether nothing was missing."""
    config = _load_config(source, trust_remote_code)
    if (
        target.type == "meta" or not trust_remote_code
    ):  # the repository's code cannot be sized without running it
        with torch.device("meta"):
            skeleton = random_model(config, trust_remote_code)
        if target.type == "meta":
            return skeleton.to(dtype), True
        _check_memory(skeleton, source, dtype, target, n_processes() if shard else 1)
        if init == "pretrained":
            _check_files(skeleton, source)
    if init != "pretrained":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random = random_model(config, trust_remote_code).to(dtype)
        if init == "random":
            return random, True
    parts = sharding(skeleton, config) if shard else None
    model, whole = pretrained_model(source, config, dtype, trust_remote_code, parts)
    put_into(image_or_text_tower(model), source)
    if init in CONTROLS:
        replace_weights(image_or_text_tower(model), init, seed=seed, fresh=image_or_text_tower(random))
    return model, whole


def random_model(config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    """The architecture with the weights that its constructor draws."""
    from transformers import AutoModel

    architecture = architecture_of(config)
    try:
        if architecture is AutoModel:
            made: nn.Module = AutoModel.from_config(config, trust_remote_code=trust_remote_code)
            return made
        return architecture(config)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # as many kinds as there are models
        kind = type(config).__name__
        raise BrokenFileError(f"no model can be built from the {kind}: {first_line(error)}") from error


def _restore_stem(backbone: Backbone, run: dict[str, Any]) -> None:
    """Give the backbone the trained stem of its bridge run."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    run_folder = Path(backbone.name).expanduser()
    path = inside(run_folder, str(run["stem_file"]), run_folder)
    try:
        state = load_file(path)
        rows, columns = state["projection.weight"].shape
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BrokenFileError(f"cannot read the stem {path}: {first_line(error)}") from error
    patch = int(backbone.patch_size or 0)
    if not patch or columns % (patch * patch) or rows != backbone.embedding_width:
        raise BrokenFileError(f"the stem {path} ({rows}×{columns}) does not fit patch size {patch}")
    channels = columns // (patch * patch)
    stem = PatchStem(channels, patch, rows)
    stem.load_state_dict(state)
    backbone.stem = stem.to(backbone.device, backbone.dtype)
    backbone.preprocessing = for_language(backbone.image_size, channels)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best one here, with a note. One that is missing is an error."""
    if name is None:
        mps = torch.backends.mps.is_available()
        best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        if best != "cpu":
            note(f"device: {best} (choose with --device)")
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnknownNameError(f"unknown device '{name}'; examples: cpu, cuda, cuda:1, mps") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise NotAvailableError(
            f"device '{name}' was asked for, but torch {torch.__version__} sees {count} CUDA devices; "
            "use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise NotAvailableError(f"device '{name}' was asked for, but it is not here; use --device cpu")
    return device


def _check_memory(
    full: nn.Module, source: ModelSource, dtype: torch.dtype, device: torch.device, parts: int
) -> None:
    """Refuse weights that cannot fit before anything is loaded; of a sharded model, its part."""
    needed = sum(parameter.numel() for parameter in full.parameters()) * dtype.itemsize // parts
    free = available_memory(device)
    if free is not None and needed > free:
        kind = dtype_name(dtype)
        raise NotAvailableError(
            f"'{source.name}' needs {needed / 2**30:.1f} GiB for its weights in {kind}, but {device} has "
            f"{free / 2**30:.1f} GiB free; try --dtype bfloat16, another device, or a smaller model"
        )


def _check_files(full: nn.Module, source: ModelSource) -> None:
    """Refuse a configuration of far more parameters than the files can hold: filling them would take hours."""
    files, _ = weight_files(source.folder)
    held = sum(check_plain(path, what="weights").st_size for path in files)
    announced = sum(parameter.numel() for parameter in full.parameters())
    if announced > 64 * held + 2**26:  # at one bit a weight, with room for heads that are not there
        raise BrokenFileError(
            f"'{source.name}' holds {held:,} bytes of weights, but its configuration announces {announced:,} parameters"
        )


def available_memory(device: torch.device) -> int | None:
    """Free bytes on `device`, or None where that cannot be told. $LAYERPROBE_MEMORY_LIMIT caps it."""
    free: int | None = None
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        with contextlib.suppress(OSError, IndexError, ValueError):
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("MemAvailable:"):
                    free = int(line.split()[1]) * 1024
    if limit := os.environ.get("LAYERPROBE_MEMORY_LIMIT"):
        try:
            cap = int(limit)
        except ValueError as error:
            raise UsageError(f"LAYERPROBE_MEMORY_LIMIT is a number of bytes, not {limit!r}") from error
        free = cap if free is None else min(free, cap)
    return free
