"""What the studies share: the command line, models and tasks by name, claims, and the answer page.

A study is a script with its question in the first line of its docstring. It writes into results/<study>/:
`table.csv` (every measurement, long), `answers.csv` (what is claimed, each with n, seeds, interval and
command), figures, `about.json` (settings, versions, hardware) and a README.md that is made from the numbers.
Nothing is measured here: that is the library's work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from layerprobe.backbones import Backbone, load_backbone
from layerprobe.cli.output import save_figure
from layerprobe.errors import LayerprobeError
from layerprobe.files import read_json, write_json, write_text
from layerprobe.metrics.intervals import mean_interval, paired_seed_interval
from layerprobe.progress import note
from layerprobe.provenance import provenance
from layerprobe.tables import render_table, tidy, write_frame
from layerprobe.tasks import Task, load_task

STUDIES = (
    "outlier_gap",
    "depth_curves",
    "bridge_cka",
    "partial_bridge",
    "score_truth",
    "lr_fairness",
    "depth_and_data",
)
"""In the order of the paper's claims; also the order of `make studies`."""

WORK = Path("runs/studies")
"""Finished parts of unfinished studies; not part of the repository."""

MIN_SEEDS = 3
"""Fewer seeds claim nothing (PROTOCOL.md, section 8); 0 means that nothing was random."""

VISION = ("vit-mnist", "vit-cifar10", "vit-base", "deit", "dinov2", "clip")


class Size:
    """What a study does by default: `quick` on what the extra [demo] brings, full on the shared folder.

    `settings` are those of the study alone, by names of its own.
    """

    def __init__(
        self,
        models: tuple[str, ...],
        tasks: tuple[str, ...],
        limit: int | None,
        patch: int | None,
        **settings: Any,
    ) -> None:
        self.models, self.tasks, self.limit, self.patch = models, tasks, limit, patch
        self.settings = SimpleNamespace(**settings)


@dataclass
class Setup:
    """The command line, resolved."""

    name: str
    question: str
    arguments: argparse.Namespace
    models: list[str]
    tasks: list[str]
    limit: int | None
    patch: int | None
    settings: SimpleNamespace
    began: float = field(default_factory=time.process_time)

    @property
    def quick(self) -> bool:
        return bool(self.arguments.quick)

    @property
    def output(self) -> Path:
        default = WORK / "quick" / self.name if self.quick else Path("results") / self.name
        return Path(self.arguments.output or default)

    @property
    def features(self) -> Path:
        """Where features are kept between calls."""
        return WORK / "features"

    @property
    def command(self) -> str:
        return shlex.join(["python", f"analyses/{self.name}.py", *self.arguments.line])

    def path(self, name: str, kind: str) -> str:
        """`name` within the data folder where it is there, else as it was written: alias, hub id, folder."""
        base, _, column = name.partition(":")
        local = self.arguments.data / kind / base if self.arguments.data else None
        if local is not None and local.is_dir():
            return f"{local}:{column}" if column else str(local)
        return name

    def load(self, model: str, task: Task, **options: Any) -> Backbone:
        """A backbone ready for `task`; language backbones get the study's patch size and a PCA stem."""
        options = {"stem": "pca", "seed": 0, "device": self.arguments.device, **options}
        if is_vision(model):
            options.pop("stem")
        else:
            size = task.image_size
            # 8 does not divide MNIST's 28 pixels: the largest patch that does, 7, keeps the 16 tokens.
            if size is not None and self.patch is not None:
                options["patch_size"] = max(p for p in range(1, self.patch + 1) if size % p == 0)
        return load_backbone(self.path(model, "models"), **options).prepare(task)

    def task(self, name: str) -> Task:
        return load_task(self.path(name, "data"), limit=self.limit, seed=0)

    def kept(self, key: str, make: Callable[[], Any], **settings: Any) -> Any:
        """JSON that an earlier call made with the same settings, or that `make` makes now."""
        name = digest({"limit": self.limit, "patch": self.patch, **settings})
        path = WORK / self.name / f"{short(key)}-{name}.json"
        if path.exists():
            return read_json(path, what="part of a study")
        note(f"{self.name}: {key}")
        made = make()
        write_json(path, made, indent=None)
        return made


def setup(name: str, doc: str, quick: Size, full: Size, argv: Sequence[str] | None, **more: str) -> Setup:
    """Read the command line; `argv` None: of this process. `more` names further options with their help."""
    line = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog=f"analyses/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with models/ and data/")
    parser.add_argument("--quick", action="store_true", help="about a minute on what the extra [demo] brings")
    for option, kind in (("--model", "models"), ("--task", "data")):
        parser.add_argument(option, help=f"comma-separated: alias, hub id, folder, or a name in DATA/{kind}")
    parser.add_argument("--limit", type=int, help="training images; the others in proportion")
    parser.add_argument("--patch", type=int, help="pixels per side of a patch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help=f"default results/{name}; quick: {WORK}/quick/{name}")
    for option, text in more.items():
        parser.add_argument(f"--{option.replace('_', '-')}", help=text)
    arguments = parser.parse_args(line)
    arguments.line = line
    size = quick if arguments.quick else full
    named = arguments.model or getattr(arguments, "tables", None)
    if arguments.data is None and not arguments.quick and not named:
        parser.error("give --data (a folder with models/ and data/), --model and --task, or --quick")
    return Setup(
        name,
        doc.strip().splitlines()[0],
        arguments,
        _listed(arguments.model) or list(size.models),
        _listed(arguments.task) or list(size.tasks),
        arguments.limit or size.limit,
        arguments.patch or size.patch,
        size.settings,
    )


def run(main: Callable[[], None]) -> None:
    """Call a study; known mistakes give one line."""
    try:
        main()
    except LayerprobeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; finished parts are kept")


def short(name: str) -> str:
    """The last part of a path or hub id: what tables call a model or a task."""
    return name.rstrip("/").rsplit("/", 1)[-1]


def is_vision(model: str) -> bool:
    """Whether a name is that of a vision backbone, which brings its own stem."""
    return short(model).startswith(VISION)


# -- what is claimed --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One claim. It holds where its interval excludes `null` and its p, where it has one, is at most 0.05.

    `key` groups claims of one kind; `unit` is points, times or empty for a plain number. `n` counts `counted`
    (test images, models, …), `n_seeds` the seeds of what was random, 0 where nothing was.
    """

    key: str
    claim: str
    value: float
    low: float
    high: float
    interval: str
    n: int
    counted: str
    n_seeds: int
    model: str
    task: str
    unit: str = "points"
    null: float = 0.0
    pvalue: float | None = None

    @property
    def verdict(self) -> str:
        if not np.isfinite([self.low, self.high]).all():
            return "not shown"
        if 0 < self.n_seeds < MIN_SEEDS:
            return "too few seeds"
        if self.pvalue is not None and self.pvalue > 0.05:
            return "not shown"
        return "above" if self.low > self.null else "below" if self.high < self.null else "not shown"

    @property
    def shown(self) -> bool:
        return self.verdict in ("above", "below")

    @property
    def sentence(self) -> str:
        shape = "+.2f" if self.unit == "points" else ".2f"
        value, low, high = (
            f"{v:{shape}}".replace("-", "\N{MINUS SIGN}") for v in (self.value, self.low, self.high)
        )
        unit = f" {self.unit}" if self.unit else ""
        seeds = f", {self.n_seeds} seeds" if self.n_seeds > 1 else ", 1 seed" if self.n_seeds else ""
        p = f", p = {self.pvalue:.2g}" if self.pvalue is not None else ""
        return (
            f"{self.claim}: {value}{unit} ({self.interval} {low} to {high}{p}; n = {self.n:,} "
            f"{self.counted}{seeds})"
        )


def against(
    key: str,
    claim: str,
    a: Sequence[float],
    b: Sequence[float],
    *,
    n: int,
    model: str,
    task: str,
    counted: str = "test images",
    scale: float = 100.0,
    unit: str = "points",
) -> Answer:
    """The claim that arm `a` is above arm `b`: paired over common seeds, shares of images turned into points.

    Undefined, and so not shown, where a training of either arm failed.
    """
    kind = f"95 % t interval over {len(a)} paired seeds"
    a, b = (scale * np.asarray(side, float) for side in (a, b))
    if np.isfinite([*a, *b]).all():
        pair = paired_seed_interval(a, b)
        found = pair.value, pair.low, pair.high
    else:
        found = (float("nan"),) * 3
        claim += ", undefined: a training failed"
    return Answer(key, claim, *found, kind, n, counted, len(a), short(model), short(task), unit)


def answer_rows(setup: Setup, answers: Iterable[Answer]) -> pd.DataFrame:
    """The table of claims."""
    return pd.DataFrame(
        {"study": setup.name, **asdict(a), "verdict": a.verdict, "command": setup.command} for a in answers
    )


def mean_row(values: Sequence[float], **row: Any) -> dict[str, Any]:
    """A table row: mean over seeds with its t interval; empty, with a reason, where a training failed."""
    names = ("value", "stderr", "low", "high")
    if not np.isfinite(np.asarray(values, float)).all():
        return {**dict.fromkeys(names), "n_seeds": len(values), "reason": "a training failed", **row}
    found = mean_interval(values)
    return {**{name: getattr(found, name) for name in names}, "n_seeds": found.n, **row}


def tally(answers: Sequence[Answer], what: str) -> str:
    """How many claims of one kind hold: the sentence that keeps single hits in proportion."""
    count = {side: sum(a.verdict == side for a in answers) for side in ("above", "below")}
    count["not shown"] = sum(not a.shown for a in answers)
    return (
        f"{what}: above in {count['above']} of {len(answers)}, below in {count['below']}, not shown in "
        f"{count['not shown']} (intervals are not corrected for their number: of {len(answers)} true zeros about "
        f"{0.05 * len(answers):.1f} would be called either)."
    )


# -- the page ---------------------------------------------------------------------------------------------


def publish(
    setup: Setup,
    *,
    rows: pd.DataFrame | list[dict[str, Any]],
    answers: Sequence[Answer],
    headline: str,
    setting: str,
    sections: Mapping[str, Sequence[str]] | None = None,
    figures: Mapping[str, tuple[Callable[[], Any], str]],
    facts: Mapping[str, Any],
) -> None:
    """Write table, claims, figures, settings and the page.

    Parameters
    ----------
    headline : the answer in a sentence or two, with interval, n and seeds, made from the numbers.
    setting : what was done, in a paragraph. sections : further parts of the page, title → lines.
    figures : file name → how it is drawn, and its caption; without one the page leaves it out.
    facts : further entries of `about.json`.
    """
    folder = setup.output
    frame = rows if isinstance(rows, pd.DataFrame) else tidy(rows)
    write_frame(frame, folder / "table.csv")
    write_frame(answer_rows(setup, answers), folder / "answers.csv")
    for file, (draw, _) in figures.items():
        save_figure(draw, folder / file)
    made = provenance(setup.name, {"models": setup.models, "tasks": setup.tasks, "limit": setup.limit})
    seconds = _spent(setup)
    made |= {
        "command": setup.command,
        "question": setup.question,
        "headline": headline,
        "process_seconds": round(seconds),
        "patch": setup.patch,
        **facts,
    }
    del made["command_line"]
    write_json(folder / "about.json", made)
    versions, machine = made["versions"], made["machine"]
    few = {"too few seeds": "; too few seeds for a claim"}
    shown = [f"- {a.sentence}." for a in answers if a.shown]
    others = [f"- {a.sentence}{few.get(a.verdict, '')}." for a in answers if not a.shown]
    paragraphs = [
        f"# {setup.question}",
        f"    {setup.command}",
        "made everything here, this page included, from the numbers.",
        "## The answer",
        headline,
        *(f"![{caption}]({file})\n\n*{caption}*" for file, (_, caption) in figures.items() if caption),
        "## What was done",
        setting,
        "## Shown",
        "\n".join(shown) or "Nothing: no interval excludes its null value.",
        "## Not shown",
        "\n".join(others) or "–",
        *(f"## {title}\n\n" + "\n".join(body) for title, body in (sections or {}).items()),
        "## Files",
        "`table.csv`: every measurement. `answers.csv`: the claims above, with n, seeds, interval and command. "
        "`about.json`: settings, versions, hardware.",
        f"Made with layerprobe {versions['layerprobe']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, numpy {versions['numpy']}, Python {machine['python']} on {machine['processor']}, "
        f"{machine.get('torch_threads', machine['cores'])} thread(s); {seconds / 60:.1f} min of processor time, "
        "earlier calls that were continued included, those that were killed not.",
    ]
    write_text(folder / "README.md", "\n\n".join(paragraphs) + "\n")
    print(headline)
    print(f"saved: {folder}")


def md_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table."""
    return render_table(rows, "markdown").splitlines()


def _spent(setup: Setup) -> float:
    """Processor seconds of all calls of this command, which continue one another."""
    path = WORK / setup.name / "seconds.json"
    spent = read_json(path, what="times") if path.exists() else {}
    spent[setup.command] = spent.get(setup.command, 0.0) + time.process_time() - setup.began
    setup.began = time.process_time()
    write_json(path, spent)
    return float(spent[setup.command])


def _listed(text: str | None) -> list[str]:
    return [part for part in (text or "").split(",") if part]


def digest(value: Any) -> str:
    """A short name for settings."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
