"""`layerprobe env`: what a bug report needs."""

from __future__ import annotations

import os
import sys

from layerprobe.cli import options
from layerprobe.cli.output import print_json

PREFIXES = ("LAYERPROBE_", "OMP_", "MKL_", "CUDA_VISIBLE")


def env(as_json: options.Json = False) -> None:
    """Print versions, hardware and cache folders.

    Example: layerprobe env
    """
    import torch  # noqa: F401  (so that accelerators are seen)
    from huggingface_hub import constants

    from layerprobe.files import cache_root
    from layerprobe.provenance import machine, versions

    facts = {
        "versions": versions(),
        "machine": machine(),
        "layerprobe cache": str(cache_root()),
        "hugging face cache": constants.HF_HUB_CACHE,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(PREFIXES)},
    }
    if as_json:
        print_json({"schema": "layerprobe.env/v1", **facts})
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            inner = "".join(f"  {key:<16} {item}\n" for key, item in value.items())
            sys.stdout.write(f"{name}\n{inner}")
        else:
            sys.stdout.write(f"{name}: {value}\n")
