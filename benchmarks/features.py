"""How fast do images become features? `layerprobe.extract_features` on JPEG files against the bare forward pass.

    python benchmarks/features.py --output results/features

The benchmark makes its own JPEGs (500×375, ten class folders) in a temporary folder. MiniLM at 224 pixels (64
tokens), one thread for the forward pass. Every way runs in a process of its own; rounds are interleaved, and each
figure is the median over rounds: images per second by the clock, and images per second of this process's own
processor time, which says what the workers take off the process that computes even where other work shares the cores.
Ways: a bare forward loop over tensors in memory; `features` with 0, 1 and 2 decoding workers, its second run on
pixels kept on disk; Hugging Face `datasets` with an image processor and a torch DataLoader. Peak memory is that of
the process (its workers apart) for 2,000 and for 20,000 images, up to block 0: `peak_mib` with the pages of mapped
files, which the system takes back when it needs them, and `private_mib` without them (RssAnon of Linux, looked at
every 20 ms; null elsewhere).
"""

from __future__ import annotations

from common import circumstances  # before numpy and torch

# isort: split
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH, SIDE = 64, 224
WAYS = (
    "bare", "first-0", "first-1", "first-2", "second-0", "second-2", "datasets-0", "datasets-2",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--many", type=int, default=20_000, help="images of the memory test; 0 leaves it out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        with private_memory() if arguments.way == "memory" else nullcontext([]) as private:
            found = run_way(arguments.way, arguments.folder, arguments.model)
        print(json.dumps({**found, "private_mib": max(private, default=None)}))
        return
    with tempfile.TemporaryDirectory() as root:
        result = measure(arguments, Path(root))
    if arguments.output:
        from layerprobe.files import write_json

        write_json(arguments.output / "benchmark_features.json", result)


def measure(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:

    make_images(root / "images", arguments.images)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    in_process("scan", root, arguments.model)  # ids and duplicates, once for all rounds
    for _ in range(arguments.rounds):
        for way in WAYS:
            found[way].append(in_process(way, root, arguments.model))
    rows = []
    for way, runs in found.items():
        row: dict[str, Any] = {"way": way, "decoded": runs[-1]["decoded"]}
        for rate in ("images_per_second", "images_per_cpu_second"):
            pairs = [(one[rate], base[rate]) for one, base in zip(runs, found["bare"], strict=True)]
            row[rate] = round(statistics.median(value for value, _ in pairs), 2)
            row[f"{rate}_of_bare"] = round(statistics.median(value / base for value, base in pairs), 3)
            row[f"{rate}_each_round"] = [round(value, 2) for value, _ in pairs]
        rows.append(row)
        print(
            f"{way:<12} {row['images_per_second']:8.2f} images/s, {row['images_per_second_of_bare']:.3f} of bare; "
            f"by CPU time {row['images_per_cpu_second']:8.2f}, {row['images_per_cpu_second_of_bare']:.3f} of bare"
        )
    memory, private = {}, {}
    for n_images in (arguments.images, arguments.many) if arguments.many else ():
        make_images(root / "images", n_images)
        in_process("scan", root, arguments.model)
        run = in_process("memory", root, arguments.model)
        memory[n_images], private[n_images] = run["peak_mib"], run["private_mib"]
        own = "" if private[n_images] is None else f"; private memory {private[n_images]:,.0f} MiB"
        print(f"peak memory with {n_images:,} images: {memory[n_images]:,.0f} MiB{own}")
    return {
        **circumstances(),
        "model": arguments.model,
        "images": arguments.images,
        "batch_size": BATCH,
        "rounds": arguments.rounds,
        "rows": rows,
        "peak_mib": memory,
        "private_mib": private,
        "bar": "first-2 at least 0.9 of bare; second-0 decodes 0; peak memory flat",
        "load_average": os.getloadavg(),
    }


def make_images(folder: Path, n_images: int) -> None:
    """JPEGs of photograph-like content: smooth shapes with some grain, quality 90.

    Beyond 2,000 the pictures come again, as files of other bytes.
    """
    for i in range(n_images):
        path = folder / f"class{i % 10}" / f"{i:06}.jpg"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if i >= 2000:
            again = folder / f"class{i % 10}" / f"{i % 2000:06}.jpg"
            path.write_bytes(again.read_bytes() + b"%d" % i)
            continue
        draw = np.random.default_rng(i)
        coarse = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        grain = draw.integers(-12, 13, (375, 500, 1), dtype=np.int16)
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(path, quality=90)


def in_process(way: str, root: Path, model: str) -> dict[str, Any]:
    environment = {**os.environ, "LAYERPROBE_CACHE": str(root / "cache"), "HF_HOME": str(root / "hf")}
    command = [sys.executable, __file__, "--way", way, "--folder", str(root), "--model", model]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_way(way: str, root: Path, model: str) -> dict[str, Any]:
    """One way in this process: images per second, images decoded here, peak memory."""
    import torch

    import layerprobe as lp
    from layerprobe.tasks import images

    torch.set_num_threads(1)
    kind, _, workers = way.partition("-")
    decoded = 0
    plain = images.decode_image

    def counting(*arguments: Any) -> np.ndarray:
        nonlocal decoded
        decoded += 1
        return plain(*arguments)

    task = lp.load_task(str(root / "images"), decode_workers=int(workers or 2), keep_decoded=kind != "first")
    if kind == "scan":
        return {}
    backbone = lp.load_backbone(model, image_size=SIDE, device="cpu").prepare(task)
    images.decode_image = counting
    n_images, run = {"bare": bare, "datasets": with_datasets}.get(kind, of_layerprobe)(
        backbone, task, root, kind, int(workers or 0)
    )
    if kind == "second":
        run(0)  # the first command, which decodes
        decoded = 0
    start, cpu = time.perf_counter(), time.process_time()
    run(1)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "images_per_second": n_images / seconds,
        "images_per_cpu_second": n_images / cpu,
        "decoded": decoded,
        "peak_mib": peak,
    }


@contextmanager
def private_memory() -> Iterator[list[float]]:
    """MiB of this process that no file holds, looked at every 20 ms and once in the end; empty where Linux is not."""
    seen: list[float] = []
    done = threading.Event()

    def look() -> None:
        while True:
            last = done.wait(0.02)
            lines = Path("/proc/self/status").read_text().splitlines()
            seen.extend(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))
            if last:
                return

    if not Path("/proc/self/status").exists():
        yield seen
        return
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def bare(backbone: Any, task: Any, *_: Any) -> tuple[int, Callable[[int], None]]:
    import torch

    pixels = backbone.preprocess_rows(task.train, np.arange(BATCH) % len(task.train))

    def run(_: int) -> None:
        with torch.inference_mode():
            for _ in range(10):
                backbone(pixels)

    return 10 * BATCH, run


def of_layerprobe(
    backbone: Any, task: Any, root: Path, kind: str, _: int
) -> tuple[int, Callable[[int], None]]:
    import layerprobe as lp
    from layerprobe.layers import LayerRef

    layers = [LayerRef(0)] if kind == "memory" else None
    extract = lp.extract_features  # imports what it needs, before the clock starts

    def run(number: int) -> None:
        with tempfile.TemporaryDirectory(dir=root) as store:
            extract(backbone, task, layers=layers, batch_size=BATCH, cache_dir=store, quiet=True)

    return len(task.train), run


def with_datasets(
    backbone: Any, task: Any, root: Path, _: str, workers: int
) -> tuple[int, Callable[[int], None]]:
    """What one writes by hand: imagefolder, the processor as a transform, a DataLoader, mean-pooled hidden states."""
    import datasets
    import torch
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    found = datasets.load_dataset("imagefolder", data_dir=str(root / "images"), split="train")
    found = found.shuffle(seed=0).select(range(len(task.train)))
    found.set_transform(
        lambda rows: {"pixels": list(processor(rows["image"], return_tensors="pt")["pixel_values"])}
    )
    loader = torch.utils.data.DataLoader(found, batch_size=BATCH, num_workers=workers)

    def run(_: int) -> None:
        kept = []
        with torch.inference_mode():
            for batch in loader:
                tokens = backbone.stem(batch["pixels"])
                hidden = backbone.model(inputs_embeds=tokens, output_hidden_states=True).hidden_states
                kept.append(torch.stack([layer.mean(1) for layer in hidden]))
        torch.cat(kept, dim=1)

    return len(task.train), run


if __name__ == "__main__":
    main()
