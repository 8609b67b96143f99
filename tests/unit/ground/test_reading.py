"""Things that are not plain files, and files that unpack to more than is read: one line each, and nobody waits."""

from __future__ import annotations

import gzip
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import layerprobe as lp
from layerprobe.checkpoints import open_checkpoint
from layerprobe.errors import BrokenFileError, LayerprobeError, UsageError, printable, shortened
from layerprobe.files import atomic_write, read_json
from layerprobe.hooks.feature_store import list_stores
from layerprobe.model_config import read_model_config
from layerprobe.plans import FreezePlan
from layerprobe.reading import check_fields, check_plain, open_file
from layerprobe.report import write_report
from layerprobe.training.checkpoints import find_checkpoint

KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "nowhere": lambda path: path.symlink_to("/nowhere/at/all"),
    "circle": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "outside": lambda path: path.symlink_to("/etc/passwd"),
}
WORDS = {
    "pipe": "it is a pipe", "folder": "it is a folder", "nowhere": "its link leads nowhere",
    "circle": "its links lead in a circle", "device": "it is a device", "outside": "it is a link out of its folder",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "x")
    with (
        pytest.raises(BrokenFileError, match=f"cannot read thing .*{WORDS[kind]}"),
        open_file(tmp_path / "x", what="thing", inside=tmp_path),
    ):
        pass


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_refuses_what_is_no_plain_file(tmp_path: Path, kind: str) -> None:
    """Weights, configurations, indices, plans, runs, reports, figures, keys, images, tables: none hangs."""

    def place(name: str, **beside: str) -> Path:
        folder = tmp_path / name.replace("/", "_")
        (folder / name).parent.mkdir(parents=True)
        for other, text in beside.items():
            (folder / other.replace("_", ".")).write_text(text)
        KINDS[kind](folder / name)
        return folder

    record = json.dumps({"schema": "layerprobe.probe/v1", "provenance": {}, "rows": []})
    attempts: list[tuple[Callable[[Path], object], Path]] = [
        (open_checkpoint, place("model.safetensors")),
        (open_checkpoint, place("pytorch_model.bin")),
        (open_checkpoint, place("model.safetensors.index.json")),
        (lambda p: lp.load_backbone(str(p)), place("config.json")),
        (lambda p: lp.load_backbone(str(p)), place("layerprobe_run.json")),
        (write_report, place("search.json")),
        (write_report, place("curve.png", probe_json=record)),
        (find_checkpoint, tmp_path / "layerprobe_run.json"),
    ]
    for read, folder in attempts:
        with pytest.raises(LayerprobeError) as caught:
            read(folder)
        assert "\n" not in str(caught.value)
    if kind != "outside":  # named by the user
        with pytest.raises(LayerprobeError):
            FreezePlan.load(place("plan.json") / "plan.json")
    if kind not in ("folder", "outside"):
        folder = place("a/x.png")
        with pytest.raises(LayerprobeError, match="cannot read the image"):
            lp.load_task(str(folder))
        with pytest.raises(LayerprobeError):
            lp.load_task(str(place("x.parquet")))
        with pytest.raises(LayerprobeError):
            lp.load_task(str(place("train-images-idx3-ubyte")))
    store = tmp_path / "stores" / "abc"
    store.mkdir(parents=True)
    KINDS[kind](store / "key.json")
    if kind not in ("nowhere", "circle"):  # which a look for keys passes over
        with pytest.raises(BrokenFileError):
            list_stores(tmp_path / "stores")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", os.fsdecode(b"\xff\xfe")])
def test_names_that_no_file_can_have(name: str) -> None:
    for use in (lp.load_backbone, lp.load_task, FreezePlan.load, write_report, open_checkpoint):
        with pytest.raises(LayerprobeError):
            use(name)


def test_a_folder_with_a_name_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png")).write_bytes(b"x")
    with pytest.raises(BrokenFileError, match="holds a name that is no UTF-8"):
        lp.load_task(str(tmp_path))


def test_links_within_the_hub_cache_are_fine(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert check_plain(snapshot / "config.json", inside=snapshot).st_size == 2
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "other.json").symlink_to("../../../elsewhere")
    with pytest.raises(BrokenFileError, match="link out of its folder"):
        check_plain(snapshot / "other.json", inside=snapshot)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 200 + "1" + "}" * 200, '"\\ud800"', "1" * 5000, "\xff"]
)
def test_json_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BrokenFileError, match="not valid JSON") as caught:
        read_json(tmp_path / "x.json")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_messages_are_printable_and_of_bounded_length() -> None:
    assert printable("a\x1b[31m\u202eb\ud800é") == "a\\x1b[31m\\u202eb\\ud800é"
    assert len(shortened("x" * 5000)) == 300 and shortened("short") == "short"
    with pytest.raises(BrokenFileError) as caught:
        check_fields({"n": 10**1000}, {"n": int}, "x.json")
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("n_layer", 10**30),
        ("num_labels", 10**9),
        ("hidden_size", 2**40),
        ("n_head", -5),
    ],
)
def test_sizes_that_no_model_has(tmp_path: Path, field: str, value: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", field: value}))
    with pytest.raises(BrokenFileError, match=f"no model has {field} = "):
        read_model_config(tmp_path)


@pytest.mark.parametrize("where", [{}, {"text_config": {}}])
def test_kernels_from_the_hub_are_foreign_code(tmp_path: Path, where: dict[str, dict[str, str]]) -> None:
    config: dict[str, object] = {"model_type": "gpt2", **where}
    (where.get("text_config", config))["attn_implementation"] = "owner/kernel"  # type: ignore[index]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"asks for code from the hub .*--trust-remote-code"):
        read_model_config(tmp_path, trust_remote_code=False)
    read_model_config(tmp_path, trust_remote_code=True)


def test_a_small_file_that_unpacks_to_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is announced is held against a limit before anything is allocated; what is not, while it is read."""
    idx, parquet = tmp_path / "idx", tmp_path / "parquet"
    idx.mkdir()
    parquet.mkdir()
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, 4_000_000, 28, 28)
    (idx / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(4 << 20)))
    (idx / "train-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 1) + b"\0")
    with pytest.raises(BrokenFileError, match=r"truncated or damaged|raise \$LAYERPROBE_SIZE_LIMIT"):
        lp.load_task(str(idx))
    monkeypatch.setenv("LAYERPROBE_SIZE_LIMIT", str(64 << 20))
    value = np.random.default_rng(0).bytes(1 << 20)
    table = pa.table({"image": pa.array([value] * 500, pa.binary()), "label": pa.array([0, 1] * 250)})
    pq.write_table(
        table, parquet / "train.parquet", use_dictionary=["image"], dictionary_pagesize_limit=16 << 20
    )
    assert (parquet / "train.parquet").stat().st_size < 8 << 20
    with pytest.raises(BrokenFileError, match=r"unpacks to .* raise \$LAYERPROBE_SIZE_LIMIT"):
        lp.load_task(str(parquet))
    monkeypatch.setenv("LAYERPROBE_SIZE_LIMIT", "1 GB")
    with pytest.raises(UsageError, match="LAYERPROBE_SIZE_LIMIT is a number of bytes"):
        lp.load_task(str(parquet))


def test_what_dead_processes_left_is_deleted_and_what_living_ones_write_stays(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, os; from layerprobe.files import atomic_write\n"
        "with atomic_write(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.txt")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_write(tmp_path / "x.txt") as first, atomic_write(tmp_path / "x.txt") as second:
        assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name}
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
