"""The README names what exists. Its blocks of code are run by test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert named
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_the_test_command_of_the_readme_is_what_ci_runs() -> None:
    assert "$ make test" in README
    assert re.search(r"^make test$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)


def test_what_the_table_of_neighbours_says_of_layerprobe_is_there() -> None:
    """Every name in code type in the last column is a function, an option or a command of ours."""
    import layerprobe as lp
    from layerprobe.plans.export import TARGETS
    from layerprobe.plans.lint.rules import RULES
    from layerprobe.search.strategies import STRATEGIES

    table = README.split("## Neighbours")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| [")]
    assert len(rows) >= 13 and all(len(row) == 4 for row in rows)
    assert all(re.search(r"\) (\d+\.\d|[0-9a-f]{7})", row[0]) for row in rows), (
        "a version or commit stands at each"
    )
    known = {
        "load_backbone(model)": callable(lp.load_backbone),
        "make_task(images, labels)": callable(lp.make_task),
        "--strategy greedy": "greedy" in STRATEGIES,
        "export": {"axolotl", "ms-swift"} <= TARGETS.keys(),
        "plan lint": {"axolotl", "ms-swift"} <= RULES.keys(),
    }
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row[3])}
    assert named <= known.keys() and all(known[name] for name in named)
