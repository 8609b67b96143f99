"""Run by test_sharded_loading.py, one process of several: features, bridge and evaluation of a model that is spread
over them.

    python sharded_worker.py SETTINGS.json

Writes what it found to <output>.rank<r>.json.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from layerprobe.analyzers.features import extract_features
from layerprobe.backbones import Backbone, load_backbone
from layerprobe.tasks import Task, load_task
from layerprobe.training import BridgeConfig, FineTuneConfig, block_plan, bridge_train, evaluate
from layerprobe.training.classifier import Classifier, shard, whole


def stem_gradient(backbone: Backbone, task: Task) -> list[float]:
    """Of the mean loss of 16 images, which the processes share."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    classifier = Classifier(backbone, 10, seed=0)
    if world > 1:
        shard(classifier, torch.device("cpu"))
    rows = np.arange(16)[rank * 16 // world : (rank + 1) * 16 // world]
    pixels, labels = backbone.preprocess_rows(task.train, rows), torch.as_tensor(task.train.labels[rows])
    nn.functional.cross_entropy(classifier(pixels), labels).backward()
    found = whole(backbone.stem.projection.weight.grad).flatten().tolist()
    classifier.zero_grad()
    return found


def private_memory() -> int:
    """Bytes of this process that no file backs: what is mapped from a file can be given back and read again."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux says it"
    return int(found[1]) * 1024


class PeakMemory:
    """The most private memory from its making on, looked at every few milliseconds, beyond what there was then."""

    def __init__(self) -> None:
        self.start = self.peak = private_memory()
        self._done = threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while not self._done.wait(0.003):
            self.peak = max(self.peak, private_memory())

    def found(self) -> int:
        self._done.set()
        return max(self.peak, private_memory()) - self.start


def main(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    output, world = settings["output"], int(os.environ.get("WORLD_SIZE", "1"))
    memory = None
    if first := settings.get("first"):  # whose libraries and buffers are not counted as the model's
        main({**settings, "first": None, "model": first, "run": None, "output": f"{output}.first"})
        memory = PeakMemory()
    task = load_task("digits", limit=50, offline=True)
    loading = {"device": "cpu", "patch_size": 4, "shard": world > 1, **settings.get("loading", {})}
    found: dict[str, Any] = {}
    backbone = load_backbone(settings["model"], **loading).prepare(task)
    found["held"] = sum(
        (p.to_local() if hasattr(p, "to_local") else p).numel() for p in backbone.model.parameters()
    )
    plan = block_plan(backbone, settings["blocks"])
    if "features" in settings["what"]:
        features = extract_features(backbone, task, batch_size=8, cache_dir=f"{output}-store", quiet=True)
        found["features"] = {str(layer): array.tolist() for layer, array in features.arrays.items()}
    if "gradient" in settings["what"]:
        found["stem_gradient"] = stem_gradient(backbone, task)
    if "evaluate" in settings["what"]:
        config = FineTuneConfig(**{**settings["evaluate"], "lrs": tuple(settings["evaluate"]["lrs"])})
        record = evaluate(backbone, task, plan=plan, config=config, seeds=[0], quiet=True)
        frame = record.to_frame()
        found["evaluate"] = {
            m: v for m, v in zip(frame["metric"], frame["value"], strict=True) if "seconds" not in m
        }
    if "bridge" in settings["what"]:
        config = BridgeConfig(shard=world > 1, **settings["bridge"])
        run = bridge_train(backbone, task, plan=plan, config=config, output=settings.get("run"))
        found |= {"loss": run.history["loss"].tolist(), "verified": run.provenance["verified"]}
        found["grad_norm"] = run.history["grad_norm"].tolist()
        found["drift"] = [
            row["value"] for row in run.rows if row["value"] is not None and "second" not in row["metric"]
        ]
    if memory is not None:
        found["peak"] = memory.found()
    Path(f"{output}.rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
