"""`layerprobe features`: run images through a backbone and keep what its layers say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.output import Output


def features(
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
    from layerprobe.cli.memory import forward_facts

    out = Output("features", as_json=as_json, folder=output, quiet=quiet)
    if dry_run:
        facts = forward_facts(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            offline=offline,
            batch_size=batch_size,
            trust_remote_code=trust_remote_code,
        )
        facts["store"] = _bill(
            facts, task, data_dir, limit, seed, offline, split, blocks, sites, tokens, store_dtype
        )
        out.dry_run(facts)
        return

    from layerprobe.analyzers.features import TOKENS, FeatureTable, extract_features
    from layerprobe.backbones import load_backbone
    from layerprobe.hooks import all_layers
    from layerprobe.layers import LayerRef, parse_blocks
    from layerprobe.tasks import load_task

    loaded = load_task(task, data_dir=data_dir, limit=limit, seed=seed, offline=offline)
    backbone = load_backbone(
        model,
        revision=revision,
        init=init,
        seed=seed,
        device=device,
        dtype=dtype,
        stem=stem,
        patch_size=patch_size,
        image_size=image_size,
        attention=attention,
        pooling=pooling,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    chosen = set(parse_blocks(blocks, backbone.n_blocks, model=model))
    layers = [
        layer
        for layer in all_layers(
            backbone.n_blocks, [LayerRef(0, site.strip()).site for site in sites.split(",")]
        )
        if layer.block is None or layer.block in chosen
    ]
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
    out.finish(record, table=record.overview())


def _bill(
    facts: dict[str, object],
    task: str,
    data_dir: Path | None,
    limit: int | None,
    seed: int,
    offline: bool,
    split: str,
    blocks: str,
    sites: str,
    tokens: bool,
    store_dtype: str,
) -> str:
    """Bytes that the store would grow by; for token features the count of patches is assumed to be 64."""
    from layerprobe.layers import parse_blocks
    from layerprobe.tasks import load_task

    loaded = load_task(task, data_dir=data_dir, limit=limit, seed=seed, offline=offline)
    n_images = sum(len(part) for name, part in loaded.splits.items() if split in ("all", name))
    n_blocks, width = facts["blocks"], facts["width"]
    assert isinstance(n_blocks, int)
    assert isinstance(width, int)
    n_layers = 1 + len(parse_blocks(blocks, n_blocks)) * len(sites.split(","))
    size = n_images * n_layers * width * (64 if tokens else 1) * (4 if store_dtype == "float32" else 2)
    return f"{size / 2**20:.1f} MiB: {n_images:,} images × {n_layers} layers × {width}" + (
        " × about 64 tokens" if tokens else ""
    )
