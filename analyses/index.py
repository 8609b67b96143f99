"""Which studies are there, and what did each find? Writes the list of studies into results/README.md.

    python analyses/index.py

Every line is made from `about.json` and `answers.csv` of a study; nothing is written by hand between the markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
from study import STUDIES

from layerprobe.files import read_json, write_text

RESULTS = Path("results")
PAGE = RESULTS / "README.md"
BEGIN, END = "<!-- studies: made by analyses/index.py -->", "<!-- end of studies -->"

PAPER = {
    "outlier_gap": "language and vision models differ in their ratio of outlier parameters",
    "depth_curves": "some layers of a language model serve vision without fine-tuning",
    "bridge_cka": "a random-label bridge moves a language model towards vision",
    "partial_bridge": "training some blocks is better than training all",
    "score_truth": "cheap scores tell which blocks to train",
    "lr_fairness": "conclusions survive when every arm has its own learning rate",
    "depth_and_data": "the best plan depends on the amount of data",
}
"""What each study puts to the test, in the words of the paper's abstract where they are its own."""

LEADING = {
    "outlier_gap": ("group",),
    "depth_curves": ("language − pixels", "language − random", "bridge − language", "language − entry"),
    "bridge_cka": ("vision", "first − last", "own"),
    "partial_bridge": ("partial − all", "first − last"),
    "score_truth": ("score",),
    "lr_fairness": ("all − untrained, all own", "first half − all own", "none − all own"),
    "depth_and_data": ("best − all", "moves"),
}
"""The kinds of claims that stand in the list, the first of each kind that reaches farthest."""


def line(study: str) -> str:
    """One row of the list; a study that has not been run at full size says so."""
    folder = RESULTS / study
    script = f"`analyses/{study}.py`"
    if not (folder / "about.json").exists():
        return f"| {PAPER[study]} | {script} | – | not run at full size yet |"
    about = read_json(folder / "about.json", what="settings of a study")
    answers = pd.read_csv(folder / "answers.csv")
    said = [
        sentence(answers[answers["key"] == key]) for key in LEADING[study] if (answers["key"] == key).any()
    ]
    return f"| {PAPER[study]} | `{about['command']}` | [{study}]({study}/README.md) | {'; '.join(said)} |"


def sentence(claims: pd.DataFrame) -> str:
    """How many of one kind are shown on each side, and the one farthest from its null value, with its interval."""
    far = claims.loc[(claims["value"] - claims["null"]).abs().idxmax()]
    shown = claims["verdict"].isin(["above", "below"])
    verdict = "shown" if shown[far.name] else "not shown"
    sides = ", ".join(
        f"{n} {side}" for side in ("above", "below") if (n := int((claims["verdict"] == side).sum()))
    )
    count = "" if len(claims) == 1 else f"shown {sides or 'none'} of {len(claims)}, farthest: "
    unit = "" if pd.isna(far["unit"]) else f" {far['unit']}"
    seeds = f", {int(far['n_seeds'])} seeds" if far["n_seeds"] else ""
    p = "" if pd.isna(far["pvalue"]) else f", p = {far['pvalue']:.2g}"
    shape = "+.2f" if unit == " points" else ".2f"
    low, value, high = (f"{far[c]:{shape}}".replace("-", "−") for c in ("low", "value", "high"))
    return (
        f"{count}{far['claim']} {value}{unit} ({far['interval']} {low} to {high}{p}; n = {int(far['n']):,} "
        f"{far['counted']}{seeds}): {verdict}"
    )


def block() -> str:
    """The list between the markers."""
    lines = [
        BEGIN,
        "| put to the test | command | files | found on these models |",
        "| --- | --- | --- | --- |",
        *(line(study) for study in STUDIES),
        END,
    ]
    return "\n".join(lines)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"error: {PAGE} has no lines '{BEGIN}' and '{END}' to write between")
    before, rest = text.split(BEGIN, 1)
    write_text(PAGE, before + block() + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()
