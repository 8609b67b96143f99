"""One small, valid example of every foreign format, and the code that reads it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from small_search import ABOUT, make_study

import layerprobe as lp
from layerprobe.analyzers.outliers import outlier_report
from layerprobe.backbones.processor import read_recipe
from layerprobe.checkpoints import open_checkpoint
from layerprobe.cli.ls import features as list_features
from layerprobe.hooks.feature_store import FeatureStore, list_stores
from layerprobe.layers import LayerRef
from layerprobe.plans import FreezePlan
from layerprobe.plans.lint.config import read_config, trainer_of
from layerprobe.report import write_report
from layerprobe.search.status import search_status
from layerprobe.search.trials import TrialStore
from layerprobe.tables import read_frame
from layerprobe.tasks.duplicates import _recall
from layerprobe.training import BridgeConfig, bridge_train
from layerprobe.training.checkpoints import find_checkpoint
from layerprobe.training.evaluation import _TrialStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "tasks"))
from task_files import picture, png, write_idx, write_parquet

Read = Callable[[Path], object]
"""Reads an example; what it raises is a LayerprobeError or a bug."""

IMAGES = {
    "png": "PNG",
    "jpg": "JPEG",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "webp": "WEBP",
    "ppm": "PPM",
}
KEY = {"backbone": {"model": "tiny", "init": "pretrained"}, "task": "t", "split": "train"}
SETTINGS = {"mode": "finetune"}
SEARCH = {"budget": 5.0, "bridge_steps": 1, "finetune_steps": 1, "batch_size": 8, "lrs": (1e-3, 3e-3), "seeds": 2,
          "quiet": True, "use_scores": False}  # fmt: skip


def _load_model(folder: Path) -> object:
    backbone = lp.load_backbone(str(folder), patch_size=4, device="cpu", offline=True)
    return backbone.prepare(lp.load_task("digits", limit=20))


def _load_vision(folder: Path) -> object:
    read_recipe(folder)
    backbone = lp.load_backbone(str(folder), device="cpu", offline=True)
    return backbone.preprocess([picture(0, side=20)])


def _read_weights(folder: Path) -> object:
    open_checkpoint(folder)
    return outlier_report(folder, quiet=True).table()


def _read_task(folder: Path) -> object:
    task = lp.load_task(str(folder), offline=True)
    return [task.splits[name].images() for name in task.splits]


def _read_store(folder: Path) -> object:
    list_stores(folder)
    list_features(cache_dir=str(folder), prune=None, prune_all=False, as_json=False)
    store = FeatureStore(folder, KEY, n_rows=6, dtype="float32")
    layers = [LayerRef(0), LayerRef(1)]
    with store.writer(layers, batch_size=3) as writer:
        while writer.layers and writer.rows < 6:
            writer.append({layer: np.zeros((3, 4), "f4") for layer in writer.layers})
    return [store.read(layer) for layer in layers]


def _read_run(folder: Path) -> object:
    find_checkpoint(folder, check_bytes=True)
    write_report(folder)
    return lp.load_backbone(str(folder), device="cpu", offline=True)


def _read_evaluation(folder: Path) -> object:
    store = _TrialStore(folder, SETTINGS)
    return store.get("language", 1e-3, 0)


def _read_study(folder: Path) -> object:
    store = TrialStore.open(folder / "study.db", ABOUT)
    try:
        return [store.records(), store.get("scores"), search_status(folder / "study.db")]
    finally:
        store.close()


def _continue_search(folder: Path) -> object:
    return lp.freeze_search(
        lp.load_backbone(str(folder.parent.parent / "seeds" / "model"), patch_size=4, device="cpu"),
        lp.load_task("digits", limit=60), output=folder, **SEARCH,
    )  # fmt: skip


def _continue_bridge(folder: Path) -> object:
    bridge_train(
        lp.load_backbone(str(folder.parent.parent / "seeds" / "model"), patch_size=4, device="cpu"),
        lp.load_task("digits", limit=20),
        config=BridgeConfig(steps=3, batch_size=4, random_classes=2, checkpoint_every=1),
        output=folder,
    )
    return None


READERS: dict[str, Read] = {
    "model": _load_model,
    "weights": _read_weights,
    "sharded": _read_weights,
    "pickled": _load_model,
    "vision": _load_vision,
    "plan": FreezePlan.load,
    "bridge": _read_run,
    "unfinished": _continue_bridge,
    "evaluation": _read_evaluation,
    "search": write_report,
    "record": write_report,
    "table": lambda folder: [read_frame(path) for path in sorted(folder.iterdir())],
    "study": _read_study,
    "searched": _continue_search,
    "images": _read_task,
    "idx": _read_task,
    "parquet": _read_task,
    "store": _read_store,
    "scan": lambda folder: _recall_scan(folder),
    "trainer": lambda folder: [_read_configuration(path) for path in sorted(folder.iterdir())],
}


def _read_configuration(path: Path) -> object:
    return trainer_of(read_config(path))


def _recall_scan(folder: Path) -> object:
    import layerprobe.tasks.duplicates as module

    module._cache_file = lambda key: folder / "scan.npz"
    return _recall("scan", 20)


def make_seeds(root: Path) -> None:
    """Write the examples, one folder each."""
    from families import save

    for make in (_models, _images, _runs):
        make(root, save)


def _models(root: Path, save: Callable[..., Path]) -> None:
    from safetensors.torch import load_file

    save("gpt2", root / "model")
    shutil.copytree(root / "model", root / "weights")
    model = lp.load_backbone(str(root / "model"), patch_size=4, device="cpu").model
    model.save_pretrained(root / "sharded", max_shard_size="20KB")
    (root / "pickled").mkdir()
    shutil.copy(root / "model" / "config.json", root / "pickled")
    torch.save(load_file(root / "model" / "model.safetensors"), root / "pickled" / "pytorch_model.bin")
    save("vit", root / "vision")
    recipe = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "do_resize": True,
    }
    (root / "vision" / "preprocessor_config.json").write_text(json.dumps(recipe))


def _images(root: Path, _: object) -> None:
    for index in range(28):
        kind = [*IMAGES][index % len(IMAGES)]
        path = root / "images" / "ab"[index // 14] / f"{index}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(index)).save(path, IMAGES[kind])
    pixels, labels = (
        np.stack([picture(i, gray=True) for i in range(40)]),
        (np.arange(40) % 2).astype(np.uint8),
    )
    write_idx(root / "idx" / "train-images-idx3-ubyte.gz", pixels)
    write_idx(root / "idx" / "train-labels-idx1-ubyte", labels)
    names = {"label": ["cat", "dog"]}
    files = [png(picture(i)) for i in range(40)]
    write_parquet(
        root / "parquet" / "train.parquet", files, {"label": [i % 2 for i in range(40)]}, class_names=names
    )
    (root / "trainer").mkdir()
    (root / "trainer" / "train.yaml").write_text(
        "finetuning_type: freeze\nfreeze_trainable_layers: 2\nbase: &b [mlp, attn]\nfreeze_extra_modules: *b\n"
    )
    (root / "trainer" / "peft.json").write_text(
        json.dumps({"target_modules": ["q"], "r": 8, "peft_type": "LORA"})
    )
    (root / "scan").mkdir()
    np.savez(
        root / "scan" / "scan.npz",
        digests=np.arange(20, dtype=np.uint64),
        groups=np.arange(20),
        facts=np.array([3, 6, 1000, 0]),
    )


def _runs(root: Path, _: object) -> None:
    task = lp.load_task("digits", limit=20)

    def backbone() -> object:
        return lp.load_backbone(str(root / "model"), patch_size=4, device="cpu")

    config = BridgeConfig(steps=2, batch_size=4, random_classes=2)
    run = bridge_train(backbone(), task, config=config, output=root / "bridge")
    run.plan.save(root / "plan" / "plan.json")

    _unfinished(root / "unfinished", backbone(), task)
    store = _TrialStore(root / "evaluation", SETTINGS)
    from layerprobe.training.arms import ArmRun

    store.put(ArmRun(arm="language", lr=1e-3, seed=0, validation_accuracy=0.5, train_seconds=1.0))
    lp.freeze_search(backbone(), lp.load_task("digits", limit=60), output=root / "search", **SEARCH)
    (root / "searched").mkdir()
    (root / "search" / "study.db").rename(root / "searched" / "study.db")
    Image.fromarray(picture(0)).save(root / "search" / "pareto.png")
    run.save(root / "record")
    Image.fromarray(picture(0)).save(root / "record" / "curve.png")
    run.save(root / "table" / "x.csv")
    run.save(root / "table" / "x.parquet")
    (root / "study").mkdir()
    make_study(root / "study" / "study.db")
    features = FeatureStore(root / "store", KEY, n_rows=6, dtype="float32")
    with features.writer([LayerRef(0)], batch_size=3) as writer:
        for _ in range(2):
            writer.append({LayerRef(0): np.ones((3, 4), "f4")})
    with features.writer([LayerRef(1)], batch_size=3) as writer:
        writer.append({LayerRef(1): np.ones((3, 4), "f4")})


def _unfinished(folder: Path, backbone: object, task: object) -> None:
    """A bridge that was interrupted after two of three steps."""
    from layerprobe.training.bridge_run import History

    add = History.add

    def interrupted(self: History, step: object, *rest: object) -> None:
        add(self, step, *rest)
        if step.index == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    History.add = interrupted
    try:
        config = BridgeConfig(steps=3, batch_size=4, random_classes=2, checkpoint_every=1)
        bridge_train(backbone, task, config=config, output=folder)
    except KeyboardInterrupt:
        pass
    finally:
        History.add = add
