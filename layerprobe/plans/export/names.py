"""The plan's names as another trainer's model spells them, and the trainers that take names or patterns of names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from layerprobe.errors import PlanError
from layerprobe.plans.match import block_modules, names_within
from layerprobe.plans.plan import TRAINABLE, PlanData, few


@dataclass(frozen=True, kw_only=True)
class ExportNames:
    """The plan in the spelling of one model.

    Attributes
    ----------
    plan : PlanData
        The plan itself.
    trainable, frozen : tuple[str, ...]
        Full names, those outside the base model included.
    blocks : tuple[str, ...]
        Full dotted name of every block, `transformer.h.0` …
    free_blocks : tuple[str, ...]
        Those of `blocks` whose every parameter is trained.
    others : tuple[str, ...]
        Trainable names outside the free blocks.
    aliases : dict[str, tuple[str, ...]]
        Name of a tied tensor, as the model lists it, -> its other names.
    adapters : dict[str, int]
        Full name of a module -> rank of the adapter on it.
    """

    plan: PlanData
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    blocks: tuple[str, ...]
    free_blocks: tuple[str, ...]
    others: tuple[str, ...]
    aliases: dict[str, tuple[str, ...]]
    adapters: dict[str, int]

    @property
    def patterns(self) -> tuple[str, ...]:
        """`others` under every name, for targets that may name what a model does not list."""
        return tuple(every for name in self.others for every in (name, *self.aliases.get(name, ())))

    @property
    def all(self) -> tuple[str, ...]:
        """Every name that is known."""
        return self.trainable + self.frozen

    def require_exact(self, chosen: Iterable[str], target: str, hint: str = "") -> None:
        """Raise PlanError unless `chosen`, what the target's rule makes of the text, is the plan."""
        taken, wanted = set(chosen), set(self.trainable)
        parts = []
        if more := [name for name in self.all if name in taken - wanted]:
            parts.append(f"would also train {few(more)}")
        if less := [name for name in self.all if name in wanted - taken]:
            parts.append(f"would leave out {few(less)}")
        if parts:
            raise PlanError(f"{target} cannot say this plan exactly: it {' and '.join(parts)}{hint}")

    def comment(self, target: str) -> str:
        """Comment lines that say what the file is; the text of a plan cannot end the comment."""
        summary = json.dumps(self.plan.summary())[1:-1]
        return f"# freeze plan for {target}, made by layerprobe\n# {summary}\n"


def export_names(
    plan: PlanData, *, prefix: str, outside: Mapping[str, str], without: Iterable[str]
) -> ExportNames:
    """Spell the plan's names with `prefix`, drop the modules in `without`, add those outside."""
    if prefix and not prefix.endswith("."):
        prefix += "."
    absent = names_within(plan, without)
    trained = set(plan.trainable)
    # Full name -> whether it is trained, in the model's order and then those outside.
    states: dict[str, bool] = {}
    aliases: dict[str, tuple[str, ...]] = {}
    for name in plan.parameters:
        if name not in absent:
            listed, *more = _listed_names(prefix + name, plan.tied.get(name, ()))
            states[listed] = name in trained
            aliases |= {listed: tuple(more)} if more else {}
    if clash := [name for name in outside if name in states and name not in aliases]:
        raise PlanError(f"outside: {few(clash)} belongs to the plan itself")
    same = {alias: listed for listed, more in aliases.items() for alias in (listed, *more)}
    for name, state in outside.items():
        if states.setdefault(same.get(name, name), state == TRAINABLE) != (state == TRAINABLE):
            raise PlanError(
                f"outside: {name} cannot be {state}: it is a tensor of the plan (tied), which says else"
            )
    trainable = tuple(name for name, is_trained in states.items() if is_trained)
    blocks = tuple(prefix + module for module in block_modules(plan))
    free = tuple(module for module, whole in zip(blocks, plan.blocks, strict=True) if whole)
    starts = tuple(module + "." for module in free)
    return ExportNames(
        plan=plan,
        trainable=trainable,
        frozen=tuple(name for name, is_trained in states.items() if not is_trained),
        blocks=blocks,
        free_blocks=free,
        others=tuple(name for name in trainable if not name.startswith(starts)),
        aliases=aliases,
        adapters={prefix + module: rank for module, rank in plan.adapters.items()},
    )


def _listed_names(spelled: str, tied: tuple[str, ...]) -> list[str]:
    """The names of one tensor in the model that is exported to, the one that the model lists first.

    `tied` are its names in the model that the plan was made from, its own first. Either model may be the other's
    inner part; names that lie outside the inner one are left out.
    """
    if not tied:
        return [spelled]
    own, *others = tied
    if f".{spelled}".endswith(f".{own}"):
        around = spelled[: len(spelled) - len(own)]
        return [*(around + name for name in others), spelled]
    if f".{own}".endswith(f".{spelled}"):
        around = own[: len(own) - len(spelled)]
        return [*(name[len(around) :] for name in others if name.startswith(around)), spelled]
    return [spelled]


def write_axolotl(names: ExportNames) -> str:
    """A YAML fragment with `unfrozen_parameters`, a list of patterns of names to train.

    Its rule (axolotl-ai-cloud/axolotl, src/axolotl/utils/freeze.py, `freeze_layers_except` and
    `LayerNamePattern`): a trailing `[a:b]` is cut off as a range of rows; every dot that no `+` follows is
    escaped; the rest is matched from the start of the name, and anything may follow. So patterns begin with
    `^`, a block ends with its dot (or `h.1` takes `h.10` along), and a full name ends with `$`. The list is
    only read when it is not empty: an empty one trains everything. Reentrant gradient checkpointing is refused
    beside it (src/axolotl/utils/schemas/validation.py), and an `adapter` would be trained instead of the
    weights.
    """
    if odd := [name for name in (*names.all, *names.patterns) if not re.fullmatch(r"[A-Za-z0-9_.\-]+", name)]:
        raise PlanError(f"axolotl reads names as patterns and would misread {few(odd)}")
    patterns = [f"^{block}." for block in names.free_blocks] + [f"^{name}$" for name in names.patterns]
    compiled = [re.compile(pattern.replace(".", r"\.")) for pattern in patterns]
    names.require_exact((n for n in names.all if any(p.match(n) for p in compiled)), "axolotl")
    hint = "# set no adapter; with gradient_checkpointing, gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    return names.comment("axolotl") + hint + "unfrozen_parameters:\n" + _yaml_list(patterns)


def write_ms_swift(names: ExportNames) -> str:
    """A YAML fragment that freezes everything and opens what one regular expression finds.

    Its rule (modelscope/ms-swift 4.x at 006938b, swift/utils/transformers_utils.py, `freeze_parameters` and
    `activate_parameters`): with `tuner_type: full` the first parameters are frozen until their entries are
    `freeze_parameters_ratio` of all, 1 being every one; then each name in which `trainable_parameters_regex` is found
    anywhere is trained. With any other tuner these settings do nothing.
    """
    pattern = f"^(?:{write_regex(names).strip()})$"
    names.require_exact((name for name in names.all if re.search(pattern, name)), "ms-swift")
    text = names.comment("ms-swift") + "tuner_type: full\nfreeze_parameters_ratio: 1.0\n"
    return text + f"trainable_parameters_regex: {json.dumps(pattern)}\n"


def write_finetuning_scheduler(names: ExportNames) -> str:
    """A YAML schedule of one phase for Lightning's finetuning-scheduler.

    Its rule (speediedan/finetuning-scheduler, src/finetuning_scheduler/fts_supporters.py, `_parse_phase` and
    `_validate_phases_disjoint`): everything is frozen first; an entry of `params` that is a parameter's name is
    that parameter, any other is a pattern matched from the start of the names, and one that matches nothing is
    an error; phases are numbered from 0 without gaps and may not share a parameter. Full names and a single
    phase are exact whatever else the model holds. Names start at the LightningModule, so its attribute belongs
    into the prefix (`model.transformer.`).
    """
    return names.comment("finetuning-scheduler") + "0:\n  params:\n" + _yaml_list(names.trainable)


_FREEZE_FUNCTION = '''

def freeze(model):
    """Train exactly TRAINABLE; call before the Trainer is built, and again on resume."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = sorted((TRAINABLE | FROZEN) - parameters.keys())
    if missing:
        raise ValueError(f"this model lacks {len(missing)} parameters of the plan, for example {missing[0]}")
    # A tied tensor has several names, and one of them is enough.
    trained = {id(parameters[name]) for name in TRAINABLE}
    frozen = {id(parameters[name]) for name in FROZEN}
    split = sorted(name for name in TRAINABLE if id(parameters[name]) in frozen)
    if split:
        raise ValueError(f"the plan trains {split[0]}, which in this model is one tensor with what it freezes")
    unknown = sorted(name for name, parameter in parameters.items() if id(parameter) not in trained | frozen)
    if unknown:
        raise ValueError(f"the plan says nothing about {len(unknown)} parameters, for example {unknown[0]}")
    for parameter in parameters.values():
        parameter.requires_grad_(id(parameter) in trained)
    return model
'''


def write_hf_trainer(names: ExportNames, title: str = "hf-trainer", spell: Callable[[str], str] = str) -> str:
    """A Python module with the names and a function `freeze(model)`; it needs neither layerprobe nor the plan.

    The Hugging Face Trainer has no option for freezing; it trains what requires a gradient. `from_pretrained`
    makes every parameter trainable, hence `freeze` before the Trainer is built and again on resume. Others use the
    same module under another `title`, and `spell` the names in their own way.
    """
    text = names.comment(title)
    for which, members in (("TRAINABLE", names.trainable), ("FROZEN", names.frozen)):
        listed = "".join(f"    {spell(name)!a},\n" for name in members)
        text += f"\n{which} = frozenset([\n{listed}])\n"
    return text + _FREEZE_FUNCTION


def write_regex(names: ExportNames) -> str:
    """One regular expression on a line for any other tool: `re.fullmatch(pattern, name)` holds for what is trained."""
    indices: dict[str, list[str]] = {}
    for block in names.free_blocks:
        container, _, index = block.rpartition(".")
        indices.setdefault(container, []).append(index)
    parts = [
        (re.escape(container) + r"\." if container else "") + f"(?:{'|'.join(chosen)})" + r"\..+"
        for container, chosen in indices.items()
    ]
    parts += [re.escape(name) for name in names.patterns]
    pattern = "|".join(parts) if parts else r"(?!)"
    names.require_exact((name for name in names.all if re.fullmatch(pattern, name)), "regex")
    return pattern + "\n"


def _yaml_list(items: Iterable[str]) -> str:
    """A block sequence of double-quoted strings, which YAML reads as JSON does."""
    return "".join(f"  - {json.dumps(item)}\n" for item in items)
