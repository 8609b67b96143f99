"""`layerprobe outliers`: the outlier parameters of a checkpoint, read from its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from layerprobe.cli import options
from layerprobe.cli.options import common_option, option
from layerprobe.cli.output import Output

if TYPE_CHECKING:
    from layerprobe.analyzers.outliers import OutlierReport


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """How weight files are read."""

    engine: str = option("auto", "What counts; the numbers are the same.", choices=("auto", "numba", "torch"))
    threads: int | None = option(None, "Tensors read at once; default: the usable cores.", min=1)
    offline: options.Offline = False

    def reading(self) -> dict[str, Any]:
        return {"engine": self.engine, "threads": self.threads, "offline": self.offline}


@options.option_group("checkpoint", CheckpointOptions)
@options.output_options("outliers", one_file=True)
def outliers(
    checkpoint: CheckpointOptions,
    out: Output,
    model: Annotated[
        str, Option("--model", "-m", help="Alias, hub id, local folder, bridge run, or one weight file.")
    ],
    sigmas: str = option("3,6", "Comma-separated k of |w - mean| > k·std.", "--sigmas", "-k"),
    absolute: str = option("", "Comma-separated t of |w| > t."),
    mean_multiples: str = option("5", "Comma-separated M of |w| > M·mean|w|."),
    top: int = option(3, "Largest entries kept per tensor.", min=0),
    include: list[str] | None = option(None, "Only tensors that fit this pattern, e.g. '*.mlp.*'."),
    exclude: list[str] | None = option(None, "No tensors that fit this pattern; may be repeated."),
    state: str | None = option(
        None, "Of a training checkpoint: which state, e.g. ema; default: the model's own."
    ),
    axes: bool | None = option(
        None, "Rows and columns that stand out; default: for checkpoints up to 512 MiB.", "--axes/--no-axes"
    ),
    quick: bool = option(False, "Only moments and counts beyond kσ; quicker for float32.", "--quick"),
    revision: options.Revision = None,
    output: Path | None = common_option(
        None,
        "Folder for table, record and figures; or one file ending on .csv, .parquet or .json.",
        "--output",
        "-o",
    ),
) -> None:
    """Count the outlier parameters of a model, exactly, without building the model.

    Example: layerprobe outliers minilm
    """
    from layerprobe.metrics.outliers import OutlierRules

    chosen, counted = numbers(sigmas, "--sigmas"), numbers(absolute, "--absolute")
    if quick:
        rules = OutlierRules.sigma_only(chosen, absolute=counted, top=top)
    else:
        multiples = numbers(mean_multiples, "--mean-multiples")
        rules = OutlierRules(sigmas=chosen, absolute=counted, mean_multiples=multiples, top=top)
    beyond = " and ".join(f"{k:g}σ" for k in chosen)
    out.start(f"parameters of {model} beyond {beyond}, counted from its files")
    files: dict[str, Any] = {"revision": revision, "include": include, "exclude": exclude, "state": state}
    if out.dry_run:
        from layerprobe.analyzers.outlier_scan import checkpoint_facts

        out.show_facts(checkpoint_facts(model, offline=checkpoint.offline, **files))
        return

    from layerprobe.analyzers.outliers import outlier_report

    report = outlier_report(model, rules=rules, axes=axes, quiet=out.quiet, **files, **checkpoint.reading())
    out.finish(report, figures=lambda: figures(report))


def numbers(text: str, flag: str) -> tuple[float, ...]:
    return tuple(options.number_list(text, f"{flag} takes comma-separated numbers such as 3,6; got '{text}'"))


def figures(report: OutlierReport) -> dict[str, Any]:
    from layerprobe.plotting import outliers as plots

    if not report.pool().n:
        return {}
    frame = report.roll_up_frame()
    drawn: dict[str, Any] = {"outlier_tails": lambda: plots.plot_outlier_tails(frame)}
    if report.n_blocks and report.rules.sigmas:
        k = report.rules.sigmas[0]
        drawn["outlier_depth"] = lambda: plots.plot_outlier_depth(frame, n_sigma=k)
        drawn["outlier_heatmap"] = lambda: plots.plot_outlier_heatmap(frame, n_sigma=k)
    return drawn
