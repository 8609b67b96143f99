"""`layerprobe outliers`: the outlier parameters of a checkpoint, read from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from layerprobe.cli import options
from layerprobe.cli.output import Output

Sigmas = Annotated[str, typer.Option("--sigmas", "-k", help="Comma-separated k of |w - mean| > k·std.")]
Engine = Annotated[str, typer.Option("--engine", help="auto, numba or torch; the numbers are the same.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Tensors read at once; default: the usable cores.")
]

_NO_EFFECT = "No effect here, accepted because every command has it: "
NoDevice = Annotated[
    str | None,
    typer.Option(
        "--device", help=_NO_EFFECT + "weights are counted on the CPU.", rich_help_panel="Common options"
    ),
]
NoDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help=_NO_EFFECT + "weights are measured as they are stored.",
        rich_help_panel="Common options",
    ),
]
NoLimit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help=_NO_EFFECT + "no images are read.", rich_help_panel="Common options"),
]
NoSeed = Annotated[
    int,
    typer.Option("--seed", min=0, help=_NO_EFFECT + "nothing is random.", rich_help_panel="Common options"),
]


def outliers(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Alias, hub id, local folder, bridge run, or one weight file."),
    ],
    sigmas: Sigmas = "3,6",
    absolute: Annotated[str, typer.Option("--absolute", help="Comma-separated t of |w| > t.")] = "",
    mean_multiples: Annotated[
        str, typer.Option("--mean-multiples", help="Comma-separated M of |w| > M·mean|w|.")
    ] = "5",
    top: Annotated[int, typer.Option("--top", min=0, help="Largest entries kept per tensor.")] = 3,
    include: Annotated[
        list[str] | None,
        typer.Option("--include", help="Only tensors that fit this pattern, e.g. '*.mlp.*'."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="No tensors that fit this pattern; may be repeated.")
    ] = None,
    axes: Annotated[
        bool | None,
        typer.Option(
            "--axes/--no-axes",
            help="Rows and columns that stand out; default: for checkpoints up to 512 MiB.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only moments and counts beyond kσ; quicker for float32.")
    ] = False,
    engine: Engine = "auto",
    threads: Threads = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for table, record and figures; or one file ending on .csv, .parquet or .json.",
            rich_help_panel="Common options",
        ),
    ] = None,
    seed: NoSeed = 0,
    device: NoDevice = None,
    dtype: NoDtype = None,
    limit: NoLimit = None,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
) -> None:
    """Count the outlier parameters of a model, exactly, without building the model.

    Example: layerprobe outliers --model llama-7b
    """
    single = output if output is not None and output.suffix in (".csv", ".parquet", ".json") else None
    out = Output("outliers", as_json=as_json, folder=None if single else output, quiet=quiet)
    say_unused(out, device=device, dtype=dtype, limit=limit)
    from layerprobe.metrics.outliers import OutlierRules

    chosen = parse_floats(sigmas, "--sigmas")
    counted = parse_floats(absolute, "--absolute")
    if quick:
        rules = OutlierRules.sigma_only(chosen, absolute=counted, top=top)
    else:
        multiples = parse_floats(mean_multiples, "--mean-multiples")
        rules = OutlierRules(sigmas=chosen, absolute=counted, mean_multiples=multiples, top=top)
    if dry_run:
        from layerprobe.analyzers.outlier_scan import checkpoint_facts

        out.dry_run(
            checkpoint_facts(model, revision=revision, offline=offline, include=include, exclude=exclude)
        )
        return

    from layerprobe.analyzers.outliers import outlier_report

    report = outlier_report(
        model,
        revision=revision,
        rules=rules,
        include=include,
        exclude=exclude,
        threads=threads,
        axes=axes,
        engine=engine,
        offline=offline,
        quiet=quiet,
    )
    if single is not None:
        report.save(single)
        out.say(f"saved: {single}")
    out.finish(report, table=report.table(), figures=_figures(report) if out.folder is not None else None)


def say_unused(out: Output, **given: object) -> None:
    """Tell the user which of the options they gave change nothing in this command."""
    if unused := [f"--{name}" for name, value in given.items() if value is not None]:
        out.say(f"{' and '.join(unused)} changed nothing: weights are counted on the CPU as they are stored")


def parse_floats(text: str, flag: str) -> tuple[float, ...]:
    """Numbers from a comma-separated option; UsageError names the flag."""
    from layerprobe.errors import UsageError

    try:
        return tuple(float(item) for item in text.split(",") if item.strip())
    except ValueError:
        raise UsageError(f"{flag} takes comma-separated numbers such as 3,6; got '{text}'") from None


def _figures(report: Any) -> dict[str, Any]:
    from layerprobe.plotting import outliers as plots

    frame = report.to_frame()
    found: dict[str, Any] = {"outlier_tails": lambda: plots.plot_outlier_tails(frame)}
    if report.n_blocks and report.rules.sigmas:
        k = report.rules.sigmas[0]
        found["outlier_depth"] = lambda: plots.plot_outlier_depth(frame, n_sigma=k)
        found["outlier_heatmap"] = lambda: plots.plot_outlier_heatmap(frame, n_sigma=k)
    return found
