"""Reports and comparisons of whole checkpoints: roll-ups add up, tied weights count once, answers follow the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import layerprobe as lp
from layerprobe.analyzers.compare import DEPTHS
from layerprobe.errors import UsageError
from layerprobe.metrics.outliers import OutlierRules
from layerprobe.plotting import outliers as plots


def transformer(
    folder: Path,
    *,
    blocks: int = 6,
    tail: float = 50.0,
    seed: int = 0,
    tied: bool = False,
    late: float | None = None,
) -> Path:
    """A Llama-shaped checkpoint whose entries follow a t distribution with `tail` degrees of freedom."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, df: float = tail) -> torch.Tensor:
        return torch.from_numpy(rng.standard_t(df, shape).astype(np.float32) * 0.02)

    weights = {"model.embed_tokens.weight": draw(40, 32), "model.norm.weight": torch.ones(32)}
    for i in range(blocks):
        df = late if late is not None and i >= blocks * 2 / 3 else tail
        p = f"model.layers.{i}."
        for name in "qkvo":
            weights[f"{p}self_attn.{name}_proj.weight"] = draw(32, 32, df=df)
        weights[f"{p}mlp.gate_proj.weight"] = draw(64, 32, df=df)
        weights[f"{p}mlp.up_proj.weight"] = draw(64, 32, df=df)
        weights[f"{p}mlp.down_proj.weight"] = draw(32, 64, df=df)
        norm = 1 + draw(32)
        norm[5] = 4.0
        weights[p + "input_layernorm.weight"] = norm
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone() if tied else draw(40, 32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def values(frame: pd.DataFrame, metric: str, **where: object) -> list[float]:
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    return frame[frame["metric"] == metric]["value"].astype(float).tolist()


def test_roll_ups_add_the_counts_of_their_tensors(tmp_path: Path) -> None:
    frame = lp.outlier_report(transformer(tmp_path / "m", tail=4)).to_frame()
    tensors = frame[frame["level"] == "tensor"]
    for metric in (
        "count",
        "outlier_count_3sigma",
        "outlier_count_madz3.5",
        "outlier_count_tukey1.5",
        "nonfinite",
    ):
        assert values(frame, metric, level="model") == [sum(values(tensors, metric))]
        assert sum(values(frame, metric, level="group")) == sum(values(tensors, metric))
        assert sum(values(frame, metric, level="kind")) == sum(values(tensors, metric))
        for block in range(6):
            assert values(frame, metric, level="block", block=block) == [
                sum(values(tensors, metric, block=block))
            ]
    ratio = values(frame, "outlier_ratio_3sigma", level="block", block=2)[0]
    assert (
        ratio
        == values(frame, "outlier_count_3sigma", level="block", block=2)[0]
        / values(frame, "count", level="block", block=2)[0]
    )
    assert values(frame, "outlier_ppm_3sigma", level="block", block=2)[0] == pytest.approx(1e6 * ratio)
    assert frame[frame["value"].isna()]["reason"].notna().all()
    assert frame[(frame["level"] == "model")]["block"].isna().all()


def test_pooled_moments_are_those_of_all_entries_together(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    folder = transformer(tmp_path / "m")
    together = np.concatenate([w.ravel() for w in load_file(folder / "model.safetensors").values()]).astype(
        float
    )
    found = lp.outlier_report(folder).pool()
    assert found.n == together.size
    assert found.values["std"] == pytest.approx(together.std(), rel=1e-9)
    assert found.values["kurtosis"] == pytest.approx(
        ((together - together.mean()) ** 4).mean() / together.var() ** 2
    )


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_the_embedding_counts_once(tied: bool, tmp_path: Path) -> None:
    report = lp.outlier_report(transformer(tmp_path / "m", tied=tied))
    assert (report.provenance["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}) == tied
    assert report.pool(group="head").n == (0 if tied else 40 * 32)
    assert "lm_head.weight" in set(report.to_frame()["tensor"])


def test_threads_and_engines_do_not_change_a_single_number(tmp_path: Path) -> None:
    folder = transformer(tmp_path / "m")
    one = lp.outlier_report(folder, threads=1, engine="torch").to_frame()
    many = lp.outlier_report(folder, threads=4).to_frame()
    pd.testing.assert_frame_equal(one, many)


def test_a_dimension_that_stands_out_in_every_norm_gets_every_vote(tmp_path: Path) -> None:
    frame = lp.outlier_report(transformer(tmp_path / "m")).to_frame()
    votes = frame[frame["metric"] == "norm_weight_dimension_votes"]
    assert (votes["entry"].iloc[0], votes["value"].iloc[0], votes["n"].iloc[0]) == ("[5]", 6, 6)


def test_rows_and_columns_that_stand_out_are_found_in_any_layout(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(60, 50))
    weight[:, 7] *= 9
    weight[33] *= 5
    for name, stored in (("layers.0.mlp.fc1.weight", weight), ("h.0.mlp.c_fc.weight", weight.T)):
        folder = tmp_path / name
        folder.mkdir()
        tensor = torch.from_numpy(np.ascontiguousarray(stored))
        extra = {"h.0.attn.c_attn.weight": torch.ones(4, 12)} if "c_fc" in name else {}
        save_file({name: tensor, **extra}, folder / "model.safetensors")
        frame = lp.outlier_report(folder).to_frame()
        rows = frame[frame["tensor"] == name].set_index("metric")
        # Columns are input dimensions, however the matrix is stored.
        assert rows.loc["column_outlier_count_4z", "entry"] == "[7]"
        assert rows.loc["row_outlier_count_4z", "entry"] == "[33]"
        deviation = weight.std(axis=0, ddof=1)
        z = (deviation - deviation.mean()) / deviation.std(ddof=1)
        assert rows.loc["column_max_z", "value"] == pytest.approx(z.max(), rel=1e-9)


def test_the_quick_path_gives_the_same_sigma_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_t(3, (1100, 1000)).astype(np.float32)
    weight[3, 3], weight[4, 4], weight[5, 5] = np.nan, np.inf, 0
    save_file({"layers.0.w": torch.from_numpy(weight)}, tmp_path / "model.safetensors")
    found = [
        lp.outlier_report(tmp_path, rules=OutlierRules(order=order, absolute=(0.5,))).counted()[0].found
        for order in (True, False)
    ]
    full, quick = found
    assert full is not None and quick is not None
    assert quick.counts == {rule: full.counts[rule] for rule in quick.counts}
    assert len(quick.counts) == 10
    assert (quick.top, quick.nan, quick.inf, quick.zeros) == (full.top, full.nan, full.inf, full.zeros)
    for name, value in quick.values.items():
        assert value == pytest.approx(full.values[name], rel=1e-12, abs=1e-15)
    assert "median" not in quick.values


def test_include_and_exclude_leave_the_rest_out(tmp_path: Path) -> None:
    folder = transformer(tmp_path / "m")
    report = lp.outlier_report(folder, include=["*mlp*"], exclude=["*layers.0.*"])
    assert len(report.tensors) == 15
    assert {row.place.kind for row in report.tensors} == {"gate", "up", "down"}


def test_a_bare_weight_file_and_a_folder_without_configuration(tmp_path: Path) -> None:
    folder = transformer(tmp_path / "m")
    (folder / "config.json").unlink()
    a = lp.outlier_report(folder).pool()
    b = lp.outlier_report(folder / "model.safetensors").pool()
    assert a == b


def test_saved_tables_hold_the_same_rows(tmp_path: Path) -> None:
    report = lp.outlier_report(transformer(tmp_path / "m"))
    report.save(tmp_path / "out")
    report.save(tmp_path / "t.parquet")
    body = json.loads((tmp_path / "out" / "outliers.json").read_text())
    assert body["schema"] == "layerprobe.outliers/v1"
    assert "own tensor" in body["provenance"]["definitions"]["roll-ups"]
    assert len(body["rows"]) == len(pd.read_csv(tmp_path / "out" / "outliers.csv"))
    assert len(body["rows"]) == len(pd.read_parquet(tmp_path / "t.parquet"))


def test_heavier_tails_are_found_to_differ_and_equal_ones_are_not(tmp_path: Path) -> None:
    heavy = transformer(tmp_path / "heavy", tail=4, seed=1)
    light = transformer(tmp_path / "light", seed=2)
    twin = transformer(tmp_path / "twin", seed=3)
    differ = lp.compare_outliers(heavy, light)
    main = (
        differ.to_frame()
        .query("metric == 'ratio_of_ratios_3sigma' and part == 'all' and depth == 'all'")
        .iloc[0]
    )
    assert 1 < main["low"] < main["value"] < main["high"]
    assert main["effect"] > 2
    assert differ.summary().startswith("heavy and light differ: ")
    same = lp.compare_outliers(light, twin)
    main = (
        same.to_frame()
        .query("metric == 'ratio_of_ratios_3sigma' and part == 'all' and depth == 'all'")
        .iloc[0]
    )
    assert main["low"] < 1 < main["high"]
    assert "are not shown to differ" in same.summary()


def test_a_finished_report_answers_only_for_what_it_counted(tmp_path: Path) -> None:
    rules = OutlierRules.sigma_only(sigmas=(2.5, 4.0))
    folders = [transformer(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    reports = [lp.outlier_report(folder, rules=rules, quiet=True) for folder in folders]
    with pytest.raises(UsageError, match=r"counted outliers beyond 2\.5, 4 σ, not beyond 3; choose another"):
        lp.compare_outliers(*reports)
    found = lp.compare_outliers(*reports, n_sigma=4.0)
    assert "beyond 4σ" in found.summary()
    assert not any("3sigma" in row["metric"] for row in found.rows)


def test_a_difference_is_placed_at_its_depth(tmp_path: Path) -> None:
    changed = transformer(tmp_path / "a", late=3.0, seed=1)
    plain = transformer(tmp_path / "b", seed=2)
    frame = lp.compare_outliers(changed, plain).to_frame()
    rows = frame.query("metric == 'ratio_of_ratios_3sigma' and part == 'all' and level == 'pair'").set_index(
        "depth"
    )
    assert rows.loc["late", "low"] > 1
    assert all(rows.loc[depth, "low"] < 1 < rows.loc[depth, "high"] for depth in DEPTHS[:2])
    assert "late third" in lp.compare_outliers(changed, plain).summary()


def test_groups_of_models_get_an_exact_permutation_test(tmp_path: Path) -> None:
    heavy = [str(transformer(tmp_path / f"h{i}", tail=4, seed=i)) for i in range(4)]
    light = [str(transformer(tmp_path / f"l{i}", seed=10 + i)) for i in range(4)]
    found = lp.compare_outliers(groups={"heavy": heavy, "light": light})
    main = found.to_frame().query("level == 'group' and part == 'all' and depth == 'all'").iloc[0]
    assert main["pvalue"] == pytest.approx(2 / 70)
    assert main["p_smallest"] == pytest.approx(2 / 70)
    assert main["low"] > 1
    assert "heavy and light differ" in found.summary()


def test_a_fused_and_a_split_attention_compare_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_t(5, (30, 30)) * scale) for scale in (1.0, 2.0, 0.1))
    fused, split = tmp_path / "fused", tmp_path / "split"
    for folder in (fused, split):
        folder.mkdir()
    save_file(
        {f"blocks.{i}.attn.qkv.weight": torch.cat([q, k, v]) for i in (0, 1)}, fused / "model.safetensors"
    )
    parts = {"q": q, "k": k, "v": v}
    separate = {f"layers.{i}.self_attn.{n}_proj.weight": w.clone() for i in (0, 1) for n, w in parts.items()}
    save_file(separate, split / "model.safetensors")
    rows = (
        lp.compare_outliers(fused, split)
        .to_frame()
        .query("metric == 'ratio_of_ratios_3sigma' and depth == 'all'")
    )
    assert set(rows["part"]) == {"all", "attention in", "q", "k", "v"}
    assert (rows["value"] == 1).all()


def test_what_cannot_be_compared_says_why(tmp_path: Path) -> None:
    one = transformer(tmp_path / "m")
    with pytest.raises(UsageError, match="at least two different models"):
        lp.compare_outliers(one)
    with pytest.raises(UsageError, match="at least two names"):
        lp.compare_outliers(groups={"a": [str(one)]})
    flat = tmp_path / "flat"
    flat.mkdir()
    save_file({"w": torch.ones(3, 3)}, flat / "model.safetensors")
    with pytest.raises(UsageError, match="has no blocks"):
        lp.compare_outliers(one, flat)


def test_figures_draw_into_the_axes_they_are_given(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    a, b = transformer(tmp_path / "a", tail=4), transformer(tmp_path / "b")
    frame = lp.outlier_report(a).to_frame()
    figure, axes = plt.subplots(2, 2)
    assert plots.plot_outlier_depth(frame, ax=axes[0, 0]) is axes[0, 0]
    assert plots.plot_outlier_heatmap(frame, ax=axes[0, 1]) is axes[0, 1]
    assert plots.plot_outlier_tails(frame, ax=axes[1, 0]) is axes[1, 0]
    assert plots.plot_outlier_comparison(lp.compare_outliers(a, b).to_frame(), ax=axes[1, 1]) is axes[1, 1]
    report = lp.outlier_report(a)
    assert report.plot(ax=axes[0, 0]) is axes[0, 0]
    axes[0, 0].clear()
    plots.plot_outlier_depth(frame, ax=axes[0, 0])
    lines = {line.get_label(): line.get_ydata() for line in axes[0, 0].get_lines()}
    assert set(lines) == {"q", "k", "v", "o", "gate", "up", "down", "Gaussian"}
    ratios = values(frame, "outlier_ratio_3sigma", level="kind", kind="q")
    assert np.allclose(lines["q"], 100 * np.array(ratios))
    plt.close(figure)
    with pytest.raises(UsageError, match="no outlier_ratio_9sigma"):
        plots.plot_outlier_depth(frame, n_sigma=9)


def test_real_weights_settle_the_quick_look(shared_data: Path) -> None:
    # Shares of the two-dimensional block weights beyond 3σ, first seen with a throw-away script.
    for name, expected in (
        ("stories260k", 0.77),
        ("babyllama-char105", 0.33),
        ("vit-mnist", 0.52),
        ("vit-cifar10", 0.18),
    ):
        found = lp.outlier_report(shared_data / "models" / name, quiet=True).pool(group="blocks")
        assert 100 * found.counts["3sigma"] / found.n == pytest.approx(expected, abs=0.01)
