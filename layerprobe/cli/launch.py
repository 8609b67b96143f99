"""`--launch`: the same command as jobs of a cluster, which stop when they are told to and go on when they are let.

submitit submits and requeues. What a job has to keep is kept by the command itself: on SIGTERM, which Slurm sends
before it preempts a job or ends its time, it saves and leaves with exit code 143.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprobe.cli.options import name_list, option
from layerprobe.cli.output import Output, print_body
from layerprobe.errors import NotAvailableError, UsageError, first_line

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

CLUSTERS = ("slurm", "local")
PANEL = "Cluster"
STOPPED = 143
MOST_REQUEUES = 1000
_PREEMPT_SIGNAL = "SUBMITIT_PREEMPT_SIGNAL"
_OF_EVERY_CLUSTER = (
    "timeout_min", "mem_gb", "nodes", "gpus_per_node", "cpus_per_task", "tasks_per_node", "name",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Whether the command runs here or as jobs."""

    launch: str | None = option(
        None,
        "slurm: submit this command as a job, requeued when preempted. local: try that here.",
        panel=PANEL,
        choices=CLUSTERS,
    )
    jobs: int = option(1, "Jobs of a search, which share its --storage.", min=1, panel=PANEL)
    job_options: str | None = option(
        None, "What a job asks for, such as partition=gpu,gpus_per_node=1,timeout_min=240.", panel=PANEL
    )

    def submit(self, out: Output, *, storage: str | None = None) -> bool:
        """Submit this very command and say which jobs there are; False without --launch."""
        if self.launch is None:
            return False
        assert out.folder is not None, "commands that can be launched have a folder"
        if self.jobs > 1 and self.launch == "slurm" and "://" not in (storage or ""):
            raise UsageError(f"{self.jobs} jobs on several machines need --storage postgresql://…")
        jobs = _submit(self.launch, out, self.jobs, self.job_options, _in_folder(own_arguments(), out.folder))
        rows = [{"job": job.job_id, "log": str(job.paths.stdout)} for job in jobs]
        if out.as_json:
            print_body(out.command, {"launch": self.launch}, {"rows": rows})
        else:
            sys.stdout.writelines(f"job {row['job']}, log {row['log']}\n" for row in rows)
        return True


def own_arguments() -> list[str]:
    """The arguments of this process without those of `LaunchOptions`."""
    own = {"--launch", "--jobs", "--job-options"}
    kept, given = [], iter(sys.argv[1:])
    for word in given:
        if word in own:
            next(given, None)
        elif word.partition("=")[0] not in own:
            kept.append(word)
    return kept


def _in_folder(arguments: list[str], folder: Path) -> list[str]:
    """The arguments with the folder that was chosen here, so that every job works there."""
    named = any(word in ("-o", "--output") or word.startswith("--output=") for word in arguments)
    return arguments if named else [*arguments, "--output", str(folder)]


@dataclass
class Command:
    """What submitit keeps and calls: the command, and how it goes on after it was stopped."""

    arguments: list[str]

    def __call__(self) -> None:
        """Run the command in this process, whose SIGTERM it takes over; then let submitit requeue it."""
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        if JobEnvironment().num_tasks > 1:
            TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        from layerprobe.cli.main import main

        sys.argv = ["layerprobe", *self.arguments]
        try:
            main()
        except SystemExit as end:
            if end.code == STOPPED:
                # The command has saved, and submitit's own handler stands again: it requeues and leaves.
                signal.raise_signal(signal.SIGTERM)
            if end.code:
                raise

    def checkpoint(self) -> DelayedSubmission:
        """The same once more: the command itself finds what is done."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


def _submit(cluster: str, out: Output, count: int, asked: str | None, arguments: list[str]) -> list[Any]:
    # Read by submitit when it is imported, here and in the job.
    os.environ[_PREEMPT_SIGNAL] = "TERM"
    try:
        from submitit import AutoExecutor
    except ImportError as error:
        raise NotAvailableError("--launch needs submitit: pip install 'layerprobe[slurm]'") from error
    assert out.folder is not None, "submit"
    chosen: dict[str, Any] = {"name": out.command, "slurm_setup": [f"export {_PREEMPT_SIGNAL}=TERM"]}
    for item in name_list(asked):
        key, _, value = item.partition("=")
        chosen[key if key in _OF_EVERY_CLUSTER else f"slurm_{key}"] = int(value) if value.isdigit() else value
    try:
        executor = AutoExecutor(out.folder / "jobs", cluster=cluster, slurm_max_num_timeout=MOST_REQUEUES)
        executor.update_parameters(**chosen)
        return [executor.submit(Command(arguments)) for _ in range(count)]
    except Exception as error:  # a parameter that is not known, or what sbatch says
        raise UsageError(f"the job was not submitted: {first_line(error)}") from error
