"""Checkpoints read as files: every container gives the same bytes; files that lie, break off or point elsewhere
give one error that names file and tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layerprobe.analyzers.outliers import outlier_report
from layerprobe.checkpoints import StoredTensor, open_checkpoint
from layerprobe.errors import BrokenFileError, NotAvailableError, UsageError


def whole(tensor: StoredTensor, size: int = 64) -> np.ndarray:
    return np.concatenate([chunk.copy() for chunk in tensor.chunks(bytearray(size))] or [np.empty(0)])


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(11, 6, generator=generator),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(6, 6, generator=generator).bfloat16(),
        "model.layers.1.self_attn.q_proj.weight": torch.randn(6, 6, generator=generator).half(),
        "model.norm.weight": torch.randn(6, generator=generator).double(),
    }


@pytest.mark.parametrize("container", ["single", "sharded", "bin", "nested pth", "old torch format"])
def test_every_container_gives_the_same_values(
    container: str, weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    names = list(weights)
    if container == "single":
        save_file(weights, tmp_path / "model.safetensors")
    elif container == "sharded":
        for i, part in enumerate((names[:2], names[2:])):
            save_file({name: weights[name] for name in part}, tmp_path / f"m-{i}.safetensors")
        table = {name: f"m-{0 if name in names[:2] else 1}.safetensors" for name in names}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    elif container == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    elif container == "nested pth":
        torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "checkpoint.pth")
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    checkpoint = open_checkpoint(tmp_path)
    prefix = "state_dict." if container == "nested pth" else ""
    assert {tensor.name for tensor in checkpoint.tensors} == {prefix + name for name in names}
    for tensor in checkpoint.tensors:
        expected = weights[tensor.name.removeprefix(prefix)]
        raw = expected.view(torch.uint16) if expected.element_size() == 2 else expected
        assert tensor.shape == tuple(expected.shape)
        assert np.array_equal(whole(tensor), raw.numpy().ravel())


def test_two_names_over_one_storage_are_one_weight(tmp_path: Path) -> None:
    shared = torch.randn(5, 4)
    torch.save({"wte.weight": shared, "lm_head.weight": shared}, tmp_path / "pytorch_model.bin")
    tensors = {tensor.name: tensor for tensor in open_checkpoint(tmp_path).tensors}
    assert tensors["lm_head.weight"].alias_of == "wte.weight"
    assert tensors["wte.weight"].alias_of is None


def test_a_view_in_a_torch_file_is_read_in_its_own_order(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"w": base.T, "part": base[1:]}, tmp_path / "pytorch_model.bin")
    tensors = {tensor.name: tensor for tensor in open_checkpoint(tmp_path).tensors}
    assert np.array_equal(whole(tensors["w"]), base.T.numpy().ravel())
    assert np.array_equal(whole(tensors["part"]), base[1:].numpy().ravel())


def test_patterns_select_by_name(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.select(["*.q_proj.*"]).tensors) == 2
    assert len(checkpoint.select(["*.q_proj.*"], ["*layers.1*"]).tensors) == 1
    with pytest.raises(UsageError, match=r"names look like: model\."):
        checkpoint.select(["nothing"])


def write_raw(
    path: Path, header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None
) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def model(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"w": entry([4], 0, 16)}, b"\0" * 12, None, "'w' ends at byte .* truncated"),
        ({"w": entry([4], 0, 16)}, b"", 10_000, "header claims 10,000 bytes"),
        ({"w": entry([4], 0, 16)}, b"", 1 << 63, "header claims"),
        ({"v": entry([4], 0, 16), "w": entry([4], 8, 24)}, b"\0" * 24, None, "'w' overlaps the bytes of tensor 'v'"),
        ({"w": entry([4], 4000, 4016)}, b"\0" * 16, None, "'w' ends at byte"),
        ({"w": entry([4], 16, 0)}, b"\0" * 16, None, "'w' of shape .* needs 16 bytes"),
        ({"w": entry([4], -16, 0)}, b"\0" * 16, None, "entry for tensor 'w' is malformed"),
        ({"w": entry([5], 0, 16)}, b"\0" * 16, None, "'w' of shape .* needs 20 bytes"),
        ({"w": entry([2**40, 2**40], 0, 16)}, b"\0" * 16, None, "'w' of shape"),
        ({"w": entry([4], 0, 16, "F128")}, b"\0" * 16, None, "'w' has the unknown dtype 'F128'"),
        ({"w": {**entry([4], 0, 16), "dtype": []}}, b"\0" * 16, None, "entry for tensor 'w' is malformed"),
        ({"w": {"dtype": "F32"}}, b"", None, "entry for tensor 'w' is malformed"),
        ({"w": entry(["4"], 0, 16)}, b"\0" * 16, None, "entry for tensor 'w' is malformed"),  # type: ignore[list-item]
        (b'{"w": 1', b"", None, "not valid JSON"),
        (b"[1]", b"", None, "no JSON object"),
        (b"[" * 100_000, b"", None, "not valid JSON"),
        (b'{"w": {}, "w": {}}', b"", None, "names 'w' twice"),
    ],
)  # fmt: skip
def test_a_lying_safetensors_header_is_one_error(
    tmp_path: Path, header: Any, data: bytes, length: int | None, message: str
) -> None:
    file = write_raw(tmp_path / "model.safetensors", header, data, length=length)
    with pytest.raises(BrokenFileError, match=message) as caught:
        open_checkpoint(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_too_short_for_a_header(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(BrokenFileError, match="not even a header length"):
        open_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened_names_the_tensor(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", {"layers.0.w": torch.ones(5000)})
    checkpoint = open_checkpoint(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        BrokenFileError, match=r"cannot read tensor 'layers\.0\.w' from .*the file ends at byte"
    ):
        list(checkpoint.tensors[0].chunks(bytearray(4096)))


def index(folder: Path, weight_map: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    folder = index(tmp_path / "m", {"w": "model-00001-of-00002.safetensors"})
    with pytest.raises(BrokenFileError, match=r"model-00001-of-00002\.safetensors for tensor 'w'.*missing"):
        open_checkpoint(folder)
    with pytest.raises(BrokenFileError, match="for tensor 'w'"):
        outlier_report(folder)


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None]
)
def test_an_index_that_points_out_of_its_folder(tmp_path: Path, shard: Any) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "secret.safetensors")
    with pytest.raises(BrokenFileError, match="not a file of its folder"):
        open_checkpoint(index(tmp_path / "m", {"w": shard}))


def test_an_index_that_places_a_tensor_where_it_is_not(tmp_path: Path) -> None:
    folder = index(tmp_path / "m", {"w": "a.safetensors", "v": "a.safetensors"})
    save_file({"w": torch.ones(2)}, folder / "a.safetensors")
    with pytest.raises(BrokenFileError, match=r"places tensor 'v' in .*it is not there"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', "not json"])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BrokenFileError, match="index"):
        open_checkpoint(tmp_path)


def test_a_tensor_stored_in_two_shards(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(BrokenFileError, match="'w' is stored twice"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_and_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(NotAvailableError, match="holds no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(NotAvailableError, match="there is no"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "weights.xyz").write_text("")
    with pytest.raises(UsageError, match="cannot tell the format"):
        open_checkpoint(tmp_path / "weights.xyz")


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pickled-code-ran"),))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "evil": _Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BrokenFileError, match="never pickled code") as caught:
        open_checkpoint(tmp_path)
    assert "pytorch_model.bin" in str(caught.value)
    assert not (tmp_path / "pickled-code-ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x80\x02garbage"])
def test_a_torch_file_that_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(BrokenFileError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_a_truncated_torch_file(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.randn(10_000)}, file)
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(BrokenFileError, match=r"pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_odd_tensors_get_the_right_answer_or_a_reason(tmp_path: Path) -> None:
    folder = model(
        tmp_path / "m",
        {
            "layers.0.a.weight": torch.empty(0, 3),
            "layers.0.b.weight": torch.tensor([2.5]),
            "layers.0.c.weight": torch.full((7, 7), 0.1),
            "layers.0.d.weight": torch.full((4, 4), float("nan")),
            "layers.0.e.weight": torch.tensor(3.0),
            "layers.0.f.weight": torch.tensor([1.0, float("inf"), -1.0, float("nan")]),
            "layers.0.g.weight": torch.zeros(3, 3, dtype=torch.int8),
            "layers.0.h.weight": torch.zeros(3, 3, dtype=torch.bool),
        },
    )
    report = outlier_report(folder)
    rows = report.to_frame().query("level == 'tensor'")

    def cell(letter: str, metric: str) -> tuple[Any, Any]:
        row = rows[(rows["tensor"] == f"layers.0.{letter}.weight") & (rows["metric"] == metric)]
        assert len(row) == 1
        value = row["value"].iloc[0]
        return (None if value != value else value), row["reason"].iloc[0]

    assert cell("a", "count")[0] == 0
    assert cell("a", "mean") == (None, "the tensor is empty")
    assert cell("b", "mean")[0] == 2.5
    assert cell("b", "kurtosis") == (None, "the tensor is constant")
    assert cell("c", "std")[0] == 0
    assert cell("c", "outlier_ratio_3sigma")[0] == 0
    assert cell("d", "nonfinite")[0] == 16
    assert cell("d", "mean") == (None, "no finite entries")
    assert cell("e", "median")[0] == 3.0
    assert (cell("f", "mean")[0], cell("f", "nan_count")[0], cell("f", "inf_count")[0]) == (0, 1, 1)
    assert "I8" in cell("g", "count")[1]
    assert "BOOL" in cell("h", "count")[1]
    # Nothing is an unexplained gap, and nothing infinite reaches the table.
    assert rows[rows["value"].isna()]["reason"].notna().all()
    assert np.isfinite(rows["value"].dropna().astype(float)).all()
    assert "Skipped, the table says why: 2 of 8" in report.summary()


def test_a_row_of_twenty_million_entries(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    row = rng.standard_normal(20_000_000, dtype=np.float32)
    row[12_345_678] = 1000.0
    folder = model(
        tmp_path / "m", {"layers.0.mlp.up_proj.weight": torch.from_numpy(row[None]).to(torch.bfloat16)}
    )
    found = outlier_report(folder, axes=True).counted()[0].found
    assert found is not None
    assert found.n == 20_000_000
    assert found.top[0] == (1000.0, 12_345_678)
    assert found.counts["3sigma"] / found.n == pytest.approx(0.0018, abs=0.0012)


def test_packed_and_integer_weights_are_named_and_skipped(tmp_path: Path) -> None:
    file = write_raw(
        tmp_path / "model.safetensors",
        {
            "layers.0.mlp.up_proj.qweight": entry([4, 4], 0, 64, "I32"),
            "layers.0.mlp.up_proj.weight": entry([4, 8], 64, 80, "F4"),
            "layers.0.mlp.up_proj.scales": entry([4], 80, 88, "F16"),
        },
        b"\0" * 88,
    )
    report = outlier_report(file)
    assert {row.name for row in report.tensors if row.found is None} == {
        "layers.0.mlp.up_proj.qweight",
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.up_proj.scales",
    }
    reasons = report.to_frame().query("metric == 'count' and value.isna()")["reason"].tolist()
    assert all(reason.startswith("skipped: ") for reason in reasons)
    assert len(reasons) == 3
