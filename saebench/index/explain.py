"""What each latent fires on, in words: literals of a sample's rows, and the rules fitted to them."""

import itertools
from collections.abc import Iterator

import numpy as np
from scipy import sparse

from saebench.index.derive import firing
from saebench.index.evidence import Sample
from saebench.index.memory import give_back
from saebench.index.rules import RULE, Rows, describe, fit_rules
from saebench.labels import VERSION, Stream, Vocabulary, choose_literals, label
from saebench.pieces import TokenBytes
from saebench.runlog import progress
from saebench.store import Store

FIT_ROWS = 50_000
"""Rows of the training sample that rules are fitted to; labelling is the slowest part of an index of few rows."""
_CHUNK = 2**17  # rows labelled at once, to the next end of a document
_CHUNKS_FOR_VOCABULARY = 4


def explain(store: Store, samples: dict[str, Sample], d_sae: int) -> dict[str, dict[str, np.ndarray]]:
    """Columns `[d_sae]` of a rule for every latent, and the vocabulary of literals that they are made of.

    `samples` are of `train`, any rows of which the first `FIT_ROWS` are used, and `validation`, whole contexts. Where
    either is empty, or the store has no texts, there are no rules.
    """
    tokenizer = store.tokenizer()
    if tokenizer is None or not all(len(samples[split].rows) for split in ("train", "validation")):
        return {}
    fit = samples["train"].stretch(0, FIT_ROWS)
    first = [stream for _, stream in itertools.islice(_streams(store, "train"), _CHUNKS_FOR_VOCABULARY)]
    texts = TokenBytes(tokenizer).all()
    vocabulary = choose_literals(Stream(*(np.concatenate(parts) for parts in zip(*first, strict=True))), texts)
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


def _streams(store: Store, split: str) -> Iterator[tuple[int, Stream]]:
    """(first row in the store, columns) of stretches of a split; a document that ends in another shard is cut there."""
    first_row = 0
    for shard in store.shards:
        if shard.split == split:
            stream = Stream(*(shard.column(name) for name in Stream._fields))
            borders = np.append(np.flatnonzero(np.diff(stream.doc_id)) + 1, shard.n_rows)
            start = 0
            while start < shard.n_rows:
                stop = int(borders[min(np.searchsorted(borders, start + _CHUNK), len(borders) - 1)])
                yield first_row + start, Stream(*(column[start:stop] for column in stream))
                start = stop
        first_row += shard.n_rows


def _rows(store: Store, split: str, sample: Sample, d_sae: int, vocabulary: Vocabulary) -> Rows:
    names = store.document_names()
    literals, tokens, positions = [], [], []
    with progress(len(sample.rows), f"label {split} rows", "row") as bar:
        for first, stream in _streams(store, split):
            low, high = np.searchsorted(sample.rows, [first, first + len(stream.tokens)])
            if low < high:
                wanted = sample.rows[low:high] - first
                literals.append(label(stream, vocabulary, names)[wanted])
                tokens.append(stream.tokens[wanted])
                positions.append(stream.position[wanted])
                bar.update(int(high - low))
    give_back()
    return Rows(
        firing(sample, d_sae).tocsc(),
        sparse.vstack(literals, format="csr"),
        np.concatenate(tokens),
        np.concatenate(positions),
    )
