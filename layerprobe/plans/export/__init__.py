"""Plans in the formats of other trainers: one file a target, and a refusal for what it cannot say exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from layerprobe.errors import PlanError, UnknownNameError, did_you_mean
from layerprobe.plans.export import axolotl, finetuning_scheduler, hf_trainer, llama_factory, peft, regex
from layerprobe.plans.export.names import ExportNames, export_names
from layerprobe.plans.plan import FROZEN, TRAINABLE, FreezePlan


@dataclass(frozen=True)
class Target:
    """A trainer that plans can be exported to.

    Attributes
    ----------
    write : names -> text.
    suffix : of the file it belongs into.
    reads_nothing : whether a plan that trains nothing can be said; most trainers stop, or train everything.
    use : how the text is used, in a sentence.
    """

    write: Callable[[ExportNames], str]
    suffix: str
    use: str
    reads_nothing: bool = False


TARGETS: dict[str, Target] = {
    "axolotl": Target(axolotl.write, ".yaml", "merge into the axolotl config; no adapter may be set"),
    "llama-factory": Target(llama_factory.write, ".yaml", "merge into the LLaMA-Factory training config"),
    "peft": Target(peft.write, ".json", "get_peft_model(model, LoraConfig(**json.load(file)))"),
    "finetuning-scheduler": Target(
        finetuning_scheduler.write, ".yaml", "FinetuningScheduler(ft_schedule='schedule.yaml')"
    ),
    "hf-trainer": Target(
        hf_trainer.write, ".py", "freeze(model) before the Trainer is built, and again on resume", True
    ),
    "regex": Target(regex.write, ".txt", "re.fullmatch(pattern, name) is true for what is trained", True),
}
"""Target name -> how to write for it."""


def export_plan(
    plan: FreezePlan,
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
    target : `axolotl`, `llama-factory`, `peft`, `finetuning-scheduler`, `hf-trainer` or `regex`.
    prefix : what the other trainer's model puts before the names: `model.` for LlamaForCausalLM,
        `transformer.` for GPT2LMHeadModel, `bert.`, `vit.`; nothing for the bare model.
    outside : full name of a parameter around the base model (`lm_head.weight`) -> `trainable` or
        `frozen`. Trainable ones are exported too; all of them are watched, so that no pattern takes a frozen
        one along. Those not named stay frozen in every target but see what its rule says.
    without : modules of the plan (`pooler`) that the other trainer's model does not have.

    Raises
    ------
    UnknownNameError : no such target.
    PlanError : the target cannot say this plan; one sentence says why.
    """
    if target not in TARGETS:
        raise UnknownNameError(
            f"unknown target '{target}'.{did_you_mean(target, TARGETS)} Targets: {', '.join(TARGETS)}"
        )
    chosen = dict(outside or {})
    if wrong := [name for name, state in chosen.items() if state not in (FROZEN, TRAINABLE)]:
        raise PlanError(f"outside: the state of {wrong[0]} must be '{FROZEN}' or '{TRAINABLE}'")
    names = export_names(plan, prefix=prefix, outside=chosen, without=without)
    if not names.trainable and not TARGETS[target].reads_nothing:
        raise PlanError(
            f"{target} cannot be told to train nothing of the model: name the head with outside, "
            "for example {'score.weight': 'trainable'}"
        )
    return TARGETS[target].write(names)
