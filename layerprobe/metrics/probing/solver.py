"""The solver behind the linear probes: L2-regularised multinomial logistic regression along a path of C.

For standardised features X (n×d), labels y in 0 … K−1, weights W (K×d) and intercepts b (K) it minimises

    F(W, b) = Σ_i [ logsumexp(W x_i + b) − (W x_i + b)_{y_i} ] + ‖W‖² / (2C)

which is scikit-learn's objective divided by C, intercept unpenalised. The features are rotated onto their
principal axes once, where an exact diagonal preconditions L-BFGS well. Line searches run on cached logits: a
trial step costs one softmax and no matrix product. Work is float32; the last Newton steps and every reported
number are float64. A fit ends with a conjugate-gradient solve of the Newton system, whose decrement
½ gᵀH⁻¹g estimates F − min F and decides whether the fit counts as converged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from layerprobe.metrics.probing import Standardised, lower_gram

_MEMORY = 20  # L-BFGS pairs: each costs two passes over the K×d weights, small beside n×d×K
_LOOSE = 2e-6  # L-BFGS's own estimate of what is left, at which the Newton steps take over
_CG_STEPS = 150
_MOST_EVALUATIONS = 5000  # per fit
_DELAY = 6  # steps of conjugate gradients over which the decay of their gains is judged
_SAFETY = 0.5  # the decrement has been seen up to 2 times too small, so it must be below half of `tol`
_LOG_TINY = -40.0  # below exp(−40) probabilities are cut, because subnormal numbers are slow on CPUs


@dataclass(frozen=True, kw_only=True)
class LogisticFit:
    """One fitted probe, in the units of the features that were given.

    Attributes
    ----------
    coef, intercept : np.ndarray
        K×d and K, float64, for standardised features.
    objective : float
        F at the solution, float64; scikit-learn's objective is C times this.
    newton_decrement, duality_gap : float
        Estimate and upper bound of (F − min F) / F before the last Newton step; the bound is tight for small C.
    converged : bool
        Whether one of the two is within half of the tolerance asked for.
    evaluations : int
        Passes over the data; float64 ones count twice.
    """

    C: float
    coef: np.ndarray
    intercept: np.ndarray
    objective: float
    newton_decrement: float
    duality_gap: float
    converged: bool
    evaluations: int


class LogisticPath:
    """All fits of one layer: what they share (rotation, buffers) is made once, each C starts from the last.

    Parameters
    ----------
    X, y
        Training features, and n labels, int64 in 0 … n_classes − 1, each class present.
    tol : float
        A fit counts as converged when its relative suboptimality is at most this.
    device : str
        Where to compute; float64 is used there, too, so `mps` is not possible.
    """

    def __init__(
        self, X: Standardised, y: np.ndarray, n_classes: int, *, tol: float = 1e-4, device: str = "cpu"
    ) -> None:
        self.X, self.tol = X, tol
        self.device = torch.device(device)
        self.n, self.k = len(X), n_classes
        self.y = torch.from_numpy(np.ascontiguousarray(y, dtype=np.int64)).to(self.device)
        self.rotation = self._principal_axes()  # d×r float64
        self.Z = torch.empty(self.n, self.rotation.shape[1], dtype=torch.float32, device=self.device)
        for rows, block in X.blocks(self.device):
            self.Z[rows] = (block @ self.rotation).float()
        self.Z2 = self.Z * self.Z
        self.column = self.y[:, None]
        self.evaluations = 0
        prior = torch.bincount(self.y, minlength=n_classes).double() / self.n
        self.W = torch.zeros(n_classes, self.Z.shape[1], dtype=torch.float64, device=self.device)
        self.b = prior.log()
        self._before: tuple[torch.Tensor, torch.Tensor] | None = None

    def _principal_axes(self) -> torch.Tensor:
        """Orthonormal d×r axes that span the rows of X, by the smaller of its two Gram matrices."""
        d = self.X.X.shape[1]
        if d <= self.n:
            gram = torch.zeros(d, d, dtype=torch.float64, device=self.device)
            for _, block in self.X.blocks(self.device):
                gram += lower_gram(block)
            values, axes = torch.linalg.eigh(gram)
            return axes[:, values > values[-1] * 1e-12]
        full = torch.cat([block for _, block in self.X.blocks(self.device)])
        values, left = torch.linalg.eigh(full @ full.T)
        kept = values > values[-1] * 1e-12
        axes = full.T @ (left[:, kept] / values[kept].sqrt())
        return torch.linalg.qr(axes).Q

    def start_from(self, coef: np.ndarray, intercept: np.ndarray) -> None:
        """Begin the next fit at these weights (K×d, for the standardised features)."""
        self.W = torch.from_numpy(coef).to(self.device) @ self.rotation
        self.b = torch.from_numpy(intercept).to(self.device)

    def fit(self, C: float) -> LogisticFit:
        """Minimise F for this C, from the last solution; ascending C is quickest."""
        start = self.evaluations
        before = (self.W, self.b)
        self._extrapolate(C)
        self._lbfgs(C, _LOOSE, start + _MOST_EVALUATIONS)
        while True:
            value, decrement, gap = self._newton(C)
            converged = min(decrement, gap) <= _SAFETY * self.tol
            if converged or self.evaluations - start >= _MOST_EVALUATIONS:
                break
        self._before = before
        return LogisticFit(
            C=float(C),
            coef=(self.W @ self.rotation.T).cpu().numpy(),
            intercept=(self.b - self.b.mean()).cpu().numpy(),
            objective=value,
            newton_decrement=decrement,
            duality_gap=gap,
            converged=converged,
            evaluations=self.evaluations - start,
        )

    def _extrapolate(self, C: float) -> None:
        """Move along the line through the last two solutions: the path is smooth in log C."""
        if self._before is None:
            return
        W, b = self.W.float(), self.b.float()
        dW, db = W - self._before[0].float(), b - self._before[1].float()
        if not dW.any():
            return
        line = _Line(self, torch.addmm(b, self.Z, W.T), W, torch.cat([dW, db[:, None]], 1), 1 / C)
        self.evaluations += 1
        step = line.search(1.0)
        self.W, self.b = (W + step * dW).double(), (b + step * db).double()

    def _lbfgs(self, C: float, loose: float, budget: int) -> None:
        """Preconditioned L-BFGS until its own estimate of the relative decrement is below `loose`."""
        penalty = 1 / C
        W, b = self.W.float(), self.b.float()
        logits = torch.addmm(b, self.Z, W.T)
        inverse = self._inverse_diagonal(_softmax(logits), penalty)
        pairs: deque[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = deque(maxlen=_MEMORY)
        scale = torch.ones((), device=self.device)
        g = self._gradient(_loss_and_residuals(logits, self.column)[1], W, penalty)
        self.evaluations += 1
        while self.evaluations < budget:
            direction = -_two_loop(g, pairs, inverse, scale)
            line = _Line(self, logits, W, direction, penalty)
            step = line.search(1.0)
            if step == 0:
                break
            W, b = W + step * direction[:, :-1], b + step * direction[:, -1]
            new = self._gradient(line.R, W, penalty)
            self.evaluations += 1
            logits, change, bend = line.logits, step * direction, new - g
            g = new
            if -0.5 * step * line.slope0 <= loose * line.value:
                break
            curvature = torch.sum(change * bend)
            if curvature > 0:
                pairs.append((change, bend, 1 / curvature))
                scale = curvature / torch.sum(bend * bend * inverse)
        # The optimum sums to zero over classes; what rounding left of the sum only adds to the penalty.
        self.W, self.b = (W - W.mean(0)).double(), b.double()

    def _gradient(self, R: torch.Tensor, W: torch.Tensor, penalty: float) -> torch.Tensor:
        """K×(r+1) gradient from residuals P − Y, the intercept's in the last column."""
        return torch.cat([torch.addmm(W, R.T, self.Z, beta=penalty), R.sum(0)[:, None]], 1)

    def _inverse_diagonal(self, P: torch.Tensor, penalty: float) -> torch.Tensor:
        """One over the exact diagonal of the Hessian in the rotated basis, K×(r+1)."""
        weight = P - P * P
        self.evaluations += 1
        diagonal = torch.cat([weight.T @ self.Z2 + penalty, weight.sum(0)[:, None]], 1)
        return 1 / diagonal.clamp_(min=1e-12)

    def _exact(self, W: torch.Tensor, b: torch.Tensor, penalty: float) -> tuple[float, torch.Tensor]:
        """F and its gradient, float64, on the features as they came."""
        coef = W @ self.rotation.T
        loss = 0.0
        g = torch.zeros(self.k, coef.shape[1] + 1, dtype=torch.float64, device=self.device)
        for rows, block in self.X.blocks(self.device):
            logits = torch.addmm(b, block, coef.T)
            labels = self.y[rows]
            index = torch.arange(len(block), device=self.device)
            normaliser = torch.logsumexp(logits, 1)
            loss += float((normaliser - logits[index, labels]).sum())
            R = torch.exp_(logits - normaliser[:, None])
            R[index, labels] -= 1
            g[:, :-1].addmm_(R.T, block)
            g[:, -1] += R.sum(0)
        self.evaluations += 2
        rotated = torch.cat([g[:, :-1] @ self.rotation + penalty * W, g[:, -1:]], 1)
        return loss + 0.5 * penalty * float((W * W).sum()), rotated

    def _newton(self, C: float) -> tuple[float, float, float]:
        """One Newton step: F after it, and the relative decrement and duality gap before it."""
        penalty = 1 / C
        value, g = self._exact(self.W, self.b, penalty)
        size = g.norm()
        if size == 0:
            return value, 0.0, 0.0
        W, b = self.W.float(), self.b.float()
        logits = torch.addmm(b, self.Z, W.T)
        system = _NewtonSystem(self, _softmax(logits), penalty)
        self.evaluations += 1
        direction, decrement, gap = system.solve(
            (g / size).float(), 2 * _SAFETY * self.tol * value / float(size) ** 2
        )
        unit = 0.5 * float(size) ** 2 / value
        direction *= size.float()
        direction[:, :-1] -= direction[:, :-1].mean(0)
        step = _Line(self, logits, W, direction, penalty).search(1.0)
        moved_W = self.W + step * direction[:, :-1].double()
        moved_b = self.b + step * direction[:, -1].double()
        moved = self.X.loss(self.y, moved_W @ self.rotation.T, moved_b)
        moved += 0.5 * penalty * float((moved_W * moved_W).sum())
        self.evaluations += 1
        if moved < value:
            self.W, self.b, value = moved_W, moved_b, moved
        return value, decrement * unit, gap * unit


class _Line:
    """F along one direction, from cached logits: each trial is one softmax."""

    def __init__(
        self, path: LogisticPath, logits: torch.Tensor, W: torch.Tensor, step: torch.Tensor, penalty: float
    ) -> None:
        dW, db = step[:, :-1], step[:, -1]
        self.start, self.along, self.y = logits, torch.addmm(db, path.Z, dW.T), path.column
        self.penalty = penalty
        self.ww, self.wd, self.dd = (float(torch.sum(a * c)) for a, c in ((W, W), (W, dW), (dW, dW)))

    def at(self, step: float) -> float:
        """Derivative of F at `step`; leaves the value, logits and residuals P − Y there behind."""
        self.logits = torch.add(self.start, self.along, alpha=step)
        loss, self.R = _loss_and_residuals(self.logits, self.y)
        self.value = loss + 0.5 * self.penalty * (self.ww + 2 * step * self.wd + step * step * self.dd)
        return float(torch.sum(self.R * self.along)) + self.penalty * (self.wd + step * self.dd)

    def search(self, step: float, flat: float = 0.5) -> float:
        """A step where the slope has shrunk to `flat` of its start; 0 where no step lowers F.

        F is convex along the line, so its derivative alone brackets the minimum; F itself, with its
        rounding, is not compared.
        """
        self.slope0 = self.at(0.0)
        if not self.slope0 < 0:
            return 0.0
        low, slope_low, high = 0.0, self.slope0, math.inf
        for _ in range(12):
            slope = self.at(step)
            if abs(slope) <= -flat * self.slope0:
                return step
            if slope < 0:
                low_before, slope_before = low, slope_low
                low, slope_low = step, slope
                if math.isinf(high):
                    bend = (slope - slope_before) / (step - low_before)
                    secant = step - slope / bend if bend > 0 else math.inf
                    step = min(max(secant, 1.5 * step), 8 * step)
                    continue
            else:
                high, slope_high = step, slope
            secant = low - slope_low * (high - low) / (slope_high - slope_low)
            step = min(max(secant, low + 0.1 * (high - low)), high - 0.1 * (high - low))
        if low > 0:
            self.at(low)
        return low


class _NewtonSystem:
    """Products with the Hessian at given probabilities, the intercepts eliminated, and its solution by CG."""

    def __init__(self, path: LogisticPath, P: torch.Tensor, penalty: float) -> None:
        self.path, self.P, self.penalty = path, P, penalty
        self.inverse = path._inverse_diagonal(P, penalty)[:, :-1]
        mass = P.double()
        intercepts = torch.diag(mass.sum(0)) - mass.T @ mass
        # Adding one number to all intercepts changes nothing; that direction is pinned, then removed.
        pin = intercepts.diagonal().mean() / len(intercepts)
        self.intercepts = (torch.linalg.inv(intercepts + pin) - 1 / (pin * len(intercepts) ** 2)).float()

    def _curve(self, U: torch.Tensor) -> torch.Tensor:
        """(diag p − p pᵀ) applied to each row of U, in place."""
        # A number added to a row of U changes nothing, so the label's entry is moved to 0: where p is almost 1
        # there, the rest would be a difference of nearly equal numbers.
        U -= U.gather(1, self.path.column)
        U *= self.P
        return U.sub_(self.P * U.sum(1, keepdim=True))

    def eliminate(self, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights' gradient after the intercepts took their Newton step, and that step."""
        shift = -(self.intercepts @ g[:, -1])
        T = self._curve(shift.expand_as(self.P).clone())
        return g[:, :-1] + T.T @ self.path.Z, shift

    def times(self, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Schur complement times V (K×r), and the intercepts that go with V."""
        T = self._curve(self.path.Z @ V.T)
        shift = -(self.intercepts @ T.sum(0))
        T += self._curve(shift.expand_as(T).clone())
        self.path.evaluations += 1
        return torch.addmm(V, T.T, self.path.Z, beta=self.penalty), shift

    def solve(self, g: torch.Tensor, enough: float) -> tuple[torch.Tensor, float, float]:
        """Conjugate gradients on H x = −g, until gᵀH⁻¹g is known well enough or proven small enough.

        Returns x, the estimate of gᵀH⁻¹g and an upper bound of it.
        gᵀH⁻¹g = q + rᵀH⁻¹r, where q grows with every step and rᵀH⁻¹r ≤ C ‖r‖², since H ⪰ I/C on the weights.
        """
        residual, shift = self.eliminate(g)
        residual = -residual
        x = torch.zeros_like(residual)
        z = residual * self.inverse
        p = z.clone()
        rz = first = float(torch.sum(residual * z))
        gap = float(torch.sum(residual * residual)) / self.penalty
        q, bound, rest = 0.0, gap, math.inf
        gains: list[float] = []
        for _ in range(_CG_STEPS):
            if bound <= 0.1 * enough:
                break
            product, move = self.times(p)
            alpha = rz / float(torch.sum(p * product))
            x += alpha * p
            shift = shift + alpha * move
            residual -= alpha * product
            gains.append(alpha * rz)
            q += gains[-1]
            bound = q + float(torch.sum(residual * residual)) / self.penalty
            z = residual * self.inverse
            rz, old = float(torch.sum(residual * z)), rz
            rest = _tail(gains)
            if bound <= enough or rest <= 0.25 * q:
                break
            if q > 20 * enough and rz <= 0.01 * first:
                break
            p = z + (rz / old) * p
        decrement = min(bound, q + rest)
        return torch.cat([x, shift[:, None]], 1), decrement, gap


def _tail(gains: Sequence[float]) -> float:
    """What conjugate gradients would still add to q: the last gains continued as a geometric series."""
    if len(gains) < 2 * _DELAY:
        return math.inf
    recent, before = sum(gains[-_DELAY:]), sum(gains[-2 * _DELAY : -_DELAY])
    # Rounding may end the decay; then there is no series to continue.
    return recent * recent / (before - recent) if 0 < recent < before else math.inf


def _two_loop(
    g: torch.Tensor,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    inverse: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """The L-BFGS product H·g, from the preconditioner scale·inverse (Nocedal & Wright, algorithm 7.4)."""
    q, kept = g.clone(), []
    for change, bend, rho in reversed(pairs):
        alpha = rho * torch.sum(change * q)
        q -= alpha * bend
        kept.append(alpha)
    q *= inverse * scale
    for (change, bend, rho), alpha in zip(pairs, reversed(kept), strict=True):
        q += (alpha - rho * torch.sum(bend * q)) * change
    return q


def _loss_and_residuals(logits: torch.Tensor, label: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Σ −log p of the labels, and P − Y, both precise also where p of the label is almost 1."""
    normaliser = torch.logsumexp(logits, 1, keepdim=True)
    R = (logits - normaliser).clamp_(min=_LOG_TINY).exp_()
    R.scatter_(1, label, 0.0)
    miss = R.sum(1, keepdim=True)
    R.scatter_(1, label, -miss)
    plain = normaliser - logits.gather(1, label)
    loss = torch.where(miss < 0.5, -torch.log1p(-miss.clamp(max=0.5)), plain)
    return float(loss.double().sum()), R


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    return (logits - torch.logsumexp(logits, 1, keepdim=True)).clamp_(min=_LOG_TINY).exp_()
