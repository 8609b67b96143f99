"""`layerprobe features`: run images through a backbone and keep the outputs of its layers."""

from __future__ import annotations

from pathlib import Path

from layerprobe import choices
from layerprobe.cli import options
from layerprobe.cli.memory import forward_facts
from layerprobe.cli.options import option
from layerprobe.cli.output import Output
from layerprobe.cli.processes import copies
from layerprobe.locks import process_number


@options.shardable_backbone_options()
@options.task_options()
@options.layer_options()
@options.output_options("features")
def features(
    backbone: options.ShardableBackboneOptions,
    task: options.TaskOptions,
    layers: options.LayerOptions,
    out: Output,
    split: str = option("all", "Which images.", choices=(*choices.SPLITS, "all")),
    store_dtype: str = option("float32", "On disk.", choices=choices.DTYPES),
    tokens: bool = option(
        False, "Keep every token instead of pooling; --dry-run tells the size.", "--tokens"
    ),
    workers: int = option(1, "Processes on this machine that share the images and the cores.", min=1),
    export: Path | None = option(None, "Also write them to FILE.safetensors or FILE.npy, a file a split."),
    cache_dir: options.CacheDir = None,
) -> None:
    """Extract and keep the features of a backbone's layers on a task's images.

    They land in the feature store, where cka, probe and transfer find them again; see: layerprobe ls features
    Several processes (--workers, torchrun, accelerate launch) share the images and end with the bytes of one.

    Example: layerprobe features minilm --task digits
    """
    if export is not None:
        from layerprobe.hooks.store_records import check_export

        check_export(export)
    what = "every layer" if layers.blocks == "all" else f"blocks {layers.blocks}"
    out.start(f"{what} of {backbone.model} on {split} images of {task.task}")
    seen = backbone.meta_backbone(task, out, blocks=layers.blocks)
    n_layers = len(layers.pick(seen, model=backbone.model))
    if out.dry_run:
        loaded = task.load(out)
        counts = {name: len(part) for name, part in loaded.splits.items() if split in ("all", name)}
        n_images = sum(counts.values())
        n_tokens, value_bytes = seen.tokens if tokens else 1, 4 if store_dtype == "float32" else 2
        size = n_images * n_layers * seen.hidden_size * n_tokens * value_bytes
        facts = forward_facts(seen, batch_size=layers.batch_size, counts=counts, shard=backbone.shard)
        facts["store"] = (
            f"{size / 2**20:.1f} MiB: {n_images:,} images × {n_layers} layers × {seen.hidden_size}"
        )
        facts["store"] += f" × {seen.tokens} tokens" if tokens else ""
        out.show_facts(facts)
        return

    with copies(workers):
        from layerprobe.analyzers.features import TOKENS, FeatureTable, extract_features

        images = task.load(out)
        network = backbone.of_this_process().load()
        chosen = layers.pick(network, model=backbone.model)
        extracted = [
            extract_features(
                network,
                images,
                name,
                layers=chosen,
                pooling=TOKENS if tokens else None,
                dtype=store_dtype,
                batch_size=layers.batch_size,
                cache_dir=cache_dir,
                quiet=out.quiet or process_number() > 0,
            )
            for name in (images.splits if split == "all" else [split])
        ]
    if process_number() == 0:
        record = FeatureTable(extracted)
        out.finish(record)
        for path in record.export(export) if export is not None else ():
            out.say(f"exported: {path}")
