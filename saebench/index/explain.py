"""What each latent fires on, in words: literals of a sample's rows, and the rules fitted to them."""

from collections.abc import Iterator

import numpy as np
from scipy import sparse

from saebench.index.derive import firing
from saebench.index.evidence import Sample, hashed
from saebench.index.memory import give_back
from saebench.index.rules import RULE, Rows, describe, fit_rules
from saebench.labels import VERSION, Stream, Vocabulary, choose_literals, label
from saebench.pieces import TokenBytes
from saebench.runlog import progress
from saebench.store import Store

FIT_ROWS = 50_000
"""Rows of the training sample that rules are fitted to; labelling is the slowest part of an index of few rows."""
_CHUNK = 2**17  # rows of which what is wanted is labelled at once, to the next end of a document
_CHUNKS_FOR_VOCABULARY = 4


def explain(store: Store, samples: dict[str, Sample], d_sae: int) -> dict[str, dict[str, np.ndarray]]:
    """Columns `[d_sae]` of a rule for every latent, and the vocabulary of literals that they are made of.

    `samples` are of `train`, rows chosen by their hash of which the `FIT_ROWS` of lowest hash are used, so that they come from
    everywhere, and `validation`, whole contexts. Where either is empty, or the store has no texts, there are no rules.
    """
    tokenizer = store.tokenizer()
    if tokenizer is None or not all(len(samples[split].rows) for split in ("train", "validation")):
        return {}
    fit = _of_lowest_hash(samples["train"], FIT_ROWS)
    vocabulary = choose_literals(_spread(store, "train", fit.rows), TokenBytes(tokenizer).all())
    rules = fit_rules(
        _rows(store, "train", fit, d_sae, vocabulary),
        lambda: _rows(store, "validation", samples["validation"], d_sae, vocabulary),
    )
    names = vocabulary.names
    columns = {name: rules[name] for name in RULE.names or ()}
    columns["text"] = np.array([describe(rule, names) for rule in rules], dtype=object)
    kept = {
        "version": np.array(VERSION.encode()),
        "tokens": vocabulary.tokens,
        "previous": vocabulary.previous,
        "bigrams": vocabulary.bigrams,
    }
    return {"rules": columns, "literals": kept}


def _of_lowest_hash(sample: Sample, n: int) -> Sample:
    """At most `n` rows of a sample, wherever they lie."""
    chosen = np.zeros(len(sample.rows), bool)
    chosen[np.argsort(hashed(sample.rows))[:n]] = True
    return sample.take(chosen)


def _spread(store: Store, split: str, rows: np.ndarray) -> Stream:
    """Some of the stretches that hold any of `rows`, from the first to the last of them."""
    n_stretches = sum(1 for _ in _streams(store, split, rows))
    chosen = set(np.linspace(0, n_stretches - 1, _CHUNKS_FOR_VOCABULARY).round().tolist())
    parts = [stream for number, (_, stream) in enumerate(_streams(store, split, rows)) if number in chosen]
    return Stream(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _streams(store: Store, split: str, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Stream]]:
    """(places of those of `rows` that it holds, columns) of stretches of a split; a document that ends in another shard is cut there.

    `rows` are of the store, ascending; stretches without any are left out.
    """
    first_row = 0
    for shard in store.shards:
        mine = rows[slice(*np.searchsorted(rows, [first_row, first_row + shard.n_rows]))] - first_row
        first_row += shard.n_rows
        if shard.split != split or not len(mine):
            continue
        stream = Stream(*(shard.column(name) for name in Stream._fields))
        borders = np.append(np.flatnonzero(np.diff(stream.doc_id)) + 1, shard.n_rows)
        start = 0
        while start < shard.n_rows:
            stop = int(borders[min(np.searchsorted(borders, start + _CHUNK), len(borders) - 1)])
            wanted = mine[slice(*np.searchsorted(mine, [start, stop]))] - start
            if len(wanted):
                yield wanted, Stream(*(column[start:stop] for column in stream))
            start = stop


def _rows(store: Store, split: str, sample: Sample, d_sae: int, vocabulary: Vocabulary) -> Rows:
    names = store.document_names()
    literals, tokens, positions = [], [], []
    with progress(len(sample.rows), f"label {split} rows", "row") as bar:
        for wanted, stream in _streams(store, split, sample.rows):
            literals.append(label(stream, vocabulary, names, wanted))
            tokens.append(stream.tokens[wanted])
            positions.append(stream.position[wanted])
            bar.update(len(wanted))
    give_back()
    return Rows(
        firing(sample, d_sae).tocsc(),
        sparse.vstack(literals, format="csr"),
        np.concatenate(tokens),
        np.concatenate(positions),
    )
