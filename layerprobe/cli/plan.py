"""`layerprobe plan`: look at a freeze plan, test it against a model or a configuration, take it elsewhere, share it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option, Typer

from layerprobe.cli import options
from layerprobe.cli.output import Output, print_body
from layerprobe.errors import UsageError

app = Typer(
    no_args_is_help=True,
    help="Show a freeze plan, check it, export it to another trainer, lint a trainer's configuration, or share it.",
)

PlanFile = Annotated[Path, Argument(metavar="PLAN", help="A plan.json, or a run folder that holds one.")]


@app.command("show")
def show(
    plan: PlanFile, as_json: options.Json = False, output: options.OutDir = None, quiet: options.Quiet = False
) -> None:
    """Show what a plan trains, in numbers and as a strip of blocks.

    Example: layerprobe plan show plan.json
    """
    from layerprobe.plans import FreezePlan
    from layerprobe.plans.plan import ADAPTER
    from layerprobe.plans.table import MARKS, PlanTable, block_strip
    from layerprobe.provenance import provenance

    out = Output("plan-show", as_json=as_json, output=output, quiet=quiet)
    loaded = FreezePlan.load(plan)
    record = PlanTable(loaded, provenance("plan show", {"plan": str(plan)}))
    if not as_json:
        sys.stdout.write(block_strip(loaded) + "\n")
        shown = {state: mark for state, mark in MARKS.items() if state != ADAPTER or loaded.adapters}
        sys.stdout.write("  ".join(f"{mark} {state}" for state, mark in shown.items()) + "\n\n")

    out.finish(record, figures=lambda: {"plan": record.plot})


@app.command("check")
def check(
    plan: PlanFile,
    model: options.Model,
    revision: options.Revision = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Check that a plan fits a model: every name and every shape. Weights are not loaded.

    Example: layerprobe plan check plan.json --model minilm
    """
    from layerprobe.backbones import load_backbone
    from layerprobe.plans import FreezePlan, parameter_table

    loaded = FreezePlan.load(plan)
    backbone = load_backbone(
        model, revision=revision, device="meta", offline=offline, trust_remote_code=trust_remote_code
    )
    source = backbone.source
    loaded.check(parameter_table(backbone.model))
    n_tensors = len(loaded.parameters)
    remarks = []
    if loaded.revision and loaded.revision != source.revision:
        remarks.append(
            f"the plan was found at revision {loaded.revision}, this is {source.revision}: same names, "
            "perhaps other weights"
        )
    if as_json:
        body = {"fits": True, "tensors": n_tensors, "remarks": remarks}
        print_body("plan check", {"plan": str(plan), "model": model}, body, revision=source.revision)
        return
    sys.stdout.write(f"fits: all {n_tensors} names and shapes of {loaded.source} are those of {model}\n")
    sys.stdout.write("".join(f"note: {remark}\n" for remark in remarks))
    sys.stdout.write(loaded.summary() + "\n")


@app.command("lint")
def lint(
    config: Annotated[Path, Argument(metavar="CONFIG", help="YAML or JSON file of another trainer.")],
    model: options.Model,
    plan: Annotated[Path | None, Option(help="Freeze plan to compare with.")] = None,
    trainer: Annotated[
        str | None,
        Option(
            help="axolotl, llama-factory, ms-swift, peft or finetuning-scheduler; default: told by the keys."
        ),
    ] = None,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Say exactly which parameters another trainer's configuration trains. Weights are not loaded.

    Leaves with exit code 1 when it trains nothing or everything, when a pattern matches nothing, when a setting does
    nothing, or when it differs from the plan.

    Example: layerprobe plan lint train.yaml --model minilm --plan plan.json
    """
    from dataclasses import asdict

    from layerprobe.backbones.skeleton import model_names
    from layerprobe.plans import FreezePlan
    from layerprobe.plans.lint import lint_config, read_config
    from layerprobe.plans.lint.rules import ModelNames

    names = ModelNames(**model_names(model, revision=revision, offline=offline))
    loaded = FreezePlan.load(plan) if plan is not None else None
    verdict = lint_config(read_config(config), names, trainer=trainer, plan=loaded)
    if as_json:
        body = {"holds": verdict.holds, **asdict(verdict)}
        print_body("plan lint", {"config": str(config), "model": model}, body)
    else:
        sys.stdout.write("".join(f"{line}\n" for line in verdict.lines()))
    if not verdict.holds:
        raise Exit(1)


@app.command("export")
def export(
    plan: PlanFile,
    to: Annotated[
        str,
        Option(
            help="axolotl, llama-factory, ms-swift, peft, finetuning-scheduler, hf-trainer, trl, unsloth, torchtune "
            "or regex."
        ),
    ],
    prefix: Annotated[
        str,
        Option(
            help="What the other trainer's model puts before the names: 'model.' for LlamaForCausalLM, "
            "'transformer.' for GPT2LMHeadModel, 'bert.', 'vit.'."
        ),
    ] = "",
    train: Annotated[
        list[str] | None, Option(help="Parameter around the base model to train, e.g. score.weight; repeat.")
    ] = None,
    freeze: Annotated[
        list[str] | None, Option(help="Parameter around the base model that stays frozen; repeat.")
    ] = None,
    without: Annotated[
        list[str] | None, Option(help="Module of the plan that the other model lacks, e.g. pooler; repeat.")
    ] = None,
    as_json: options.Json = False,
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="File, or folder for a file of the usual name; default: stdout."),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Write a plan in another trainer's format, or say why that trainer cannot follow it.

    Example: layerprobe plan export plan.json --to axolotl --prefix model.
    """
    from layerprobe.files import write_text
    from layerprobe.plans import FreezePlan
    from layerprobe.plans.export import TARGETS
    from layerprobe.progress import note

    loaded = FreezePlan.load(plan)
    if both := sorted(set(train or []) & set(freeze or [])):
        raise UsageError(f"{both[0]} is named with --train and with --freeze; choose one")
    outside = {**dict.fromkeys(train or [], "trainable"), **dict.fromkeys(freeze or [], "frozen")}
    how: dict[str, Any] = {"prefix": prefix, "outside": outside, "without": without or []}
    text = loaded.export(to, **how)
    target = TARGETS[to]
    written = None
    if output is not None:
        written = output if output.suffix == target.suffix else output / f"{to}{target.suffix}"
        write_text(written, text)
    if as_json:
        file = None if written is None else str(written)
        body = {"target": to, "use": target.use, "file": file, "text": text}
        print_body("plan export", {"plan": str(plan), "to": to, **how}, body)
    elif written is None:
        sys.stdout.write(text)
    if not quiet:
        note(f"{to}: {target.use}" + (f"; saved: {written}" if written is not None else ""))


Repository = Annotated[str, Argument(metavar="OWNER/NAME", help="Repository of the Hugging Face hub.")]


@app.command("push")
def push(
    plan: PlanFile,
    repository: Repository,
    private: Annotated[bool, Option("--private", help="Make a new repository private.")] = False,
    as_json: options.Json = False,
) -> None:
    """Share a plan on the Hugging Face hub, with a card made from its evidence. Log in first: hf auth login.

    Everything in the file is shared, the names of folders in it included.

    Example: layerprobe plan push plan.json me/minilm-digits-plan
    """
    from layerprobe.plans import FreezePlan

    address = FreezePlan.load(plan).push(repository, private=private)
    if as_json:
        arguments = {"plan": str(plan), "repository": repository}
        print_body("plan push", arguments, {"commit": address})
        return
    sys.stdout.write(f"{address}\n")


@app.command("pull")
def pull(
    repository: Repository,
    revision: options.Revision = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
    output: Annotated[Path, Option("--output", "-o", help="File, or folder for a plan.json.")] = Path(
        "plan.json"
    ),
) -> None:
    """Fetch a plan from the Hugging Face hub and write it to a file.

    Example: layerprobe plan pull me/minilm-digits-plan -o plan.json
    """
    from layerprobe.plans import FreezePlan
    from layerprobe.plans.freeze_plan import PLAN_FILE

    found = FreezePlan.pull(repository, revision=revision, offline=offline)
    written = found.save(output if output.suffix == ".json" else output / PLAN_FILE)
    if as_json:
        print_body(
            "plan pull", {"repository": repository}, {"file": str(written), "summary": found.summary()}
        )
        return
    sys.stdout.write(f"{found.summary()}\nsaved: {written}\n")
