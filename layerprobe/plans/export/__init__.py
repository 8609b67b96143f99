"""Plans in the formats of other trainers, and a refusal for what a format cannot say exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from layerprobe.errors import PlanError, UnknownNameError, did_you_mean
from layerprobe.plans.export.modules import write_llama_factory, write_peft
from layerprobe.plans.export.names import (
    ExportNames,
    export_names,
    write_axolotl,
    write_finetuning_scheduler,
    write_hf_trainer,
    write_ms_swift,
    write_regex,
)
from layerprobe.plans.export.recipes import write_torchtune, write_trl, write_unsloth
from layerprobe.plans.plan import FROZEN, TRAINABLE, PlanData


@dataclass(frozen=True)
class Target:
    """A trainer that plans can be exported to: who writes for it, the suffix of the file, how the text is used."""

    write: Callable[[ExportNames], str]
    suffix: str
    use: str


TARGETS: dict[str, Target] = {
    "axolotl": Target(write_axolotl, ".yaml", "merge into the axolotl config; no adapter may be set"),
    "llama-factory": Target(write_llama_factory, ".yaml", "merge into the LLaMA-Factory training config"),
    "ms-swift": Target(write_ms_swift, ".yaml", "merge into the ms-swift config; tuner_type must stay full"),
    "peft": Target(write_peft, ".json", "get_peft_model(model, LoraConfig(**json.load(file)))"),
    "finetuning-scheduler": Target(
        write_finetuning_scheduler, ".yaml", "FinetuningScheduler(ft_schedule='schedule.yaml')"
    ),
    "hf-trainer": Target(
        write_hf_trainer, ".py", "freeze(model) before the Trainer is built, and again on resume"
    ),
    "trl": Target(
        write_trl,
        ".py",
        "freeze(model), or place(model) for adapters, before SFTTrainer is built on that object",
    ),
    "unsloth": Target(
        write_unsloth, ".py", "the same; load with full_finetuning=True for freeze, without for place"
    ),
    "torchtune": Target(
        write_torchtune,
        ".py",
        "freeze(model) at the end of the recipe's _setup_model; with adapters, YAML to merge",
    ),
    "regex": Target(write_regex, ".txt", "re.fullmatch(pattern, name) is true for what is trained"),
}
"""Target name -> how to write for it."""

_PLACES_ADAPTERS = ("peft", "trl", "unsloth", "torchtune")

_MAY_TRAIN_NOTHING = ("hf-trainer", "trl", "unsloth", "torchtune", "regex")
"""The others stop, or train everything, when they are told to train nothing."""


def export_plan(
    plan: PlanData,
    target: str,
    *,
    prefix: str = "",
    outside: Mapping[str, str] | None = None,
    without: Iterable[str] = (),
) -> str:
    """The plan as text in the format of another trainer.

    The text is read back by the target's own matching rule before it is returned; what does not come out
    as exactly the plan is refused.

    Parameters
    ----------
    target : str
        One of `TARGETS`: `axolotl`, `peft`, `hf-trainer` and others.
    prefix : str
        What the other trainer's model puts before the names: `model.` for LlamaForCausalLM, `transformer.`
        for GPT2LMHeadModel, `bert.`, `vit.`; nothing for the bare model.
    outside : Mapping[str, str] | None
        Full name of a parameter around the base model (`lm_head.weight`) -> `trainable` or `frozen`.
        Trainable ones are exported too; all of them are watched, so that no pattern takes a frozen one along.
        Those not named stay frozen in every target but see what its rule says.
    without : Iterable[str]
        Modules of the plan (`pooler`) that the other trainer's model does not have.

    Raises
    ------
    UnknownNameError
        No such target.
    PlanError
        The target cannot say this plan; one sentence says why.
    """
    if target not in TARGETS:
        raise UnknownNameError(
            f"unknown target '{target}'.{did_you_mean(target, TARGETS)} Targets: {', '.join(TARGETS)}"
        )
    chosen = dict(outside or {})
    if wrong := [name for name, state in chosen.items() if state not in (FROZEN, TRAINABLE)]:
        raise PlanError(f"outside: the state of {wrong[0]} must be '{FROZEN}' or '{TRAINABLE}'")
    names = export_names(plan, prefix=prefix, outside=chosen, without=without)
    if plan.adapters and target not in _PLACES_ADAPTERS:
        raise PlanError(
            f"{target} trains weights and places no adapters, but {plan.source} has {len(plan.adapters)} of them; "
            f"export it to {' or '.join(_PLACES_ADAPTERS)}"
        )
    if not names.trainable and not plan.adapters and target not in _MAY_TRAIN_NOTHING:
        raise PlanError(
            f"{target} cannot be told to train nothing of the model: name the head with outside, "
            "for example {'score.weight': 'trainable'}"
        )
    return TARGETS[target].write(names)
