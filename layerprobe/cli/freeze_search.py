"""`layerprobe freeze-search`: which blocks to train, found under a stated budget."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe import choices
from layerprobe.cli import options
from layerprobe.cli.launch import LaunchOptions
from layerprobe.cli.options import option
from layerprobe.cli.output import Output
from layerprobe.errors import UsageError
from layerprobe.layers import parse_blocks
from layerprobe.locks import folder_lock, n_processes, process_number
from layerprobe.search import settings as defaults

if TYPE_CHECKING:
    from layerprobe.search import SearchResult


def _option(
    panel: str,
    text: str,
    *names: str,
    default: object = None,
    min: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """The help says the default; the option defaults to None, so that a preset knows what was left open."""
    told = text if default is None else f"{text}; default: {defaults.in_words(default)}."
    return option(None, told, *names, min=min, panel=panel, choices=choices)


_search = functools.partial(_option, "Search")
_training = functools.partial(_option, "Training of each plan")
_limits = functools.partial(_option, "Constraints on the plan")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Settings of a search; None is left to the preset and the defaults."""

    budget: float | None = _search(
        "What the search may spend, in full trainings", default=defaults.DEFAULT_BUDGET
    )
    time: float | None = _search("Seconds for search and report, instead of a budget.")
    preset: str | None = _search(
        "quickstart, a first look on 2 cores, stands for "
        f"{defaults.preset_in_words('quickstart')}. What is given beside it wins.",
        choices=tuple(defaults.PRESETS),
    )
    strategy: str | None = _search(
        "How plans are proposed", default=defaults.DEFAULT_STRATEGY, choices=defaults.STRATEGIES
    )
    objective: str | None = _search(
        "frugal: fewest parameters within one standard error of the best",
        default=defaults.DEFAULT_OBJECTIVE,
        choices=defaults.OBJECTIVES,
    )
    seeds: int | None = _search("Unseen seeds of the report, 2 or more", default=defaults.DEFAULT_SEEDS)
    max_seeds: int | None = _search(
        "Add seeds up to so many until --half-width is reached", min=2, default=defaults.DEFAULT_MAX_SEEDS
    )
    half_width: float | None = _search(
        "Wanted half-width of the verdict's 95 % intervals, as a share", default=defaults.DEFAULT_HALF_WIDTH
    )
    margin: float | None = _search(
        "Stopping margin: the search ends when no plan is likely to be better by this share",
        default=defaults.DEFAULT_MARGIN,
    )
    storage: str | None = _search(
        "postgresql://… shared by many machines; default: study.db in the output folder."
    )
    workers: int | None = _search(
        "Processes on this machine; default: one a GPU, or a core of a CPU (at most 4).", min=1
    )
    no_scores: bool = option(False, "Compute no transfer scores.", "--no-scores", panel="Search")
    baselines: str | None = _search(
        "Comma-separated arms of the report, 'all' among them; also auto-rgn, greedy (a second search), and, as large "
        "as the plan, first-equal, last-equal, random-equal, everywhere-equal (adapters)",
        default=defaults.DEFAULT_BASELINES,
    )
    keep_bridge: bool = option(
        False, "Bridge-train the chosen plan into OUTPUT/bridge.", "--keep-bridge", panel="Search"
    )
    train: str | None = _training("weights, or lora[:RANK] to search where adapters go", default="weights")
    units: str | None = _training(
        "What a plan tells apart: block, or attention,mlp for halves of blocks", default="block"
    )
    lrs: str | None = _training("Learning rates to choose from, per plan; default: found by the pilot.")
    head: str | None = _training(
        "Start of the head", default=defaults.DEFAULT_HEAD, choices=choices.HEAD_STARTS
    )
    head_lr: float | None = _training("Multiple of the rate for the head", default=defaults.DEFAULT_HEAD_LR)
    bridge_steps: int | None = _training(
        "Random-label steps; 0: none", min=0, default=defaults.DEFAULT_BRIDGE_STEPS
    )
    steps: int | None = _training(
        f"Optimizer steps on true labels; default: found by the pilot, at most {defaults.DEFAULT_STEP_LIMIT}.",
        min=1,
    )
    shots: int | None = _training("Training images a class, drawn by the seed; default: all.", min=1)
    batch_size: int | None = _training("Images per step", min=1, default=defaults.DEFAULT_BATCH_SIZE)
    random_classes: int | None = _training(
        "Number K of random labels", min=2, default=defaults.DEFAULT_RANDOM_CLASSES
    )
    precision: str | None = _training(
        "bfloat16: autocast over float32 weights, quicker on GPUs and on some CPUs",
        default=defaults.DEFAULT_PRECISION,
        choices=choices.PRECISIONS,
    )
    min_frozen: int | None = _limits("At least so many frozen blocks.", min=0)
    max_trainable_params: int | None = _limits("In the blocks.", min=0)
    must_freeze: str | None = _limits("Blocks, such as 0:2,-1.")
    must_train: str | None = _limits("Blocks, such as 0:2,-1.")

    def given(self, *, seed: int) -> dict[str, Any]:
        """The settings that the user gave, without those that need the number of blocks."""
        apart = ("preset", "storage", "workers", "no_scores", "must_freeze", "must_train", "steps")
        return {
            **{name: value for name, value in vars(self).items() if name not in apart},
            "finetune_steps": self.steps,
            "lrs": options.learning_rates(self.lrs) or None,
            "baselines": tuple(options.name_list(self.baselines)) or None,
            "keep_bridge": self.keep_bridge or None,
            "use_scores": False if self.no_scores else None,
            "seed": seed,
        }

    def blocks(self, n_blocks: int, *, model: str) -> dict[str, tuple[int, ...]]:
        """The blocks that must be frozen or trained, where any are named."""
        named = {"must_freeze": self.must_freeze, "must_train": self.must_train}
        return {
            name: tuple(parse_blocks(text, n_blocks, model=model))
            for name, text in named.items()
            if text is not None
        }


@options.shardable_backbone_options(model="gpt2", stem=None)
@options.task_options(task="cifar100")
@options.output_options("freeze-search")
@options.option_group("settings", SearchOptions)
@options.option_group("launch", LaunchOptions)
def freeze_search(
    backbone: options.ShardableBackboneOptions,
    task: options.TaskOptions,
    settings: SearchOptions,
    out: Output,
    launch: LaunchOptions,
) -> None:
    """Find which blocks to train and which to leave frozen, by training plans under a budget.

    Without -o the search is kept in runs/freeze-search-MODEL-TASK. The same command continues there, and another
    search gets a folder with a number; on another machine with the same --storage it joins. Look in with: layerprobe
    watch RUN

    A model that one device cannot hold: torchrun --nproc-per-node 8 -m layerprobe freeze-search MODEL --shard

    Example: layerprobe freeze-search minilm --task digits --preset quickstart
    """
    from layerprobe.search.settings import make_settings

    if n_processes() > 1 and not backbone.shard:
        raise UsageError(
            f"{n_processes()} processes were launched, but each plan trains in one; start one process with --workers, "
            "or spread the model over them with --shard"
        )
    given = settings.given(seed=backbone.seed)
    made = make_settings(settings.preset, **given)
    out.own_folder(backbone.model, task.task)
    spent = f"{made.time:g} s" if made.budget is None else f"{made.budget:g} full trainings"
    out.start(f"which blocks of {backbone.model} to train for {task.task}, {spent} by {made.strategy}")
    usual = defaults.PRESET_LOADING.get(settings.preset or "", {})
    backbone = replace(
        backbone,
        stem=backbone.stem or "pca",
        patch_size=backbone.patch_size or usual.get("patch_size"),
    )
    seen = backbone.meta_backbone(task, out)
    from layerprobe.search.estimate import check_search, search_facts
    from layerprobe.search.evaluator import search_space
    from layerprobe.search.workers import processes_on

    given |= settings.blocks(seen.n_blocks, model=seen.name)
    if backbone.shard and given["use_scores"] is None:
        given["use_scores"] = False  # they need the whole model in one process
    processes = settings.workers or (1 if backbone.shard else processes_on(seen))
    if out.dry_run:
        shards = n_processes() if backbone.shard else 1
        facts = search_facts(
            seen, settings.preset, given, workers=processes, shards=shards, output=out.folder
        )
        out.show_facts({**facts, "task": task.task, "output": str(out.folder)})
        return
    final = make_settings(settings.preset, **given)
    is_first = process_number() == 0
    check_search(final, search_space(seen, final), out.folder if is_first else None)

    if launch.submit(out, storage=settings.storage):
        return
    from layerprobe.search import follow_search
    from layerprobe.search import freeze_search as search

    images = task.load(out)
    network = backbone.of_this_process().load()
    if not is_first:
        follow_search(network, images, preset=settings.preset, **given)
        return
    out.keep_settings()
    result = search(
        network,
        images,
        preset=settings.preset,
        storage=settings.storage,
        workers=processes,
        output=out.folder,
        quiet=out.quiet,
        **given,
    )
    with folder_lock(out.folder, "layerprobe freeze-search", wait=True):
        out.finish(result, figures=lambda: figures(result))
        if out.folder is not None:
            finish_folder(out.folder, out)


def figures(result: SearchResult) -> dict[str, Any]:
    from layerprobe.plotting.search import plot_pareto, plot_ranking, plot_strips

    return {
        "pareto": lambda: plot_pareto(result.plans),
        "ranking": lambda: plot_ranking(result.baselines, chance=result.facts["chance"]),
        "plans": lambda: plot_strips(result.plans, parts=result.n_parts),
    }


def finish_folder(folder: Path, out: Output) -> None:
    """Write the report page, and say where plan and report are."""
    from layerprobe.report import write_report

    page = write_report(folder)
    lines = [f"plan:   {folder / 'plan.json'}", f"report: {page}"]
    if (folder / "bridge").is_dir():
        lines.append(f"bridge: {folder / 'bridge'}  (use it as --model)")
    text = "\n".join(lines)
    if out.as_json:
        out.say(text)
    else:
        sys.stdout.write(text + "\n")
