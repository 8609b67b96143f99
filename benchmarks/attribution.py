"""Conductance of all blocks in one pass, against captum's LayerConductance block after block.

    OMP_NUM_THREADS=1 python benchmarks/attribution.py --output results/attribution

Both sides sum the same terms at the same steps (Gauss–Legendre, captum's default rule), so their values have to
agree. captum runs twice: as its documentation calls it (all steps in one batch), and at its best here
(`internal_batch_size` of one step's size times 4, parameters frozen). The sides take turns in every round on one
thread; the figure is the median CPU time. MiniLM (L = 6, d = 384, needs the `demo` extra) on random pixels, which
cost what images cost; weights are random where the package is absent.
"""

from __future__ import annotations

from common import circumstances, processor_time  # before numpy and torch

# isort: split
import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerConductance
from captum.attr._utils.approximation_methods import approximation_parameters
from torch import Tensor, nn

from layerprobe.analyzers.attribution_path import path_conductance, residual_taps
from layerprobe.analyzers.heads import only_these_train
from layerprobe.backbones import load_backbone
from layerprobe.files import write_json


class Images32:
    """What a backbone needs to know of images of 32×32."""

    image_size = 32
    channels = 3
    train: Any = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None, help="folder for benchmark.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone(options.model, device="cpu", patch_size=4, self_check=False)
    backbone.prepare(Images32())
    n_blocks = backbone.n_blocks
    torch.manual_seed(0)
    pixels, baseline = torch.randn(options.images, 3, 32, 32), torch.zeros(3, 32, 32)
    head = nn.Linear(backbone.hidden_size, 10)
    targets = torch.arange(options.images) % 10
    alphas = approximation_parameters("gausslegendre")[1](options.steps + 1)

    def score(images: Tensor, classes: Tensor) -> Tensor:
        return head(backbone.features(images)).gather(1, classes[:, None])[:, 0]

    def one_by_one(taps: list[nn.Identity], internal_batch_size: int | None) -> list[Tensor]:
        return [
            LayerConductance(score, tap)
            .attribute(
                pixels,
                baselines=baseline.expand_as(pixels),
                additional_forward_args=(targets,),
                n_steps=options.steps,
                internal_batch_size=internal_batch_size,
            )
            .detach()
            for tap in taps[1:]
        ]

    def at_its_best(taps: list[nn.Identity]) -> list[Tensor]:
        with only_these_train(backbone, []):
            return one_by_one(taps, 4 * options.images)

    def at_once(taps: list[nn.Identity]) -> list[Tensor]:
        with only_these_train(backbone, []):
            found = path_conductance(
                lambda p: score(p, targets), taps, pixels, baseline, alphas, rule="left", embed=False
            )
        return found.conductance[1:]

    sides: dict[str, Callable[[list[nn.Identity]], list[Tensor]]] = {
        "one pass": at_once,
        "captum as documented": lambda taps: one_by_one(taps, None),
        "captum at its best": at_its_best,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    values: dict[str, list[Tensor]] = {}
    with residual_taps(backbone) as taps:
        for round_ in range(options.rounds + 1):
            for name, work in sides.items():
                seconds, values[name] = processor_time(lambda work=work: work(taps))
                if round_:  # the first round warms allocators and caches
                    times[name].append(seconds)
    median = {name: statistics.median(spent) for name, spent in times.items()}
    difference = {
        name: max(
            float((mine - theirs).abs().max() / theirs.abs().max())
            for mine, theirs in zip(values["one pass"], values[name], strict=True)
        )
        for name in list(sides)[1:]
    }
    limit = passes_captum(n_blocks, options.steps) / passes_at_once(n_blocks, options.steps)
    print(
        f"{options.model}: L={n_blocks}, d={backbone.hidden_size}, 64 tokens, {options.images} images, "
        f"{options.steps} steps, one thread, CPU time, {options.rounds} rounds\n"
        f"by counting passes through blocks, at equal speed: {limit:.2f}x = {limit / n_blocks:.2f} L"
    )
    for name in sides:
        ratio = median[name] / median["one pass"]
        print(
            f"{name:22} {median[name]:8.3f} s (min {min(times[name]):.3f}, max {max(times[name]):.3f})"
            + (
                f"   {ratio:5.2f}x = {ratio / n_blocks:.2f} L, largest relative difference {difference[name]:.1e}"
                if name in difference
                else ""
            )
        )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(
            options.output / "benchmark.json",
            {
                **circumstances(),
                "arguments": {name: value for name, value in vars(options).items() if name != "output"},
                "n_blocks": n_blocks,
                "median_cpu_seconds": median,
                "cpu_seconds": times,
                "times_faster": {name: median[name] / median["one pass"] for name in difference},
                "times_faster_over_blocks": {
                    name: median[name] / median["one pass"] / n_blocks for name in difference
                },
                "times_faster_by_counting_passes": limit,
                "largest_relative_difference": difference,
            },
        )


def passes_captum(n_blocks: int, steps: int) -> int:
    """Passes through single blocks that block-after-block needs: all forward, then back to the block asked for."""
    points = steps + 1
    return points * sum(n_blocks + (n_blocks - 1 - block) for block in range(n_blocks))


def passes_at_once(n_blocks: int, steps: int) -> int:
    """The same in one pass: the last point needs no gradient, and block 0 no backward pass."""
    return (steps + 1) * n_blocks + steps * (n_blocks - 1)


if __name__ == "__main__":
    main()
