"""A checkpoint's own model with exactly the checkpoint's weights: nothing left over, nothing made up, nothing raw."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerprobe.backbones.layout import image_or_text_tower
from layerprobe.backbones.resolve import ModelSource
from layerprobe.backbones.sharding import settle
from layerprobe.errors import BrokenFileError, NotAvailableError, first_line
from layerprobe.files import read_json, unread_weights, weight_files
from layerprobe.progress import note
from layerprobe.reading import check_fields, is_there

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LOADED_BY_NAME = ("model.safetensors", "pytorch_model.bin")


def architecture_of(config: PretrainedConfig) -> Any:
    """The class the checkpoint was saved from, so that no layer is invented; else the AutoModel.

    A tower that was saved by itself (the encoder of T5, the image tower of CLIP) is in the module of its family
    alone, which lies beside the configuration's.
    """
    import transformers

    family = type(config).__module__.replace(".configuration_", ".modeling_")
    for name in getattr(config, "architectures", None) or []:
        found = getattr(transformers, str(name), None)
        if found is None and family.startswith("transformers.models."):
            with contextlib.suppress(ImportError):
                found = getattr(importlib.import_module(family), str(name), None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel


def place_in_whole_model(tower: PreTrainedModel) -> tuple[str, str]:
    """The class that AutoModel would build for a tower's configuration, and what it puts before the tower's names.

    An encoder (T5, BART) shares its configuration with the whole model. Where AutoModel would build the tower
    itself, or does not know it, the tower's own class and no prefix.
    """
    from transformers import MODEL_MAPPING

    own = type(tower).__name__
    whole = MODEL_MAPPING.get(type(tower.config), None)
    if not isinstance(whole, type) or isinstance(tower, whole):
        return own, ""
    with torch.device("meta"):
        skeleton = whole(tower.config)
    shapes = {name: p.shape for name, p in tower.named_parameters()}
    for name, module in skeleton.named_modules():
        if type(module) is type(tower) and {n: p.shape for n, p in module.named_parameters()} == shapes:
            return whole.__name__, f"{name}."
    return own, ""


def pretrained_model(
    source: ModelSource,
    config: PretrainedConfig,
    dtype: torch.dtype,
    trust_remote_code: bool,
    sharding: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, bool]:
    """The checkpoint's model, and whether all of it was in the checkpoint (else a head around the tower was not).

    `sharding` are arguments of `from_pretrained` from `layerprobe.backbones.sharding`.

    Raises
    ------
    BrokenFileError
        Weights that cannot be read, that the tower needs and that are not there, or that it has no use for.
    NotAvailableError
        Weights quantised in a way that is not known here, or whose package is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoModel

    quantised = _quantisation(source.folder, config)
    if quantised is None:
        _refuse_codes(source.folder)
    architecture = architecture_of(config)
    extra = {"trust_remote_code": trust_remote_code} if architecture is AutoModel else {}
    state = _state_by_index(source.folder)
    if unread := unread_weights(source.folder, weight_files(source.folder)[0]):
        note(unread)
    try:
        model, loading = architecture.from_pretrained(
            None if state is not None and not trust_remote_code else source.folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            state_dict=state,
            **extra,
            **(sharding or {}),
        )
    except ImportError:
        raise  # a package is missing, for all quantisations as for all else: see remarks_in_one_line
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        if sharding:  # Gemma among them: torch cannot do with parts what its loading does with whole weights
            for file in weight_files(source.folder)[0]:
                _names(file)  # BrokenFileError for a damaged one, which is no matter of parts
            raise NotAvailableError(
                f"'{source.name}' cannot be read in parts: {first_line(error)}; leave --shard away"
            ) from error
        raise BrokenFileError(
            f"cannot load the weights of '{source.name}' from {source.folder}: {first_line(error)}"
        ) from error
    except Exception as error:
        if quantised is None:  # damaged pickles among them, and weights that do not fit the configuration
            raise BrokenFileError(
                f"cannot load the weights of '{source.name}' from {source.folder}: {first_line(error)}"
            ) from error
        raise NotAvailableError(
            f"the weights of '{source.name}' are quantised ({quantised}) and transformers cannot load them: "
            f"{first_line(error)}"
        ) from error
    settle(model)
    whole = _check_missing(source, model, loading["missing_keys"])
    _check_left_over(source, model, loading["unexpected_keys"])
    return model, whole


def _check_missing(source: ModelSource, model: nn.Module, keys: Collection[str]) -> bool:
    """Whether nothing is missing; BrokenFileError where the tower would be part random."""
    tower = image_or_text_tower(model)
    of_tower = {id(p): n for n, p in tower.named_parameters()}
    absent = {name: p for name, p in model.named_parameters() if name in keys}
    missing = sorted(of_tower[id(p)] for p in absent.values() if id(p) in of_tower)
    if not all(".pooler." in f".{name}" for name in missing):  # which no feature passes through
        raise BrokenFileError(
            f"{source.folder} lacks {len(missing)} tensors of {type(tower).__name__} (first: {missing[0]}); "
            "they would be random numbers, so nothing was loaded"
        )
    around = sorted(name for name, p in absent.items() if id(p) not in of_tower)
    if around:
        note(
            f"{source.name}: {len(around)} tensors around the backbone are not in the checkpoint (first: "
            f"{around[0]}) and are random; no feature passes through them, and they are not used as a head"
        )
    return not around


def _check_left_over(source: ModelSource, model: nn.Module, keys: Collection[str]) -> None:
    """Refuse stored tensors that belong inside the tower and that it has no place for; name those around it.

    transformers takes out beforehand what the model's class declares as harmless. A buffer that the model makes
    itself is none of the checkpoint's business either.
    """
    tower = image_or_text_tower(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is tower and name), "")
    parts = {name for name, _ in tower.named_children()}
    buffers = {name for name, _ in tower.named_buffers()}
    around: list[str] = []
    for key in sorted(keys):
        inner = key.removeprefix(prefix)
        if inner.partition(".")[0] in parts:
            if inner in buffers:
                continue
            raise BrokenFileError(
                f"{source.folder} stores {key}, for which {type(tower).__name__} has no place "
                f"({len(keys)} such tensors): the model would not be the checkpoint's, so nothing was loaded"
            )
        around.append(key)
    if around:
        note(f"{source.name}: {len(around)} tensors around the backbone are not used (first: {around[0]})")


def _quantisation(folder: Path, config: PretrainedConfig) -> str | None:
    """The quantisation method in the configuration; NotAvailableError for one that transformers passes over."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    asked = getattr(config, "quantization_config", None)
    raw: dict[str, Any] = asked if isinstance(asked, dict) else asked.to_dict() if asked is not None else {}
    method = raw.get("quant_method")
    if raw.get("load_in_4bit") or raw.get("load_in_8bit") or method == "bitsandbytes":
        return "bitsandbytes"  # which the table has by the number of bits
    beside = folder / "hf_quant_config.json"
    if method is None and is_there(beside):
        said = check_fields(
            read_json(beside, what="quantisation", inside=folder), {"quantization?": dict}, beside
        )
        algorithm = said.get("quantization", {}).get("quant_algo")
        method = f"{algorithm or 'unnamed'}, says {beside.name}"
    method = None if method is None and not raw else str(getattr(method, "value", method))
    if method is not None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise NotAvailableError(
            f"the weights in {folder} are quantised ({method}), which this transformers does not load: their codes "
            "would be taken for weights; take the checkpoint from before quantisation"
        )
    return method


def _refuse_codes(folder: Path) -> None:
    """NotAvailableError where weights are stored as integers and nothing says what they stand for."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder)[0]:
        if file.suffix != ".safetensors":
            continue
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            for name in names:
                if name.endswith("weight") and opened.get_slice(name).get_dtype()[0] in "IU":
                    raise NotAvailableError(
                        f"{file} stores {name} as integer codes, and no quantization_config says what they stand "
                        "for; take the checkpoint from before quantisation"
                    )


def _state_by_index(folder: Path) -> dict[str, Tensor] | None:
    """The tensors as `weight_files` places them, where `from_pretrained` by itself would take others.

    It takes every tensor of every shard, whatever the index says, and with peft installed an adapter that lies
    beside the weights. None in the usual case: the folder is loaded as it is.
    """
    files, placed = weight_files(folder)
    known = {*_LOADED_BY_NAME, *(f"{name}.index.json" for name in _LOADED_BY_NAME)}
    plain = not (folder / "adapter_config.json").is_file() and any(
        (folder / name).is_file() for name in known
    )
    if plain and not placed:
        return None
    listed = {file: _names(file) for file in files} if plain else {}
    if plain and all(placed.get(name) == file for file, names in listed.items() for name in names):
        return None
    state: dict[str, Tensor] = {}
    for file in files:
        state.update((n, t) for n, t in _tensors(file).items() if not placed or placed.get(n) == file)
    return state


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    if file.suffix != ".safetensors":
        return list(_tensors(file))
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise BrokenFileError(f"cannot load the weights in {file}: {first_line(error)}") from error


def _tensors(file: Path) -> dict[str, Tensor]:
    """Mapped into memory rather than read."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return loaded
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise BrokenFileError(f"cannot load the weights in {file}: {first_line(error)}") from error


@contextlib.contextmanager
def remarks_in_one_line(source: ModelSource) -> Iterator[None]:
    """What transformers warns of while it loads, each as one line; its tables and bars are left out.

    Its report on keys is restated by `pretrained_model`. NotAvailableError for a package that is not installed.
    """
    from transformers.utils import logging as hf_logging

    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    logger = logging.getLogger("transformers")
    handlers, collector = list(logger.handlers), _Collector()
    logger.handlers[:] = [collector]
    hf_logging.set_verbosity(logging.WARNING)
    hf_logging.disable_progress_bar()
    try:
        yield
    except ImportError as error:
        raise NotAvailableError(
            f"'{source.name}' needs a package that is not here: {first_line(error)}"
        ) from error
    finally:
        logger.handlers[:] = handlers
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
        for remark in collector.remarks:
            note(f"transformers: {remark}")


class _Collector(logging.Handler):
    """Keeps the first line of every warning once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.remarks: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage().strip()
        if message and "LOAD REPORT" not in message:
            self.remarks.setdefault(message.splitlines()[0][:300])
