"""Plans from somebody else: wrong types, sizes, schemas and contradictions, each in one line, all at once."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from freeze_plan_examples import example_plan

from layerprobe.errors import BrokenFileError, UnknownNameError
from layerprobe.plans import FreezePlan

VALID = example_plan("gpt2", [1, 2], n_blocks=3, found={"task": "digits"}).to_dict()


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    raw = copy.deepcopy(VALID)
    change(raw)
    return raw


def reason(raw: Any) -> str:
    with pytest.raises(BrokenFileError) as caught:
        FreezePlan.from_dict(raw, source="plan.json")
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_the_untouched_plan_is_valid() -> None:
    assert FreezePlan.from_dict(copy.deepcopy(VALID)).to_dict() == VALID


NAME = "h.1.ln_1.weight"

MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another schema": (
        lambda r: r.update(schema="freeze-plan/v3"),
        "plan.json is no valid freeze-plan/v1: its schema is 'freeze-plan/v3'; "
        "this version of layerprobe reads 'freeze-plan/v1' and 'freeze-plan/v2'",
    ),
    "no schema": (lambda r: r.pop("schema"), "it has no 'schema'"),
    "missing key": (lambda r: r.pop("frozen"), "'frozen' is missing"),
    "unknown key": (lambda r: r.update(extra=1), "unknown keys: 'extra'"),
    "names not a list": (
        lambda r: r.update(trainable="all"),
        "'trainable' must be a list of names, not 'all'",
    ),
    "a name that is a number": (lambda r: r["trainable"].append(3), "holds what is no parameter name: 3"),
    "a name with a line break": (
        lambda r: r["trainable"].append("a\nb"),
        r"holds what is no parameter name: 'a\nb'",
    ),
    "an endless name": (lambda r: r["frozen"].append("x" * 5000), "holds what is no parameter name"),
    "twice": (lambda r: r["trainable"].append(NAME), f"'trainable' names twice: '{NAME}'"),
    "on both sides": (lambda r: r["frozen"].append(NAME), f"both frozen and trainable: '{NAME}'"),
    "on neither side": (lambda r: r["trainable"].remove(NAME), f"neither frozen nor trainable: '{NAME}'"),
    "unknown name": (lambda r: r["trainable"].append("h.9.w"), "not among the parameters: 'h.9.w'"),
    "mask too short": (lambda r: r["blocks"].pop(), "'blocks' has 2 entries, but the parameters belong to 3"),
    "mask of numbers": (lambda r: r.update(blocks=[0, 1, 1]), "'blocks' must hold only true and false"),
    "mask against names": (
        lambda r: r.update(blocks=[True, True, True]),
        "'blocks' and the names disagree about block 0",
    ),
    "state against names": (
        lambda r: r["states"].update(norms="trainable"),
        "'states' and the names disagree about 'norms'",
    ),
    "unknown state": (
        lambda r: r["states"].update(head="warm"),
        "states.head must be 'frozen' or 'trainable'",
    ),
    "a state too many": (lambda r: r["states"].update(tail="frozen"), "disagree about 'tail'"),
    "a state too few": (lambda r: r["states"].pop("norms"), "'states' lacks norms"),
    "wrong counts": (
        lambda r: r["counts"].update(blocks=99),
        "'counts' is not what the parameters add up to",
    ),
    "negative counts": (lambda r: r["counts"].update(blocks=-1), "'counts' must hold whole numbers from 0"),
    "wrong hash": (lambda r: r.update(weights_hash="sha256:0"), "'weights_hash' is not the hash"),
    "unknown group": (lambda r: r["parameters"][NAME].update(group="tail"), f"is wrong for '{NAME}'"),
    "a block spelt otherwise": (
        lambda r: r["parameters"][NAME].update(group="block.01"),
        f"is wrong for '{NAME}'",
    ),
    "a block in other digits": (
        lambda r: r["parameters"][NAME].update(group="block.\u0661"),
        f"is wrong for '{NAME}'",
    ),
    "negative shape": (
        lambda r: r["parameters"][NAME].update(shape=[-1]),
        f"the shape is wrong for '{NAME}'",
    ),
    "shape of truth": (lambda r: r["parameters"][NAME].update(shape=[True]), "the shape is wrong"),
    "astronomic shape": (
        lambda r: r["parameters"][NAME].update(shape=[2**62, 2**62]),
        "the shape is wrong",
    ),
    "odd dtype": (lambda r: r["parameters"][NAME].update(dtype="os.system"), "the dtype is wrong"),
    "parameter without shape": (
        lambda r: r["parameters"][NAME].pop("shape"),
        "need exactly group, shape and dtype",
    ),
    "a hole in the blocks": (
        lambda r: [p.update(group="block.7") for p in r["parameters"].values() if p["group"] == "block.2"],
        "belong to 3 blocks up to block.7",
    ),
    "model id of a list": (lambda r: r.update(model_id=[]), "'model_id' must be text, not []"),
    "model id with escape codes": (lambda r: r.update(model_id="\x1b[2J"), "'model_id' is too long or holds"),
    "not finite": (lambda r: r["found"].update(x=float("inf")), "holds a non-finite number"),
    "no parameters": (lambda r: r.update(parameters={}), "'parameters' is empty"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_each_mistake_is_named(what: str) -> None:
    change, message = MISTAKES[what]
    assert message in reason(broken(change))


ODD = [
    None,
    True,
    -1,
    3,
    1e308,
    "",
    "x",
    "\n",
    [],
    {},
    [[]],
    {"a": []},
    ["h.1.w", "h.1.w"],
    float("nan"),
    2**70,
]


def every_place(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, item in items for p in every_place(item, (*path, key)))]


def test_any_value_in_any_place_is_read_or_refused_but_never_a_crash() -> None:
    chance = random.Random(0)
    places = every_place(VALID)
    refused = 0
    for _ in range(1500):
        raw = copy.deepcopy(VALID)
        for _ in range(chance.choice([1, 1, 2, 3])):
            path = chance.choice(places)
            try:
                target = raw
                for key in path[:-1]:
                    target = target[key]
                if path:
                    target[path[-1]] = copy.deepcopy(chance.choice(ODD))
            except (KeyError, IndexError, TypeError):
                continue
        try:
            plan = FreezePlan.from_dict(raw)
        except BrokenFileError as error:
            assert "\n" not in str(error) and len(str(error)) < 5000
            refused += 1
        else:
            assert plan.trainable == tuple(VALID["trainable"])
    assert refused > 1000


def test_all_mistakes_are_listed_together() -> None:
    def change(raw: dict[str, Any]) -> None:
        raw.update(model_id=3, blocks="none", extra=1)
        raw.pop("counts")
        raw["trainable"].append(NAME)
        raw["parameters"][NAME].update(shape="large")

    text = reason(broken(change))
    for part in (
        "'model_id' must be",
        "'blocks' must be",
        "unknown keys",
        "'counts' is missing",
        "twice",
        "shape",
    ):
        assert part in text


@pytest.mark.parametrize("raw", [None, [], "plan", 3, True, {}])
def test_other_json_is_no_plan(raw: Any) -> None:
    assert "is no valid freeze-plan/v1" in reason(raw)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"schema": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("\x00", "not valid JSON"),
        ('{"schema": "freeze-plan/v1", "found": NaN}', "is no valid freeze-plan/v1"),
    ],
)
def test_files_that_are_no_plan(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(BrokenFileError, match=message):
        FreezePlan.load(path)


def test_a_missing_file_and_a_huge_one(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"there is no plan .*none.json: name a plan file, or a run folder"
    ):
        FreezePlan.load(tmp_path / "none.json")
    with pytest.raises(UnknownNameError, match=f"no plan in {tmp_path}: name a plan file"):
        FreezePlan.load(tmp_path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(BrokenFileError, match="are not read"):
        FreezePlan.load(huge)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(60):
        deep = {"x": deep}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**VALID, "found": {"x": deep}}))
    with pytest.raises(BrokenFileError, match="nested deeper than 40"):
        FreezePlan.load(path)
