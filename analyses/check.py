"""Do the committed tables come out again? Re-runs one study in quick size, chosen by date, and compares.

    python analyses/check.py                      # the study of the day
    python analyses/check.py --study lr_fairness
    python analyses/check.py --write              # make the references anew, all studies

The reference is results/<study>/quick/table.csv. On the machine and with the versions that made it every value must
come out again to a millionth; elsewhere it must lie within the tolerance that the study states (absolute, outlier
counts relative): trainings of a few steps differ between processors, counts do not. Everything is computed again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
import tempfile
from pathlib import Path

import pandas as pd
import study

from layerprobe.files import read_json
from layerprobe.provenance import machine, versions
from layerprobe.tables import read_frame

KEYS = (
    "model", "model_y", "task", "split", "block", "site", "metric", "seed", "origin", "plan", "arm", "lr", "share",
    "moment", "pair", "score", "level", "part", "depth",
)  # fmt: skip
RELATIVE = ("outlier_gap",)
SAME_MACHINE = 1e-6
SETTLED_BY_CHOICE = ("lr",)
"""Columns that identify a row except where a study chose the value by accuracy (a plan's own rate)."""


def of_the_day(day: datetime.date) -> str:
    """The study whose turn it is: day of the year modulo the number of studies."""
    return study.STUDIES[day.timetuple().tm_yday % len(study.STUDIES)]


def differences(reference: pd.DataFrame, again: pd.DataFrame, name: str, tolerance: float) -> list[str]:
    """Rows whose value is farther off than `tolerance`, and rows that one table lacks."""
    keys = [key for key in KEYS if key in reference and key in again]
    if "chosen" in reference or "own" in reference:
        keys = [key for key in keys if key not in SETTLED_BY_CHOICE or name == "lr_fairness"]
    left, right = (frame.assign(**{k: frame[k].astype(str) for k in keys}) for frame in (reference, again))
    both = left.merge(right, on=keys, how="outer", suffixes=("", "_again"), indicator=True)
    found = [
        f"only in the {'reference' if side == 'left_only' else 're-run'}: {count} rows"
        for side, count in both["_merge"].value_counts().items()
        if side != "both" and count
    ]
    both = both[both["_merge"] == "both"]
    old, new = both["value"].astype(float), both["value_again"].astype(float)
    bar = tolerance * old.abs().clip(lower=1e-12) if name in RELATIVE else tolerance
    wrong = ((old - new).abs() > bar) | (old.isna() != new.isna())
    for _, row in both[wrong].iterrows():
        place = ", ".join(f"{key} {row[key]}" for key in keys if row[key] not in ("nan", "None", "<NA>"))
        found.append(f"{place}: {row['value']:.4g} in the reference, {row['value_again']:.4g} now")
    return found


def tolerance(folder: Path, stated: float) -> float:
    """The study's tolerance, or that of the same program on the same machine."""
    made = read_json(folder / "about.json", what="record of a study")
    same = (made["versions"], made["machine"]) == (versions(), machine())
    return min(stated, SAME_MACHINE) if same else stated


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", choices=study.STUDIES)
    parser.add_argument("--write", action="store_true", help="write the references instead of comparing")
    arguments = parser.parse_args()
    chosen = [arguments.study] if arguments.study else [of_the_day(datetime.date.today())]
    if arguments.write and not arguments.study:
        chosen = list(study.STUDIES)
    for name in chosen:
        script = importlib.import_module(name)
        folder = Path("results") / name / "quick"
        if not arguments.write and not (folder / "table.csv").exists():
            sys.exit(f"{name} has no reference yet: python analyses/check.py --write --study {name}")
        with tempfile.TemporaryDirectory() as aside:
            study.WORK = Path(aside) / "work"
            output = folder if arguments.write else Path(aside) / name
            script.main(["--quick", "--output", str(output)])
            again = read_frame(output / "table.csv")
        if arguments.write:
            continue
        bar = tolerance(folder, script.TOLERANCE)
        wrong = differences(read_frame(folder / "table.csv"), again, name, bar)
        if wrong:
            shown = "\n".join(wrong[:20])
            sys.exit(f"{name}: {len(wrong)} rows are farther off than {bar:g}:\n{shown}")
        print(f"{name}: {len(again)} rows as in {folder / 'table.csv'}, within {bar:g}")


if __name__ == "__main__":
    main()
