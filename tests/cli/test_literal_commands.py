"""The very lines that users type, run offline from a Hugging Face cache that this test fills."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from families import save
from hub_cache import folder_files, put_dataset, put_model
from PIL import Image

N_CLASSES = 100
CLASS_NAMES = [f"class_{index}" for index in range(N_CLASSES)]


def cifar100_parquet(per_class: int, seed: int) -> bytes:
    """Images in the schema of the hub's CIFAR-100: PNG bytes, fine and coarse label, names in the metadata."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list] = {"img": [], "fine_label": [], "coarse_label": []}
    for label in rng.permutation(np.repeat(np.arange(N_CLASSES), per_class)):
        noise = rng.normal(0, 30, (32, 32, 3))
        pixels = np.clip(noise + [label * 2, 255 - label * 2, 128], 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        rows["img"].append({"bytes": buffer.getvalue(), "path": None})
        rows["fine_label"].append(int(label))
        rows["coarse_label"].append(int(label) // 5)
    features = {
        "img": {"_type": "Image"},
        "fine_label": {"names": CLASS_NAMES, "_type": "ClassLabel"},
        "coarse_label": {"names": [f"group_{index}" for index in range(20)], "_type": "ClassLabel"},
    }
    table = pa.table(
        {
            "img": pa.array(rows["img"], pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "fine_label": pa.array(rows["fine_label"], pa.int64()),
            "coarse_label": pa.array(rows["coarse_label"], pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.fixture
def filled_cache(hub_cache: Path, tmp_path: Path) -> Path:
    """Small models under the hub ids behind `llama-7b` and `gpt2`; CIFAR-100's schema under its hub id."""
    put_model(hub_cache, "huggyllama/llama-7b", folder_files(save("llama", tmp_path / "llama")))
    put_model(hub_cache, "openai-community/gpt2", folder_files(save("gpt2", tmp_path / "gpt2")))
    put_dataset(
        hub_cache,
        "uoft-cs/cifar100",
        {
            "cifar100/train-00000-of-00001.parquet": cifar100_parquet(10, 0),
            "cifar100/test-00000-of-00001.parquet": cifar100_parquet(2, 1),
        },
    )
    return hub_cache


def test_outliers_of_llama_7b(run_cli: Callable, filled_cache: Path) -> None:
    result = run_cli("outliers", "--model", "llama-7b")
    assert result.code == 0, result.err
    assert "sigma" in result.out or "σ" in result.out
    as_json = json.loads(run_cli("outliers", "--model", "llama-7b", "--json").out)
    assert as_json["schema"] == "layerprobe.outliers/v1"
    blocks = {row["block"] for row in as_json["rows"] if row["level"] == "block"}
    assert {0, 1, 2} <= blocks


def test_freeze_search_on_cifar100(run_cli: Callable, filled_cache: Path, tmp_path: Path) -> None:
    result = run_cli("freeze-search", "--task", "cifar100", "--limit", 200, "--budget", 5, "--bridge-steps", 4,
                     "--steps", 4, "--seeds", 2, "--patch-size", 8, "-o", tmp_path / "run")  # fmt: skip
    assert result.code == 0, result.err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["schema"] == "freeze-plan/v1"
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")
