"""Linear probes among the baselines: what they are, and when they come first; a plan equal to a baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers

import layerprobe as lp
from layerprobe.metrics.inference import PooledArms
from layerprobe.records import Estimate
from layerprobe.search.baselines import Baseline, BaselineResult, Report
from layerprobe.search.frames import baseline_frame
from layerprobe.search.probes import ProbeBaseline, pixels_in_words, probes_in_words
from layerprobe.search.space import Space
from layerprobe.search.verdict import Verdict

SPACE = Space((5, 5, 5))
N_IMAGES = 400


def line(name: str, accuracy: float, *, mask: tuple[bool, ...] = (True, False, False)) -> BaselineResult:
    right = np.zeros(N_IMAGES)
    right[: round(accuracy * N_IMAGES)] = 1.0
    return BaselineResult(
        baseline=Baseline(name=name, mask=mask),
        lr=1e-3,
        params=SPACE.params(mask),
        cost=1.0,
        seconds=1.0,
        recall=None,
        test=(accuracy, accuracy),
        accuracy=Estimate(value=accuracy, n=2),
        pooled=PooledArms(
            {name: {0: accuracy, 1: accuracy}, "other": {0: 0.495, 1: 0.505}},
            n_images=N_IMAGES,
            correct={name: right},
        ),
        arm=name,
        against={},
    )


def report(*lines: BaselineResult) -> Report:
    verdict = Verdict(
        kind="train these", mask=lines[0].baseline.mask, arms={}, margin=None, differences={}, detectable=None
    )
    return Report(lines=list(lines), verdict=verdict, seeds=[0, 1], pooled=None)


def probe(name: str, accuracy: float) -> ProbeBaseline:
    right = np.arange(N_IMAGES) < round(accuracy * N_IMAGES)
    return ProbeBaseline(
        name=name, C=1.0, accuracy=accuracy, low=accuracy - 0.03, high=accuracy + 0.03, correct=right
    )


def test_a_probe_that_beats_every_trained_plan_is_the_first_sentence() -> None:
    trained = report(line("plan", 0.80), line("all", 0.82, mask=SPACE.all))
    words = probes_in_words([probe("probe", 0.81), probe("pixels", 0.90)], trained)
    assert words.startswith(
        "A linear probe of the raw pixels beats every trained plan: 90.0 % of the test images"
    )
    assert "82.0 % (all blocks trained; difference +8.0 points, 95 % interval +" in words


def test_a_probe_that_is_ahead_by_chance_is_said_to_be_no_worse() -> None:
    words = probes_in_words([probe("probe", 0.803)], report(line("plan", 0.80), line("none", 0.79)))
    assert words.startswith("No trained plan is ahead of a linear probe of the frozen features: 80.3 %")
    assert probes_in_words([probe("probe", 0.70)], report(line("plan", 0.80))) == ""
    assert probes_in_words([], report(line("plan", 0.80))) == ""


def test_pixels_that_are_not_shown_to_be_behind_are_the_last_sentence() -> None:
    words = pixels_in_words([probe("pixels", 0.797)], line("plan", 0.80))
    assert words.startswith(
        " A linear probe of the raw pixels is not shown to be behind it (79.7 %; difference -"
    )
    assert words.endswith("this task may not need the backbone.")
    for other in ([probe("pixels", 0.60)], [probe("probe", 0.797)], []):
        assert pixels_in_words(other, line("plan", 0.80)) == ""


def test_a_stored_probe_comes_back_and_is_compared_on_the_same_images() -> None:
    made = probe("pixels", 0.9)
    back = ProbeBaseline.from_dict(made.to_dict())
    assert np.array_equal(back.correct, made.correct) and back.C == made.C
    frame = baseline_frame(report(line("plan", 0.80)), SPACE, [back]).set_index("arm")
    row = frame.loc["pixels"]
    assert row["minus_plan"] == pytest.approx(0.1)
    # Eighty images apart of 400, all in one direction, and seeds that hardly differ.
    assert row["minus_plan_low"] > 0.06 and row["minus_plan_high"] < 0.14
    assert row["plan"] == "..." and row["trainable_parameters"] == 0


def test_a_search_has_probes_and_calls_an_equal_plan_so(tmp_path: Path) -> None:
    task = lp.load_task("digits", limit=60)
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=32)
    backbone = lp.load_backbone(transformers.GPT2Model(config), patch_size=4)
    few = {"budget": 4, "finetune_steps": 4, "bridge_steps": 0, "batch_size": 16, "seeds": 2, "max_seeds": 2}
    settings = {**few, "lrs": [1e-3], "use_scores": False, "baselines": ("all", "none"), "quiet": True}
    found = lp.freeze_search(backbone, task, output=tmp_path / "run", **settings, must_train=(0, 1, 2))
    rows = {row["arm"].removeprefix("▸ "): row for row in found.arm_rows()}
    assert {"probe", "pixels"} < set(rows)
    assert rows["best found"]["− all, points"] == "same plan"
    assert found.facts["head"] == "probe" and found.facts["stop_margin"] == 0.01
    # What was fitted once is found again.
    again = lp.freeze_search(backbone, task, output=tmp_path / "run", **settings, must_train=(0, 1, 2))
    assert again.answer == found.answer
    text = lp.write_report(tmp_path / "run").read_text()
    assert "same plan" in text and "probe of raw pixels" in text
    assert lp.load(tmp_path / "run").answer == found.answer
