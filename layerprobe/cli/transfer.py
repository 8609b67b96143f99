"""`layerprobe transfer`: what frozen layers already say about a task, and what training them would change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.loading import load_pair, sketch
from layerprobe.cli.memory import forward_facts
from layerprobe.cli.output import Output


def transfer(
    ctx: typer.Context,
    model: options.Model,
    task: options.TaskName,
    family: Annotated[str, typer.Option("--family", help="readable, trainable or both.")] = "both",
    knn: Annotated[
        bool, typer.Option("--knn/--no-knn", help="Leave-one-out kNN too; costs images squared.")
    ] = True,
    replicates: Annotated[
        int, typer.Option("--replicates", min=0, help="Half samples behind each standard error; 0: none.")
    ] = 30,
    batches: Annotated[int, typer.Option("--batches", min=3, help="Gradient batches.")] = 8,
    batch_size: options.BatchSize = 32,
    head: Annotated[
        str, typer.Option("--head", help="Gradients of what: a 'probe', or the model's 'own' classifier.")
    ] = "probe",
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Folder of the feature store; default: the cache.")
    ] = None,
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
    """Score every layer of a backbone for a task, without training the backbone.

    Two families that are never mixed: readable scores of a layer's output (LogME, H-score, TransRate, GBC, neural
    collapse, leave-one-out ridge, kNN), and trainable scores of a block's gradients (RGN, SNR, Taylor, Fisher).

    Example: layerprobe transfer --model minilm --task digits --limit 300
    """
    from layerprobe.errors import UnknownNameError

    out = Output("transfer", as_json=as_json, folder=output, quiet=quiet)
    families = {"both": ("readable", "trainable"), "readable": ("readable",), "trainable": ("trainable",)}
    if family not in families:
        raise UnknownNameError(f"unknown family '{family}'; choose one of: {', '.join(families)}")
    from layerprobe.analyzers.heads import check_head

    check_head(head)
    if dry_run:
        facts = forward_facts(sketch(ctx.params), batch_size=batch_size)
        facts["families"] = " and ".join(families[family])
        out.dry_run(facts)
        return

    from layerprobe.analyzers.transfer import transfer_scores
    from layerprobe.plotting.layer_scores import transfer_figure

    backbone, loaded = load_pair(ctx.params)
    record = transfer_scores(
        backbone,
        loaded,
        families=families[family],
        knn=knn,
        n_replicates=replicates,
        n_batches=batches,
        batch_size=batch_size,
        head=head,
        seed=seed,
        cache_dir=cache_dir,
        quiet=quiet,
    )
    out.finish(record, table=record.table(), figures={"transfer": lambda: transfer_figure(record.to_frame())})
