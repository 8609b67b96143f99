"""Speed of a bridge training step, against a bare PyTorch loop and the Hugging Face Trainer, and what freezing pays.

    python benchmarks/bridge.py                       # MiniLM, 16 tokens an image, this machine's default device
    python benchmarks/bridge.py --model gpt2-shape --device cuda --precision bfloat16 --batch 256 --tokens 64
    python benchmarks/bridge.py --model llama-7b-shape --device cuda --precision bfloat16 --weights bfloat16 \\
        --batch 8 --tokens 64 --gradient-checkpointing --plans last-two --peers bare

Same model, batch, precision, clipping and (fused) AdamW for all. CPU figures are processor time of the
process, so that other load on the machine does not enter; CUDA figures are wall time between synchronisations.
Rounds alternate between the loops. Rates are medians over rounds; a ratio is the median over rounds of the ratio
within the round. The Trainer's clock starts at its first step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerprobe.backbones import load_backbone
from layerprobe.provenance import machine, versions
from layerprobe.tasks import Task, make_task
from layerprobe.training import FineTuneConfig, TaskTensors, all_trainable, block_plan
from layerprobe.training.classifier import Classifier, Snapshot, autocast, set_training, training_flops
from layerprobe.training.freeze_check import FrozenCheck
from layerprobe.training.loop import make_accelerator, make_optimizer, training_steps

CLASSES = 10


def noise(n: int) -> Task:
    """A task of `n` random training images: their content does not matter for speed."""
    draw = np.random.default_rng(0)
    splits = {}
    for split, size in {"train": n, "validation": CLASSES, "test": CLASSES}.items():
        splits[split] = draw.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8), np.arange(size) % CLASSES
    return make_task(splits, name="noise")


def model_folder(name: str, scratch: Path) -> str:
    """A known shape with random weights, or a name for `load_backbone`."""
    import transformers

    shapes = {
        "gpt2-shape": lambda: transformers.GPT2Config(),
        "llama-7b-shape": lambda: transformers.LlamaConfig(),
    }
    if name not in shapes:
        return name
    folder = scratch / name
    shapes[name]().save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")  # never read: init is "random"
    return str(folder)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def ours(classifier: Classifier, tensors: TaskTensors, config: FineTuneConfig, n_steps: int) -> Any:
    device = next(classifier.parameters()).device
    accelerator = make_accelerator(device)
    model, optimizer = accelerator.prepare(classifier, make_optimizer(classifier, config))
    labels = tensors.labels["train"]
    return training_steps(
        model, optimizer, tensors.pixels["train"], labels, config, accelerator=accelerator, n_steps=n_steps
    )


def bare(classifier: Classifier, tensors: TaskTensors, config: FineTuneConfig, n_steps: int) -> Any:
    """What anyone would write by hand."""
    device = next(classifier.parameters()).device
    parameters = [p for p in classifier.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    images, labels = tensors.pixels["train"], torch.from_numpy(tensors.labels["train"])
    for step in range(n_steps):
        rows = np.random.permutation(len(images))[: config.batch_size]
        x, y = images[rows].to(device), labels[torch.from_numpy(rows)].to(device)
        optimizer.zero_grad()
        with autocast(device, config.precision):
            logits = classifier(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        loss.item()
        yield step


def hf_trainer(classifier: Classifier, tensors: TaskTensors, config: FineTuneConfig, n_steps: int) -> Any:
    """The Hugging Face Trainer with the same freeze; timed from its first step on, without its set-up."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = classifier

        def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.classifier(pixels)
            return {"loss": torch.nn.functional.cross_entropy(logits.float(), labels), "logits": logits}

    pixels, labels = tensors.pixels["train"], tensors.labels["train"]
    data = [{"pixels": pixels[np.array([i])][0], "labels": int(labels[i])} for i in range(len(pixels))]
    device = next(classifier.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=n_steps,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=config.precision == "bfloat16",
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        marks: list[float] = []

        class Marks(TrainerCallback):
            def on_step_begin(self, *_args: Any, **_more: Any) -> None:
                marks.append(clock(device))

            def on_train_end(self, *_args: Any, **_more: Any) -> None:
                marks.append(clock(device))

        trainer = Trainer(model=Wrapped(), args=arguments, train_dataset=data, callbacks=[Marks()])
        trainer.train()
    yield marks[-1] - marks[0]


LOOPS = {"layerprobe": ours, "bare": bare, "hf-trainer": hf_trainer}


def step_seconds(loop: Any, classifier: Classifier, tensors: TaskTensors, config: Any, n_steps: int) -> float:
    device = next(classifier.parameters()).device
    classifier.zero_grad()
    began = clock(device)
    yielded = list(loop(classifier, tensors, config, n_steps))
    seconds = yielded[0] if loop is hf_trainer else clock(device) - began
    return seconds / n_steps


def kept_for_backward(classifier: Classifier, tensors: TaskTensors, config: FineTuneConfig) -> int:
    """Bytes of activations that autograd keeps from one forward pass of one batch."""
    device = next(classifier.parameters()).device
    weights = {p.untyped_storage().data_ptr() for p in classifier.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = tensors.pixels["train"][np.arange(config.batch_size)].to(device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(device, config.precision):
        logits = classifier(images)
    del logits
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="minilm", help="name for load_backbone, gpt2-shape or llama-7b-shape"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--weights", default="float32", help="dtype of the parameters")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="image tokens: 16 or 64")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plans", default="all,first-two,last-two,last-two-frozen-stem,none")
    parser.add_argument("--peers", default="bare,hf-trainer")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(arguments.model, Path(scratch))
        shape_only = folder != arguments.model
        task = noise(max(4 * arguments.batch, 64))
        backbone = load_backbone(
            folder,
            init="random" if shape_only else "pretrained",
            device=arguments.device,
            dtype=arguments.weights,
            patch_size=round(32 / arguments.tokens**0.5),
        ).prepare(task)
    if arguments.gradient_checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    tensors = TaskTensors.of(backbone, task, ("train",))
    last = [backbone.n_blocks - 2, backbone.n_blocks - 1]
    plans = {
        "all": lambda: all_trainable(backbone),
        "first-two": lambda: block_plan(backbone, [0, 1]),
        "last-two": lambda: block_plan(backbone, last),
        "last-two-frozen-stem": lambda: block_plan(backbone, last, stem="frozen"),
        "none": lambda: block_plan(backbone, []),
    }
    config = FineTuneConfig(
        lr=1e-4, batch_size=arguments.batch, augment="none", cache_prefix=False, precision=arguments.precision
    )
    peers = [name for name in arguments.peers.split(",") if name]
    chosen = arguments.plans.split(",")
    report: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "machine": machine(),
        "versions": versions(),
        "plans": {},
        "loops": {},
    }
    # A large backbone is not copied to be restored: its weights do not matter for speed.
    snapshot = Snapshot(backbone) if report["parameters"] < 1e9 else None
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    loops: dict[str, list[float]] = {name: [] for name in ["layerprobe", *peers]}
    others = {
        "layerprobe, weak augmentation": config.replace(augment="weak"),
        "layerprobe, other precision": config.replace(
            precision="bfloat16" if arguments.precision == "float32" else "float32"
        ),
    }
    loops |= {name: [] for name in others}
    for number in range(-1, arguments.rounds):  # round −1 warms up
        for name in chosen:
            plan = plans[name]()
            classifier = Classifier(backbone, CLASSES, seed=0)
            if snapshot is None:
                plan.apply(backbone.model, remember=False)
                backbone.stem.requires_grad_(plan.states["stem"] == "trainable")
            else:
                FrozenCheck(plan, classifier)
            set_training(classifier)
            if number < 0:
                if arguments.device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats()
                step_seconds(ours, classifier, tensors, config, 2)
                trained = sum(
                    p.numel() * p.element_size() for p in classifier.parameters() if p.requires_grad
                )
                facts = {
                    "flops": training_flops(classifier, tensors.pixels["train"].shape, arguments.batch),
                    "activation_mib": kept_for_backward(classifier, tensors, config) / 2**20,
                    "gradient_and_moment_mib": 3 * trained / 2**20,
                }
                if arguments.device.startswith("cuda"):
                    facts["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
                report["plans"][name] = facts
            else:
                seconds[name].append(step_seconds(ours, classifier, tensors, config, arguments.steps))
                if name == chosen[0]:
                    for peer in peers:
                        loops[peer].append(
                            step_seconds(LOOPS[peer], classifier, tensors, config, arguments.steps)
                        )
                        set_training(classifier)
                    loops["layerprobe"].append(seconds[name][-1])
                    for other, settings in others.items():
                        loops[other].append(
                            step_seconds(ours, classifier, tensors, settings, arguments.steps)
                        )
            classifier.zero_grad()
            if snapshot is not None:
                snapshot.restore()
    for name, times in loops.items():
        value = statistics.median(times)
        ratio = statistics.median([t / o for t, o in zip(times, loops["layerprobe"], strict=True)])
        report["loops"][name] = {
            "images_per_second": arguments.batch / value,
            "layerprobe_speed_ratio": ratio,
        }
        print(f"{name:32} {arguments.batch / value:9.1f} images/s   layerprobe is {ratio:.3f}× as fast")
    base = report["plans"][chosen[0]]
    for name in chosen:
        facts = report["plans"][name]
        facts["images_per_second"] = arguments.batch / statistics.median(seconds[name])
        facts["time_share"] = statistics.median(
            [a / b for a, b in zip(seconds[name], seconds[chosen[0]], strict=True)]
        )
        facts["flops_share"] = facts["flops"] / base["flops"]
        memory = facts["activation_mib"] + facts["gradient_and_moment_mib"]
        facts["memory_share"] = memory / (base["activation_mib"] + base["gradient_and_moment_mib"])
        print(
            f"{name:22} time {facts['time_share']:.2f} of '{chosen[0]}' (arithmetic alone allows "
            f"{facts['flops_share']:.2f}); activations, gradients, moments {memory:8.1f} MiB "
            f"({facts['memory_share']:.2f})"
            + (f"; peak {facts['peak_mib']:.0f} MiB" if "peak_mib" in facts else "")
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
