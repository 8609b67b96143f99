"""Training checkpoints: the model's state is read, once, and what else was there is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerprobe.analyzers.outliers import outlier_report
from layerprobe.checkpoints import open_checkpoint
from layerprobe.errors import BrokenFileError, UnknownNameError


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(d, 3 * d), "c_proj": nn.Linear(d, d)})
        self.ln_1 = nn.LayerNorm(d)


class Model(nn.Module):
    def __init__(self, d: int = 16) -> None:
        super().__init__()
        blocks = nn.ModuleList(Block(d) for _ in range(3))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(20, d), "h": blocks})


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        sum((p**2).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model.state_dict(), optimizer.state_dict()


State = dict[str, torch.Tensor]


def copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


CASES: dict[str, tuple[Callable[[State, Any], Any], set[str]]] = {
    "nanoGPT": (
        lambda m, o: {
            "model": {f"_orig_mod.{k}": v for k, v in m.items()},
            "optimizer": o,
            "iter_num": 3,
            "best_val_loss": torch.tensor(1.0),
        },
        {"optimizer", "best_val_loss"},
    ),
    "one storage, two names": (
        lambda m, o: {"state_dict": m, "state_dict_ema": m, "optimizer": o},
        {"state_dict_ema", "optimizer"},
    ),
    "an average first": (lambda m, o: {"ema": copy(m), "model": m}, {"ema"}),
    "the best so far": (lambda m, o: {"best_state": copy(m), "net": m}, {"best_state"}),
    "a copy under any name": (lambda m, o: {"net": m, "frozen_reference": copy(m)}, {"frozen_reference"}),
    "stages in a list": (lambda m, o: {"stages": [m], "epoch": torch.tensor(1)}, {"epoch"}),
    "lightning": (
        lambda m, o: {
            "state_dict": {f"model.{k}": v for k, v in m.items()},
            "optimizer_states": [o],
            "loops": {},
        },
        {"optimizer_states"},
    ),
    "the weights at the top, an average below": (
        lambda m, o: {**m, "ema": copy(m), "optim": o},
        {"ema", "optim"},
    ),
    "moments under another name": (
        lambda m, o: {"model": m, "adam": {k: {"exp_avg": v, "exp_avg_sq": v} for k, v in m.items()}},
        {"adam"},
    ),
    "a random generator": (
        lambda m, o: {"model": m, "rng_state": torch.zeros(5056, dtype=torch.uint8)},
        {"rng_state"},
    ),
    "a state of states": (
        lambda m, o: {"state": {"model": copy(m), "optimizers": {"AdamW": o}}, "rng": [torch.zeros(16)]},
        {"state.optimizers", "rng"},
    ),
    "moments by the model's names": (lambda m, o: {"net": m, "opt": {"buffer": copy(m)}}, {"opt"}),
    "a loss with a centre": (
        lambda m, o: {"student": m, "dino_loss": {"center": torch.rand(1, 9)}},
        {"dino_loss"},
    ),
    "only the state": (lambda m, o: m, set()),
    "a list of tensors": (lambda m, o: list(m.values()), set()),
}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_counts_once(case: str, trained: tuple[State, Any], tmp_path: Path) -> None:
    make, left_out = CASES[case]
    state, _ = trained
    file = tmp_path / "checkpoint.pt"
    torch.save(make(*trained), file)
    report = outlier_report(file, quiet=True)
    assert report.pool().n == sum(tensor.numel() for tensor in state.values())
    if case != "a list of tensors":
        assert report.pool(group="blocks").n == sum(
            t.numel() for n, t in state.items() if ".attn." in n and t.dim() == 2
        )
        assert report.n_blocks == 3
    assert set(report.provenance.get("left_out", {})) == left_out
    for name in left_out:
        assert name in report.summary()


def test_another_state_can_be_asked_for(trained: tuple[State, Any], tmp_path: Path) -> None:
    state, _ = trained
    file = tmp_path / "checkpoint.pt"
    torch.save({"model": state, "model_ema": {name: 2 * tensor for name, tensor in state.items()}}, file)
    own, averaged = outlier_report(file, quiet=True), outlier_report(file, state="ema", quiet=True)
    assert averaged.pool().moments.std == pytest.approx(2 * own.pool().moments.std)
    with pytest.raises(UnknownNameError, match=r"no state 'student'; its states: model, model_ema"):
        open_checkpoint(file, state="student")


def test_parts_of_one_model_are_all_read(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    torch.save(
        {"encoder": {"layers.0.w": torch.ones(2, 2)}, "decoder": {"layers.0.w": torch.ones(3, 2)}}, file
    )
    assert [tensor.name for tensor in open_checkpoint(file).tensors] == [
        "encoder.layers.0.w",
        "decoder.layers.0.w",
    ]


def test_an_optimizer_alone_is_no_model(trained: tuple[State, Any], tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"optimizer": trained[1], "step": 3}, file)
    with pytest.raises(BrokenFileError, match="no weights of a model are in it, only: optimizer"):
        open_checkpoint(file)
    torch.save(trained[1], file)
    with pytest.raises(BrokenFileError, match="no weights of a model"):
        open_checkpoint(file)


def test_a_file_without_states_names_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownNameError, match="no named states, so --state ema names none"):
        open_checkpoint(tmp_path, state="ema")


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "sparse coo": lambda: torch.eye(8).to_sparse(),
    "sparse csr": lambda: torch.eye(8).to_sparse_csr(),
    "sparse bsr": lambda: torch.eye(8).to_sparse_bsr((2, 2)),
    "complex": lambda: torch.randn(4, dtype=torch.complex64),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8),
    "conj": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "meta": lambda: torch.empty(3, 3, device="meta"),
    "e8m0": lambda: torch.ones(4).to(torch.float8_e8m0fnu),
    "uint16": lambda: torch.zeros(3, dtype=torch.uint16),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)]),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_odd_tensors_are_rows_with_a_reason(kind: str, tmp_path: Path) -> None:
    weight = torch.randn(8, 8)
    torch.save({"w": weight, "layers.0.odd.weight": ODD[kind]()}, tmp_path / "pytorch_model.bin")
    report = outlier_report(tmp_path / "pytorch_model.bin", quiet=True)
    assert [(row.name, row.found is None, bool(row.skip)) for row in report.tensors] == [
        ("w", False, False),
        ("layers.0.odd.weight", True, True),
    ]


@pytest.mark.parametrize("kind", ["parameter", "negated", "expanded"])
def test_unusual_but_dense_tensors_are_read(kind: str, tmp_path: Path) -> None:
    made = {
        "parameter": nn.Parameter(torch.randn(4, 4)),
        "negated": torch.randn(4, 4, dtype=torch.complex64).conj().imag,
        "expanded": torch.randn(1, 4).expand(6, 4),
    }[kind]
    torch.save({"layers.0.w": made}, tmp_path / "m.pt")
    found = outlier_report(tmp_path / "m.pt", quiet=True).tensors[0].found
    assert found is not None
    assert found.values["mean"] == pytest.approx(made.detach().double().mean().item())
