"""`layerprobe features`: run images through a backbone and keep what its layers say."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.loading import check_split, load_images, load_pair, parse_sites, pick_layers, sketch
from layerprobe.cli.memory import forward_facts
from layerprobe.cli.output import Output

if TYPE_CHECKING:
    from layerprobe.tasks.task import Task


def features(
    ctx: typer.Context,
    model: options.Model,
    task: options.TaskName,
    split: Annotated[str, typer.Option("--split", help="train, validation, test or all.")] = "all",
    blocks: options.Blocks = "all",
    sites: options.Sites = "resid_post",
    store_dtype: Annotated[
        str, typer.Option("--store-dtype", help="float32, float16 or bfloat16 on disk.")
    ] = "float32",
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Keep every token instead of pooling; --dry-run tells the size.")
    ] = False,
    cache_dir: Annotated[
        Path | None, typer.Option("--cache-dir", help="Folder of the feature store; default: the cache.")
    ] = None,
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
    """Extract and keep the features of a backbone's layers on a task's images.

    They land in the feature store, where cka, probe and transfer find them again; see: layerprobe ls features

    Example: layerprobe features --model minilm --task digits
    """
    out = Output("features", as_json=as_json, folder=output, quiet=quiet)
    from layerprobe.hooks.feature_store import check_store_dtype

    check_split(split, "all")
    check_store_dtype(store_dtype)
    chosen_sites = parse_sites(sites)
    if dry_run:
        seen = sketch(ctx.params)
        n_layers = len(pick_layers(seen, blocks, chosen_sites, model=model))
        size = seen.hidden_size * (seen.tokens if tokens else 1) * (4 if store_dtype == "float32" else 2)
        bill = _bill(load_images(ctx.params), split, n_layers, size)
        out.dry_run(
            {
                **forward_facts(seen, batch_size=batch_size),
                "store": f"{bill} × {seen.hidden_size}" + (f" × {seen.tokens} tokens" if tokens else ""),
            }
        )
        return

    from layerprobe.analyzers.features import TOKENS, FeatureTable, extract_features

    backbone, loaded = load_pair(ctx.params)
    layers = pick_layers(backbone, blocks, chosen_sites, model=model)
    extracted = [
        extract_features(
            backbone,
            loaded,
            name,
            layers=layers,
            pooling=TOKENS if tokens else None,
            dtype=store_dtype,
            batch_size=batch_size,
            cache_dir=cache_dir,
            quiet=quiet,
        )
        for name in (loaded.splits if split == "all" else [split])
    ]
    record = FeatureTable(extracted)
    out.finish(record, table=record.table())


def _bill(loaded: Task, split: str, n_layers: int, layer_bytes: int) -> str:
    """By how much the store would grow: every image is kept with `layer_bytes` a layer."""
    n_images = sum(len(part) for name, part in loaded.splits.items() if split in ("all", name))
    size = n_images * n_layers * layer_bytes
    return f"{size / 2**20:.1f} MiB: {n_images:,} images × {n_layers} layers"
