"""Measured peaks: `--dry-run` says them within a quarter, and more images need no more memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from families import save

UNITS = {"MiB": 1.0, "GiB": 1024.0}
LARGER = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024}
DIGITS = ("--task", "digits")
CASES: dict[str, tuple[str, ...]] = {
    "features": ("features", "--model", "minilm", *DIGITS),
    "features-llama": ("features", "--model", "llama", *DIGITS, "--batch-size", "512"),
    "probe": ("probe", "--model", "minilm", *DIGITS, "--limit", "200"),
    "cka": ("cka", "--model", "minilm", *DIGITS, "--limit", "200"),
    "bridge": ("bridge", "--model", "minilm", *DIGITS, "--steps", "2", "--batch-size", "64"),
    "bridge-llama": ("bridge", "--model", "llama", *DIGITS, "--steps", "2", "--batch-size", "128"),
    "bridge-vit": ("bridge", "--model", "vit", *DIGITS, "--steps", "2", "--batch-size", "256"),
    "evaluate": ("evaluate", "--model", "minilm", *DIGITS, "--limit", "200", "--steps", "2", "--seeds", "1",
                 "--lrs", "1e-4"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    llama = save("llama", root / "llama", **LARGER, num_key_value_heads=8, head_dim=32)
    return {"minilm": "minilm", "llama": str(llama), "vit": str(save("vit", root / "vit", **LARGER))}


def layerprobe(*arguments: str, cache: Path) -> tuple[str, float]:
    """What a command said, and its peak in MiB."""
    environment = {**os.environ, "LAYERPROBE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "layerprobe", *arguments, "--json", "--quiet"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, err = process.stdout.read(), process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, err[-2000:]
    return out, usage.ru_maxrss / 1024


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_says_the_peak_within_a_quarter(case: str, models: dict[str, str], tmp_path: Path) -> None:
    arguments = [models.get(word, word) for word in CASES[case]]
    said, _ = layerprobe(*arguments, "--dry-run", cache=tmp_path)
    number, unit = re.match(r"about ([\d.]+) (.iB)", json.loads(said)["memory"]).groups()
    _, measured = layerprobe(*arguments, cache=tmp_path)
    expected = float(number) * UNITS[unit]
    note(case=case, said_mebibytes=round(expected), measured_mebibytes=round(measured))
    assert 0.75 <= expected / measured <= 1.25, f"{expected:.0f} MiB said, {measured:.0f} MiB measured"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_features_of_fifteen_times_the_images_need_the_same_memory(tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "tasks"))
    from task_files import write_idx

    model = save("llama", tmp_path / "llama")
    peaks = {}
    for n in (2_000, 30_000):
        draw = np.random.default_rng(n)
        folder = tmp_path / str(n)
        folder.mkdir()
        write_idx(folder / "train-images-idx3-ubyte", draw.integers(0, 256, (n, 32, 32), dtype=np.uint8))
        write_idx(folder / "train-labels-idx1-ubyte", (np.arange(n) % 10).astype(np.uint8))
        _, peaks[n] = layerprobe(
            "features", "--model", str(model), "--task", str(folder), "--patch-size", "8",
            cache=tmp_path / f"cache-{n}",
        )  # fmt: skip
    note(**{f"features_of_{n}_images_mebibytes": round(peak) for n, peak in peaks.items()})
    images = 28_000 * 32 * 32 / 2**20  # MiB; an IDX file is held as the one array that it is
    assert peaks[30_000] - images <= 1.1 * peaks[2_000], peaks


def note(**facts: object) -> None:
    """Keep the figures where $LAYERPROBE_MEMORY_LOG says."""
    if target := os.environ.get("LAYERPROBE_MEMORY_LOG"):
        with Path(target).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")
