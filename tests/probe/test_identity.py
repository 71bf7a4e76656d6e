"""Vectors say who made them; a simulation cannot be told to say otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hadal.probe import identity as identities
from hadal.probe import table
from hadal.probe.backends import Item, Local, Simulation, folder_revision, weights_revision
from hadal.probe.extract import ProbeError, extract_all
from hadal.probe.identity import Embeddings, Identity, IdentityError, given, is_marked
from hadal.weights import hub

ITEMS = [
    Item("a", "I know this.", ((2, 6),)),
    Item("é", "Où est la lune ?", ((0, 2),)),
    Item("c", "I think. I know.", ((11, 15),)),
]


@pytest.fixture(scope="module")
def local() -> Local:
    return Local("hadal-mini", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def measured(local: Local) -> Embeddings:
    return local.embed(ITEMS, (0, 3, -1), "span")


@pytest.fixture
def made_up() -> Embeddings:
    return Simulation(seed=7, effect=0.5, width=32).embed(ITEMS, (0, 2))


def test_a_local_identity_says_everything(measured: Embeddings, local: Local) -> None:
    who = measured.identity
    assert (who.model, who.backend, who.dtype, who.layers) == ("hadal-mini", "local", "float32", (0, 3, 8))
    assert who.pooling == "span" and measured.spans == ["know", "Où", "know"]
    assert who.revision == folder_revision(hub.resolve("hadal-mini")) and len(who.revision) == 64
    assert who.hadal and who.date
    assert all(part in who.label() for part in ("hadal-mini", who.revision[:12], "float32", "local", "span"))


def test_local_vectors_are_the_mean_of_the_targets_states(measured: Embeddings, local: Local) -> None:
    encoded = local.encode(ITEMS)
    [first] = extract_all(local.model, [encoded[0].ids], (0, 3, 8))
    tokens = [i for i, place in enumerate(encoded[0].offsets) if place and place[0] < 6 and place[1] > 2]
    expected = first.hidden_lnD[:, tokens].mean(1).numpy()
    np.testing.assert_allclose(measured.vectors[0], expected, rtol=1e-5, atol=1e-5)
    both = local.embed_ways(ITEMS, (3,), ("span", "mean"))
    np.testing.assert_allclose(both["span"].at(3), measured.at(3), rtol=1e-5, atol=1e-5)
    assert not np.allclose(both["mean"].at(3), both["span"].at(3))
    assert measured.select(["é"]).only((3,)).vectors.shape == (1, 1, measured.vectors.shape[2])


def test_other_weights_are_another_revision(local: Local) -> None:
    before = weights_revision(local.model)
    assert Local.of(local.model, local.tokenizer, "x").revision == before
    untrained = Local("hadal-mini", device="cpu", dtype="float32", random_weights=3)
    assert untrained.revision != before and "random weights" in untrained.embed(ITEMS[:1]).identity.label()


def test_simulation_is_seeded_and_says_so(made_up: Embeddings) -> None:
    again = Simulation(seed=7, effect=0.5, width=32).embed(ITEMS[::-1], (0, 2))
    assert np.array_equal(again.select([i.id for i in ITEMS]).vectors, made_up.vectors)
    assert not np.array_equal(Simulation(seed=8, width=32).embed(ITEMS, (0, 2)).vectors, made_up.vectors)
    assert made_up.identity.label().startswith("SIMULATION") and is_marked(made_up.vectors)


def test_effects_are_of_the_size_that_was_asked_for() -> None:
    items = [Item(f"{g}{i}", "x") for g in "abcd" for i in range(50)]
    groups = {item.id: item.id[0] for item in items}
    squares = [tuple(f"{g}{i}" for g in "abcd") for i in range(50)]
    for effect in (0.0, 0.5, 2.0):
        x = Simulation(seed=1, effect=effect, groups=groups, width=512).embed(items, (1,)).at(1)
        x = x.reshape(4, 50, 512)
        between = x.mean(1).var(0, ddof=1).mean() - x.var(1, ddof=1).mean() / 50
        assert between == pytest.approx(effect**2, abs=0.15 * max(effect**2, 0.2))
        y = Simulation(seed=1, effect=effect, squares=squares, width=512).embed(items, (1,)).at(1)  # type: ignore[arg-type]
        s1, s2, not_s1, not_s2 = y.reshape(4, 50, 512).mean(1)
        cosine = (s1 - s2) @ (not_s2 - not_s1) / np.linalg.norm(s1 - s2) / np.linalg.norm(not_s2 - not_s1)
        assert cosine > 0.9 if effect else abs(cosine) < 0.2
    only = Simulation(seed=1, effect=2.0, groups=groups, layers=(2,)).embed(items, (1, 2))
    quiet, loud = (only.at(n).reshape(4, 50, -1).mean(1).var() for n in (1, 2))
    assert loud > 20 * quiet


def forgeries(made_up: Embeddings, who: Identity) -> dict[str, Any]:
    v, ids = made_up.vectors, made_up.ids
    fields = {
        k: getattr(who, k) for k in ("model", "revision", "dtype", "layers", "pooling", "hadal", "date")
    }
    raw = np.array(v)
    raw[1:] = np.random.default_rng(0).normal(size=raw[1:].shape)
    return {
        "constructor": lambda: Identity(**fields, backend="local"),
        "replace": lambda: replace(made_up.identity, backend="local"),
        "replaced seal": lambda: replace(made_up.identity, backend="local", seal=object()),
        "other identity": lambda: Embeddings(v, (0, 2), ids, issued(who)),
        "copied": lambda: given(v.copy(), (0, 2), ids, "deepseek"),
        "one row of it": lambda: given(raw, (0, 2), ids, "deepseek"),
        "changed numbers": lambda: Embeddings(v * np.float32(1.0001), (0, 2), ids, made_up.identity),
        "assigned": lambda: setattr(made_up.identity, "backend", "local"),
    }  # fmt: skip


def issued(who: Identity) -> Identity:
    return identities.issue("local", **identity_fields(who))


def identity_fields(who: Identity) -> dict[str, Any]:
    return {
        "model": who.model,
        "revision": who.revision,
        "dtype": "float32",
        "layers": (0, 2),
        "pooling": "mean",
    }


@pytest.mark.parametrize("way", [
    "constructor", "replace", "replaced seal", "other identity", "copied", "one row of it", "changed numbers",
    "assigned",
])  # fmt: skip
def test_a_simulation_cannot_be_relabelled(way: str, made_up: Embeddings, measured: Embeddings) -> None:
    with pytest.raises((IdentityError, AttributeError, ValueError)):
        forgeries(made_up, measured.identity)[way]()


def test_what_is_derived_keeps_its_identity(made_up: Embeddings, measured: Embeddings) -> None:
    for found in (made_up, measured):
        centred = found.derived(found.vectors - found.vectors.mean(0), "centred")
        assert centred.identity.backend == found.identity.backend and centred.identity.steps == ("centred",)
        assert is_marked(centred.vectors) == found.identity.is_simulation
    with pytest.raises(ValueError, match="read-only"):
        measured.vectors[0] = 0
    with pytest.raises(IdentityError, match="layers"):
        Embeddings(measured.vectors, (1, 2, 3), measured.ids, measured.identity)


def test_real_numbers_never_carry_the_mark(local: Local) -> None:
    rng = np.random.default_rng(0)
    assert not is_marked(rng.normal(size=(20_000, 16)))
    half = torch.from_numpy(rng.normal(size=(1000, 64))).bfloat16().float().numpy()
    assert not is_marked(half) and not is_marked(np.zeros((10, 64)))


@pytest.mark.parametrize("ending", table.ENDINGS)
def test_files_give_back_what_was_written(
    ending: str, tmp_path: Path, made_up: Embeddings, measured: Embeddings
) -> None:
    for name, found in (("s", made_up), ("m", measured)):
        path = table.write(tmp_path / f"{name}{ending}", found, {"group": ["x", "y", "é"]})
        back, columns = table.read_with_columns(path)
        assert np.array_equal(back.vectors, found.vectors) and back.ids == found.ids
        assert back.identity == found.identity and back.spans == found.spans
        assert columns == {"group": ["x", "y", "é"]} and table.read(path).digest() == found.digest()


def relabel(path: Path, change: Any) -> None:
    """Edit the label of a file as somebody with an editor would, and make the digest fit."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        stored = parquet.read_table(path)
        head = json.loads(stored.schema.metadata[b"hadal"])
        parquet.write_table(stored.replace_schema_metadata({"hadal": json.dumps(change(head))}), path)
        return
    where = path.with_name(path.name + ".json") if path.suffix == ".npy" else path
    first, *rest = where.read_text("utf-8").split("\n")
    where.write_text("\n".join([json.dumps(change(json.loads(first))), *rest]), "utf-8")


@pytest.mark.parametrize("ending", table.ENDINGS)
def test_a_relabelled_file_does_not_open(ending: str, tmp_path: Path, made_up: Embeddings) -> None:
    real = issued(made_up.identity).to_json()

    def other_name(head: dict[str, Any]) -> dict[str, Any]:
        return head | {"identity": head["identity"] | {"model": "deepseek-r1"}}

    def whole(head: dict[str, Any]) -> dict[str, Any]:
        return head | {"identity": real, "digest": "0" * 64}

    for change, match in ((other_name, "digest"), (whole, "mark of a simulation")):
        path = table.write(tmp_path / f"x{ending}", made_up)
        relabel(path, change)
        with pytest.raises(IdentityError, match=match):
            table.read(path)


def test_vectors_without_a_label_do_not_open(tmp_path: Path, made_up: Embeddings) -> None:
    np.save(tmp_path / "bare.npy", made_up.vectors)
    (tmp_path / "bare.jsonl").write_text('{"id": "a", "vectors": [[1.0]]}\n' * 2)
    for name in ("bare.npy", "bare.jsonl"):
        with pytest.raises(IdentityError, match="who made"):
            table.read(tmp_path / name)
    with pytest.raises(ProbeError, match="does not exist"):
        table.read(tmp_path / "none.npy")
    with pytest.raises(ProbeError, match="must end in"):
        table.write(tmp_path / "x.csv", made_up)
    with pytest.raises(ProbeError, match="column 'id'"):
        table.write(tmp_path / "x.npy", made_up, {"id": ["a", "b", "c"]})


def test_items_are_checked() -> None:
    for wrong, match in (
        ([], "no texts"),
        ([Item("a", " ")], "is empty"),
        ([Item("a", "x"), Item("a", "y")], "two texts"),
    ):
        with pytest.raises(ProbeError, match=match):
            Simulation().embed(wrong)


def test_estimate_and_watch(local: Local) -> None:
    told = local.estimate(ITEMS)
    assert told.texts == 3 and told.tokens == sum(len(e.ids) for e in local.encode(ITEMS))
    assert told.seconds is not None and told.seconds > 0 and told.cost is None
    assert local.clipped([*ITEMS, Item("d", "I see the moon.", ((6, 8),))]) == ["d"]
    encoded, taken = local.watch(ITEMS[0], attention=(0,))
    n = len(encoded.ids)
    assert taken.hidden_lnD.shape[:2] == (9, n) and taken.attention[0].shape[1:] == (n, n) and taken.experts
