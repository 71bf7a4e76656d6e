"""Held-out losses and exact documents, against a literal computation."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from hadal.data.documents import render, write_puzzles
from hadal.data.puzzles import conversation
from hadal.data.shards import Manifest, write_manifest, write_shard
from hadal.data.stream import PackedRows, packed_rows
from hadal.model.context import Context
from hadal.text.tokenizer import Tokenizer
from hadal.train.batches import Rows
from hadal.train.domains import find_domains, share_out, token_bytes
from hadal.train.heldout import evaluate
from hadal.train.sources import ON_BOARD
from tests.train import tiny


def test_losses_are_means_over_all_counted_tokens():
    network = tiny.model()
    source = tiny.RandomRows()
    held = evaluate(network, source, rows=5, micro_rows=2, mask_documents=True)
    packed = source.rows(0, 5)
    token_T, weight_T = packed.token_RC.flatten(), packed.weight_RC.flatten()
    total = count = start = 0
    for length, padding in zip(packed.lengths, packed.padding, strict=True):
        token = torch.from_numpy(token_T[start : start + length])
        logprob = network.logits(network(token, Context.packed([length]))).log_softmax(-1)
        for i in range(0 if padding else length - 1):
            weight = weight_T[start + i + 1]
            total -= weight * logprob[i, token[i + 1]].item()
            count += weight
        start += length
    assert held.loss == pytest.approx(total / count, abs=1e-5)
    assert held.tokens == count
    assert held.mtp_loss == pytest.approx(math.log(tiny.VOCAB), abs=0.3)
    assert held.documents == sum(not p for p in packed.padding)
    assert held.exact == 0.0


@pytest.mark.parametrize(("mask_documents", "prompt"), [(True, 0), (False, 0), (True, 0.1)])
def test_exact_counts_documents_whose_every_counted_token_is_likely(mask_documents, prompt, monkeypatch):
    """Three documents: faultless; one unlikely token; the only unlikely token is in the prompt."""
    rows = Rows(
        token_RC=np.arange(12)[None],
        weight_RC=np.array([[0, 1, 1, 1, 0, 1, 1, 1, 0, prompt, 1, 1]], dtype=np.float32),
        lengths=[4, 4, 4],
        padding=[False] * 3,
    )
    nll_T = torch.full((12,), 0.1)
    nll_T[5] = 0.7  # predicts token 6, of the second document; ln 2 = 0.69
    nll_T[8] = 5.0  # predicts token 9, a prompt
    nll_T[7] = 5.0  # predicts the first token of the third document, which is not counted

    class Source:
        def rows(self, start, count):
            return rows

    network = tiny.model(mtp=0)
    monkeypatch.setattr("hadal.train.heldout.cross_entropies", lambda model, micro, context: [nll_T])
    held = evaluate(network, Source(), rows=1, micro_rows=1, mask_documents=mask_documents)
    assert (held.exact, held.documents) == (2 / 3, 3)


def test_evaluation_leaves_no_gradient_behind():
    network = tiny.model()
    evaluate(network, tiny.RandomRows(), rows=2, micro_rows=2, mask_documents=True)
    assert all(p.grad is None for p in network.parameters())


# --- domains and bytes ---
THINK, PAD = 90, 91


def _shards(folder, sizes):
    """Held-out shards of two documents' worth of rows for each source: {source: number of documents}."""
    shards = []
    for name, count in sizes.items():
        rng = np.random.default_rng(len(name))
        documents = [rng.integers(2, 80, 9).tolist() for _ in range(count)]
        shards.append(write_shard(folder, f"heldout-{name}-00000", documents))
    write_manifest(folder, Manifest(tuple(shards), {"generator": "test"}))
    return PackedRows(folder, 16, think_id=THINK, pad_id=PAD, shuffle=False)


@pytest.mark.parametrize(
    ("rows", "sizes", "taken"),
    [(6, [9, 9, 9], [2, 2, 2]), (6, [1, 9, 9], [1, 2, 3]), (2, [5, 5, 5], [1, 1, 1]), (99, [3, 4], [3, 4])],
)
def test_rows_are_shared_out_evenly(rows, sizes, taken):
    assert share_out(rows, sizes) == taken


def test_each_source_is_measured_by_itself(tmp_path):
    """Rows of one document each: a domain's loss is that of its rows alone, and its bits per byte count only
    tokens that are text."""
    source = _shards(tmp_path, {"books": 7, "code": 2, "web-2": 5})
    domains = find_domains(source, 9)
    assert domains.names == ("books", "code", "web-2")
    assert domains.stretches == ((0, 4), (7, 9), (9, 12))
    network = tiny.model()
    bytes_V = np.arange(tiny.VOCAB) % 5  # every fifth token is a control token
    held = evaluate(
        network, source, rows=9, micro_rows=2, mask_documents=True, domains=domains, bytes_V=bytes_V
    )
    assert list(held.domains) == ["books", "code", "web-2"]
    for name, (first, end) in zip(domains.names, domains.stretches, strict=True):
        nats = text = size = 0.0
        for row in range(first, end):
            token = torch.from_numpy(source.rows(row, 1).token_RC[0][:9])
            nll = -network.logits(network(token, Context.packed([9]))).log_softmax(-1)
            for i in range(8):
                nats += (cost := nll[i, token[i + 1]].item())
                text += cost if (count := int(bytes_V[token[i + 1]])) else 0.0
                size += count
        score = held.domains[name]
        assert (score.documents, score.tokens) == (end - first, 8 * (end - first))
        assert score.loss == pytest.approx(nats / score.tokens, abs=1e-5)
        assert score.bits_per_byte == pytest.approx(text / math.log(2) / size, abs=1e-5)
    mean = sum(s.loss * s.tokens for s in held.domains.values()) / held.tokens
    assert held.loss == pytest.approx(mean)
    assert held.tokens == sum(s.tokens for s in held.domains.values())


def test_puzzles_are_told_apart_by_their_task(tmp_path):
    """Against the documents drawn anew: which task, how many counted tokens, how many bytes of text."""
    write_puzzles(tmp_path, ON_BOARD, tokens=12_000, seed=3, split="held-out", workers=1)
    tokenizer = Tokenizer.load(ON_BOARD)
    source = packed_rows(tmp_path, 512, tokenizer.special, shuffle=False)
    domains = find_domains(source, 12)
    network = tiny.model(vocab_size=1024, max_position_embeddings=512, mtp=0)
    held = evaluate(
        network, source, rows=12, micro_rows=5, mask_documents=True, domains=domains,
        bytes_V=token_bytes(tokenizer, 1024),
    )  # fmt: skip
    documents, tokens = Counter(), Counter()
    text_tokens = []  # bytes of each counted token that is text
    control = set(tokenizer.special.values())
    for number in range(sum(not p for p in source.rows(0, 12).padding)):
        talk = conversation(number, 3, "held-out")
        ids = tokenizer.encode_with_controls(render(talk))
        documents[talk.last.task] += 1
        think = len(ids) - 1 - ids[::-1].index(tokenizer.special["<think>"])
        counted = ids[think + 2 : 512]  # behind `<think>` and its line break
        tokens[talk.last.task] += len(counted)
        text_tokens += [len(tokenizer.id_to_bytes(i)) for i in counted if i not in control]
    assert {name: s.documents for name, s in held.domains.items()} == dict(documents)
    assert {name: s.tokens for name, s in held.domains.items()} == dict(tokens)
    assert held.documents == sum(documents.values())
    assert held.bits_per_byte == pytest.approx(10 * len(text_tokens) / sum(text_tokens), rel=0.03)  # 2^10 ids


def test_bytes_are_those_of_the_text():
    tokenizer = Tokenizer.load(ON_BOARD)
    bytes_V = token_bytes(tokenizer, 1088)
    text = "Calculer 123 + 45 = 168 → «é» 深"
    assert bytes_V[tokenizer.encode(text)].sum() == len(text.encode())
    assert not bytes_V[list(tokenizer.special.values())].any()
    assert not bytes_V[tokenizer.vocab_size :].any()


def test_shards_without_sources_are_one_domain(tmp_path):
    shard = write_shard(tmp_path, "train-00000", [[2, 3, 4]] * 8)
    write_manifest(tmp_path, Manifest((shard,), {}))
    source = PackedRows(tmp_path, 4, think_id=THINK, pad_id=PAD, shuffle=False)
    domains = find_domains(source, 99)
    assert (domains.names, domains.stretches) == ((), ((0, 8),))  # no row is read twice
    held = evaluate(tiny.model(), source, rows=99, micro_rows=4, mask_documents=True, domains=domains)
    assert (held.domains, held.bits_per_byte, held.documents) == ({}, None, 8)
