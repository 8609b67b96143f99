"""All pairs of layers: agreement of every form with float64, standard errors, minibatches."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from layerprobe.errors import UsageError
from layerprobe.metrics.similarity import FLOAT64_UP_TO, SCAN_ROWS, hsic, paired_layers
from layerprobe.metrics.similarity.all_pairs import MinibatchCKA, pairwise_cka
from layerprobe.metrics.similarity.measures import debiased_linear_cka


def related(n: int, d: int, e: int, *, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two feature sets that have `share` of their spread from eight common directions."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 8))
    x = share * common @ rng.normal(size=(8, d)) + rng.normal(size=(n, d))
    y = share * common @ rng.normal(size=(8, e)) + rng.normal(size=(n, e))
    return x, y


def mixed(
    rng: np.random.Generator, n: int, share: float, d: int = 12, e: int = 20
) -> tuple[np.ndarray, np.ndarray]:
    mixing = np.random.default_rng(5)
    common = rng.normal(size=(n, 4))
    return (
        share * common @ mixing.normal(size=(4, d)) + rng.normal(size=(n, d)),
        share * common @ mixing.normal(size=(4, e)) + rng.normal(size=(n, e)),
    )


def awkward_layers(n: int, widths: list[int], seed: int) -> list[np.ndarray]:
    """float32 layers of unequal width: some columns carry 300 σ, one layer is scaled by 1e-3, one by 1e4."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(99).normal(size=(n, 8))
    layers = []
    for index, d in enumerate(widths):
        x = 0.3 * index * common @ rng.normal(size=(8, d)) + rng.normal(size=(n, d))
        x[:, : max(1, d // 8)] += 300 * x.std()
        layers.append((x * [1.0, 1e-3, 1e4][index % 3]).astype(np.float32))
    return layers


def reference(xs: list[np.ndarray], ys: list[np.ndarray]) -> np.ndarray:
    return np.array([[debiased_linear_cka(x, y) for y in ys] for x in xs])


@pytest.mark.parametrize("method", ["gram", "features"])
@pytest.mark.parametrize("n", [4, 5, 31, 100, 512, 513, 1100, 2051])
def test_all_pairs_agree_with_float64_to_a_millionth(method: str, n: int) -> None:
    xs, ys = awkward_layers(n, [17, 40, 5], seed=1), awkward_layers(n, [9, 64], seed=2)
    both = pairwise_cka(xs, ys, method=method)
    assert both.method == method
    np.testing.assert_allclose(both.values, reference(xs, ys), atol=1e-6)
    alone = pairwise_cka(xs, method=method)
    np.testing.assert_allclose(alone.values, reference(xs, xs), atol=1e-6)
    np.testing.assert_allclose(np.diag(alone.values), 1.0, atol=1e-7)
    np.testing.assert_allclose(np.diag(alone.stderr), 0.0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_scale_under_or_overflows(scale: float, dtype: type) -> None:
    x, y = related(600, 20, 30, share=0.4)
    expected = debiased_linear_cka(x, y)
    found = pairwise_cka([(x * scale).astype(dtype)], [y.astype(dtype)]).values[0, 0]
    assert found == pytest.approx(expected, abs=1e-6)
    assert debiased_linear_cka(x * scale, y) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("offset", [0.0, 300.0, 3e4])
@pytest.mark.parametrize("method", ["gram", "features"])
def test_offsets_of_many_deviations_lose_nothing_in_realistic_widths(method: str, offset: float) -> None:
    rng = np.random.default_rng(3)
    common = rng.normal(size=(1500, 16))
    layers = []
    for share in (0.0, 0.2):
        x = share * common @ rng.normal(size=(16, 384)) + rng.normal(size=(1500, 384))
        x[:, rng.choice(384, 5, replace=False)] += offset
        layers.append((1e-3 * x).astype(np.float32))
    found = pairwise_cka(layers, method=method).values
    np.testing.assert_allclose(found, reference(layers, layers), atol=1e-6)


def test_memory_mapped_half_precision_strided_and_torch_inputs_give_the_same(tmp_path) -> None:
    import torch

    x, y = (part.astype(np.float16) for part in related(700, 24, 16, share=0.6))
    expected = debiased_linear_cka(x, y)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y.astype(np.float32))
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy"]
    for a, b in (
        (x, y),
        mapped,
        (np.asfortranarray(x.astype(np.float32)), np.repeat(y, 2, axis=1)[:, ::2]),
        (torch.from_numpy(x), torch.from_numpy(y.astype(np.float32)).requires_grad_()),
    ):
        assert pairwise_cka([a], [b]).values[0, 0] == pytest.approx(expected, abs=1e-6)
    bfloat = torch.from_numpy(x.astype(np.float32)).bfloat16()
    rounded = debiased_linear_cka(bfloat.float().numpy(), y)
    assert pairwise_cka([bfloat], [y]).values[0, 0] == pytest.approx(rounded, abs=1e-6)


def test_strips_and_tiles_of_any_size_give_the_same(monkeypatch) -> None:
    xs, ys = awkward_layers(1400, [33, 20], seed=4), awkward_layers(1400, [12], seed=5)
    whole = pairwise_cka(xs, ys, method="gram")
    monkeypatch.setattr(hsic, "PANEL_BYTES", 1)
    pieces = pairwise_cka(xs, ys, method="gram")
    np.testing.assert_allclose(pieces.values, whole.values, atol=1e-7)
    np.testing.assert_allclose(pieces.stderr, whole.stderr, atol=1e-6)


def test_pieces_of_the_feature_form_give_the_same(monkeypatch) -> None:
    xs, ys = awkward_layers(1400, [33, 20], seed=4), awkward_layers(1400, [12, 50], seed=5)
    whole = pairwise_cka(xs, ys, method="features")
    monkeypatch.setattr(hsic, "PIECE_BYTES", 1)
    monkeypatch.setattr(hsic, "ACCUMULATOR_BYTES", 1)
    pieces = pairwise_cka(xs, ys, method="features")
    np.testing.assert_allclose(pieces.values, whole.values, atol=1e-7)
    np.testing.assert_allclose(pieces.stderr, whole.stderr, rtol=1e-4, atol=1e-6)


def test_rows_in_another_order_are_paired_by_the_given_order() -> None:
    x, y = related(900, 10, 12, share=0.5)
    shuffle = np.random.default_rng(0).permutation(900)
    expected = debiased_linear_cka(x, y)
    found = pairwise_cka([x], [y[shuffle]], rows_y=np.argsort(shuffle)).values[0, 0]
    assert found == pytest.approx(expected, abs=1e-6)
    assert abs(pairwise_cka([x], [y[shuffle]]).values[0, 0]) < 0.1 < expected


def test_auto_takes_the_form_with_fewer_multiplications() -> None:
    wide = [np.random.default_rng(0).normal(size=(100, 300))]
    narrow = [np.random.default_rng(0).normal(size=(3000, 3))]
    for layers, method in ((wide, "gram"), (narrow, "features")):
        xs, _ = paired_layers(layers, None)
        assert (hsic.gram_cost(xs, None) < hsic.feature_cost(xs, None)) == (method == "gram")
        assert pairwise_cka(layers).method == method


# -- bad input --------------------------------------------------------------------------------------------


def test_constant_layers_are_undefined_with_a_reason() -> None:
    x, y = related(600, 6, 6, share=0.5)
    for constant in (np.full((600, 5), 0.1, np.float32), np.full((600, 5), 1e7 / 3)):
        found = pairwise_cka([x, constant], [y], names_x=["block.0", "block.1"])
        assert found.reasons == [[None], ["block.1 is constant over the images"]]
        assert (
            np.isfinite(found.values[0, 0]) and np.isnan(found.values[1, 0]) and np.isnan(found.stderr[1, 0])
        )
        with pytest.raises(UsageError, match="X is constant over the images"):
            debiased_linear_cka(constant, y)


def test_equidistant_images_are_undefined_with_a_reason() -> None:
    found = pairwise_cka([np.eye(5)], [np.random.default_rng(0).normal(size=(5, 3))], names_x=["block.0"])
    assert found.reasons == [["all 5 images are equally far apart in block.0; use more images"]]
    with pytest.raises(UsageError, match="equally far apart"):
        debiased_linear_cka(np.eye(5), np.eye(5))


@pytest.mark.parametrize("n", [100, 700])
def test_non_finite_values_are_counted_and_located(n: int) -> None:
    x, y = (part.astype(np.float32) for part in related(n, 6, 6, share=0.5))
    x[18, 2] = np.nan
    x[70, :2] = np.inf
    message = r"block\.12\.mlp_out holds 3 non-finite values \(first: image 18\)"
    with pytest.raises(UsageError, match=message):
        pairwise_cka([x], [y], names_x=["block.12.mlp_out"])
    with pytest.raises(UsageError, match=r"X holds 3 non-finite values \(first: image 18\)"):
        debiased_linear_cka(x, y)


def test_shapes_that_do_not_pair_are_refused() -> None:
    x = np.zeros((5, 2))
    with pytest.raises(UsageError, match=r"X is 5×2, Y is 6×2"):
        debiased_linear_cka(x, np.zeros((6, 2)))
    with pytest.raises(UsageError, match=r"layer 0 of A is 5×2, layer 0 of B is 6×2"):
        pairwise_cka([x], [np.zeros((6, 2))])
    with pytest.raises(UsageError, match=r"layer 0 of A is 5×2, layer 1 of A is 4×2"):
        pairwise_cka([x, x[:4]])
    with pytest.raises(UsageError, match="at least 4 images; got 3"):
        pairwise_cka([x[:3]])
    with pytest.raises(UsageError, match="at least 4 images; got 3"):
        debiased_linear_cka(x[:3], x[:3])
    with pytest.raises(UsageError, match=r"n×d features, one row per image, got shape \(5, 2, 2\)"):
        pairwise_cka([np.zeros((5, 2, 2))])
    with pytest.raises(UsageError, match="no layers"):
        pairwise_cka([])
    with pytest.raises(UsageError, match="unknown method 'grams'"):
        pairwise_cka([x], method="grams")


def test_a_piece_of_the_scan_is_smaller_than_the_tests_above() -> None:
    """The streaming paths are only tested if the arrays above are longer than one piece."""
    assert SCAN_ROWS < 1100 and FLOAT64_UP_TO < 1100


# -- standard errors --------------------------------------------------------------------------------------


@functools.cache
def truth_of(share: float) -> float:
    """Debiased CKA of 40,000 images: ten times surer than any sample below."""
    x, y = mixed(np.random.default_rng(12345), 40_000, share)
    return float(pairwise_cka([x], [y], method="features").values[0, 0])


def coverage(share: float, n: int, method: str, repeats: int) -> tuple[float, float]:
    """Share of 95 % intervals that hold the truth, and mean standard error over the true deviation."""
    rng = np.random.default_rng(2)
    values, errors, held = [], [], 0
    for _ in range(repeats):
        x, y = mixed(rng, n, share)
        found = pairwise_cka([x], [y], method=method, seed=int(rng.integers(1 << 30)))
        half = found.quantile(0.95) * found.stderr[0, 0]
        held += abs(found.values[0, 0] - truth_of(share)) <= half
        values.append(found.values[0, 0])
        errors.append(found.stderr[0, 0])
    return held / repeats, float(np.mean(errors) / np.std(values))


@pytest.mark.parametrize("method", ["gram", "features"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_intervals_cover_the_truth_about_as_often_as_they_say(share: float, method: str) -> None:
    held, ratio = coverage(share, 300, method, repeats=200)
    assert 0.90 <= held <= 0.98
    assert 0.85 <= ratio <= 1.2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gram", "features"])
@pytest.mark.parametrize("n", [100, 300, 1000, 3000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 1.0])
def test_intervals_cover_the_truth_in_a_long_simulation(share: float, n: int, method: str) -> None:
    held, _ = coverage(share, n, method, repeats=600)
    assert 0.90 <= held <= 0.98


def test_the_error_of_a_difference_is_smaller_for_layers_that_move_together() -> None:
    rng = np.random.default_rng(0)
    x, y = mixed(rng, 800, 0.8)
    near = y + 0.05 * rng.normal(size=y.shape)
    found = pairwise_cka([x], [y, near])
    together = found.difference_stderr((0, 0), (0, 1))
    assert together < 0.3 * found.stderr.min()
    assert found.difference_stderr((0, 0), (0, 0)) == 0.0


def test_the_seed_deals_groups_and_leaves_values_alone() -> None:
    x, y = mixed(np.random.default_rng(0), 700, 0.5)
    one, other, again = (pairwise_cka([x], [y], seed=seed) for seed in (0, 1, 0))
    assert one.values[0, 0] == pytest.approx(other.values[0, 0], abs=1e-7)
    assert one.stderr[0, 0] != other.stderr[0, 0]
    assert one.stderr[0, 0] == again.stderr[0, 0]


def test_a_sorted_split_does_not_mislead_the_standard_error() -> None:
    """Groups are dealt at random, so the order in which the images are stored does not matter."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 80)
    centres = rng.normal(size=(10, 12))
    x, y = centres[labels] + rng.normal(size=(800, 12)), centres[labels] + rng.normal(size=(800, 12))
    shuffle = rng.permutation(800)
    by_class, mixed_up = pairwise_cka([x], [y]), pairwise_cka([x[shuffle]], [y[shuffle]])
    assert by_class.stderr[0, 0] == pytest.approx(mixed_up.stderr[0, 0], rel=0.35)


def test_quantiles_are_those_of_student() -> None:
    x, y = mixed(np.random.default_rng(0), 100, 0.5)
    found = pairwise_cka([x], [y])
    assert 1.96 < found.quantile(0.95) < 2.1
    with pytest.raises(UsageError, match="between 0 and 1"):
        found.quantile(95)


# -- minibatches ------------------------------------------------------------------------------------------


def test_one_batch_is_the_whole() -> None:
    x, y = mixed(np.random.default_rng(0), 700, 0.5)
    running = MinibatchCKA()
    running.update([x, 1e-3 * y], [y])
    found = running.result()
    np.testing.assert_allclose(found.values, pairwise_cka([x, y], [y]).values, atol=1e-6)
    assert np.isnan(found.stderr).all()


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_minibatches_agree_with_the_whole_within_their_standard_error(share: float) -> None:
    x, y = mixed(np.random.default_rng(1), 4000, share)
    running = MinibatchCKA()
    for start, stop in zip(
        [0, 40, 200, *range(400, 4000, 100)], [40, 200, *range(400, 4001, 100)], strict=True
    ):
        running.update([x[start:stop]], [y[start:stop] * 1e-3])
    found = running.result()
    assert found.n == 4000
    whole = pairwise_cka([x], [y])
    assert abs(found.values - whole.values)[0, 0] < 3 * found.stderr[0, 0]
    assert found.stderr[0, 0] >= 0.8 * whole.stderr[0, 0]


def test_minibatch_intervals_cover_the_truth() -> None:
    rng, held = np.random.default_rng(3), 0
    for _ in range(150):
        running = MinibatchCKA()
        for _ in range(20):
            x, y = mixed(rng, 32, 0.5)
            running.update([x], [y])
        found = running.result()
        held += abs(found.values[0, 0] - truth_of(0.5)) <= found.quantile() * found.stderr[0, 0]
    assert 0.88 <= held / 150 <= 1.0


def test_batches_that_do_not_fit_are_refused() -> None:
    x, y = mixed(np.random.default_rng(0), 20, 0.5)
    running = MinibatchCKA()
    with pytest.raises(UsageError, match="no batch was added"):
        running.result()
    running.update([x, np.ones((20, 2))], [y])
    with pytest.raises(UsageError, match="2 and 1 before, 1 and 1 now"):
        running.update([x], [y])
    with pytest.raises(UsageError, match="at least 4 images; got 3"):
        running.update([x[:3], x[:3]], [y[:3]])
    found = running.result()
    assert found.reasons == [[None], ["layer 1 of A is constant over the images of every batch"]]
    assert np.isnan(found.values[1, 0])
