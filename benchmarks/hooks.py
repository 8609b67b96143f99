"""What does capturing cost? Pooled capture of all blocks against the bare forward pass, in time and memory.

    python benchmarks/hooks.py --output results/features

MiniLM's forward pass on 64 images of 65 tokens of width 384, one thread. Rounds are interleaved; each figure is the
median over rounds of the ratio to the bare pass of the same round, in CPU time. Memory is exact: every storage that
torch allocates during a pass is counted while it lives. Peers run when they are installed:
`output_hidden_states=True` of transformers, nnsight, TransformerLens (same shape, its own implementation).
"""

from __future__ import annotations

from common import circumstances, processor_time  # before numpy and torch

# isort: split
import argparse
import gc
import importlib.util
import statistics
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import layerprobe
from layerprobe.analyzers.features import extract_features
from layerprobe.backbones import load_backbone
from layerprobe.files import write_json
from layerprobe.hooks import all_layers, capture

BATCH, TOKENS = 64, 65
IMAGES = 2000


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside, while they live; `peak` is the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or storage.nbytes() == 0:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    backbone = load_backbone(arguments.model, device="cpu")
    width = backbone.hidden_size
    tokens = torch.randn(BATCH, TOKENS, width, generator=torch.Generator().manual_seed(0))
    blocks = all_layers(backbone.n_blocks, ("resid_post",), embed=False)

    def bare() -> Any:
        return backbone.forward_tokens(tokens)

    def pooled_capture() -> Any:
        with capture(backbone, blocks, pool=backbone.pool) as seen:
            backbone.forward_tokens(tokens)
        return seen

    def hidden_states() -> Any:
        return backbone.model(inputs_embeds=tokens, output_hidden_states=True).hidden_states

    ways: dict[str, Callable[[], Any]] = {
        "pooled capture of all blocks": pooled_capture,
        "output_hidden_states=True": hidden_states,
    }
    absent = {}
    for peer, make in (("nnsight", nnsight_way), ("transformer_lens", transformer_lens_way)):
        if importlib.util.find_spec(peer) is None:
            absent[peer] = "not installed"
            continue
        try:
            ways[peer] = make(backbone, tokens)
        except ImportError as error:
            # TransformerLens 4 gave up the implementation that takes residual streams as they are.
            absent[peer] = str(error).split(".")[0]

    with torch.inference_mode():
        ratios = interleaved(bare, ways, arguments.rounds)
        memory = {name: peak_bytes(way) - peak_bytes(bare) for name, way in ways.items() if name != "nnsight"}
    checks = self_check_percent(arguments.model, max(3, arguments.rounds // 3))
    one_output = BATCH * TOKENS * width * 4
    pooled = BATCH * width * 4 * backbone.n_blocks
    rows = [
        {
            "way": name,
            "overhead_percent": round(100 * (statistics.median(values) - 1), 2),
            "quartiles_percent": [round(100 * (q - 1), 2) for q in statistics.quantiles(values, n=4)],
            "extra_peak_bytes": memory.get(name),
        }
        for name, values in ratios.items()
    ]
    result = {
        "command": "python benchmarks/hooks.py",
        "model": arguments.model,
        "input": [BATCH, TOKENS, width],
        "rounds": arguments.rounds,
        "rows": rows,
        "bar_overhead_percent": 3.0,
        "bar_extra_bytes": one_output + pooled,
        "bytes_of_one_block_output": one_output,
        "self_check": {
            "images": IMAGES,
            "percent_of_features": round(statistics.median(checks), 2),
            "rounds_percent": [round(share, 2) for share in checks],
            "bar_percent": 3.0,
        },
        "absent": absent,
        **circumstances("nnsight", "transformer-lens"),
    }
    for row in rows:
        print(f"{row['way']:<32} {row['overhead_percent']:+6.2f} %   quartiles {row['quartiles_percent']}   "
              f"extra peak {row['extra_peak_bytes']}")  # fmt: skip
    print(
        f"bars: ≤ 3 % and ≤ {one_output + pooled} bytes (one block's output {one_output}); absent: {absent}"
    )
    print(f"self-check: {statistics.median(checks):.2f} % of the features of {IMAGES:,} images (bar: 3 %)")
    if arguments.output:
        write_json(arguments.output / "benchmark_hooks.json", result)


def self_check_percent(model: str, rounds: int) -> list[float]:
    """The self-check's share in what the features of 2,000 images of 8 × 8 pixels cost, by round."""
    images = np.random.default_rng(0).integers(0, 256, (IMAGES + 20, 8, 8, 3), dtype=np.uint8)
    given = {
        "train": (images[:IMAGES], np.arange(IMAGES) % 10),
        "test": (images[IMAGES:], np.arange(20) % 10),
    }
    task = layerprobe.make_task(given, name="noise")
    backbone = load_backbone(model, device="cpu").prepare(task)
    shares = []
    for _ in range(rounds):
        backbone.stem, backbone.checked = None, None
        with_check = timed(lambda: backbone.prepare(task))
        backbone.stem, backbone.checks_itself = None, False
        without = timed(lambda: backbone.prepare(task))
        with tempfile.TemporaryDirectory() as folder:
            took = timed(lambda cache=folder: extract_features(backbone, task, cache_dir=cache, quiet=True))
        backbone.checks_itself = True
        shares.append(100 * (with_check - without) / took)
    return shares


def interleaved(
    bare: Callable[[], Any], ways: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Per way, the ratio of its CPU time to the bare pass of the same round."""
    for run in (bare, *ways.values()):
        run()
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            # Bare before and after, so that a drift of the clock speed cancels.
            first, mine, last = timed(bare), timed(way), timed(bare)
            ratios[name].append(2 * mine / (first + last))
    return ratios


def timed(run: Callable[[], Any]) -> float:
    gc.disable()
    took, _ = processor_time(run)
    gc.enable()
    return took


def peak_bytes(run: Callable[[], Any]) -> int:
    gc.collect()
    with LiveBytes() as live:
        kept = run()
    del kept
    return live.peak


def nnsight_way(backbone: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    from nnsight import NNsight, save

    wrapped = NNsight(backbone.model)

    def run() -> Any:
        with wrapped.trace(inputs_embeds=tokens):
            # In transformers 5 these blocks hand on a bare tensor: output[0] would be the first image alone.
            saved = save([wrapped.get(name).output for name in backbone.layout.block_names])
        assert all(output.shape == tokens.shape for output in saved)
        return saved

    return run


def transformer_lens_way(backbone: Any, tokens: torch.Tensor) -> Callable[[], Any]:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=backbone.n_blocks, d_model=backbone.hidden_size, n_ctx=TOKENS, d_head=32, n_heads=12,
        d_mlp=4 * backbone.hidden_size, act_fn="gelu", d_vocab=100, attention_dir="bidirectional",
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    names = [f"blocks.{i}.hook_resid_post" for i in range(backbone.n_blocks)]

    def run() -> Any:
        return model.run_with_cache(tokens, start_at_layer=0, names_filter=names, return_type=None)

    return run


if __name__ == "__main__":
    main()
