"""`layerprobe freeze-search`: which blocks to train, found under a stated budget."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.cli import options
from layerprobe.cli.launch import LaunchOptions
from layerprobe.cli.options import option
from layerprobe.cli.output import Output
from layerprobe.locks import folder_lock
from layerprobe.search import settings as defaults

if TYPE_CHECKING:
    from layerprobe.search import SearchResult


def _option(panel: str, text: str, *, default: object = None, min: float | None = None) -> Any:
    """The help says the default; the option defaults to None, so that a preset knows what was left open."""
    told = text if default is None else f"{text}; default: {defaults.in_words(default)}."
    return option(None, told, min=min, panel=panel)


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
        f"{defaults.preset_in_words('quickstart')}. What is given beside it wins."
    )
    strategy: str | None = _search(
        "bayes, exhaustive, greedy, random or tpe",
        default=defaults.DEFAULT_STRATEGY,
    )
    objective: str | None = _search(
        "frugal (fewest parameters within one standard error of the best) or accuracy",
        default=defaults.DEFAULT_OBJECTIVE,
    )
    seeds: int | None = _search("Unseen seeds of the report, 2 or more", default=defaults.DEFAULT_SEEDS)
    max_seeds: int | None = _search(
        "Add seeds up to so many until --half-width is reached", min=2, default=defaults.DEFAULT_MAX_SEEDS
    )
    half_width: float | None = _search(
        "Wanted half-width of the verdict's 95 % intervals, as a share", default=defaults.DEFAULT_HALF_WIDTH
    )
    margin: float | None = _search(
        "Stop when no plan is likely to be better by this share", default=defaults.DEFAULT_MARGIN
    )
    storage: str | None = _search(
        "postgresql://… shared by many machines; default: study.db in the output folder."
    )
    workers: int | None = _search(
        "Processes on this machine; default: one a GPU, or a core of a CPU (at most 4).", min=1
    )
    no_scores: bool = option(False, "Compute no transfer scores.", "--no-scores", panel="Search")
    baselines: str | None = _search(
        "Comma-separated arms of the report, 'all' among them; also auto-rgn, greedy (a second search)",
        default=defaults.DEFAULT_BASELINES,
    )
    keep_bridge: bool = option(
        False, "Bridge-train the chosen plan into OUTPUT/bridge.", "--keep-bridge", panel="Search"
    )
    train: str | None = _training("weights, or lora[:RANK] to search where adapters go", default="weights")
    lrs: str | None = _training("Learning rates to choose from, per plan; default: found by the pilot.")
    head: str | None = _training("Start of the head: probe or random", default=defaults.DEFAULT_HEAD)
    head_lr: float | None = _training("Multiple of the rate for the head", default=defaults.DEFAULT_HEAD_LR)
    bridge_steps: int | None = _training(
        "Random-label steps; 0: none", min=0, default=defaults.DEFAULT_BRIDGE_STEPS
    )
    finetune_steps: int | None = _training(
        f"Steps on true labels; default: found by the pilot, at most {defaults.DEFAULT_STEP_LIMIT}.", min=1
    )
    shots: int | None = _training("Training images a class, drawn by the seed; default: all.", min=1)
    batch_size: int | None = _training("Images per step", min=1, default=defaults.DEFAULT_BATCH_SIZE)
    random_classes: int | None = _training(
        "Number K of random labels", min=2, default=defaults.DEFAULT_RANDOM_CLASSES
    )
    precision: str | None = _training("float32 or bfloat16", default=defaults.DEFAULT_PRECISION)
    min_frozen: int | None = _limits("At least so many frozen blocks.", min=0)
    max_trainable_params: int | None = _limits("In the blocks.", min=0)
    must_freeze: str | None = _limits("Blocks, such as 0:2,-1.")
    must_train: str | None = _limits("Blocks, such as 0:2,-1.")

    def given(self, *, seed: int) -> dict[str, Any]:
        """The settings that the user gave, without those that need the number of blocks."""
        apart = ("preset", "storage", "workers", "no_scores", "must_freeze", "must_train")
        return {
            **{name: value for name, value in vars(self).items() if name not in apart},
            "lrs": options.learning_rates(self.lrs) or None,
            "baselines": tuple(options.name_list(self.baselines)) or None,
            "keep_bridge": self.keep_bridge or None,
            "use_scores": False if self.no_scores else None,
            "seed": seed,
        }

    def blocks(self, n_blocks: int, *, model: str) -> dict[str, tuple[int, ...]]:
        """The blocks that must be frozen or trained, where any are named."""
        from layerprobe.search.estimate import parse_constraints

        named = {"must_freeze": self.must_freeze, "must_train": self.must_train}
        return parse_constraints(named, n_blocks, model=model)


@options.backbone_options(model="gpt2", stem=None)
@options.task_options(task="cifar100")
@options.output_options("freeze-search")
@options.option_group("settings", SearchOptions)
@options.option_group("launch", LaunchOptions)
def freeze_search(
    backbone: options.BackboneOptions,
    task: options.TaskOptions,
    settings: SearchOptions,
    out: Output,
    launch: LaunchOptions,
) -> None:
    """Find which blocks to train and which to leave frozen, by training plans under a budget.

    The same command again continues what was interrupted; on another machine with the same --storage it joins.

    Example: layerprobe freeze-search --model minilm --task digits --preset quickstart -o run
    """
    from layerprobe.search.estimate import search_facts
    from layerprobe.search.settings import make_settings
    from layerprobe.search.workers import processes_on

    given = settings.given(seed=backbone.seed)
    make_settings(settings.preset, **given)
    usual = defaults.PRESET_LOADING.get(settings.preset or "", {})
    backbone = replace(
        backbone,
        stem=backbone.stem or "pca",
        patch_size=backbone.patch_size or usual.get("patch_size"),
    )
    if out.dry_run:
        seen = backbone.sketch(task)
        given |= settings.blocks(seen.n_blocks, model=seen.name)
        processes = settings.workers or processes_on(seen)
        facts = search_facts(seen, settings.preset, given, workers=processes, output=out.folder)
        kept = str(out.folder or "none: pass -o to keep the plan")
        out.show_facts({**facts, "task": task.task, "output": kept})
        return

    if launch.submit(out, storage=settings.storage):
        return
    from layerprobe.search import freeze_search as search

    images = task.load(out)
    network = backbone.load()
    result = search(
        network,
        images,
        preset=settings.preset,
        storage=settings.storage,
        workers=settings.workers or processes_on(network),
        output=out.folder,
        quiet=out.quiet,
        **given | settings.blocks(network.n_blocks, model=network.name),
    )
    with folder_lock(out.folder, "layerprobe freeze-search", wait=True):
        out.finish(result, table=result.arm_rows(), figures=figures(result))
        if out.folder is not None:
            finish_folder(out.folder, out)


def figures(result: SearchResult) -> dict[str, Any]:
    from layerprobe.plotting.search import plot_pareto, plot_ranking, plot_strips

    return {
        "pareto": lambda: plot_pareto(result.plans),
        "ranking": lambda: plot_ranking(result.baselines, chance=result.facts["chance"]),
        "plans": lambda: plot_strips(result.plans),
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
