"""Options that several commands share, in groups.

A decorator such as `backbone_options` adds the options of its group to a command and hands the command one typed
object instead of their values. Options keep this order: model and task, the command's own, then the groups'.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeVar, get_type_hints

from typer import Argument, CallbackParam, Option

from layerprobe import choices
from layerprobe.cli.output import Output
from layerprobe.cli.settings import option_name, use_config
from layerprobe.errors import UnknownNameError, UsageError, did_you_mean

if TYPE_CHECKING:
    from layerprobe.backbones import Backbone
    from layerprobe.layers import LayerRef
    from layerprobe.plans import FreezePlan
    from layerprobe.tasks.task import Task

Command = TypeVar("Command", bound=Callable[..., None])
T = TypeVar("T")

COMMON = "Common options"
common = functools.partial(Option, rich_help_panel=COMMON)


def option(
    default: T,
    text: str,
    *names: str,
    min: float | None = None,
    max: float | None = None,
    panel: str | None = None,
    choices: Sequence[str] = (),
) -> T:
    """A field of a group of options, or the default of a command's parameter, with its help.

    Of `choices`, which the shell completes, any other value is refused before anything is loaded.
    """
    among: dict[str, Any] = {}
    if choices:

        def check(parameter: CallbackParam, value: str | None) -> str | None:
            if value is not None:
                check_name(option_name(parameter), value, choices)
            return value

        among = {"callback": check, "autocompletion": lambda: list(choices), "metavar": "WORD"}
        text = f"{text} One of {', '.join(choices)}."
    info = Option(*names, help=text, min=min, max=max, rich_help_panel=panel, **among)
    made: Any = field(default=default, metadata={"option": info})
    return made


common_option = functools.partial(option, panel=COMMON)

MODEL_HELP = "Alias, hub id, local folder or bridge run; see: layerprobe ls models"
Model = Annotated[str, Option("--model", "-m", help=MODEL_HELP)]
NamedModel = Annotated[str | None, Argument(metavar="MODEL", help="The same as --model.", show_default=False)]
Revision = Annotated[str | None, Option("--revision", help="Branch, tag or commit of the hub repository.")]
BatchSize = Annotated[int, Option("--batch-size", min=1, help="Images per forward pass.")]
CacheDir = Annotated[
    Path | None, Option("--cache-dir", help="Folder of the feature store; default: the cache.")
]
Json = Annotated[bool, common("--json", help="Strict JSON on stdout and nothing else there.")]
OutDir = Annotated[Path | None, common("--output", "-o", help="Folder for tables, figures and records.")]
Seed = Annotated[int, common("--seed", min=0, help="Seed of everything random.")]
Offline = Annotated[bool, common("--offline", help="Never ask the network; use the Hugging Face cache.")]
TrustRemoteCode = Annotated[
    bool, common("--trust-remote-code", help="Let the model repository run its own Python code here.")
]
Quiet = Annotated[bool, common("--quiet", "-q", help="No progress and no remarks.")]

FIRST = ("model", "task")
"""Options that lead the help of a command, before its own."""


@dataclass(frozen=True, kw_only=True)
class BackboneOptions:
    """Which model, and how images enter it."""

    model: Model
    revision: Revision = None
    init: str = option(
        "pretrained",
        "Weights: the published ones, or a control of the same architecture.",
        choices=choices.INITS,
    )
    stem: str = option("random", "How a language model's image stem starts.", choices=choices.STEMS)
    patch_size: int | None = option(None, "Pixels per side of a patch; default: about 64 patches.", min=1)
    image_size: int | None = option(
        None, "Pixels per side; default: the model's own, or the task's for language.", min=1
    )
    attention: str | None = option(None, "Default: as the model was pretrained.", choices=choices.ATTENTIONS)
    pooling: str | None = option(
        None, "How tokens become one vector; default: mean.", choices=choices.POOLINGS
    )
    seed: Seed = 0
    self_check: bool = common_option(
        True, "Check on two images that the model does what features rest on.", "--self-check/--no-self-check"
    )
    device: str | None = common_option(None, "cpu, cuda, cuda:1, mps; default: the best one here.")
    dtype: str | None = common_option(None, "Of the computation; default: float32.", choices=choices.DTYPES)
    threads: int | None = common_option(
        None, "Threads of the computation; default: all cores, one for models below 1 M parameters.", min=1
    )
    offline: Offline = False
    trust_remote_code: TrustRemoteCode = False

    def load(self) -> Backbone:
        from layerprobe.backbones import load_backbone
        from layerprobe.cli.processes import choose_threads

        chosen = asdict(self)
        threads = chosen.pop("threads")
        loaded = load_backbone(chosen.pop("model"), **chosen)
        choose_threads(threads, loaded.n_parameters)
        return loaded

    def of_this_process(self) -> Self:
        """With its own accelerator as device, where `accelerate launch` or `torchrun` started several processes."""
        rank = os.environ.get("LOCAL_RANK")
        if self.device is not None or rank is None:
            return self
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return replace(self, device=f"cuda:{int(rank) % gpus}" if gpus else "cpu")

    def meta_backbone(
        self, task: TaskOptions, out: Output, *, blocks: str = "all", plan: FreezePlan | None = None
    ) -> Backbone:
        """The backbone before images and weights are read; refuses what `load` would."""
        from layerprobe.cli.mistakes import refuse_mistakes

        side, certain = refuse_mistakes(self, task, dry_run=out.dry_run, blocks=blocks, plan=plan)
        from layerprobe.backbones.backbone import MIXED_SIZE
        from layerprobe.backbones.load import load_for_dry_run

        chosen = asdict(self)
        del chosen["seed"], chosen["threads"]
        return load_for_dry_run(
            chosen.pop("model"),
            task_size=MIXED_SIZE if side == 0 else side,
            task_size_certain=certain,
            **chosen,
        )


@dataclass(frozen=True, kw_only=True)
class ShardableBackboneOptions(BackboneOptions):
    """The same for commands that many processes run together."""

    shard: bool = option(
        False, "Spread the model over the processes of a launch while it is read (FSDP).", "--shard"
    )


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which images."""

    task: Annotated[
        str,
        Option("--task", "-t", help="Alias, hub data set id or folder of images; see: layerprobe ls tasks"),
    ]
    data_dir: Path | None = option(None, "Folder that holds the task's files, instead of the hub.")
    limit: int | None = option(
        None, "At most this many training images (stratified), others in proportion.", min=1
    )
    decode_workers: int | None = option(
        None, "Processes that decode images ahead of the model; 0: none; default: as many as pay.", min=0
    )
    keep_decoded: bool = option(
        True,
        "Keep resized images on disk, so that the next command decodes none; 20 GB at most.",
        "--keep-decoded/--no-keep-decoded",
    )
    seed: Seed = 0
    offline: Offline = False

    def load(self, out: Output) -> Task:
        """The task; what its reading left out, or took otherwise than by its name, is said."""
        from layerprobe.tasks import load_task

        chosen = asdict(self)
        loaded = load_task(chosen.pop("task"), **chosen)
        for remark in loaded.report["remarks"]:
            out.say(f"{self.task}: {remark}")
        return loaded


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which layers to read, and how many images at once."""

    blocks: str = option("all", "Which blocks, for example 0:8,-1; or 'all'.")
    sites: str = option("resid_post", "Comma-separated: resid_pre, attn_out, mlp_out, resid_post.")
    batch_size: BatchSize = 256

    def __post_init__(self) -> None:
        self.site_names()

    def site_names(self) -> list[str]:
        from layerprobe.layers import LayerRef

        return [LayerRef(0, site.strip()).site for site in self.sites.split(",")]

    def pick(self, backbone: Backbone, *, model: str) -> list[LayerRef]:
        """The layers at the sites of the chosen blocks, and those outside all blocks."""
        from layerprobe.hooks.capture import all_layers, check_layers
        from layerprobe.layers import parse_blocks

        kept = set(parse_blocks(self.blocks, backbone.n_blocks, model=model))
        layers = all_layers(backbone.n_blocks, self.site_names())
        chosen = [layer for layer in layers if layer.block is None or layer.block in kept]
        check_layers(chosen, backbone)
        return chosen


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where the result goes."""

    as_json: Json = False
    output: OutDir = None
    dry_run: bool = common_option(False, "Say what would be done and how much memory it takes.", "--dry-run")
    quiet: Quiet = False
    config: Annotated[
        str | None,
        common(
            "--config",
            metavar="FILE",
            is_eager=True,
            callback=use_config,
            help="Settings from a file, such as the settings.yaml of a run folder; options given beside it win.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What `bridge` and `evaluate` say of a training."""

    epochs: float = option(10.0, "Passes over the training images.")
    steps: int | None = option(None, "Optimizer steps, instead of --epochs.")
    random_classes: int = option(10, "Number K of random labels; our own default.")
    batch_size: int = option(128, "Images per optimizer step, all processes together.")
    stem_lr: float = option(1.0, "Learning rate of the stem, as a multiple of that of the blocks.")
    head_lr: float = option(1.0, "Learning rate of the head, as a multiple of that of the blocks.")
    random_labels: str = option(
        "hash",
        "hash of the image's id, or complementary: never the true class, a leak.",
        choices=choices.RANDOM_LABELS,
    )
    augment: str = option("weak", "weak: shift by a pixel, mirror.", choices=choices.AUGMENTATIONS)
    precision: str = option(
        "float32",
        "bfloat16: autocast over float32 weights, quicker on GPUs and on some CPUs.",
        choices=choices.PRECISIONS,
    )


def option_group(
    parameter: str, kind: type[Any], *, build: Callable[..., Any] | None = None, **defaults: str | None
) -> Callable[[Command], Command]:
    """A decorator that replaces the command's `parameter` by one option for each field of the dataclass `kind`.

    The command then receives `build(**values)`, by default a `kind`. `defaults` replace those of the fields. An
    option of two groups, or of a group and the command, is declared once and its value goes to both.
    """
    given = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        given[name] = _parameter(name, hint, kind.__dataclass_fields__[name])
        if name in defaults:
            given[name] = given[name].replace(default=defaults[name])

    def decorate(command: Command) -> Command:
        own, groups = getattr(command, "option_parts", None) or (_own_options(command), {})
        wanted = {**own, **groups}.keys() - {parameter}
        own = {name: item for name, item in own.items() if name != parameter}
        groups = {name: item for name, item in {**given, **groups, **given}.items() if name not in own}
        first = {name: groups[name] for name in FIRST if name in groups}
        options = {**first, **own, **groups}
        if "model" in options:
            options = {"named_model": _parameter("named_model", NamedModel, None), **options}
            if options["model"].default is inspect.Parameter.empty:
                options["model"] = options["model"].replace(default=None)

        @functools.wraps(command)
        def filled(**values: object) -> None:
            if "model" in options:
                values["model"] = the_model(values)
            group = (build or kind)(**{name: values[name] for name in given})
            command(**{name: values[name] for name in wanted}, **{parameter: group})

        view: Any = filled  # typer reads the options off the signature and the annotations
        view.option_parts = own, groups
        view.__signature__ = inspect.Signature(list(options.values()))
        view.__annotations__ = {name: item.annotation for name, item in options.items()}
        return view

    return decorate


def _own_options(command: Callable[..., None]) -> dict[str, inspect.Parameter]:
    given = inspect.signature(command).parameters
    hints = get_type_hints(command, include_extras=True)
    return {name: _parameter(name, hints[name], given[name].default) for name in given}


def _parameter(name: str, annotation: Any, default: object) -> inspect.Parameter:
    if isinstance(default, Field):
        if "option" in default.metadata:
            annotation = Annotated[annotation, default.metadata["option"]]
        default = inspect.Parameter.empty if default.default is MISSING else default.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


backbone_options = functools.partial(option_group, "backbone", BackboneOptions)
shardable_backbone_options = functools.partial(option_group, "backbone", ShardableBackboneOptions)
task_options = functools.partial(option_group, "task", TaskOptions)
layer_options = functools.partial(option_group, "layers", LayerOptions)
training_options = functools.partial(option_group, "training")


def output_options(command: str, *, one_file: bool = False) -> Callable[[Command], Command]:
    return option_group("out", OutputOptions, build=functools.partial(Output, command, one_file=one_file))


def the_model(values: dict[str, Any]) -> str:
    """The model that was named, with the flag or without; UsageError where none was."""
    named = values.pop("named_model", None) or values["model"]
    if named is None:
        raise UsageError("which model? Name one, such as minilm; layerprobe ls models lists the short names")
    return str(named)


def check_name(what: str, name: str, known: Sequence[str]) -> None:
    """UnknownNameError where `name` is none of the `known`."""
    if name not in known:
        raise UnknownNameError(
            f"unknown {what} '{name}'.{did_you_mean(name, known)} Choose from: {', '.join(known)}"
        )


def name_list(text: str | None) -> list[str]:
    """`a, b` as names."""
    return [name for item in (text or "").split(",") if (name := item.strip())]


def number_list(text: str, refusal: str, kind: Callable[[str], Any] = float) -> list[Any]:
    """`3, 6` as numbers of the `kind`; a UsageError says the `refusal`."""
    try:
        return [kind(item) for item in name_list(text)]
    except ValueError as error:
        raise UsageError(refusal) from error


def learning_rates(text: str | None) -> tuple[float, ...]:
    refusal = f"'{text}' is no list of learning rates; write for example 3e-4,1e-3"
    return tuple(number_list(text or "", refusal))


def seed_list(text: str) -> list[int]:
    """`3` means seeds 0, 1, 2; `0,5,7` means these.

    >>> seed_list("3"), seed_list("0,5")
    ([0, 1, 2], [0, 5])
    """
    refusal = f"'{text}' is no number of seeds nor a list of them; write 3 or 0,1,2"
    numbers = number_list(text, refusal, int)
    if not numbers or min(numbers) < 0 or (len(numbers) == 1 and numbers[0] < 1):
        raise UsageError(f"'{text}' names no seeds; write 3 or 0,1,2")
    return list(range(numbers[0])) if len(numbers) == 1 else numbers
