"""`layerprobe probe`: how much of a task a linear classifier reads off each layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layerprobe.cli import options
from layerprobe.cli.memory import count_images, forward_facts
from layerprobe.cli.options import option
from layerprobe.cli.output import Output
from layerprobe.cli.processes import copies, sharing_work
from layerprobe.locks import process_number

if TYPE_CHECKING:
    from layerprobe.analyzers.probe_record import LinearProbes

CONTROLS = ("chance", "pixels", "random", "labels")
EXTRAS = ("knn", "ridge", "mdl", "few-shot")


@options.backbone_options()
@options.task_options()
@options.layer_options()
@options.output_options("probe")
def probe(
    backbone: options.BackboneOptions,
    task: options.TaskOptions,
    layers: options.LayerOptions,
    out: Output,
    controls: str = option(
        "pixels,random,labels",
        "Comma-separated: pixels, random (the same architecture untrained), labels (random labels, "
        "for selectivity); or none. Chance is always told.",
    ),
    extras: str = option("none", "Comma-separated: knn, ridge, mdl (online code length), few-shot; or none."),
    strengths: str | None = option(
        None, "Comma-separated inverse L2 strengths; default 1e-4 to 1e3, 8 values.", "--C"
    ),
    refit: str = option(
        "train+validation", "Images of the last fit, at the chosen C.", choices=("train+validation", "train")
    ),
    workers: int = option(
        1, "Processes on this machine that share the images, the layers and the cores.", min=1
    ),
    cache_dir: options.CacheDir = None,
) -> None:
    """Probe each layer linearly: C chosen on validation, accuracy measured once on test, beside controls.

    Every fit is driven to within 1e-4 of its optimum and says how far it is from it. Differences from the
    best layer carry paired bootstrap intervals.

    Example: layerprobe probe minilm --task digits --limit 500 --patch-size 4
    """
    asked = chosen_names("control", controls, CONTROLS)
    further = chosen_names("extra", extras, EXTRAS)
    refusal = f"--C takes numbers such as 1e-4,1e-2,1,100; got '{strengths}'"
    given = None if strengths is None else options.number_list(strengths, refusal)
    out.start(
        f"a linear classifier on every layer of {backbone.model} for {task.task}; "
        f"controls: {', '.join(['chance', *asked])}"
    )
    from layerprobe.metrics.validation import C_GRID, check_grid

    grid = check_grid(C_GRID if given is None else given)
    seen = backbone.meta_backbone(task, out, blocks=layers.blocks)
    layers.pick(seen, model=backbone.model)
    random = "random" in asked and backbone.init != "random"
    if out.dry_run:
        facts = forward_facts(
            seen, batch_size=layers.batch_size, models=1 + random, counts=count_images(task, out)
        )
        facts["controls"] = ", ".join(["chance", *(name for name in asked if name != "chance")])
        facts["extras"] = ", ".join(further) or "none"
        facts["memory of the probes"] = (
            "about 3 times the features of one layer, and 5 × images × classes values"
        )
        out.show_facts(facts)
        return

    with copies(workers), sharing_work() as work:
        from layerprobe.analyzers.probes import probe_backbone

        images = task.load(out)
        own = backbone.of_this_process()
        network = own.load()
        record = probe_backbone(
            network,
            images,
            twin=replace(own, init="random").load() if random else None,
            pixels="pixels" in asked,
            layers=layers.pick(network, model=backbone.model),
            extras=[*(["labels"] if "labels" in asked else []), *further],
            Cs=grid,
            refit=refit,
            seed=backbone.seed,
            batch_size=layers.batch_size,
            cache_dir=cache_dir,
            # The solver needs float64, which Apple's GPUs lack.
            device="cpu" if network.device.type == "mps" else str(network.device),
            quiet=out.quiet or process_number() > 0,
            work=work,
        )
    if process_number() == 0:
        out.finish(record, figures=lambda: figures(record))


def figures(record: LinearProbes) -> dict[str, Any]:
    from layerprobe.plotting.probes import plot_few_shot, plot_probe_accuracy, plot_probe_strength

    if record.best_layer is None:
        return {}
    frame = record.to_frame()
    drawn: dict[str, Any] = {
        "probe": lambda: plot_probe_accuracy(frame),
        "probe_strength": lambda: plot_probe_strength(frame),
    }
    if (frame["metric"] == "few_shot_accuracy").any():
        drawn["probe_few_shot"] = lambda: plot_few_shot(frame)
    return drawn


def chosen_names(what: str, text: str, allowed: tuple[str, ...]) -> list[str]:
    """Names out of `allowed`, each once, or none."""
    names = list(dict.fromkeys(options.name_list(text)))
    for name in names:
        options.check_name(what, name, (*allowed, "none"))
    return [name for name in names if name != "none"]
