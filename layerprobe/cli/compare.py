"""`layerprobe compare`: do models differ in their outlier parameters, and where?"""

from __future__ import annotations

from typing import Annotated

import typer

from layerprobe.cli import options
from layerprobe.cli.outliers import Engine, NoDevice, NoDtype, NoLimit, Threads, say_unused
from layerprobe.cli.output import Output


def compare(
    models: Annotated[
        list[str] | None, typer.Argument(help="Two or more aliases, hub ids, local folders or bridge runs.")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option("--group", help="NAME=MODEL,MODEL,…; repeat for each group, e.g. language=gpt2,minilm."),
    ] = None,
    n_sigma: Annotated[
        float, typer.Option("--n-sigma", "-k", min=0, help="The k of |w - mean| > k·std.")
    ] = 3.0,
    confidence: Annotated[
        float, typer.Option("--confidence", min=0.5, max=0.9999, help="Level of the intervals.")
    ] = 0.95,
    engine: Engine = "auto",
    threads: Threads = None,
    offline: options.Offline = False,
    seed: options.Seed = 0,
    device: NoDevice = None,
    dtype: NoDtype = None,
    limit: NoLimit = None,
    as_json: options.Json = False,
    output: options.OutDir = None,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare the outlier parameters of models or of groups of models, by module kind and depth.

    Example: layerprobe compare gpt2 vit-base
    """
    out = Output("compare", as_json=as_json, folder=output, quiet=quiet)
    say_unused(out, device=device, dtype=dtype, limit=limit)
    groups = parse_groups(group) if group else None
    members = [*(models or []), *(name for names in (groups or {}).values() for name in names)]
    from layerprobe.analyzers.compare import check_groups, check_number, compare_outliers

    check_groups(groups)
    check_number(len(set(members)))
    if dry_run:
        from layerprobe.analyzers.outlier_scan import checkpoint_facts

        out.dry_run({name: checkpoint_facts(name, offline=offline) for name in members})
        return

    record = compare_outliers(
        *(models or []),
        groups=groups,
        n_sigma=n_sigma,
        confidence=confidence,
        seed=seed,
        threads=threads,
        engine=engine,
        offline=offline,
        quiet=quiet,
    )
    out.finish(record, table=record.table(), figures={"compare": record.plot})


def parse_groups(texts: list[str]) -> dict[str, list[str]]:
    """`language=a,b` → {"language": ["a", "b"]}; UsageError for any other form or a repeated name."""
    from layerprobe.errors import UsageError

    found: dict[str, list[str]] = {}
    for text in texts:
        name, sign, models = text.partition("=")
        members = [member.strip() for member in models.split(",") if member.strip()]
        if not sign or not name.strip() or not members:
            raise UsageError(f"--group takes NAME=MODEL,MODEL,…; got '{text}'")
        if name.strip() in found:
            raise UsageError(f"--group names '{name.strip()}' twice")
        found[name.strip()] = members
    return found
