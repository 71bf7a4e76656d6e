"""Against anisotropy: vectors of one model share a direction and a few huge dimensions, so that any two texts
look alike (arXiv 2109.04404). Fitted on other texts than those that are studied, applied to these.

    centre     x − μ
    zscore     dimensions whose spread is beyond `OUTLIER` times the median one are divided by it over the
               median: rogue dimensions are brought to size, the others stay (arXiv 2109.04404)
    top        all-but-the-top: x − μ − Σ_{i ≤ D} ⟨x − μ, u_i⟩ u_i over the D leading principal directions,
               D = ⌈width / 100⌉ (arXiv 1702.01417)
    whiten     Σ^(−1/2)·(x − μ), Σ shrunk towards a multiple of the unit matrix as Ledoit and Wolf have it
               (J. Multivariate Anal. 88, 2004), without which n < width has no inverse

Every step is fitted on what the steps before it leave, and for each layer apart. `iso_score` tells what it
was good for. A fitted `Normaliser` says what texts of what model it is from, and refuses another's vectors.

Legend: n texts, l layers, d width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hadal.probe.extract import ProbeError
from hadal.probe.identity import Embeddings, Identity, identity_of

Step = Literal["centre", "zscore", "top", "whiten"]
STEPS: tuple[Step, ...] = get_args(Step)
OUTLIER = 3.0  # times the median spread
Wide = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Fitted steps. shift_ld, map_ldd: for each step and layer, x → (x − shift)·map; map None where it is the
    identity, [l, d] where it is diagonal."""

    steps: tuple[Step, ...]
    identity: Identity
    digest: str
    count: int
    shift: list[NDArray[np.float32]] = field(default_factory=list)
    matrix: list[NDArray[np.float32] | None] = field(default_factory=list)

    def apply(self, found: Embeddings) -> Embeddings:
        """The vectors after all steps. Raises ProbeError for vectors of another model, layer or pooling."""
        mine, other = self.identity, found.identity
        for name in ("backend", "model", "revision", "dtype", "layers", "pooling", "steps"):
            if getattr(mine, name) != getattr(other, name):
                raise ProbeError(
                    f"this normaliser was fitted on {name} {getattr(mine, name)!r}, and these vectors have "
                    f"{getattr(other, name)!r}: fit one on vectors of the same making"
                )
        values = found.vectors.astype(np.float64)
        for shift, matrix in zip(self.shift, self.matrix, strict=True):
            values = _mapped(values - shift, matrix)
        what = f"{'+'.join(self.steps)} fitted on {self.count} texts ({self.digest[:12]})"
        return found.derived(values, what)

    def save(self, path: str | Path) -> Path:
        """As safetensors, the identity in the header."""
        from safetensors.numpy import save_file

        head: dict[str, Any] = {"steps": list(self.steps), "identity": self.identity.to_json()}
        head |= {"digest": self.digest, "count": self.count}
        tensors = {f"shift.{i}": x for i, x in enumerate(self.shift)}
        tensors |= {f"matrix.{i}": x for i, x in enumerate(self.matrix) if x is not None}
        save_file(tensors, str(path), {"hadal": json.dumps(head)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Normaliser:
        """Of a file that `save` wrote. Raises ProbeError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "np") as file:
                head = json.loads((file.metadata() or {})["hadal"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            steps = tuple(head["steps"])
            return cls(
                steps,
                identity_of(head["identity"]),
                str(head["digest"]),
                int(head["count"]),
                [tensors[f"shift.{i}"] for i in range(len(steps))],
                [tensors.get(f"matrix.{i}") for i in range(len(steps))],
            )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ProbeError(f"{path} is no normaliser that Hadal wrote ({error})") from error


def fit(found: Embeddings, steps: Sequence[Step] = ("centre",)) -> Normaliser:
    """Fit on these texts; apply it to others. Raises ProbeError for unknown steps or fewer than 10 texts."""
    if unknown := [s for s in steps if s not in STEPS]:
        raise ProbeError(f"no step is called {unknown[0]!r}; there are {', '.join(STEPS)}")
    if not steps or len(set(steps)) != len(steps):
        raise ProbeError(f"steps must be given, each once, not {list(steps)}")
    if len(found) < 10:
        raise ProbeError(f"{len(found)} texts are too few to fit on; take 10 or more, other than the studied")
    values = found.vectors.astype(np.float64)
    shifts: list[NDArray[np.float32]] = []
    matrices: list[NDArray[np.float32] | None] = []
    for step in steps:
        shift = values.mean(0)
        matrix = _matrix(step, values - shift)
        values = _mapped(values - shift, matrix)
        shifts.append(shift.astype(np.float32))
        matrices.append(None if matrix is None else matrix.astype(np.float32))
    return Normaliser(tuple(steps), found.identity, found.digest(), len(found), shifts, matrices)


def _mapped(values: Wide, matrix: NDArray[Any] | None) -> Wide:
    """x·M for each layer."""
    if matrix is None:
        return values
    if matrix.ndim == 2:
        return values * matrix
    return np.stack([values[:, i] @ matrix[i] for i in range(matrix.shape[0])], 1)


def _matrix(step: Step, centred: Wide) -> Wide | None:
    """What centred vectors [n, l, d] are multiplied with."""
    if step == "centre":
        return None
    if step == "zscore":
        spread = centred.std(0)
        usual = np.median(spread, 1, keepdims=True)
        scale = np.maximum(usual, np.finfo(np.float64).tiny) / np.maximum(spread, usual)
        return np.where(spread > OUTLIER * usual, scale, 1.0)
    make = _without_top if step == "top" else _whitening
    return np.stack([make(centred[:, i]) for i in range(centred.shape[1])])


def _without_top(centred: Wide) -> Wide:
    """1 − Σ u·uᵀ over the leading directions [d, d]."""
    width = centred.shape[1]
    _, _, rows = np.linalg.svd(centred, full_matrices=False)
    top = rows[: -(-width // 100)]
    return np.eye(width) - top.T @ top


def _whitening(centred: Wide) -> Wide:
    """Σ^(−1/2) [d, d] of the shrunk covariance."""
    value, vector = np.linalg.eigh(shrunk_covariance(centred)[0])
    if value[-1] <= 0:
        raise ProbeError("all texts have the same vector at some layer: there is nothing to whiten")
    floor = value[-1] * 1e-10
    return (vector / np.sqrt(np.maximum(value, floor))) @ vector.T


def shrunk_covariance(centred: Wide) -> tuple[Wide, float]:
    """(1 − ρ)·S + ρ·m·1 and ρ, of centred rows [n, d]: S = XᵀX/n, m = tr S / d,
    ρ = min(1, Σ_k ‖x_k x_kᵀ − S‖² / n² / ‖S − m·1‖²)  (Ledoit & Wolf 2004)."""
    n, d = centred.shape
    cov = centred.T @ centred / n
    mean = np.trace(cov) / d
    distance = (cov**2).sum() - d * mean**2
    spread = ((centred**2).sum(1) ** 2).sum() / n - (cov**2).sum()  # mean of ‖x xᵀ − S‖²
    rho = 1.0 if distance <= 0 else float(min(1.0, max(0.0, spread / n / distance)))
    return (1 - rho) * cov + rho * mean * np.eye(d), rho


def iso_score(vectors: NDArray[Any]) -> float:
    """IsoScore of points [n, d] (arXiv 2108.07344): 1 where the variance is spread over all dimensions alike,
    0 where it is in one. With Σ the variances along the principal axes, scaled to norm √d:
        δ = ‖Σ − 1‖ / √(2(d − √d)),   φ = (d − δ²(d − √d))² / d²,   score = (d·φ − 1) / (d − 1)
    Fewer points than dimensions cannot score high. Raises ProbeError for one point or one dimension."""
    n, d = vectors.shape
    if n < 2 or d < 2:
        raise ProbeError(f"IsoScore needs 2 points of 2 dimensions or more, not {n} of {d}")
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    variance = np.zeros(d)
    found = np.linalg.svd(centred, compute_uv=False) ** 2 / (n - 1)
    variance[: len(found)] = found
    length = np.linalg.norm(variance)
    if length == 0:
        raise ProbeError("all points are the same: IsoScore is not defined")
    scaled = np.sqrt(d) * variance / length
    defect = np.linalg.norm(scaled - 1) / np.sqrt(2 * (d - np.sqrt(d)))
    phi = (d - defect**2 * (d - np.sqrt(d))) ** 2 / d**2
    return float((d * phi - 1) / (d - 1))
