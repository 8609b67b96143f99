"""`layerprobe compare`: do models differ in their outlier parameters, and where?"""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from layerprobe.cli import options
from layerprobe.cli.options import option
from layerprobe.cli.outliers import CheckpointOptions
from layerprobe.cli.output import Output
from layerprobe.errors import UsageError


@options.option_group("checkpoint", CheckpointOptions)
@options.output_options("compare")
def compare(
    checkpoint: CheckpointOptions,
    out: Output,
    models: Annotated[
        list[str] | None, Argument(help="Two or more aliases, hub ids, local folders or bridge runs.")
    ] = None,
    group: list[str] | None = option(
        None, "NAME=MODEL,MODEL,…; repeat for each group, e.g. language=gpt2,minilm."
    ),
    sigmas: float = option(3.0, "The k of |w - mean| > k·std.", "--sigmas", "-k", min=0),
    confidence: float = option(0.95, "Level of the intervals.", min=0.5, max=0.9999),
    seed: options.Seed = 0,
) -> None:
    """Compare the outlier parameters of models or of groups of models, by module kind and depth.

    Example: layerprobe compare gpt2 vit-base
    """
    from layerprobe.analyzers.compare import check_groups, check_number, compare_outliers

    groups = parse_groups(group) if group else None
    members = [*(models or []), *(name for names in (groups or {}).values() for name in names)]
    check_groups(groups)
    check_number(len(set(members)))
    out.start(f"parameters beyond {sigmas:g}σ of {', '.join(dict.fromkeys(members))}")
    if out.dry_run:
        from layerprobe.analyzers.outlier_scan import checkpoint_facts

        out.show_facts({name: checkpoint_facts(name, offline=checkpoint.offline) for name in members})
        return

    record = compare_outliers(
        *(models or []),
        groups=groups,
        n_sigma=sigmas,
        confidence=confidence,
        seed=seed,
        quiet=out.quiet,
        **checkpoint.reading(),
    )
    out.finish(record, figures=lambda: {"compare": record.plot})


def parse_groups(texts: list[str]) -> dict[str, list[str]]:
    """`language=a,b` → {"language": ["a", "b"]}; UsageError for any other form or a repeated name."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        name, sign, models = text.partition("=")
        members = options.name_list(models)
        if not sign or not name.strip() or not members:
            raise UsageError(f"--group takes NAME=MODEL,MODEL,…; got '{text}'")
        if name.strip() in groups:
            raise UsageError(f"--group names '{name.strip()}' twice")
        groups[name.strip()] = members
    return groups
