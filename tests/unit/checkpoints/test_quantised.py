"""Quantised checkpoints: the statistics are those of the matrix that codes and scales define; nothing else counts.

Every layout is packed here code by code, by loops that share nothing with the package, and judged in float64.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layerprobe.analyzers.outliers import outlier_report
from layerprobe.checkpoints import open_checkpoint
from layerprobe.metrics.outliers import OutlierRules
from layerprobe.metrics.outliers.summary import outlier_statistics

OUT, IN, GROUP = 64, 96, 32
NAME = "model.layers.0.mlp.up_proj"
Stored = dict[str, torch.Tensor]
Made = tuple[Stored, np.ndarray, dict[str, Any]]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def words(codes: np.ndarray, bits: int, order: list[int] | None = None) -> np.ndarray:
    """Rows of codes as rows of 32-bit words, one bit at a time; `order` permutes each word's codes first."""
    codes = codes.astype(np.int64)
    if order is not None:
        codes = codes.reshape(codes.shape[0], -1, len(order))[:, :, order].reshape(codes.shape)
    n_words = -(-codes.shape[1] * bits // 32)
    packed = np.zeros((codes.shape[0], n_words), np.uint32)
    for column in range(codes.shape[1]):
        for bit in range(bits):
            place = column * bits + bit
            packed[:, place // 32] |= (((codes[:, column] >> bit) & 1) << (place % 32)).astype(np.uint32)
    return packed.view(np.int32)


def gptq(bits: int = 4, *, act_order: bool = False, form: str | None = "gptq", seed: int = 0) -> Made:
    draw = rng(seed)
    groups = IN // GROUP
    codes = draw.integers(0, 1 << bits, (OUT, IN))
    zeros = draw.integers(1, 1 << bits, (groups, OUT))
    scales = (0.01 + 0.02 * draw.random((groups, OUT))).astype(np.float16)
    index = np.arange(IN) // GROUP
    if act_order:
        index = draw.permutation(index)
    truth = np.empty((OUT, IN))
    for i in range(IN):
        g = index[i]
        truth[:, i] = (codes[:, i] - zeros[g]) * scales[g].astype(np.float64)
    kept = zeros - (1 if form != "gptq_v2" else 0)
    stored = {
        f"{NAME}.qweight": torch.from_numpy(words(codes, bits).T.copy()),
        f"{NAME}.qzeros": torch.from_numpy(words(kept, bits)),
        f"{NAME}.scales": torch.from_numpy(scales),
        f"{NAME}.g_idx": torch.from_numpy(index.astype(np.int32)),
        f"{NAME}.bias": torch.ones(OUT).half(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
    return stored, truth, {} if form is None else config | {"checkpoint_format": form}


def awq() -> Made:
    draw = rng(1)
    groups = IN // GROUP
    codes, zeros = draw.integers(0, 16, (IN, OUT)), draw.integers(0, 16, (groups, OUT))
    scales = (0.01 + 0.02 * draw.random((groups, OUT))).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    truth = (codes - zeros.repeat(GROUP, 0)) * scales.repeat(GROUP, 0).astype(np.float64)
    stored = {
        f"{NAME}.qweight": torch.from_numpy(words(codes, 4, order)),
        f"{NAME}.qzeros": torch.from_numpy(words(zeros, 4, order)),
        f"{NAME}.scales": torch.from_numpy(scales),
    }
    return stored, truth.T, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}


def packed(bits: int = 4, *, symmetric: bool = True, inputs: int = IN) -> Made:
    draw = rng(2)
    half, groups = 1 << (bits - 1), inputs // GROUP
    codes = draw.integers(-half, half, (OUT, inputs))
    zeros = np.zeros((OUT, groups), int) if symmetric else draw.integers(-half, half, (OUT, groups))
    scales = torch.from_numpy(0.01 + 0.02 * draw.random((OUT, groups))).bfloat16()
    truth = (codes - zeros.repeat(GROUP, 1)) * scales.double().numpy().repeat(GROUP, 1)
    stored = {
        f"{NAME}.weight_packed": torch.from_numpy(words(codes + half, bits)),
        f"{NAME}.weight_scale": scales,
        f"{NAME}.weight_shape": torch.tensor([OUT, inputs]),
    }
    if not symmetric:
        stored[f"{NAME}.weight_zero_point"] = torch.from_numpy(words((zeros + half).T, bits).T.copy())
    return stored, truth, {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def float8(
    scale_shape: tuple[int, ...],
    suffix: str = "weight_scale",
    *,
    shape: tuple[int, int] = (OUT, IN),
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
) -> Made:
    draw = rng(3)
    codes = torch.from_numpy(draw.standard_normal(shape) * 60).to(dtype)
    scales = torch.tensor(1e-3 + 1e-2 * draw.random(scale_shape)).to(scale_dtype)
    wide = scales.double().numpy()
    if block is not None:
        wide = wide.repeat(block[0], 0).repeat(block[1], 1)[: shape[0], : shape[1]]
    elif wide.ndim == 1 and wide.size > 1:
        wide = wide[:, None]
    elif wide.ndim == 2 and wide.shape[1] not in (1, shape[1]):
        wide = wide.repeat(shape[1] // wide.shape[1], 1)
    truth = codes.double().numpy() * wide
    stored = {f"{NAME}.weight": codes, f"{NAME}.{suffix}": scales, f"{NAME}.input_scale": torch.ones(1)}
    return stored, truth, {} if block is None else {"quant_method": "fp8", "weight_block_size": list(block)}


def int8_rows() -> Made:
    draw = rng(4)
    codes = draw.integers(-127, 128, (OUT, IN)).astype(np.int8)
    scb = draw.random(OUT).astype(np.float32)
    truth = codes * (scb.astype(np.float64)[:, None] / 127)
    stored = {
        f"{NAME}.weight": torch.from_numpy(codes),
        f"{NAME}.SCB": torch.from_numpy(scb),
        f"{NAME}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return stored, truth, {"quant_method": "bitsandbytes", "load_in_8bit": True}


def int8_zero_points() -> Made:
    draw = rng(5)
    codes = draw.integers(-128, 128, (OUT, IN)).astype(np.int8)
    zeros = draw.integers(-20, 20, (OUT, 1)).astype(np.int8)
    scale = torch.from_numpy(0.01 * draw.random((OUT, 1))).bfloat16()
    truth = (codes.astype(int) - zeros) * scale.double().numpy()
    stored = {
        f"{NAME}.weight": torch.from_numpy(codes),
        f"{NAME}.weight_scale": scale,
        f"{NAME}.weight_zero_point": torch.from_numpy(zeros),
    }
    return stored, truth, {"quant_method": "compressed-tensors", "format": "int-quantized"}


def nf4(*, nested: bool = False, width: int = IN) -> Made:
    draw = rng(6)
    n = OUT * width
    codes = draw.integers(0, 16, n)
    table = np.sort(draw.standard_normal(16)).astype(np.float32)
    blocks = -(-n // 64)
    facts = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [OUT, width]}
    stored = {f"{NAME}.weight": torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None])}
    if nested:
        inner = np.sort(draw.standard_normal(256)).astype(np.float32)
        keys = draw.integers(0, 256, blocks)
        outer = (0.01 * draw.random(-(-blocks // 256))).astype(np.float32)
        maxima = inner[keys].astype(np.float64) * outer[np.arange(blocks) // 256] + 0.05
        facts |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        stored[f"{NAME}.weight.absmax"] = torch.from_numpy(keys.astype(np.uint8))
        stored[f"{NAME}.weight.nested_absmax"] = torch.from_numpy(outer)
        stored[f"{NAME}.weight.nested_quant_map"] = torch.from_numpy(inner)
    else:
        maxima = draw.random(blocks).astype(np.float32).astype(np.float64)
        stored[f"{NAME}.weight.absmax"] = torch.from_numpy(maxima.astype(np.float32))
    stored[f"{NAME}.weight.quant_map"] = torch.from_numpy(table)
    state = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    stored[f"{NAME}.weight.quant_state.bitsandbytes__nf4"] = state
    truth = (table[codes].astype(np.float64) * maxima[np.arange(n) // 64]).reshape(OUT, width)
    return stored, truth, {"quant_method": "bitsandbytes", "load_in_4bit": True}


LAYOUTS: dict[str, Callable[[], Made]] = {
    "gptq 4 bits": gptq,
    "gptq 8 bits": lambda: gptq(8),
    "gptq 3 bits across words": lambda: gptq(3),
    "gptq 2 bits": lambda: gptq(2),
    "gptq by activation order": lambda: gptq(act_order=True),
    "gptq without configuration": lambda: gptq(form=None),
    "gptq version 2": lambda: gptq(form="gptq_v2"),
    "awq": awq,
    "compressed-tensors 4 bits": packed,
    "compressed-tensors 8 bits": lambda: packed(8),
    "compressed-tensors with zero points": lambda: packed(symmetric=False),
    "fp8 a scale a tensor": lambda: float8(()),
    "fp8 a scale of one entry": lambda: float8((1,)),
    "fp8 a scale a row": lambda: float8((OUT, 1)),
    "fp8 a flat scale a row": lambda: float8((OUT,), "scale"),
    "fp8 a scale a group": lambda: float8((OUT, 3), scale_dtype=torch.bfloat16),
    "fp8 blocks": lambda: float8((4, 6), "weight_scale_inv", block=(16, 16)),
    "fp8 blocks that stick out": lambda: float8((2, 3), "weight_scale_inv", shape=(60, 72), block=(32, 32)),
    "fp8 blocks whose size is not stated": lambda: (
        *float8((3, 3), "weight_scale_inv", shape=(70, 65), block=(32, 32))[:2],
        {},
    ),
    "fp8 e5m2": lambda: float8((OUT, 1), "scale_weight", dtype=torch.float8_e5m2),
    "fp8 scales that are powers of two": lambda: float8((OUT, 1), scale_dtype=torch.float8_e8m0fnu),
    "bitsandbytes 8 bits": int8_rows,
    "int8 with zero points": int8_zero_points,
    "bitsandbytes nf4": nf4,
    "bitsandbytes nf4 of odd rows": lambda: nf4(width=45),
    "bitsandbytes nf4 nested": lambda: nf4(nested=True),
}


def write(folder: Path, stored: Stored, quantisation: dict[str, Any], *, kind: str = "safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    everything = {
        "model.embed_tokens.weight": torch.from_numpy(rng(9).standard_normal((20, IN))).half(),
        "model.layers.0.input_layernorm.weight": torch.ones(IN).half(),
        **{name: tensor.contiguous() for name, tensor in stored.items()},
    }
    if kind == "safetensors":
        save_file(everything, folder / "model.safetensors")
    else:
        torch.save(everything, folder / "pytorch_model.bin")
    config = {"model_type": "llama"} | ({"quantization_config": quantisation} if quantisation else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_numbers_are_those_of_the_dequantised_matrix(layout: str, kind: str, tmp_path: Path) -> None:
    stored, truth, quantisation = LAYOUTS[layout]()
    folder = write(tmp_path / "m", stored, quantisation, kind=kind)
    report = outlier_report(folder, quiet=True, axes=False)
    row = next(row for row in report.tensors if row.name == f"{NAME}.weight")
    assert row.found is not None, row.skip
    assert row.shape == truth.shape
    assert (row.place.block, row.place.kind, row.place.group) == (0, "up", "blocks")
    far = np.abs(truth - truth.mean())
    for k in (2, 3, 6):
        assert row.found.counts[f"{k}sigma"] == int((far > k * truth.std()).sum())
    expected = outlier_statistics(truth, rules=OutlierRules())
    for name, value in expected.values.items():
        assert row.found.values[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    value, index = row.found.top[0]
    assert abs(value) == pytest.approx(np.abs(truth).max())
    assert truth.flat[index] == pytest.approx(value)
    counted = {row.name for row in report.counted()}
    plain = {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"}
    assert counted == plain | {f"{NAME}.weight"} | ({f"{NAME}.bias"} & stored.keys())
    assert report.pool(group="blocks").n == truth.size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_slice_is_the_slice_of_the_whole(layout: str, tmp_path: Path) -> None:
    stored, truth, quantisation = LAYOUTS[layout]()
    checkpoint = open_checkpoint(write(tmp_path / "m", stored, quantisation))
    tensor = next(tensor for tensor in checkpoint.tensors if tensor.name == f"{NAME}.weight")
    for size in (4 * 7, 4 * 100, 4 * 10_000):
        got = np.concatenate([chunk.copy() for chunk in tensor.chunks(bytearray(size))])
        np.testing.assert_allclose(got, truth.reshape(-1), rtol=1e-6, atol=1e-9)


def hqq() -> Stored:
    return {
        f"{NAME}.W_q": torch.zeros(OUT, IN // 2, dtype=torch.uint8),
        f"{NAME}.scale": torch.rand(OUT * IN // 64, 1).half(),
        f"{NAME}.zero": torch.rand(OUT * IN // 64, 1).half(),
    }


def mxfp4() -> Stored:
    p = "model.layers.0.mlp.experts."
    return {
        p + "gate_up_proj_blocks": torch.zeros(2, 64, 3, 16, dtype=torch.uint8),
        p + "gate_up_proj_scales": torch.full((2, 64, 3), 120, dtype=torch.uint8),
        p + "gate_up_proj_bias": torch.zeros(2, 64).bfloat16(),
    }


def nvfp4() -> Stored:
    return {
        f"{NAME}.weight": torch.zeros(OUT, IN // 2, dtype=torch.uint8),
        f"{NAME}.weight_scale": torch.ones(OUT, IN // 16).to(torch.float8_e4m3fn),
        f"{NAME}.weight_scale_2": torch.tensor(0.01),
        f"{NAME}.input_scale": torch.tensor(0.5),
    }


def without(name: str, made: Made) -> Stored:
    return {key: tensor for key, tensor in made[0].items() if not key.endswith(name)}


UNDEFINED: dict[str, tuple[Callable[[], Stored], dict[str, Any], str]] = {
    "hqq": (hqq, {"quant_method": "hqq"}, "method 'hqq' is not known"),
    "hqq without configuration": (hqq, {}, "no layout that is known"),
    "mxfp4": (mxfp4, {"quant_method": "mxfp4"}, "method 'mxfp4' is not known"),
    "nvfp4": (nvfp4, {"quant_method": "modelopt"}, "no layout that is known"),
    "nf4 without its table": (lambda: without("quant_map", nf4()), {}, "its table .* is missing"),
    "nf4 whose state is zeros": (
        lambda: (
            nf4()[0] | {f"{NAME}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8)}
        ),
        {},
        "not readable",
    ),
    "fp8 whose scale is missing": (
        lambda: without("weight_scale", float8((OUT, 1))),
        {"quant_method": "fp8"},
        "its scale is missing",
    ),
    "fp8 with a scale that fits nothing": (
        lambda: float8((OUT, 1))[0] | {f"{NAME}.weight_scale": torch.rand(5)},
        {},
        "scales of shape",
    ),
    "fp8 in blocks of a size that is not stated": (
        lambda: {
            f"{NAME}.weight": torch.ones(OUT, 300).to(torch.float8_e4m3fn),
            f"{NAME}.scale": torch.ones(1, 3),
        },
        {},
        "block size is not stated",
    ),
    "fp8 with another factor": (
        lambda: float8((OUT, 1))[0] | {f"{NAME}.pre_quant_scale": torch.rand(IN)},
        {},
        "'pre_quant_scale' beside the codes",
    ),
    "int8 of an unknown method": (
        lambda: int8_zero_points()[0],
        {"quant_method": "brandnew"},
        "method 'brandnew' is not known",
    ),
    "int8 in an order of the GPU": (
        lambda: int8_rows()[0] | {f"{NAME}.weight_format": torch.tensor(2, dtype=torch.uint8)},
        {},
        "particular to a GPU",
    ),
    "awq in another order": (lambda: awq()[0], {"quant_method": "awq", "version": "gemv"}, "order 'gemm'"),
    "vptq, with a table in a module of its own": (
        lambda: {
            f"{NAME}.indices": torch.zeros(1, OUT, IN // 8, dtype=torch.int32),
            f"{NAME}.centroids.weight": torch.randn(1, 256),
            f"{NAME}.weight_scale": torch.rand(IN),
            f"{NAME}.weight_bias": torch.rand(IN),
        },
        {},
        "no layout that is known",
    ),
    "quip#, with codes of 64 bits": (
        lambda: {
            f"{NAME}.Qidxs": torch.zeros(OUT // 8, IN // 8, dtype=torch.int64),
            f"{NAME}.SU": torch.randn(IN),
            f"{NAME}.SV": torch.randn(OUT),
            f"{NAME}.Wscale": torch.tensor(1.0),
        },
        {},
        "no layout that is known",
    ),
    "fp8 whose scale has a name of its own": (
        lambda: {
            f"{NAME}.weight": torch.ones(OUT, IN).to(torch.float8_e4m3fn),
            f"{NAME}.weight_qscale": torch.rand(OUT),
        },
        {},
        "'weight_qscale' beside the codes",
    ),
    "gptq for marlin": (
        lambda: gptq()[0],
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        "'marlin'",
    ),
}


@pytest.mark.parametrize("case", UNDEFINED)
def test_codes_that_define_no_matrix_are_one_row_with_the_reason(case: str, tmp_path: Path) -> None:
    make, quantisation, reason = UNDEFINED[case]
    report = outlier_report(write(tmp_path / "m", make(), quantisation), quiet=True)
    skipped = [row for row in report.tensors if "not decoded" in (row.skip or "")]
    assert len(skipped) == 1
    assert skipped[0].found is None
    assert re.search(reason, skipped[0].skip or ""), skipped[0].skip
    assert all(row.name.endswith(("bias", "norm.weight", "embed_tokens.weight")) for row in report.counted())
    assert not any(row.name.endswith("weight_bias") for row in report.counted())
    assert report.pool(group="blocks").n == 0


def test_scales_of_the_cache_and_of_activations_are_no_weights(tmp_path: Path) -> None:
    p = "model.layers.0.self_attn."
    extra = {
        p + "k_scale": torch.ones(1),
        p + "v_scale": torch.ones(1),
        p + "kv_cache_scaling_factor": torch.ones(1),
    }
    stored, truth, _ = float8(())
    report = outlier_report(write(tmp_path / "m", stored | extra, {}), quiet=True)
    assert report.pool(block=0).n == truth.size + IN


def test_float8_without_any_scale_is_a_dtype_like_any_other(tmp_path: Path) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    report = outlier_report(write(tmp_path / "m", {f"{NAME}.weight": weight}, {}), quiet=True)
    exact = weight.double().numpy()
    found = report.pool(group="blocks")
    assert found.counts["3sigma"] == int((np.abs(exact - exact.mean()) > 3 * exact.std()).sum())


def test_a_fused_matrix_in_float8_is_cut_like_any_other(tmp_path: Path) -> None:
    stored, truth, _ = float8((OUT, 1))
    fused = {name.replace("up_proj", "gate_up_proj"): tensor for name, tensor in stored.items()}
    report = outlier_report(write(tmp_path / "m", fused, {}), quiet=True)
    for kind, half in (("gate", truth[: OUT // 2]), ("up", truth[OUT // 2 :])):
        part = next(row for row in report.tensors if row.part_of and row.place.kind == kind)
        assert part.found is not None
        assert part.found.values["std"] == pytest.approx(half.std(), rel=1e-6)


def test_experts_in_three_axes_have_a_scale_each(tmp_path: Path) -> None:
    codes = torch.from_numpy(rng().standard_normal((3, 8, 16)) * 50).to(torch.float8_e4m3fn)
    scales = torch.from_numpy(rng(1).random((3, 1, 16))).float()
    p = "model.layers.0.mlp.experts."
    stored = {p + "down_proj": codes, p + "down_proj_scale": scales, p + "down_proj_bias": torch.zeros(3, 16)}
    checkpoint = open_checkpoint(write(tmp_path / "m", stored, {}))
    tensor = next(tensor for tensor in checkpoint.tensors if tensor.name == p + "down_proj")
    got = np.concatenate(list(tensor.chunks(bytearray(52))))
    np.testing.assert_allclose(
        got.reshape(3, 8, 16), codes.double().numpy() * scales.double().numpy(), rtol=1e-6
    )
    assert [t.skip is None for t in checkpoint.tensors if t.name.endswith("down_proj_bias")] == [True]
