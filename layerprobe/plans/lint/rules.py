"""Which parameters other trainers train, by the rules in their sources; the versions read stand at each function."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from layerprobe.plans.export.peft_rule import PeftPlaces
from layerprobe.plans.plan import few

Config = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """A model as a configuration sees it.

    Attributes
    ----------
    sizes : dict[str, int]
        Parameter name -> number of entries, in the model's order.
    linear : frozenset[str]
        Names of the linear maps, which adapters can be on.
    n_layers : int
        Number of blocks, as the model's configuration says.
    head : str | None
        Name of the linear map that makes the model's outputs.
    """

    sizes: dict[str, int]
    linear: frozenset[str]
    n_layers: int
    head: str | None = None

    @property
    def modules(self) -> list[str]:
        """Every dotted start of the names."""
        found: dict[str, None] = {}
        for name in self.sizes:
            parts = name.split(".")[:-1]
            found.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1)))
        return list(found)


@dataclass(kw_only=True)
class ParsedConfig:
    """What a configuration comes to: the weights that train, adapters and their ranks, and what is wrong with it."""

    trained: set[str] = field(default_factory=set)
    adapters: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def axolotl(config: Config, model: ModelNames) -> ParsedConfig:
    """axolotl at 107c67a (src/axolotl/utils/freeze.py `freeze_layers_except`; schemas/validation.py)."""
    patterns = _texts(config.get("unfrozen_parameters"))
    if config.get("adapter"):
        found = _lora(
            {
                "target_modules": config.get("lora_target_modules"),
                "layers_to_transform": config.get("peft_layers_to_transform"),
                "layers_pattern": config.get("peft_layers_pattern"),
                "modules_to_save": config.get("lora_modules_to_save"),
                "r": config.get("lora_r", 8),
            },
            model,
            everywhere=bool(config.get("lora_target_linear")),
        )
        if patterns:
            found.problems.append(
                f"unfrozen_parameters does nothing beside adapter: {config['adapter']}; take one of the two away"
            )
        return found
    if not patterns:
        return ParsedConfig(
            trained=set(model.sizes), remarks=["without unfrozen_parameters axolotl trains every weight"]
        )
    found = ParsedConfig()
    for pattern in patterns:
        body, rows = _range_of_rows(pattern)
        expression = re.sub(r"\.(?!\+)", r"\\.", body)
        taken = _matched(found, pattern, model.sizes, lambda name, e=expression: re.match(e, name))  # type: ignore[misc]
        if rows and taken:
            found.remarks.append(
                f"'{pattern}' trains rows {rows} of its tensors alone: other gradients are zeroed"
            )
        _too_many(found, pattern, body, taken)
    return found


def llama_factory(config: Config, model: ModelNames) -> ParsedConfig:
    """LLaMA-Factory 0.9.5 (src/llamafactory/model/adapter.py `_setup_freeze_tuning`, `_setup_lora_tuning`)."""
    kind = config.get("finetuning_type", "lora")
    frozen_keys = [key for key in config if key.startswith("freeze_") or key == "use_llama_pro"]
    if kind in ("lora", "oft"):
        targets = _words(config.get("lora_target", "all"))
        found = _lora(
            {"target_modules": targets, "modules_to_save": _words(config.get("additional_target")),
             "r": config.get("lora_rank", 8)},
            model,
            everywhere=targets == ["all"],
        )  # fmt: skip
    elif kind == "full":
        found = ParsedConfig(trained=set(model.sizes))
    else:
        return _llama_factory_freeze(config, model)
    if frozen_keys:
        found.problems.append(
            f"{', '.join(frozen_keys)} do nothing with finetuning_type: {kind}; they need finetuning_type: freeze"
        )
    return found


def _llama_factory_freeze(config: Config, model: ModelNames) -> ParsedConfig:
    found, depth, count = ParsedConfig(), model.n_layers, _whole(config.get("freeze_trainable_layers", 2))
    if config.get("use_llama_pro"):
        if not count or depth % count:
            found.problems.append(f"use_llama_pro stops: {depth} layers are not divisible by {count}")
            return found
        layers = range(depth // count - 1, depth, depth // count)
    else:
        layers = range(max(0, depth - count), depth) if count > 0 else range(min(-count, depth))
    if not count:
        found.remarks.append("freeze_trainable_layers: 0 chooses no layer")
    inside = {
        name.split(f".{i}.", 1)[1].split(".")[0] for i in (0, 1) for name in model.sizes if f".{i}." in name
    }
    marks = []
    for module in _words(config.get("freeze_trainable_modules", "all")):
        if module != "all" and module not in inside:
            found.problems.append(f"freeze_trainable_modules: no layer has '{module}', so training stops")
        marks += [f".{layer}.{'' if module == 'all' else module}" for layer in layers]
    outside = {n.split(".")[-2] for n in model.sizes if not re.search(r"\.\d+\.", n) and "." in n}
    for module in _words(config.get("freeze_extra_modules")):
        if module not in outside:
            found.problems.append(f"freeze_extra_modules: '{module}' is found nowhere, so training stops")
        more = [name for name in model.sizes if module in name and f".{module}." not in f".{name}."]
        if more:
            found.problems.append(
                f"freeze_extra_modules: '{module}' is part of other names, and trains {few(more)} too"
            )
        marks.append(module)
    found.trained = {name for name in model.sizes if any(mark in name for mark in marks)}
    return found


def ms_swift(config: Config, model: ModelNames) -> ParsedConfig:
    """ms-swift 4.x at 006938b (swift/utils/transformers_utils.py `freeze_parameters`, `activate_parameters`)."""
    kind = config.get("tuner_type", config.get("train_type", "lora"))
    keys = [k for k in config if k.startswith(("freeze_parameters", "trainable_parameters"))]
    if kind != "full":
        target = config.get("target_regex") or _texts(config.get("target_modules")) or ["all-linear"]
        found = _lora(
            {"target_modules": target, "modules_to_save": config.get("modules_to_save"),
             "r": config.get("lora_rank", 8)},
            model,
            everywhere=target == ["all-linear"],
        )  # fmt: skip
        if keys:
            found.problems.append(
                f"{', '.join(keys)} do nothing with tuner_type: {kind}; they need tuner_type: full"
            )
        return found
    found = ParsedConfig()
    ratio = config.get("freeze_parameters_ratio", 0)
    share = float(ratio) if isinstance(ratio, (int, float)) else 0.0
    sums = list(itertools.accumulate(model.sizes.values()))
    first = bisect.bisect_right(sums, int(sums[-1] * share)) if share > 0 else 0
    trained = dict.fromkeys(list(model.sizes)[first:])
    for prefix in _texts(config.get("freeze_parameters")):
        for name in _matched(ParsedConfig(), prefix, model.sizes, _starts(prefix), into=found):
            trained.pop(name, None)
    for pattern in _texts(config.get("freeze_parameters_regex")):
        for name in _matched(ParsedConfig(), pattern, model.sizes, _search(pattern), into=found):
            trained.pop(name, None)
    found.trained = set(trained)
    for prefix in _texts(config.get("trainable_parameters")):
        _too_many(found, prefix, prefix, _matched(found, prefix, model.sizes, _starts(prefix)))
    for pattern in _texts(config.get("trainable_parameters_regex")):
        _matched(found, pattern, model.sizes, _search(pattern))
    opened = [k for k in keys if k.startswith("trainable")]
    if opened and not share and not any(k.startswith("freeze") for k in keys):
        found.problems.append(
            f"{', '.join(opened)} do nothing: everything trains already; freeze it first with "
            "freeze_parameters_ratio: 1"
        )
    return found


def peft(config: Config, model: ModelNames) -> ParsedConfig:
    """peft 0.21.2 (src/peft/tuners/tuners_utils.py `check_target_module_exists`, src/peft/utils/other.py)."""
    found = _lora(config, model, everywhere=config.get("target_modules") == "all-linear")
    if config.get("layers_to_transform") is not None and isinstance(config.get("target_modules"), str):
        found.problems.append(
            "layers_to_transform does nothing beside target_modules as one expression; list the modules"
        )
    if config.get("layers_to_transform") is not None and not found.trained and found.adapters:
        found.remarks.append("the layers of layers_to_transform get adapters; their own weights stay frozen")
    return found


def finetuning_scheduler(config: Config, model: ModelNames) -> ParsedConfig:
    """finetuning-scheduler 2.14.1 (src/finetuning_scheduler/fts_supporters.py `_parse_phase`)."""
    found = ParsedConfig()
    phases = sorted(int(key) for key in config)
    if phases != list(range(len(phases))):
        found.problems.append(
            f"phases are numbered from 0 without gaps, these are {', '.join(map(str, phases))}"
        )
    for number in phases:
        phase = {str(key): value for key, value in config.items()}[str(number)]
        entries = _texts(phase.get("params") if isinstance(phase, Mapping) else None)
        if not entries:
            found.problems.append(f"phase {number} has no params")
        for entry in entries:
            before = set(found.trained)
            taken = [entry] if entry in model.sizes else None
            if taken is None:
                taken = _matched(found, entry, model.sizes, lambda name, e=entry: re.match(e, name))  # type: ignore[misc]
            found.trained |= set(taken)
            if again := before & set(taken):
                found.problems.append(
                    f"phase {number}: {few(sorted(again))} is in an earlier entry, so training stops"
                )
    if len(phases) > 1:
        found.remarks.append(f"of {len(phases)} phases; all of them are counted")
    return found


RULES: dict[str, Callable[[Config, ModelNames], ParsedConfig]] = {
    "axolotl": axolotl,
    "llama-factory": llama_factory,
    "ms-swift": ms_swift,
    "peft": peft,
    "finetuning-scheduler": finetuning_scheduler,
}


def _lora(config: Config, model: ModelNames, *, everywhere: bool) -> ParsedConfig:
    """Adapters by PEFT's rule; `everywhere` stands for all linear maps but the head."""
    found = ParsedConfig()
    given = config.get("target_modules")
    if everywhere:
        given = sorted(model.linear - {model.head})
    if not given:
        found.problems.append("target_modules is empty, so there is no place for an adapter")
    saved = _texts(config.get("modules_to_save"))
    places = PeftPlaces.of({**config, "target_modules": given or [], "modules_to_save": saved})
    taken = [module for module in model.modules if places.takes(module)]
    found.adapters = {module: places.rank(module) for module in taken if module in model.linear}
    if other := [module for module in taken if module not in model.linear]:
        found.problems.append(f"{few(other)} are taken and cannot have an adapter, so training stops")
    for entry in () if isinstance(given, str) or everywhere else _texts(given):
        alone = PeftPlaces.of({**config, "target_modules": [entry], "modules_to_save": []})
        if not any(alone.takes(module) for module in model.modules):
            where = " in those layers" if config.get("layers_to_transform") is not None else ""
            found.problems.append(f"target_modules: '{entry}' matches nothing{where}")
    for entry in saved:
        inside = [m for m in model.modules if m.endswith(entry)]
        found.trained |= {name for name in model.sizes if any(name.startswith(f"{m}.") for m in inside)}
        if not inside:
            found.problems.append(f"modules_to_save: '{entry}' matches nothing")
        if len({m.rpartition(".")[2] for m in inside}) > 1:
            found.problems.append(
                f"modules_to_save: '{entry}' is the end of other names too, and trains {few(inside)}"
            )
    return found


def _matched(
    found: ParsedConfig,
    pattern: str,
    names: Iterable[str],
    matches: Callable[[str], object],
    *,
    into: ParsedConfig | None = None,
) -> list[str]:
    """The names that a pattern takes, now trained in `found`; a problem (of `into`) where there is none."""
    try:
        taken = [name for name in names if matches(name)]
    except re.error as error:
        (into or found).problems.append(f"'{pattern}' is no regular expression ({error}), and is passed over")
        return []
    if not taken:
        (into or found).problems.append(f"'{pattern}' matches nothing")
    found.trained |= set(taken)
    return taken


def _too_many(found: ParsedConfig, pattern: str, body: str, taken: list[str]) -> None:
    """A pattern that ends on the number of a layer takes 10 to 19 along with 1."""
    number = re.search(r"\.(\d+)$", body)
    if number is None:
        return
    layers = {match[1] for name in taken for match in re.finditer(rf"\.({number[1]}\d*)\.", name)}
    if more := sorted(layers - {number[1]}, key=int):
        found.problems.append(
            f"'{pattern}' takes layer {', '.join(more)} along; end it with a dot: '{pattern}.'"
        )


def _starts(prefix: str) -> Callable[[str], object]:
    return lambda name: name.startswith(prefix)


def _search(pattern: str) -> Callable[[str], object]:
    return lambda name: re.search(pattern, name)


def _range_of_rows(pattern: str) -> tuple[str, str]:
    match = re.match(r"^(.+)\[([0-9]*(?::[0-9]*)?)\]$", pattern)
    return (match[1], match[2]) if match else (pattern, "")


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return value.split() if value else []
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else []


def _words(value: object) -> list[str]:
    listed = value.split(",") if isinstance(value, str) else _texts(value)
    return [word.strip() for word in listed if word.strip()]


def _whole(value: object) -> int:
    return int(value) if isinstance(value, (int, float, str)) and str(value).lstrip("-").isdigit() else 0
