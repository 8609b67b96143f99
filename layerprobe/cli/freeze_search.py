"""`layerprobe freeze-search`: which blocks to train, found under a stated budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.loading import load_pair, sketch
from layerprobe.cli.output import Output
from layerprobe.search import settings as defaults

if TYPE_CHECKING:
    from layerprobe.search import SearchResult

_SEARCH, _TRAINING, _LIMITS = "Search", "Training of each plan", "Constraints on the plan"


def _default(text: str, value: Any) -> str:
    """A help text with its default.

    The options themselves default to None, so that a preset knows what was left open.
    """
    return f"{text}; default: {defaults.in_words(value)}."


def freeze_search(
    ctx: typer.Context,
    model: options.Model = "gpt2",
    task: options.TaskName = "cifar100",
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            help=_default("What the search may spend, in full trainings", defaults.DEFAULT_BUDGET),
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    time: Annotated[
        float | None,
        typer.Option(
            "--time", help="Seconds for search and report, instead of a budget.", rich_help_panel=_SEARCH
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="quickstart, a first look on 2 cores, stands for "
            f"{defaults.preset_in_words('quickstart')}. What is given beside it wins.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help=_default(
                "racing, exhaustive, prefix, suffix, contiguous, greedy, random, tpe or nsga2",
                defaults.DEFAULT_STRATEGY,
            ),
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help=_default(
                "frugal (fewest parameters within one standard error of the best) or accuracy",
                defaults.DEFAULT_OBJECTIVE,
            ),
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds",
            help=_default(
                "Seeds of finalists and unseen ones of the report, 2 or more", defaults.DEFAULT_SEEDS
            ),
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="postgresql://… shared by many machines; default: study.db in the output folder.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Processes on this machine; default: 1.", rich_help_panel=_SEARCH
        ),
    ] = None,
    no_scores: Annotated[
        bool,
        typer.Option("--no-scores", help="Compute no transfer scores.", rich_help_panel=_SEARCH),
    ] = False,
    baselines: Annotated[
        str | None,
        typer.Option(
            "--baselines",
            help=_default(
                "Comma-separated arms of the report, 'all' among them; also auto-rgn, greedy (a second search)",
                defaults.DEFAULT_BASELINES,
            ),
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    keep_bridge: Annotated[
        bool,
        typer.Option(
            "--keep-bridge", help="Bridge-train the chosen plan into OUTPUT/bridge.", rich_help_panel=_SEARCH
        ),
    ] = False,
    lrs: Annotated[
        str | None,
        typer.Option(
            "--lrs",
            help=_default("Learning rates to choose from, per plan", defaults.DEFAULT_LRS),
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    bridge_steps: Annotated[
        int | None,
        typer.Option(
            "--bridge-steps",
            min=0,
            help=_default("Random-label steps; 0: none", defaults.DEFAULT_BRIDGE_STEPS),
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    finetune_steps: Annotated[
        int | None,
        typer.Option(
            "--finetune-steps",
            min=1,
            help=_default("Steps on true labels", defaults.DEFAULT_FINETUNE_STEPS),
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help=_default("Images per step", defaults.DEFAULT_BATCH_SIZE),
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    random_classes: Annotated[
        int | None,
        typer.Option(
            "--random-classes",
            min=2,
            help=_default("Number K of random labels", defaults.DEFAULT_RANDOM_CLASSES),
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            help=_default("float32 or bfloat16", defaults.DEFAULT_PRECISION),
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    min_frozen: Annotated[
        int | None,
        typer.Option("--min-frozen", min=0, help="At least so many frozen blocks.", rich_help_panel=_LIMITS),
    ] = None,
    max_trainable_params: Annotated[
        int | None,
        typer.Option("--max-trainable-params", min=0, help="In the blocks.", rich_help_panel=_LIMITS),
    ] = None,
    must_freeze: Annotated[
        str | None, typer.Option("--must-freeze", help="Blocks, such as 0:2,-1.", rich_help_panel=_LIMITS)
    ] = None,
    must_train: Annotated[
        str | None, typer.Option("--must-train", help="Blocks, such as 0:2,-1.", rich_help_panel=_LIMITS)
    ] = None,
    revision: options.Revision = None,
    init: options.Init = "pretrained",
    stem: Annotated[
        str | None, typer.Option("--stem", help="How an image stem starts: random (default) or pca.")
    ] = None,
    patch_size: options.Patch = None,
    image_size: options.ImageSize = None,
    attention: options.Attention = None,
    pooling: options.Pooling = None,
    data_dir: options.DataDir = None,
    limit: options.Limit = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    output: options.OutDir = None,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
) -> None:
    """Find which blocks to train and which to leave frozen, by training plans under a budget.

    The same command again continues what was interrupted; on another machine with the same --storage it joins.

    Example: layerprobe freeze-search --model minilm --task digits --preset quickstart -o run
    """
    from layerprobe.cli.training import learning_rates

    out = Output("freeze-search", as_json=as_json, folder=output, quiet=quiet)
    given: dict[str, Any] = {
        "budget": budget,
        "time": time,
        "strategy": strategy,
        "objective": objective,
        "seeds": seeds,
        "lrs": learning_rates(lrs) if lrs else None,
        "bridge_steps": bridge_steps,
        "finetune_steps": finetune_steps,
        "batch_size": batch_size,
        "random_classes": random_classes,
        "precision": precision,
        "baselines": tuple(name.strip() for name in baselines.split(",")) if baselines else None,
        "use_scores": False if no_scores else None,
        "keep_bridge": True if keep_bridge else None,
        "min_frozen": min_frozen,
        "max_trainable_params": max_trainable_params,
        "seed": seed,
    }
    from layerprobe.search.estimate import parse_constraints, search_facts
    from layerprobe.search.settings import make_settings

    make_settings(preset, **given)
    usual = defaults.PRESET_LOADING.get(preset or "", {})
    processes = workers or usual.get("workers", 1)
    entry = {
        "stem": stem or usual.get("stem", "random"),
        "patch_size": patch_size or usual.get("patch_size"),
    }
    constraints = {"must_freeze": must_freeze, "must_train": must_train}
    if dry_run:
        seen = sketch(ctx.params, **entry)
        given |= parse_constraints(constraints, seen.n_blocks, model=seen.name)
        facts = search_facts(seen, preset, given, workers=processes, output=output)
        out.dry_run(
            {**facts, "task": task, "output": str(output) if output else "none: pass -o to keep the plan"}
        )
        return

    from layerprobe.search import freeze_search as search

    backbone, images = load_pair(ctx.params, **entry)
    given |= parse_constraints(constraints, backbone.n_blocks, model=backbone.name)
    found = search(
        backbone,
        images,
        preset=preset,
        storage=storage,
        workers=processes,
        output=output,
        quiet=quiet,
        **given,
    )
    out.finish(found, table=arm_rows(found), figures=figures(found))
    if output is not None:
        finish_folder(found, output, out)


def arm_rows(found: SearchResult) -> list[dict[str, Any]]:
    """The plan and the baselines for a terminal, in percent."""
    rows = []
    for row in found.baselines.to_dict("records"):
        known = row["low"] == row["low"] and row["low"] is not None
        rows.append(
            {
                "arm": row["arm"],
                "blocks": "".join("■" if mark == "#" else "□" for mark in row["plan"].split("+")[0]),
                "trained parameters": f"{row['trainable_parameters']:,}",
                "lr": f"{row['lr']:g}",
                "test %": round(100 * row["test_accuracy"], 1) if row["test_accuracy"] is not None else None,
                "95 % interval": f"{100 * row['low']:.1f} to {100 * row['high']:.1f}" if known else None,
                "against all": _points(row["minus_all"]),
                "seeds": row["n_seeds"],
            }
        )
    return rows


def figures(found: SearchResult) -> dict[str, Any]:
    """The figures of a run folder."""
    from layerprobe.plotting.search import plot_pareto, plot_ranking, plot_strips

    return {
        "pareto": lambda: plot_pareto(found.pareto),
        "ranking": lambda: plot_ranking(found.baselines, chance=found.facts["chance"]),
        "plans": lambda: plot_strips(found.finalists),
    }


def finish_folder(found: SearchResult, folder: Path, out: Output) -> None:
    """Write the report page, and say where plan and report are."""
    from layerprobe.report import write_report

    page = write_report(folder)
    lines = [f"plan:   {folder / 'plan.json'}", f"report: {page}"]
    if (folder / "bridge").is_dir():
        lines.append(f"bridge: {folder / 'bridge'}  (use it as --model)")
    text = "\n".join(lines) + "\n"
    if out.as_json:
        out.say(text.rstrip())
    else:
        sys.stdout.write(text)


def _points(value: Any) -> str | None:
    return None if value is None or value != value else f"{100 * value:+.1f}"
