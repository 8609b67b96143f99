"""Plans on the Hugging Face hub: a repository with the plan, and a card made from how it was found.

The hub's client logs in by itself (`hf auth login`, or its own environment variable); no token passes through here.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from layerprobe.errors import UnknownNameError, UsageError
from layerprobe.network import hub_errors, hub_is_out_of_reach
from layerprobe.tables import percent

if TYPE_CHECKING:
    from layerprobe.plans.freeze_plan import FreezePlan

PLAN_FILE = "plan.json"
CARD_FILE = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push_plan(plan: FreezePlan, repository: str, *, private: bool = False, text: str) -> str:
    """Write a plan and its card into a repository of the hub, made if need be.

    Parameters
    ----------
    repository : str
        OWNER/NAME.
    private : bool
        Of a repository that is made now.
    text : str
        The plan as its file has it.

    Returns
    -------
    str
        The address of the commit.

    Raises
    ------
    UsageError
        No such form of a name.
    NotAvailableError
        Not logged in, no right to write, offline, or the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _check_name(repository)
    files = {PLAN_FILE: text, CARD_FILE: plan_card(plan, repository)}
    with hub_errors(repository, f"write to '{repository}'"):
        if hub_is_out_of_reach():
            raise ConnectionError
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        made = api.create_commit(
            repository,
            [CommitOperationAdd(name, body.encode()) for name, body in files.items()],
            commit_message=f"Freeze plan for {plan.model_id}",
        )
    return str(made.commit_url)


def pull_plan(repository: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The plan file of a repository of the hub, in the hub's cache.

    Raises
    ------
    UnknownNameError
        No such repository or revision, or no plan in it.
    NotAvailableError
        Gated, not cached while offline, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    _check_name(repository)
    offline = offline or hub_is_out_of_reach()
    with hub_errors(repository, f"read '{repository}'", revision=revision):
        try:
            found = HfApi().hf_hub_download(
                repository, PLAN_FILE, revision=revision, local_files_only=offline
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise UnknownNameError(f"'{repository}' holds no {PLAN_FILE}") from error
    return Path(str(found))


def plan_card(plan: FreezePlan, repository: str) -> str:
    """The repository's page: what the plan trains, and its accuracy with interval in the hub's format for results."""
    from huggingface_hub import EvalResult, ModelCardData

    accuracy, task = plan.found.get("test_accuracy"), str(plan.found.get("task", "unknown task"))
    results = None
    lines = [plan.found["answer"]] if isinstance(plan.found.get("answer"), str) else []
    if (
        isinstance(accuracy, dict)
        and isinstance(accuracy.get("mean"), float)
        and math.isfinite(accuracy["mean"])
    ):
        low, high = accuracy.get("low"), accuracy.get("high")
        words = f"{accuracy.get('interval', 'interval')}, n = {accuracy.get('n_seeds', '?')}"
        known = {"low": low, "high": high, "interval": words}
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=str(plan.found.get("task_id", task)),
                dataset_name=task,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=accuracy["mean"],
                metric_args=known,
            )
        ]
        if isinstance(low, float) and isinstance(high, float):
            lines.append(
                f"Test accuracy on {task}: {percent(accuracy['mean'])} ({words}: {percent(low)} to {percent(high)})."
            )
    base = plan.model_id if _REPOSITORY.fullmatch(plan.model_id) else None
    data = ModelCardData(
        model_name=repository.rpartition("/")[2],
        library_name="layerprobe",
        tags=["layerprobe", "freeze-plan"],
        base_model=base,
        eval_results=results,
    )
    body = "\n\n".join(line.replace("<", "&lt;") for line in (plan.summary(), *lines))
    revision = f" at {plan.revision}" if plan.revision else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# Freeze plan for {plan.model_id}\n\n{body}\n\n"
        f"Made for {plan.model_id}{revision}. Use it:\n\n"
        f"```python\nimport layerprobe as lp\n\nplan = lp.FreezePlan.pull({json.dumps(repository)})\n"
        'plan.apply(model, outside="trainable")\n```\n'
    )


def _check_name(repository: str) -> None:
    if _REPOSITORY.fullmatch(repository) is None:
        raise UsageError(f"'{repository}' is no repository of the hub: it is written OWNER/NAME")
