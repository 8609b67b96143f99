"""From a name to a `Backbone`: configuration, weights, device, and the mistakes on the way."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerprobe.backbones.backbone import Backbone, check_choices
from layerprobe.backbones.sources import ModelSource, inside, resolve_model
from layerprobe.backbones.stem import PatchStem
from layerprobe.errors import BrokenFileError, NotAvailableError, UnknownNameError, UsageError
from layerprobe.progress import note

INITS = ("pretrained", "random")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_backbone(
    name: str,
    *,
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
    offline: bool = False,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load any Hugging Face transformer as a backbone for images.

    Parameters
    ----------
    name : alias (see `layerprobe ls models`), hub id, local folder, or the folder of a bridge run.
    revision : branch, tag or commit on the hub.
    init : "pretrained", or "random" for the control of the same architecture, drawn with `seed`.
    device : "cpu", "cuda", "cuda:1", "mps"; None takes the best one there is and says so.
    dtype : "float32" (default), "bfloat16" or "float16".
    stem : how the image stem of a language backbone starts: "random" or "pca".
    patch_size, image_size : pixels per side; defaults follow the task (about 8 × 8 patches) or the model.
    attention : "causal" or "bidirectional"; None keeps what the model was pretrained with.
    pooling : "mean" (default), "last" or "cls".

    Raises
    ------
    UnknownNameError, NotAvailableError, BrokenFileError, UsageError : see the messages.
    """
    check_init(init)
    check_choices(stem=stem, attention=attention, pooling=pooling)
    target = choose_device(device)
    torch_dtype = choose_dtype(dtype)
    source = resolve_model(name, revision=revision, offline=offline)
    check_memory(source, torch_dtype, target, trust_remote_code=trust_remote_code)
    with _quiet_transformers():
        config = load_config(source, trust_remote_code=trust_remote_code)
        full = _build(source, config, init, seed, torch_dtype, trust_remote_code)
    model = image_or_text_tower(full)
    head = full if model is not full and hasattr(full, "classifier") else None
    model.to(target).eval()
    if head is not None:
        head.to(target).eval()
    settings = image_entry(
        model,
        source,
        stem_kind=stem,
        patch_size=patch_size,
        image_size=image_size,
        attention=attention,
        pooling=pooling,
    )
    backbone = Backbone(model, model.config, source, init=init, seed=seed, with_head=head, **settings)
    if source.run is not None and source.run.get("stem_file") and init == "pretrained":
        _restore_stem(backbone, source)
    return backbone.eval()


_RUN_KEYS = {
    "stem_kind": "stem",
    "patch_size": "patch_size",
    "image_size": "image_size",
    "attention": "attention",
    "pooling": "pooling",
}


def image_entry(model: nn.Module, source: ModelSource, **asked: Any) -> dict[str, Any]:
    """How images enter: as asked, and what was left open as a bridge run had it."""
    if source.run is None:
        return asked
    settings = {
        key: source.run.get(_RUN_KEYS[key]) if value in (None, "random") else value
        for key, value in asked.items()
    }
    settings["stem_kind"] = settings["stem_kind"] or "random"
    if getattr(model, "main_input_name", "") == "pixel_values":
        settings |= {"attention": None, "stem_kind": "random", "image_size": asked["image_size"]}
    return settings


def check_init(init: str) -> None:
    """UnknownNameError for what is not in `INITS`."""
    if init not in INITS:
        raise UnknownNameError(f"unknown init '{init}'; choose one of: {', '.join(INITS)}")


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration; remote code runs only when the user said so."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"'{source.name}' wants to run its own Python code; look at it, then pass --trust-remote-code"
            ) from error
        raise BrokenFileError(
            f"cannot read the configuration of '{source.name}' in {source.folder}: {_short(error)}"
        ) from error


def _architecture(config: Any) -> Any:
    """The class the checkpoint was saved from, so that no layer is invented; else the AutoModel."""
    import transformers

    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def _build(
    source: ModelSource, config: Any, init: str, seed: int, dtype: torch.dtype, trust_remote_code: bool
) -> nn.Module:
    from safetensors import SafetensorError
    from transformers import AutoModel

    architecture = _architecture(config)
    auto = architecture is AutoModel
    if init == "random":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made: nn.Module = (
                AutoModel.from_config(config, trust_remote_code=trust_remote_code)
                if auto
                else architecture(config)
            )
        return made.to(dtype)
    extra = {"trust_remote_code": trust_remote_code} if auto else {}
    try:
        model, loading = architecture.from_pretrained(
            source.folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise BrokenFileError(
            f"cannot load the weights of '{source.name}' from {source.folder}: {_short(error)}"
        ) from error
    tower = image_or_text_tower(model)
    of_tower = {id(p): n for n, p in tower.named_parameters()}
    missing = sorted(
        of_tower[id(parameter)]
        for name, parameter in model.named_parameters()
        if name in loading["missing_keys"] and id(parameter) in of_tower
    )
    unused = [n for n in missing if ".pooler." in f".{n}" or n.startswith("pooler.")]
    if set(missing) - set(unused):
        raise BrokenFileError(
            f"{source.folder} lacks {len(missing)} tensors of {type(tower).__name__} (first: {missing[0]}); "
            "they would be random numbers, so nothing was loaded"
        )
    return model


def image_or_text_tower(model: nn.Module) -> nn.Module:
    """The part that images go through: the image tower of a two-tower model, the encoder of an
    encoder-decoder, else the base model under a task head."""
    base: nn.Module = getattr(model, "base_model", model)
    for candidate in (model, base):
        tower = getattr(candidate, "vision_model", None)
        if isinstance(tower, nn.Module):
            return tower
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model.get_encoder()  # type: ignore[operator]
    return base


def _restore_stem(backbone: Backbone, source: ModelSource) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    run_folder = Path(source.name).expanduser()
    path = inside(run_folder, str(source.run["stem_file"]), run_folder)  # type: ignore[index]
    try:
        state = load_file(path)
        rows, columns = state["projection.weight"].shape
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BrokenFileError(f"cannot read the stem {path}: {_short(error)}") from error
    patch = int(backbone.patch_size or 0)
    if not patch or columns % (patch * patch) or rows != backbone._embedding_width():
        raise BrokenFileError(f"the stem {path} ({rows}×{columns}) does not fit patch size {patch}")
    channels = columns // (patch * patch)
    stem = PatchStem(channels, patch, rows)
    stem.load_state_dict(state)
    backbone.restore(stem.to(backbone.device, backbone.dtype))


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or the best one here, chosen aloud. One that is missing is an error."""
    if name is None:
        if torch.cuda.is_available():
            best = "cuda"
        elif torch.backends.mps.is_available():
            best = "mps"
        else:
            return torch.device("cpu")
        note(f"device: {best} (choose with --device)")
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnknownNameError(f"unknown device '{name}'; examples: cpu, cuda, cuda:1, mps") from error
    count = torch.cuda.device_count() if device.type == "cuda" else None
    if count is not None and (device.index or 0) >= count:
        raise NotAvailableError(
            f"device '{name}' was asked for, but torch {torch.__version__} sees {count} CUDA devices; "
            "use --device cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise NotAvailableError(f"device '{name}' was asked for, but it is not here; use --device cpu")
    return device


def choose_dtype(name: str | None) -> torch.dtype:
    """`float32` (default), `bfloat16` or `float16`."""
    if name is None:
        return torch.float32
    if name not in DTYPES:
        raise UnknownNameError(f"unknown dtype '{name}'; choose one of: {', '.join(DTYPES)}")
    return DTYPES[name]


def load_skeleton(source: ModelSource, *, trust_remote_code: bool = False) -> nn.Module:
    """The checkpoint's architecture on the meta device: every name and shape, no weights and no memory."""
    from transformers import AutoModel

    with _quiet_transformers():
        config = load_config(source, trust_remote_code=trust_remote_code)
        architecture = _architecture(config)
        with torch.device("meta"):
            model: nn.Module = (
                AutoModel.from_config(config, trust_remote_code=trust_remote_code)
                if architecture is AutoModel
                else architecture(config)
            )
    return model


def count_parameters(source: ModelSource, *, trust_remote_code: bool = False) -> int:
    """Parameters of the whole checkpoint's architecture, counted without taking memory."""
    return sum(p.numel() for p in load_skeleton(source, trust_remote_code=trust_remote_code).parameters())


def estimate_memory(
    source: ModelSource, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> dict[str, int]:
    """Bytes that the weights take in `dtype`, from the configuration alone."""
    parameters = count_parameters(source, trust_remote_code=trust_remote_code)
    size = torch.empty((), dtype=dtype).element_size()
    return {"parameters": parameters, "weights_bytes": parameters * size}


def check_memory(
    source: ModelSource, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool = False
) -> None:
    """Refuse weights that cannot fit before anything is loaded."""
    if trust_remote_code:
        return  # the architecture is the repository's own and cannot be sized without running it
    needed = estimate_memory(source, dtype)["weights_bytes"]
    free = available_memory(device)
    if free is not None and needed > free:
        kind = str(dtype).removeprefix("torch.")
        raise NotAvailableError(
            f"'{source.name}' needs {needed / 2**30:.1f} GiB for its weights in {kind}, but {device} has "
            f"{free / 2**30:.1f} GiB free; try --dtype bfloat16, another device, or a smaller model"
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


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' remarks on torchvision and unused heads off the user's terminal."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
