"""Pictures of studies: t-SNE and PCA, the same in three dimensions to turn about, heat maps, curves over
layers with their null. Every picture carries the line that says who made its vectors; a simulation is written
across it.

PNG or SVG by matplotlib, by the name of the file; the turning one is a page of its own that loads nothing.
Projections describe: distances in a t-SNE mean little, and no test is made on one.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .stats.arrays import Floats, StatsError, codes, matrix
from .stats.permute import Curve
from .stats.squares import N1, N2, S1, S2

PAIRS = (("s1 s2", S1, S2), ("s1 n1", S1, N1), ("s2 n2", S2, N2), ("s1 n2", S1, N2), ("s2 n1", S2, N1),
         ("n1 n2", N1, N2))  # fmt: skip
MARKS = "osD^vP*X"
PAGE = Path(__file__).resolve().parent.parent / "assets" / "probe" / "turning.html"


class Maker(Protocol):
    """What is used of `hadal.probe.identity.Identity`."""

    @property
    def is_simulation(self) -> bool: ...

    def label(self) -> str: ...


def project(
    x_ND: ArrayLike, dimensions: int = 2, method: Literal["pca", "tsne"] = "pca", seed: int = 0
) -> tuple[Floats, str]:
    """[N, dimensions], and what the axes are in words. t-SNE (van der Maaten & Hinton, JMLR 9, 2008) from
    PCA, at a perplexity of 30 or a third of n."""
    x = matrix(x_ND, "vectors", 4)
    if method == "pca":
        from sklearn.decomposition import PCA

        fit = PCA(dimensions, random_state=seed).fit(x)
        shares = " + ".join(f"{share:.0%}" for share in fit.explained_variance_ratio_)
        return np.asarray(fit.transform(x), np.float64), f"PCA, {shares} of the variance"
    if method != "tsne":
        raise StatsError(f"a projection is pca or tsne, not {method!r}")
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(x) - 1) / 3)
    found = TSNE(dimensions, perplexity=perplexity, init="pca", random_state=seed).fit_transform(x)
    return np.asarray(found, np.float64), f"t-SNE, perplexity {perplexity:.0f}, seed {seed}"


def scatter(
    x_ND: ArrayLike, labels: Sequence[str], names: Sequence[str], maker: Maker, path: Path, *,
    method: Literal["pca", "tsne"] = "pca", seed: int = 0, title: str = "",
) -> Path:  # fmt: skip
    """Points in the plane by category, each with its name."""
    point, axes = project(x_ND, 2, method, seed)
    code, known = codes(labels, len(point))
    _named(names, point)
    figure = _figure((10, 8))
    plot = figure.add_subplot()
    for k, name in enumerate(known):
        mine = point[code == k]
        plot.scatter(
            mine[:, 0], mine[:, 1], s=26, color=_colour(k), marker=MARKS[k // 10 % len(MARKS)], label=name
        )
    for (x, y), name in zip(point, names, strict=True):
        plot.annotate(name, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=6.5, parse_math=False)
    plot.set_title(f"{title}\n{axes}" if title else axes, parse_math=False)
    plot.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, maker, path)


def heat_map(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    maker: Maker,
    path: Path,
    *,
    title: str = "",
    limit: float = 1.0,
) -> Path:
    """A table of numbers between −limit and limit in colours, with the numbers where there is room."""
    table = np.asarray(values, float)
    if table.shape != (len(rows), len(columns)) or not np.isfinite(table).all():
        raise StatsError(
            f"a heat map of {len(rows)} rows and {len(columns)} columns, but values {list(table.shape)}"
        )
    figure = _figure((2.5 + 0.6 * len(columns), 1.8 + 0.24 * len(rows)))
    plot = figure.add_subplot()
    image = plot.imshow(table, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    plot.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7, parse_math=False)
    plot.set_yticks(range(len(rows)), rows, fontsize=6.5, parse_math=False)
    for i, j in np.ndindex(table.shape) if table.size <= 800 else ():
        plot.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", fontsize=6)
    plot.set_title(title, parse_math=False)
    figure.colorbar(image, ax=plot)
    return _save(figure, maker, path)


def squares(corner_Q4D: ArrayLike, names: Sequence[str], maker: Maker, path: Path) -> Path:
    """The six cosines of every square's corners about the mean of all corners. Contraries s1 s2,
    contradictories s1 n1 and s2 n2, implications s1 n2 and s2 n1, subcontraries n1 n2."""
    corner = np.asarray(corner_Q4D, float)
    if corner.ndim != 3 or corner.shape[1] != 4:
        raise StatsError(f"squares are [q, 4, d], and the shape is {list(corner.shape)}")
    corner = corner - corner.mean((0, 1))
    corner /= np.maximum(np.linalg.norm(corner, axis=2, keepdims=True), 1e-30)
    values = np.stack([(corner[:, a] * corner[:, b]).sum(1) for _, a, b in PAIRS], 1)
    return heat_map(
        values, names, [name for name, _, _ in PAIRS], maker, path, title="squares: cosines of corners"
    )


def curve(found: Curve, maker: Maker, path: Path) -> Path:
    """A statistic over layers; its null, 95% of a layer (dark) and of the largest of all layers (light)."""
    figure = _figure((8, 4.5))
    plot = figure.add_subplot()
    layer = np.array(found.layers)
    plot.fill_between(layer, found.low_L, found.high_L, color="0.75", label="null, 95% of a layer")
    plot.fill_between(layer, found.high_L, np.maximum(found.band_L, found.high_L), color="0.9",
                      label="null, 95% of the largest layer")  # fmt: skip
    plot.plot(layer, found.null_mean_L, color="0.4", lw=1, ls="--", label="mean of the null")
    plot.plot(layer, found.statistic_L, color="C0", marker="o", ms=4, label="statistic")
    hit = np.array([result.significant for result in found.results])
    if hit.any():
        plot.scatter(layer[hit], found.statistic_L[hit], s=70, facecolors="none", edgecolors="C3",
                     label="corrected p ≤ .05", zorder=3)  # fmt: skip
    first = found.results[0]
    plot.set_title(f"{found.name}: {first.exchanged}; n = {first.n} {first.unit}, d = {first.d}", fontsize=9)
    plot.set_xlabel("layer")
    if len(layer) <= 20:
        plot.set_xticks(layer)
    plot.set_ylabel(found.name)
    plot.legend(fontsize=7)
    return _save(figure, maker, path)


def _named(names: Sequence[str], point: Floats) -> None:
    if len(names) != len(point):
        raise StatsError(f"{len(names)} names for {len(point)} points")


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise StatsError("pictures need matplotlib: pip install 'hadal[probe]'") from None
    return Figure(figsize=size, layout="constrained")


def _colour(k: int) -> str:
    return f"C{k % 10}"


def _save(figure: Any, maker: Maker, path: Path) -> Path:
    """With the maker's line below, and a simulation's watermark across."""
    figure.supxlabel(_line(maker), fontsize=6.5, color="0.3", parse_math=False, wrap=True)
    if maker.is_simulation:
        figure.text(
            0.5,
            0.5,
            "SIMULATION",
            fontsize=60,
            color="red",
            alpha=0.18,
            rotation=30,
            ha="center",
            va="center",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(
        path, dpi=130, metadata={"Title" if path.suffix == ".svg" else "Description": _line(maker)}
    )
    return path


def _line(maker: Maker) -> str:
    line = maker.label().strip()
    if not line:
        raise StatsError("a picture of vectors that nobody made is not drawn: their identity has no label")
    return line


def page_3d(
    x_ND: ArrayLike, labels: Sequence[str], names: Sequence[str], maker: Maker, path: Path, *,
    method: Literal["pca", "tsne"] = "pca", seed: int = 0, title: str = "",
) -> Path:  # fmt: skip
    """A page with the points in three dimensions: drag to turn, wheel to come near, point at one for its
    name, a category to hide it. Data inside, nothing loaded, no library."""
    point, axes = project(x_ND, 3, method, seed)
    code, known = codes(labels, len(point))
    _named(names, point)
    scaled = (point - point.mean(0)) / max(float(np.abs(point - point.mean(0)).max()), 1e-30)
    data = {
        "points": [[round(float(v), 4) for v in row] for row in scaled],
        "code": code.tolist(), "labels": known, "names": list(names), "simulation": maker.is_simulation,
    }  # fmt: skip
    # `<` inside a script could end it.
    inside = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
    page = PAGE.read_text("utf-8")
    for key, text in {
        "TITLE": html.escape(title or axes), "AXES": html.escape(axes), "MAKER": html.escape(_line(maker)),
        "DATA": inside,
    }.items():  # fmt: skip
        page = page.replace(f"%{key}%", text, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, "utf-8")
    return path
