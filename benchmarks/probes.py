"""Linear probes against scikit-learn: CPU time at equal objective, on one thread on both sides.

    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/probes.py

Features are MiniLM's (7 layers, 384 wide) on CIFAR-100 where both are at hand, else Gaussian clusters, and the
result says which. For every layer and C from 1e-4 to 1e3 the same objective is minimised by

- layerprobe: the whole path, with standardisation, rotation and certificates in its time;
- scikit-learn's LogisticRegression (lbfgs, float64, standardised features given): each C from zero, stopped by
  an oracle at the first iterate within 1e-6 of layerprobe's objective, which is kinder than any tolerance, or
  after 14 times layerprobe's time for that C, which makes the ratio a lower bound;
- the same with `warm_start=True` along ascending C (stopped after 7 times layerprobe's time);
- scikit-learn as it comes (tol=1e-4), for what its accuracy loses.

Then the same on well-conditioned Gaussian clusters, and a ridge sweep with leave-one-out against RidgeClassifierCV.
The contestants take turns layer by layer. Writes results/probes/benchmark.json and benchmark.csv.
"""

from __future__ import annotations

from common import circumstances, processor_time  # before numpy and torch

# isort: split
import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
import torch
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV, _logistic
from threadpoolctl import threadpool_info

from layerprobe.layers import parse_blocks
from layerprobe.metrics import C_GRID
from layerprobe.metrics.intervals import paired_bootstrap
from layerprobe.metrics.probing import Standardised
from layerprobe.metrics.probing.knn_ridge import ALPHA_GRID, ridge_sweep
from layerprobe.metrics.probing.solver import LogisticPath

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAYERPROBE_SHARED", REPOSITORY.parent / "shared"))
N_TRAIN, N_TEST, WIDTH, CLASSES, LAYERS = 5000, 3000, 384, 100, 7
MOST_ITERATIONS = 6000
PATIENCE, WARM_PATIENCE = (
    14,
    7,
)  # scikit-learn is stopped after this many times layerprobe's time for the same C


class _StopAt:
    """Stands in for `scipy.optimize` inside scikit-learn: L-BFGS ends at the first iterate below `target`.

    After `deadline` (CPU seconds) it ends as well, and its time is a lower bound.
    """

    target = -np.inf
    deadline = np.inf
    reached = False

    def minimize(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["callback"] = self._check
        return scipy.optimize.minimize(*args, **kwargs)

    def _check(self, intermediate_result: Any) -> None:
        self.reached = intermediate_result.fun <= self.target
        if self.reached or time.process_time() > self.deadline:
            raise StopIteration

    def __getattr__(self, name: str) -> Any:
        return getattr(scipy.optimize, name)


ORACLE = _StopAt()
_logistic.optimize = ORACLE


def minilm_features(seed: int) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray], np.ndarray] | None:
    """Training and test features of every layer of MiniLM on CIFAR-100; None where either is missing."""
    from layerprobe.analyzers.features import extract_features
    from layerprobe.backbones import load_backbone
    from layerprobe.errors import LayerprobeError
    from layerprobe.tasks import load_task

    try:
        backbone = load_backbone("minilm", offline=True, device="cpu", seed=seed)
        task = load_task(
            "cifar100", data_dir=SHARED / "data" / "cifar100", limit=N_TRAIN, seed=seed, offline=True
        )
    except LayerprobeError as error:
        print(f"no MiniLM features: {error}")
        return None
    train, test = (extract_features(backbone, task, split, quiet=True) for split in ("train", "test"))
    assert len(train.labels) == N_TRAIN, len(train.labels)
    return [train[k] for k in train], train.labels, [test[k] for k in test], test.labels


def gaussian_clusters(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Isotropic clusters: the covariance within a class is the identity."""
    rng = np.random.default_rng(seed)
    centres = 0.25 * rng.normal(size=(CLASSES, WIDTH))
    y = rng.integers(0, CLASSES, N_TRAIN + N_TEST)
    X = (centres[y] + rng.normal(size=(len(y), WIDTH))).astype(np.float32)
    return X[:N_TRAIN], y[:N_TRAIN], X[N_TRAIN:], y[N_TRAIN:]


def scikit_learn(
    Z: np.ndarray, y: np.ndarray, targets: list[float], patience: list[float], *, warm: bool
) -> list[dict[str, Any]]:
    """LogisticRegression for every C, stopped at `targets` (objectives in our scale, Σ loss + ‖W‖²/2C).

    A fit that has not got there after `patience` CPU seconds is stopped: its time only bounds the ratio from below.
    """
    model = LogisticRegression(tol=1e-12, max_iter=MOST_ITERATIONS, warm_start=warm)
    found = []
    for C, target, seconds in zip(C_GRID, targets, patience, strict=True):
        ORACLE.target = target * (1 + 1e-6) / len(y)
        ORACLE.deadline = time.process_time() + seconds
        model.set_params(C=C)
        seconds, _ = processor_time(lambda: model.fit(Z, y))
        found.append(
            {
                "seconds": seconds,
                "iterations": int(model.n_iter_[0]),
                "reached": bool(ORACLE.reached),
                "coef": model.coef_.copy(),
                "intercept": model.intercept_.copy(),
            }
        )
    ORACLE.target, ORACLE.deadline = -np.inf, np.inf
    return found


def default_scikit_learn(Z: np.ndarray, y: np.ndarray) -> list[dict[str, Any]]:
    """LogisticRegression for every C at its own tolerance, with iterations enough to reach it."""
    found = []
    for C in C_GRID:
        model = LogisticRegression(C=C, max_iter=MOST_ITERATIONS)
        seconds, _ = processor_time(lambda model=model: model.fit(Z, y))
        found.append(
            {
                "seconds": seconds,
                "iterations": int(model.n_iter_[0]),
                "coef": model.coef_,
                "intercept": model.intercept_,
            }
        )
    return found


def our_path(X: np.ndarray, y: np.ndarray, tol: float) -> list[dict[str, Any]]:
    """Every C, with everything that is not shared with anyone: statistics, rotation, fits, certificates."""
    start = time.process_time()
    path = LogisticPath(Standardised.of(X), y, CLASSES, tol=tol)
    found = []
    for C in C_GRID:
        fit = path.fit(C)
        now = time.process_time()
        found.append(
            {
                "seconds": now - start,
                "iterations": fit.evaluations,
                "coef": fit.coef,
                "intercept": fit.intercept,
                "converged": fit.converged,
                "decrement": min(fit.newton_decrement, fit.duality_gap),
            }
        )
        start = now
    return found


def objective(data: Standardised, y: np.ndarray, coef: np.ndarray, intercept: np.ndarray, C: float) -> float:
    """F in float64; see the head of `layerprobe.metrics.probing.solver`."""
    loss = data.loss(torch.from_numpy(y), torch.from_numpy(coef), torch.from_numpy(intercept))
    return loss + float((coef * coef).sum()) / (2 * C)


def contest(name: str, X: np.ndarray, y: np.ndarray, X_test: np.ndarray, y_test: np.ndarray) -> pd.DataFrame:
    """One layer: all contestants in turn, every objective in float64, relative to the best of all."""
    data = Standardised.of(X)
    Z = (X.astype(np.float64) - data.mean) / data.scale
    Z_test = (X_test.astype(np.float64) - data.mean) / data.scale
    first = our_path(X, y, 1e-4)
    values = [objective(data, y, f["coef"], f["intercept"], C) for f, C in zip(first, C_GRID, strict=True)]
    patience = [max(2.0, PATIENCE * fit["seconds"]) for fit in first]
    arms = {"layerprobe": first, "sklearn": scikit_learn(Z, y, values, patience, warm=False)}
    arms["layerprobe again"] = our_path(X, y, 1e-4)
    patience = [max(2.0, WARM_PATIENCE * fit["seconds"]) for fit in first]
    arms["sklearn warm_start"] = scikit_learn(Z, y, values, patience, warm=True)
    arms["sklearn default"] = default_scikit_learn(Z, y)
    arms["reference"] = our_path(X, y, 1e-6)
    rows = []
    for arm, fits in arms.items():
        for C, fit in zip(C_GRID, fits, strict=True):
            predicted = (Z_test @ fit["coef"].T + fit["intercept"]).argmax(axis=1)
            rows.append(
                {
                    "features": name,
                    "solver": arm,
                    "C": C,
                    "cpu_seconds": fit["seconds"],
                    "iterations": fit["iterations"],
                    "objective": objective(data, y, fit["coef"], fit["intercept"], C),
                    "decrement": fit.get("decrement"),
                    "converged": fit.get("converged"),
                    "reached": fit.get("reached"),
                    "correct": predicted == y_test,
                }
            )
    frame = pd.DataFrame(rows)
    best = frame.groupby("C")["objective"].transform("min")
    frame["above_best"] = frame["objective"] / best - 1
    frame["test_accuracy"] = frame["correct"].map(np.mean)
    exact = {row.C: row.correct for row in frame[frame.solver == "reference"].itertuples()}
    against = [paired_bootstrap(row.correct, exact[row.C]) for row in frame.itertuples()]
    frame["accuracy_minus_reference"] = [d.value for d in against]
    frame["accuracy_low"], frame["accuracy_high"] = [d.low for d in against], [d.high for d in against]
    totals = frame.groupby("solver")["cpu_seconds"].sum()
    ours = (totals["layerprobe"] + totals["layerprobe again"]) / 2
    print(
        f"{name}: layerprobe {ours:.1f} s, scikit-learn {totals['sklearn']:.1f} s "
        f"({totals['sklearn'] / ours:.1f}×), warm_start {totals['sklearn warm_start']:.1f} s "
        f"({totals['sklearn warm_start'] / ours:.1f}×), default {totals['sklearn default']:.1f} s; worst above best: "
        f"{frame[frame.solver.str.startswith('layerprobe')]['above_best'].max():.1e}",
        flush=True,
    )
    return frame.drop(columns="correct")


def ridge_contest(X: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """All strengths with leave-one-out, against RidgeClassifierCV doing the same; medians of five turns."""
    data = Standardised.of(X)
    Z = (X.astype(np.float64) - data.mean) / data.scale
    alphas = len(y) * np.array(ALPHA_GRID)
    ours, theirs = [], []
    for _ in range(5):
        seconds, sweep = processor_time(lambda: ridge_sweep(X, y, CLASSES, ALPHA_GRID))
        ours.append(seconds)
        seconds, peer = processor_time(
            lambda: RidgeClassifierCV(alphas=alphas, store_cv_results=True).fit(Z, y)
        )
        theirs.append(seconds)
    # scikit-learn regresses onto −1/1 instead of 0/1: squared residuals are four times ours.
    error = np.asarray(peer.cv_results_).reshape(len(y), -1, len(alphas)).mean(axis=(0, 1)) / 4
    return {
        "layerprobe_seconds": float(np.median(ours)),
        "sklearn_seconds": float(np.median(theirs)),
        "ratio": float(np.median(theirs) / np.median(ours)),
        "largest_relative_difference_of_loo_error": float(np.abs(sweep.loo_error / error - 1).max()),
    }


def totals(frame: pd.DataFrame) -> dict[str, Any]:
    """Ratios over all layers and per layer, and the worst distance from the best objective."""
    seconds = frame.groupby(["features", "solver"])["cpu_seconds"].sum().unstack()
    ours = (seconds["layerprobe"] + seconds["layerprobe again"]) / 2
    own = frame[frame["solver"].isin(["layerprobe", "layerprobe again"])]
    default = frame[frame["solver"] == "sklearn default"]
    worst = default.loc[default["accuracy_minus_reference"].idxmin()]
    return {
        "seconds": {arm: float(seconds[arm].sum()) for arm in seconds}
        | {"layerprobe (mean)": float(ours.sum())},
        "ratio_sklearn_same_objective": float(seconds["sklearn"].sum() / ours.sum()),
        "ratio_sklearn_per_layer": {k: float(v) for k, v in (seconds["sklearn"] / ours).items()},
        "ratio_warm_start": float(seconds["sklearn warm_start"].sum() / ours.sum()),
        "ratio_warm_start_per_layer": {
            k: float(v) for k, v in (seconds["sklearn warm_start"] / ours).items()
        },
        "ratio_sklearn_default": float(seconds["sklearn default"].sum() / ours.sum()),
        "sklearn_fits_stopped_before_the_objective": {
            arm: int((frame.loc[frame["solver"] == arm, "reached"].astype(str) == "False").sum())
            for arm in ("sklearn", "sklearn warm_start")
        },
        "worst_above_best": float(own["above_best"].max()),
        "all_converged": bool(own["converged"].all()),
        "worst_above_best_sklearn_default": float(default["above_best"].max()),
        "largest_accuracy_loss_of_sklearn_default": {
            "features": str(worst["features"]),
            "C": float(worst["C"]),
            "accuracy_points": 100 * float(worst["accuracy_minus_reference"]),
            "interval_points": [100 * float(worst["accuracy_low"]), 100 * float(worst["accuracy_high"])],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts",
        default="ridge,clusters,0:7",
        help="what to measure; parts measured before are kept, so that a long run can be cut in pieces",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "results" / "probes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    assert all(lib["num_threads"] == 1 for lib in threadpool_info())
    names = [part for part in args.parts.split(",") if part in ("ridge", "clusters")]
    numbers = parse_blocks(",".join(p for p in args.parts.split(",") if p not in names), LAYERS)
    clusters = gaussian_clusters(args.seed)
    found = minilm_features(args.seed) if numbers or "ridge" in names else None
    if found is None:
        X, y, X_test, y_test = clusters
        found = [X] * LAYERS, y, [X_test] * LAYERS, y_test
        source = "Gaussian clusters (MiniLM or CIFAR-100 was not at hand)"
    else:
        source = (
            f"MiniLM on CIFAR-100, n={N_TRAIN}, d={WIDTH}, {CLASSES} classes, {len(found[3])} test images"
        )
    train, y, test, y_test = found
    args.output.mkdir(parents=True, exist_ok=True)
    state, table = args.output / "benchmark.json", args.output / "benchmark.csv"
    result: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    frame = pd.read_csv(table) if table.exists() else pd.DataFrame({"features": []})
    if numbers or "ridge" in names:
        result["features"] = source
    result |= {
        **circumstances(),
        "blas": [
            {k: lib.get(k) for k in ("internal_api", "version", "num_threads")} for lib in threadpool_info()
        ],
        "Cs": list(C_GRID),
    }
    if "ridge" in names:
        result["ridge"] = ridge_contest(train[LAYERS // 2], y)
        print("ridge", result["ridge"], flush=True)
    contests = [("Gaussian clusters", clusters)] if "clusters" in names else []
    contests += [("embed" if i == 0 else f"block.{i - 1}", (train[i], y, test[i], y_test)) for i in numbers]
    for name, data in contests:
        frame = pd.concat([frame[frame["features"] != name], contest(name, *data)], ignore_index=True)
        frame.to_csv(table, index=False)
    for key, rows in (
        ("gaussian_clusters", frame[frame["features"] == "Gaussian clusters"]),
        ("minilm", frame[frame["features"] != "Gaussian clusters"]),
    ):
        if len(rows):
            result[key] = totals(rows)
    state.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result.get(k) for k in ("ridge", "gaussian_clusters", "minilm")}, indent=1))


if __name__ == "__main__":
    main()
