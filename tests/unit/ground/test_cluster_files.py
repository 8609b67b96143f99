"""The examples for clusters: Kubernetes by its own schema, SkyPilot by the fields that its task files have."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[3] / "docs/howto/cluster"


def test_kubernetes_accepts_its_example() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    job = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())
    validator.validate(job, "1.31", strict=True)
    with pytest.raises(validator.ValidationError):
        validator.validate({**job, "spec": {**job["spec"], "paralelism": 8}}, "1.31", strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["layerprobe", "worker"]


def test_the_skypilot_example_has_the_fields_of_a_task() -> None:
    """Its own validator (sky 0.14.1: `sky.Task.from_yaml`) accepts the file; here its fields are held against names."""
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "resources", "num_nodes", "envs", "workdir", "setup", "run", "file_mounts"}
    assert set(task["resources"]) <= {"accelerators", "use_spot", "job_recovery", "infra", "cpus", "memory"}
    assert "layerprobe worker --storage" in task["run"] and "STORAGE" in task["envs"]
