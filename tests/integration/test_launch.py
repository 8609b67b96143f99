"""`--launch` with submitit's local executor: a job that gets SIGTERM saves, is requeued, and ends as if left alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from families import save

os.environ["SUBMITIT_PREEMPT_SIGNAL"] = "TERM"  # submitit reads it when it is imported
pytest.importorskip("submitit", reason="the extra [slurm] is not installed")

BRIDGE = ("bridge", "--task", "digits", "--limit", "60", "--patch-size", "4", "--steps", "1500",
          "--batch-size", "8", "--checkpoint-every", "100")  # fmt: skip
SEARCH = ("freeze-search", "--task", "digits", "--limit", "60", "--patch-size", "4", "--budget", "5",
          "--steps", "400", "--batch-size", "8", "--lrs", "1e-3,3e-3", "--seeds", "2", "--max-seeds", "2",
          "--no-scores", "--workers", "1")  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("llama"))


def layerprobe(*arguments: object) -> str:
    """What the command prints; into a file, since its jobs keep the stdout that they inherit."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(
            [sys.executable, "-m", "layerprobe", *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=said,
            check=False,
            timeout=300,
        )
        said.seek(0)
        assert done.returncode == 0, said.read()
        out.seek(0)
        return out.read()


def launch(*arguments: object, options: str = "timeout_min=15") -> list[int]:
    """Submit; the process of each job."""
    said = layerprobe(*arguments, "--launch", "local", "--job-options", options, "--json")
    return [int(row["job"]) for row in json.loads(said)["rows"]]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(done: object, seconds: float, what: str) -> float:
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.05)
    return time.monotonic() - began


def logs(folder: Path, ending: str) -> str:
    return "".join(path.read_text() for path in sorted((folder / "jobs").glob(f"*_log.{ending}")))


def stop_and_wait(run: Path, job: int) -> None:
    """SIGTERM, as Slurm sends it; the job is requeued within thirty seconds and ends by itself."""
    os.kill(job, signal.SIGTERM)
    wait_for(lambda: "Requeued job" in logs(run, "out"), 30, logs(run, "err"))
    wait_for(lambda: not lives(job), 300, logs(run, "err"))
    assert "Job completed successfully" in logs(run, "out"), logs(run, "err")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tasks", [1, 2])
def test_a_bridge_that_is_preempted_ends_with_the_same_bits(llama: Path, tmp_path: Path, tasks: int) -> None:
    """With two tasks the job is one training of two processes, as submitit tells torch about them."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    (job,) = launch(*BRIDGE, "--model", llama, "-o", run, options=f"timeout_min=15,tasks_per_node={tasks}")
    wait_for((run / "layerprobe_run.json").exists, 120, logs(run, "err"))
    stop_and_wait(run, job)
    assert "finished work is kept" in logs(run, "err")
    if tasks == 1:
        layerprobe(*BRIDGE, "--model", llama, "-o", whole)
    else:
        (job,) = launch(
            *BRIDGE, "--model", llama, "-o", whole, options=f"timeout_min=15,tasks_per_node={tasks}"
        )
        wait_for(lambda: not lives(job), 300, logs(whole, "err"))
    state = json.loads((run / "layerprobe_run.json").read_text())
    assert state["finished"] and state["step"] == 1500
    for name in ("backbone/model.safetensors", "stem.safetensors", "head.safetensors"):
        assert (run / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
    assert json.loads((run / "final" / "state.json").read_text())["processes"] == tasks


@pytest.mark.slow
def test_two_jobs_share_a_search_and_one_is_preempted(llama: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    layerprobe(*SEARCH, "--model", llama, "-o", whole)
    first, second = launch(*SEARCH, "--model", llama, "-o", run, "--jobs", 2)
    wait_for(lambda: re.search(r"\d+ trainings", logs(run, "err")), 120, logs(run, "err"))
    stop_and_wait(run, first)
    wait_for(lambda: not lives(second), 300, logs(run, "err"))
    assert logs(run, "out").count("Job completed successfully") == 2
    assert (run / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--launch", "pbs", "-o", "run"], "unknown launch 'pbs'. Choose from: slurm, local"),
        (["--launch", "slurm", "--jobs", "2", "-o", "run"], "need --storage postgresql"),
        (["--launch", "local", "--job-options", "colour=red", "-o", "run"], "was not submitted"),
        (["--launch", "slurm", "-o", "run"], "was not submitted"),  # no sbatch here
    ],
)
def test_jobs_that_cannot_be_submitted(
    run_cli, tmp_path: Path, monkeypatch, llama: Path, extra, message
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_cli("freeze-search", "--model", llama, "--task", "digits", *extra)
    assert done.code == 2 and message in done.err.splitlines()[-1] and done.err.count("error: ") == 1


def test_what_slurm_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sbatch file that submitit writes: SIGTERM before the end, and requeueing allowed."""
    from submitit.slurm.slurm import SlurmExecutor

    from layerprobe.cli.launch import LaunchOptions
    from layerprobe.cli.output import Output

    def submit(self, command: str) -> None:
        raise RuntimeError(self._make_submission_file_text(command, "id"))

    monkeypatch.setattr(SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    monkeypatch.setattr(SlurmExecutor, "_submit_command", submit)
    asked = LaunchOptions(launch="slurm", job_options="partition=gpu,gpus_per_node=1,timeout_min=90")
    monkeypatch.setattr(
        sys, "argv", ["layerprobe", "bridge", "--launch=slurm", "--jobs", "1", "--steps", "3"]
    )
    with pytest.raises(Exception, match="was not submitted") as refused:
        asked.submit(Output("bridge", output=tmp_path / "run"))
    script = str(refused.value.__cause__)
    assert "#SBATCH --partition=gpu" in script and "#SBATCH --gpus-per-node=1" in script
    assert "#SBATCH --signal=TERM@90" in script and "#SBATCH --time=90" in script
    assert "export SUBMITIT_PREEMPT_SIGNAL=TERM" in script
