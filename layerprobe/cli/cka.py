"""`layerprobe cka`: which layers of two backbones resemble one another, and is it more than chance."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.loading import check_split, load_images, load_model, parse_sites, pick_layers, sketch
from layerprobe.cli.memory import forward_facts
from layerprobe.cli.output import Output


def cka(
    ctx: typer.Context,
    model: options.Model,
    task: options.TaskName,
    model_b: Annotated[
        str | None,
        typer.Option(
            "--model-b",
            "-b",
            help="The other backbone, for example the bridge run of the first; default: itself.",
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "test",
    blocks: options.Blocks = "all",
    sites: options.Sites = "resid_post",
    permutations: Annotated[
        int, typer.Option("--permutations", min=1, help="At least this many shuffles of the images.")
    ] = 1000,
    intervals: Annotated[
        bool, typer.Option("--intervals", help="Write values and 95 % intervals into the heat map.")
    ] = False,
    batch_size: options.BatchSize = 256,
    revision: options.Revision = None,
    revision_b: Annotated[str | None, typer.Option("--revision-b", help="Revision of --model-b.")] = None,
    init: options.Init = "pretrained",
    init_b: Annotated[
        str | None, typer.Option("--init-b", help="'pretrained' or 'random' for the other backbone.")
    ] = None,
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
    """Compare layers by debiased CKA on a task's images: values, intervals, p-values, the closest layers.

    With one model, its layers are compared with one another. With --init-b random, a model meets its own
    random twin; with --model-b RUN, the same model after a bridge. Patch size, image size and attention
    concern language models; each backbone keeps its own preprocessing.

    Example: layerprobe cka --model minilm --init-b random --task digits
    """
    out = Output("cka", as_json=as_json, folder=output, quiet=quiet)
    other = model_b if model_b is not None else (model if init_b is not None else None)
    check_split(split)
    chosen_sites = parse_sites(sites)
    second_init = init_b or "pretrained"
    if dry_run:
        seen = sketch(ctx.params)
        pick_layers(seen, blocks, chosen_sites, model=model)
        if other is not None:
            twin = sketch(ctx.params, model=other, revision=revision_b, init=second_init)
            pick_layers(twin, blocks, chosen_sites, model=other)
        facts = forward_facts(seen, batch_size=batch_size)
        facts["compared with"] = "itself" if other is None else f"{other} ({second_init})"
        facts["memory of the comparison"] = (
            "about 200 MiB beside the features on disk; the permutations hold at most 4,096 images of all layers"
        )
        out.dry_run(facts)
        return

    from layerprobe.analyzers.features import extract_features
    from layerprobe.analyzers.similarity import cka_matrix
    from layerprobe.plotting.similarity import plot_cka, plot_cka_closest

    loaded = load_images(ctx.params)

    def features(name: str, revision: str | None, init: str) -> tuple[Any, Any]:
        backbone = load_model(ctx.params, model=name, revision=revision, init=init)
        layers = pick_layers(backbone, blocks, chosen_sites, model=name)
        return extract_features(
            backbone, loaded, split, layers=layers, batch_size=batch_size, quiet=quiet
        ), backbone

    first, backbone = features(model, revision, init)
    target = str(backbone.device)
    del backbone
    second = None if other is None else features(other, revision_b, second_init)[0]
    record = cka_matrix(first, second, permutations=permutations, seed=seed, device=target, quiet=quiet)
    frame = record.to_frame()
    out.finish(
        record,
        table=record.table(),
        figures={
            "cka": lambda: plot_cka(frame, intervals=intervals),
            "cka_closest": lambda: plot_cka_closest(record.closest()),
        },
    )
