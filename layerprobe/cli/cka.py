"""`layerprobe cka`: which layers of two backbones resemble one another, and is it more than chance."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from layerprobe import choices
from layerprobe.cli import options
from layerprobe.cli.memory import count_images, forward_facts
from layerprobe.cli.options import option
from layerprobe.cli.output import Draw, Output

if TYPE_CHECKING:
    from layerprobe.analyzers.features import Features
    from layerprobe.analyzers.similarity import CKAMatrix


@options.backbone_options()
@options.task_options()
@options.layer_options()
@options.output_options("cka")
def cka(
    backbone: options.BackboneOptions,
    task: options.TaskOptions,
    layers: options.LayerOptions,
    out: Output,
    model_b: str | None = option(
        None,
        "The other backbone, for example the bridge run of the first; default: itself.",
        "--model-b",
        "-b",
    ),
    revision_b: str | None = option(None, "Revision of --model-b."),
    init_b: str | None = option(None, "Weights of the other backbone.", choices=choices.INITS),
    split: str = option("test", "Which images.", choices=choices.SPLITS),
    permutations: int = option(1000, "At least this many shuffles of the images, or all there are.", min=1),
    intervals: bool = option(False, "Write values and 95 % intervals into the heat map.", "--intervals"),
    cache_dir: options.CacheDir = None,
) -> None:
    """Compare layers by debiased CKA on a task's images: values, intervals, p-values, the closest layers.

    With one model, its layers are compared with one another. With --init-b random, a model is compared with its own
    architecture at random weights; with --model-b RUN, with itself after a bridge. Patch size, image size and
    attention concern language models; each backbone keeps its own preprocessing.

    Example: layerprobe cka minilm --init-b random --task digits
    """
    other = None
    if model_b is not None or init_b is not None:
        other = replace(
            backbone,
            model=model_b or backbone.model,
            revision=revision_b if model_b or revision_b else backbone.revision,
            init=init_b or "pretrained",
        )
    with_whom = "one another" if other is None else f"those of {other.model} ({other.init})"
    out.start(f"layers of {backbone.model} against {with_whom}, {split} images of {task.task}")
    seen = backbone.meta_backbone(task, out, blocks=layers.blocks)
    layers.pick(seen, model=backbone.model)
    if other is not None:
        layers.pick(other.meta_backbone(task, out), model=other.model)
    if out.dry_run:
        counts = {name: n for name, n in count_images(task, out).items() if name == split}
        facts = forward_facts(
            seen, batch_size=layers.batch_size, models=1 + (other is not None), counts=counts
        )
        facts["compared with"] = "itself" if other is None else f"{other.model} ({other.init})"
        facts["memory of the comparison"] = (
            "about 200 MiB beside the features on disk; the permutations hold at most 4,096 images of all layers"
        )
        out.show_facts(facts)
        return

    from layerprobe.analyzers.features import extract_features
    from layerprobe.analyzers.similarity import cka_matrix

    images = task.load(out)

    def features(which: options.BackboneOptions) -> tuple[Features, str]:
        network = which.load()
        chosen = layers.pick(network, model=which.model)
        found = extract_features(
            network,
            images,
            split,
            layers=chosen,
            batch_size=layers.batch_size,
            cache_dir=cache_dir,
            quiet=out.quiet,
        )
        return found, str(network.device)

    first, device = features(backbone)
    second = None if other is None else features(other)[0]
    record = cka_matrix(
        first, second, permutations=permutations, seed=backbone.seed, device=device, quiet=out.quiet
    )
    out.finish(record, figures=lambda: figures(record, intervals))


def figures(record: CKAMatrix, intervals: bool) -> dict[str, Draw]:
    from layerprobe.plotting.similarity import plot_cka, plot_cka_closest

    frame = record.to_frame()
    return {
        "cka": lambda: plot_cka(frame, intervals=intervals),
        "cka_closest": lambda: plot_cka_closest(record.closest()),
    }
