"""`layerprobe env`: what a bug report needs."""

from __future__ import annotations

import os
import sys

from layerprobe.cli import options


def env(as_json: options.Json = False) -> None:
    """Print versions, hardware and cache folders.

    Example: layerprobe env
    """
    import torch  # noqa: F401  (so that accelerators are seen)
    from huggingface_hub import constants

    from layerprobe.cli.output import print_json
    from layerprobe.files import cache_root
    from layerprobe.provenance import machine, versions

    facts = {
        "versions": versions(),
        "machine": machine(),
        "layerprobe cache": str(cache_root()),
        "hugging face cache": constants.HF_HUB_CACHE,
        "offline": bool(constants.HF_HUB_OFFLINE),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("LAYERPROBE_", "OMP_", "MKL_", "CUDA_VISIBLE"))
        },
    }
    if as_json:
        print_json({"schema": "layerprobe.env/v1", **facts})
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            sys.stdout.write(f"{name}\n")
            for key, inner in value.items():
                sys.stdout.write(f"  {key:<16} {inner}\n")
        else:
            sys.stdout.write(f"{name}: {value}\n")
