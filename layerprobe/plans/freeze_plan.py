"""The class that users meet: a plan's data with everything that is done with a plan."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any, Self

from layerprobe.errors import BrokenFileError, UnknownNameError
from layerprobe.files import read_json, write_text
from layerprobe.plans.apply import apply_plan
from layerprobe.plans.export import export_plan
from layerprobe.plans.hub import pull_plan, push_plan
from layerprobe.plans.match import check_table
from layerprobe.plans.plan import (
    Parameter,
    PlanData,
    derived_fields,
)
from layerprobe.plans.table import block_strip_html, plan_frame
from layerprobe.plans.validate import claimed_schema, find_mistakes
from layerprobe.plans.verify import take_fingerprint, verify_plan
from layerprobe.reading import is_folder, is_there
from layerprobe.tables import strict_value

PLAN_FILE = "plan.json"
"""The plan's name in a run folder."""

MAX_BYTES = 64 << 20
"""A plan file larger than this is not read; a model of 100,000 tensors needs about 12 MB."""


class FreezePlan(PlanData):
    """Which parameters of one backbone are trained and which stay as they are, by exact name.

    Names are those of the base model (`h.0.attn.c_attn.weight`), without the prefix that a task head adds
    (`transformer.`); `apply` finds that prefix. What stands before and behind the backbone, the image stem
    and the head, is no part of the base model and appears only in `states`.

    Attributes
    ----------
    model_id, revision
        What the plan was made for.
    weights_hash
        sha256 over the sorted (name, shape, dtype); see `model_hash`.
    frozen, trainable
        Exact parameter names, in the model's order; together they are the whole model.
    blocks
        One flag a block, True where every parameter of the block is trained.
    states
        Of stem, embeddings, positions, norms (the norms outside the blocks), other and head: `frozen`,
        `trainable`, `partial`, or `absent` where the backbone has no such parameter.
    counts
        Entries and tensors on either side.
    found
        How the plan was found: task, split hash, seeds, budget, scores, accuracy with interval …
    parameters
        Name -> `Parameter`.
    tied
        Name -> the tensor's names in the model around the base model, where that lists it under another name
        (`shared.weight` of T5); exports need them.
    adapters, adapter_scale
        Module -> rank of the low-rank adapter (LoRA) on it, and what their products are multiplied by.
    source
        File the plan was read from, for error messages.

    Examples
    --------
    Hugging Face `Trainer`, two lines before it is built, and again when training is resumed, because
    `from_pretrained` makes every parameter trainable::

        plan = FreezePlan.load("plan.json")
        plan.apply(model, outside="trainable")      # outside: the task head
        Trainer(model=model, args=args, train_dataset=data).train()
        plan.verify(model)                          # frozen tensors are bit-identical, or an error

    Plain PyTorch, before the optimizer is built::

        FreezePlan.load("plan.json").apply(model, outside="trainable")
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """

    apply = apply_plan
    fingerprint = take_fingerprint
    verify = verify_plan
    check = check_table
    export = export_plan
    to_frame = plan_frame

    @classmethod
    def from_dict(cls, raw: Any, *, source: str = "the plan") -> Self:
        """Read plain JSON values that somebody else may have written.

        Raises
        ------
        BrokenFileError
            All mistakes found, in one line.
        """
        if mistakes := find_mistakes(raw):
            shown = "; ".join(mistakes[:20]) + (
                f"; and {len(mistakes) - 20} more" if len(mistakes) > 20 else ""
            )
            raise BrokenFileError(f"{source} is no valid {claimed_schema(raw)}: {shown}")
        table = {
            name: Parameter(entry["group"], tuple(entry["shape"]), entry["dtype"])
            for name, entry in raw["parameters"].items()
        }
        states, adapters = raw["states"], raw.get("adapters", {})
        ranks = dict(adapters.get("ranks", {}))
        return cls(
            model_id=raw["model_id"],
            revision=raw["revision"],
            parameters=table,
            found=raw["found"],
            tied={name: tuple(others) for name, others in raw.get("tied", {}).items()},
            source=source,
            adapters=ranks,
            adapter_scale=float(adapters.get("scale", 1.0)),
            **derived_fields(
                table, set(raw["trainable"]), stem=states["stem"], head=states["head"], adapters=ranks
            ),
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, one name a line; the file is whole or not there."""
        return write_text(path, _pretty(strict_value(self.to_dict())))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a plan file, or the `plan.json` of a run folder.

        Raises
        ------
        UnknownNameError
            No such file, or a folder without one.
        BrokenFileError
            Too large, not JSON, another schema, or inconsistent.
        """
        file = Path(path) / PLAN_FILE if is_folder(path) else Path(path)
        if not is_there(file):
            what = f"no plan in {path}" if file != Path(path) else f"there is no plan {path}"
            raise UnknownNameError(f"{what}: name a plan file, or a run folder of freeze-search")
        return cls.from_dict(read_json(file, what="freeze plan", max_bytes=MAX_BYTES), source=file.name)

    def push(self, repository: str, *, private: bool = False) -> str:
        """Write the plan and a card about it to the Hugging Face hub (OWNER/NAME); the commit's address.

        See `layerprobe.plans.hub.push_plan` for the errors.
        """
        return push_plan(self, repository, private=private, text=_pretty(strict_value(self.to_dict())))

    @classmethod
    def pull(cls, repository: str, *, revision: str | None = None, offline: bool = False) -> Self:
        """Read a plan from the Hugging Face hub (OWNER/NAME); see `layerprobe.plans.hub.pull_plan` for the errors."""
        return cls.load(pull_plan(repository, revision=revision, offline=offline))

    def __repr__(self) -> str:
        return f"<FreezePlan: {self.summary()}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.summary())}</p>{block_strip_html(self.block_states)}"


def _pretty(value: dict[str, Any]) -> str:
    """JSON with one name a line, so that two plans can be compared line by line."""

    def dump(item: Any) -> str:
        return json.dumps(item, allow_nan=False, ensure_ascii=False)

    lines = []
    for key, item in value.items():
        if key in ("frozen", "trainable") and item:
            text = "[\n" + ",\n".join(f"  {dump(name)}" for name in item) + "\n ]"
        elif key == "parameters" and item:
            text = "{\n" + ",\n".join(f"  {dump(k)}: {dump(v)}" for k, v in item.items()) + "\n }"
        else:
            text = dump(item)
        lines.append(f" {dump(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
