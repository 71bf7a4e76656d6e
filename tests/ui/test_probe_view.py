"""The probe page without a browser: texts, arithmetic on products of vectors, HTML."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from hadal.ui import probe_view as view
from hadal.ui.probe_view import ProbeInputError
from tests.ui.test_plan_view import Titles

TEXTS, LABELS = ["one", "two", "red", "blue", "<b>odd</b>"], ["number", "number", "colour", "colour", ""]


def an_answer(vectors: Any, **more: Any) -> dict[str, Any]:
    """As POST /v1/probe gives it. vectors: [texts, layers, width]."""
    data = [
        {"states": base64.b64encode(np.asarray(v, "<f4").tobytes()).decode(), "shape": list(np.shape(v))}
        for v in vectors
    ]
    who = {
        "model": "tiny",
        "revision": "abcdef0123456789",
        "dtype": "float32",
        "layers": [0, 1, 2],
        "pooling": "mean",
    }
    return {"data": data, "identity": who, "experts": 4, "width": np.shape(vectors)[-1], **more}


@pytest.fixture(scope="module")
def vectors() -> Any:
    return np.random.default_rng(0).normal(size=(5, 3, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def seen(vectors: Any) -> view.Seen:
    found = view.seen(TEXTS, LABELS, [an_answer(vectors[:1]), an_answer(vectors[1:])])
    found.tokens, found.routed = ["<｜begin▁of▁sentence｜>", "<i>"], 4
    found.routing = {1: ([[0, 3], [2, 1]], [[0.9, 0.3], [0.5, 0.4]])}
    return found


def test_lines_are_texts_with_or_without_labels() -> None:
    assert view.read_lines(" a | b c \n\nplain\nx|y | z\n") == (["b c", "plain", "y | z"], ["a", "", "x"])
    for text, said in (
        ("a\nb", "There are 2 texts"),
        ("x\n" * 65, "There are 65 texts"),
        ("a\nb\nl |", "has a label"),
    ):
        with pytest.raises(ProbeInputError, match=said):
            view.read_lines(text)
    for name in (*view.EXAMPLES, "Puzzles of hadal-mini"):
        texts, labels = view.read_lines(view.example(name))
        assert len(texts) == len(set(texts)) and all(labels)


def test_the_plane_is_that_of_pca(seen: view.Seen, vectors: Any) -> None:
    for k in range(3):
        x = vectors[:, k].astype(np.float64) - vectors[:, k].mean(0)
        u, s, _ = np.linalg.svd(x, full_matrices=False)
        places, shares = view.pca(seen.gram[k])
        np.testing.assert_allclose(np.abs(places), np.abs(u[:, :2] * s[:2]), atol=1e-6)
        np.testing.assert_allclose(shares, (s**2 / (s**2).sum())[:2], atol=1e-6)
        length = np.linalg.norm(x, axis=1)
        np.testing.assert_allclose(view.cosines(seen.gram[k]), x @ x.T / np.outer(length, length), atol=1e-6)


def test_neighbours_of_a_hand_worked_case() -> None:
    x = np.array([[3.0, 0], [2, 0.1], [-3, 0], [-2, -0.1]])
    near = view.nearest(x @ x.T, 2)
    assert [row[0][0] for row in near] == [1, 0, 3, 2] and near[0][0][1] == pytest.approx(0.99875, abs=1e-4)
    assert view.agreement(["a", "a", "b", "b"], near) == (4, pytest.approx(4 / 3))
    assert view.cosines(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]  # alike texts: no direction at all


def test_figures_name_who_made_them_and_hold_no_foreign_html(seen: view.Seen) -> None:
    for layer in (0, 1, 2):
        for html in (view.projection_html(seen, layer), view.neighbours_html(seen, layer)):
            page = Titles(html)
            assert (
                f"tiny @ abcdef012345 · float32 · layer {layer} of 2" in page.text
                and "mean pooling" in page.text
            )
            assert "b" not in page.tags and "centred" in view.neighbours_html(seen, layer)
    routers = Titles(view.router_html(seen, 2))
    assert "2 of 4 experts" in routers.text and "'<i>' → expert 2, choice 1 of 2, score 0.500" in routers.text
    assert "i" not in routers.tags and "block 1's router · text 5" in routers.text
    assert "dense" in view.router_html(seen, 1) and "embedding" in view.router_html(seen, 0)


def test_alike_texts_and_broken_answers_are_said(vectors: Any) -> None:
    same = view.seen(TEXTS, LABELS, [an_answer(np.ones((5, 3, 4)))])
    assert "the same vector" in view.projection_html(same, 1)
    for broken in (
        {"data": [{}]},
        {"data": [{"states": "!", "shape": [1]}]},
        {"data": [{"states": "AAAA", "shape": [9]}]},
    ):
        with pytest.raises(ProbeInputError, match="holds no states"):
            view.seen(TEXTS, LABELS, [{**an_answer(vectors), **broken}])
    with pytest.raises(ProbeInputError, match="not finite"):
        view.seen(TEXTS, LABELS, [an_answer(np.full((5, 3, 4), np.nan))])


def test_requests_stay_within_what_a_server_answers() -> None:
    parts = list(view.portions(64, 62, 7168))
    assert [p.start for p in parts] == list(range(0, 64, 6)) and parts[-1].stop == 64
    assert len(list(view.portions(64, 9, 256))) == 1
