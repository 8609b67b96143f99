"""`layerprobe transfer`: what frozen layers already say about a task, and what training them would change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from layerprobe import choices
from layerprobe.cli import options
from layerprobe.cli.memory import forward_facts
from layerprobe.cli.options import option
from layerprobe.cli.output import Draw, Output

if TYPE_CHECKING:
    from layerprobe.analyzers.transfer import TransferScores

FAMILIES = {"both": ("readable", "trainable"), "readable": ("readable",), "trainable": ("trainable",)}


@options.backbone_options()
@options.task_options()
@options.output_options("transfer")
def transfer(
    backbone: options.BackboneOptions,
    task: options.TaskOptions,
    out: Output,
    family: str = option("both", "Which scores.", choices=tuple(FAMILIES)),
    knn: bool = option(True, "Leave-one-out kNN too; costs images squared.", "--knn/--no-knn"),
    replicates: int = option(30, "Half samples behind each standard error; 0: none.", min=0),
    batches: int = option(8, "Gradient batches.", min=3),
    batch_size: options.BatchSize = 32,
    head: str = option(
        "probe", "Gradients of what: a probe, or the model's own classifier.", choices=choices.HEADS
    ),
    cache_dir: options.CacheDir = None,
) -> None:
    """Score every layer of a backbone for a task, without training the backbone.

    Two families that are never mixed: readable scores of a layer's output (LogME, H-score, TransRate, GBC, neural
    collapse, leave-one-out ridge, kNN), and trainable scores of a block's gradients (RGN, SNR, Taylor, Fisher).

    Example: layerprobe transfer minilm --task digits --limit 300
    """
    out.start(f"{' and '.join(FAMILIES[family])} scores of every layer of {backbone.model} on {task.task}")
    seen = backbone.meta_backbone(task, out)
    if out.dry_run:
        facts = forward_facts(seen, batch_size=batch_size)
        out.show_facts({**facts, "families": " and ".join(FAMILIES[family])})
        return

    from layerprobe.analyzers.transfer import transfer_scores

    images = task.load(out)
    record = transfer_scores(
        backbone.load(),
        images,
        families=FAMILIES[family],
        knn=knn,
        n_replicates=replicates,
        n_batches=batches,
        batch_size=batch_size,
        head=head,
        seed=backbone.seed,
        cache_dir=cache_dir,
        quiet=out.quiet,
    )
    out.finish(record, figures=lambda: figures(record))


def figures(record: TransferScores) -> dict[str, Draw]:
    from layerprobe.plotting.layer_scores import transfer_figure

    return {"transfer": lambda: transfer_figure(record.to_frame())}
