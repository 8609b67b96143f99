"""`layerprobe attribute`: which blocks carry the visual prediction, and where in the image."""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.loading import check_split, load_pair, sketch
from layerprobe.cli.memory import forward_facts
from layerprobe.cli.output import Output


def attribute(
    ctx: typer.Context,
    model: options.Model,
    task: options.TaskName,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Comma-separated: skip, mean_ablation, conductance, update, gradient_x_activation, "
            "integrated_gradients.",
        ),
    ] = "skip,mean_ablation,conductance,update",
    head: Annotated[
        str,
        typer.Option("--head", help="Whose prediction: a linear 'probe', or the model's 'own' classifier."),
    ] = "probe",
    split: Annotated[
        str, typer.Option("--split", help="Images to explain: train, validation or test.")
    ] = "test",
    images: Annotated[int, typer.Option("--images", min=2, help="How many images to explain.")] = 128,
    maps: Annotated[int, typer.Option("--maps", min=0, help="Patch-level maps of the first images.")] = 6,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest completeness error of path methods, a share.")
    ] = 0.02,
    max_steps: Annotated[int, typer.Option("--max-steps", min=8, help="Most steps along the path.")] = 512,
    batch_size: options.BatchSize = 32,
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
    """Rank the blocks of a backbone by what they contribute to the predicted class.

    Blocks are skipped or replaced by their mean, and the path from a mean image to each image is integrated, with
    steps that adapt until the completeness error is small. DeepLift, LRP and whole-block sums are refused.

    Example: layerprobe attribute --model minilm --task digits --limit 300 --images 32
    """
    out = Output("attribute", as_json=as_json, folder=output, quiet=quiet)
    from layerprobe.analyzers.attribution import check_methods, check_sizes
    from layerprobe.analyzers.heads import check_head

    chosen = check_methods([name.strip() for name in methods.split(",") if name.strip()])
    check_head(head)
    check_split(split)
    check_sizes(images, tolerance, max_steps)
    if dry_run:
        facts = forward_facts(sketch(ctx.params), batch_size=batch_size)
        facts["methods"] = ", ".join(chosen)
        facts["images"] = f"{images} of {split}"
        out.dry_run(facts)
        return

    from layerprobe.analyzers.attribution import attribute_layers
    from layerprobe.plotting.layer_scores import attribution_figure, patch_maps_figure

    backbone, loaded = load_pair(ctx.params)
    record = attribute_layers(
        backbone,
        loaded,
        methods=chosen,
        head=head,
        split=split,
        n_images=images,
        n_maps=maps,
        tolerance=tolerance,
        max_steps=max_steps,
        batch_size=batch_size,
        seed=seed,
        quiet=quiet,
    )
    figures = {"attribution": lambda: attribution_figure(record.to_frame())}
    if not record.maps.empty:
        figures["attribution_maps"] = lambda: patch_maps_figure(
            record.maps, record.pictures, classes=list(loaded.classes)
        )
    out.finish(record, table=record.table(), figures=figures)
