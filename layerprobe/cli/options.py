"""Flags that several commands share, defined once. Use them as annotations: `model: Model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_COMMON = "Common options"

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Alias, hub id, local folder or bridge run; see: layerprobe ls models"
    ),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of the hub repository.")
]
Init = Annotated[
    str, typer.Option("--init", help="'pretrained', or 'random' for the control of the same architecture.")
]
TaskName = Annotated[
    str,
    typer.Option("--task", "-t", help="Alias, hub data set id or folder of images; see: layerprobe ls tasks"),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder that holds the task's files, instead of the hub.")
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="At most this many training images (stratified), others in proportion."
    ),
]
Blocks = Annotated[str, typer.Option("--blocks", help="Which blocks, for example 0:8,-1; or 'all'.")]
Sites = Annotated[
    str, typer.Option("--sites", help="Comma-separated: resid_pre, attn_out, mlp_out, resid_post.")
]
Stem = Annotated[str, typer.Option("--stem", help="How a language model's image stem starts: random or pca.")]
Patch = Annotated[
    int | None,
    typer.Option("--patch-size", min=1, help="Pixels per side of a patch; default: about 64 patches."),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size", min=1, help="Pixels per side; default: the model's own, or the task's for language."
    ),
]
Attention = Annotated[
    str | None,
    typer.Option("--attention", help="causal or bidirectional; default: as the model was pretrained."),
]
Pooling = Annotated[str | None, typer.Option("--pooling", help="mean, last or cls; default: mean.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]

Json = Annotated[
    bool,
    typer.Option("--json", help="Strict JSON on stdout and nothing else there.", rich_help_panel=_COMMON),
]
OutDir = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for tables, figures and records.", rich_help_panel=_COMMON),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of everything random.", rich_help_panel=_COMMON)
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu, cuda, cuda:1, mps; default: the best one here, said aloud.",
        rich_help_panel=_COMMON,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="float32, bfloat16 or float16 for the computation.", rich_help_panel=_COMMON
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline", help="Never ask the network; use the Hugging Face cache.", rich_help_panel=_COMMON
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let the model repository run its own Python code here.",
        rich_help_panel=_COMMON,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Say what would be done and how much memory it takes.", rich_help_panel=_COMMON
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no remarks.", rich_help_panel=_COMMON)
]
