"""`layerprobe attribute`: which blocks carry the visual prediction, and where in the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerprobe import choices
from layerprobe.cli import options
from layerprobe.cli.memory import forward_facts
from layerprobe.cli.options import option
from layerprobe.cli.output import Draw, Output
from layerprobe.cli.processes import copies, sharing_work
from layerprobe.locks import process_number

if TYPE_CHECKING:
    from layerprobe.analyzers.attribution import LayerAttribution


@options.backbone_options()
@options.task_options()
@options.output_options("attribute")
def attribute(
    backbone: options.BackboneOptions,
    task: options.TaskOptions,
    out: Output,
    methods: str = option(
        "skip,mean_ablation,conductance,update",
        "Comma-separated: skip, mean_ablation, conductance, update, gradient_x_activation, "
        "integrated_gradients.",
    ),
    head: str = option(
        "probe", "Whose prediction: a linear probe's, or the model's own classifier's.", choices=choices.HEADS
    ),
    split: str = option("test", "Images to explain.", choices=choices.SPLITS),
    images: int = option(128, "How many images to explain.", min=2),
    maps: int = option(6, "Patch-level maps of the first images.", min=0),
    tolerance: float = option(0.02, "Largest completeness error of path methods, a share."),
    max_steps: int = option(512, "Most steps along the path.", min=8),
    batch_size: options.BatchSize = 32,
    workers: int = option(1, "Processes on this machine that share the images and the cores.", min=1),
) -> None:
    """Rank the blocks of a backbone by what they contribute to the predicted class.

    Blocks are skipped or replaced by their mean, and the path from a mean image to each image is integrated, with
    steps that adapt until the completeness error is small. DeepLift, LRP and whole-block sums are refused.

    Example: layerprobe attribute minilm --task digits --limit 300 --images 32
    """
    from layerprobe.analyzers.attribution_choices import check_methods, check_sizes

    chosen = check_methods(options.name_list(methods))
    check_sizes(images, tolerance, max_steps)
    out.start(f"blocks of {backbone.model} on {images} {split} images of {task.task}, by {', '.join(chosen)}")
    seen = backbone.meta_backbone(task, out)
    if out.dry_run:
        facts = forward_facts(seen, batch_size=batch_size)
        out.show_facts({**facts, "methods": ", ".join(chosen), "images": f"{images} of {split}"})
        return

    with copies(workers), sharing_work() as work:
        from layerprobe.analyzers.attribution import attribute_layers

        loaded = task.load(out)
        record = attribute_layers(
            backbone.of_this_process().load(),
            loaded,
            methods=chosen,
            head=head,
            split=split,
            n_images=images,
            n_maps=maps,
            tolerance=tolerance,
            max_steps=max_steps,
            batch_size=batch_size,
            seed=backbone.seed,
            quiet=out.quiet or process_number() > 0,
            work=work,
        )
    if process_number() == 0:
        out.finish(record, figures=lambda: figures(record, list(loaded.classes)))


def figures(record: LayerAttribution, classes: list[str]) -> dict[str, Draw]:
    from layerprobe.plotting.layer_scores import attribution_figure, patch_maps_figure

    drawn: dict[str, Draw] = {"attribution": lambda: attribution_figure(record.to_frame())}
    if not record.maps.empty:
        drawn["attribution_maps"] = lambda: patch_maps_figure(record.maps, record.pictures, classes=classes)
    return drawn
