"""`layerprobe probe`: how much of a task a linear classifier reads off each layer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.loading import load_images, load_model, parse_sites, pick_layers, sketch
from layerprobe.cli.memory import forward_facts
from layerprobe.cli.output import Output

CONTROLS = ("chance", "pixels", "random", "labels")
EXTRAS = ("knn", "ridge", "mdl", "few-shot")


def probe(
    ctx: typer.Context,
    model: options.Model,
    task: options.TaskName,
    controls: Annotated[
        str,
        typer.Option(
            "--controls",
            help="Comma-separated: pixels, random (the same architecture untrained), labels (random labels, "
            "for selectivity); or none. Chance is always told.",
        ),
    ] = "pixels,random,labels",
    extras: Annotated[
        str,
        typer.Option(
            "--extras", help="Comma-separated: knn, ridge, mdl (online code length), few-shot; or none."
        ),
    ] = "none",
    strengths: Annotated[
        str | None,
        typer.Option("--C", help="Comma-separated inverse L2 strengths; default 1e-4 to 1e3, 8 values."),
    ] = None,
    refit: Annotated[
        str,
        typer.Option("--refit", help="'train+validation' at the chosen C before the test, or 'train'."),
    ] = "train+validation",
    blocks: options.Blocks = "all",
    sites: options.Sites = "resid_post",
    batch_size: options.BatchSize = 256,
    revision: options.Revision = None,
    init: options.Init = "pretrained",
    stem: options.Stem = "random",
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
    """Probe each layer linearly: C chosen on validation, accuracy measured once on test, beside controls.

    Every fit is driven to within 1e-4 of its optimum and says how far it is from it. Differences from the
    best layer carry paired bootstrap intervals.

    Example: layerprobe probe --model minilm --task digits --controls pixels,random,labels
    """
    out = Output("probe", as_json=as_json, folder=output, quiet=quiet)
    asked = _names("control", controls, CONTROLS)
    further = _names("extra", extras, EXTRAS)
    Cs = None if strengths is None else _numbers(strengths)
    from layerprobe.metrics.probing.logistic import C_GRID, check_grid, check_refit

    check_refit(refit)
    grid = check_grid(C_GRID if Cs is None else Cs)
    chosen_sites = parse_sites(sites)
    if dry_run:
        seen = sketch(ctx.params)
        pick_layers(seen, blocks, chosen_sites, model=model)
        facts = forward_facts(seen, batch_size=batch_size)
        facts["controls"] = ", ".join(["chance", *(name for name in asked if name != "chance")])
        facts["extras"] = ", ".join(further) or "none"
        facts["memory of the probes"] = (
            "about 3 times the features of one layer, and 5 × images × classes values"
        )
        out.dry_run(facts)
        return

    from layerprobe.analyzers.probes import probe_backbone
    from layerprobe.plotting.probes import plot_few_shot, plot_probe_accuracy, plot_probe_strength

    loaded = load_images(ctx.params)
    backbone = load_model(ctx.params)
    layers = pick_layers(backbone, blocks, chosen_sites, model=model)
    place = backbone.device
    record = probe_backbone(
        backbone,
        loaded,
        twin=load_model(ctx.params, init="random") if "random" in asked and init != "random" else None,
        pixels="pixels" in asked,
        layers=layers,
        extras=[*(["labels"] if "labels" in asked else []), *further],
        Cs=grid,
        refit=refit,
        seed=seed,
        batch_size=batch_size,
        # The solver needs float64, which Apple's GPUs lack.
        device="cpu" if place.type == "mps" else str(place),
        quiet=quiet,
    )
    frame = record.to_frame()
    figures: dict[str, Any] = {}
    if record.best_layer is not None:
        figures["probe"] = lambda: plot_probe_accuracy(frame)
        figures["probe_strength"] = lambda: plot_probe_strength(frame)
        if (frame["metric"] == "few_shot_accuracy").any():
            figures["probe_few_shot"] = lambda: plot_few_shot(frame)
    out.finish(record, table=record.table(), figures=figures)


def _names(what: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    from layerprobe.errors import UnknownNameError, did_you_mean

    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    for name in names:
        if name not in allowed:
            raise UnknownNameError(
                f"unknown {what} '{name}'.{did_you_mean(name, allowed)} Choose from: {', '.join(allowed)}, none"
            )
    return list(dict.fromkeys(names))


def _numbers(text: str) -> list[float]:
    from layerprobe.errors import UsageError

    try:
        return [float(item) for item in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--C takes numbers such as 1e-4,1e-2,1,100; got '{text}'") from error
