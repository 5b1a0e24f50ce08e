"""What each latent fires on, in words: literals of a sample's rows, and the rules and lists of tokens fitted to them."""

from collections.abc import Iterator, Sequence

import numpy as np

from saebench.index.derive import firing
from saebench.index.evidence import Sample
from saebench.index.grow import fit_rules
from saebench.index.memory import give_back
from saebench.index.rules import RULE, SCORE, Rows, describe, score_rules
from saebench.labels import Labeller, Literals, Stream, Stretch, label
from saebench.labels.tokens import is_token
from saebench.pieces import TokenBytes
from saebench.runlog import progress
from saebench.store import Store

_CHUNK = 2**17  # rows of which what is wanted is labelled at once, to the next end of a document
_LEAST = 10  # rows of the fit on which a literal holds


def explain(
    store: Store, samples: dict[str, Sample], d_sae: int, labellers: Sequence[Labeller], workers: int | None = None
) -> dict[str, dict[str, np.ndarray]]:
    """Columns `[d_sae]` of a rule and of a list of tokens for every latent, and the literals that they are made of.

    `samples` are of `train`, rows chosen by their hash, so that they come from everywhere, and `validation`, whole contexts.
    Where either is empty, or the store has no texts, there are none.
    """
    tokenizer = store.tokenizer()
    if tokenizer is None or not all(len(samples[split].rows) for split in ("train", "validation")):
        return {}
    texts = TokenBytes(tokenizer).all()
    literals, rows = labelled_rows(store, "train", samples["train"], d_sae, texts, labellers)
    alone = np.array([is_token(name) for name in literals.names], bool)
    rules, lists = fit_rules(rows, alone, workers)
    del rows
    used = _used([rules, lists])
    names = [literals.names[number] for number in used]
    found = {
        "literals": {
            "names": np.array(names, dtype=object),
            "labeller": np.array([labellers[place].name for place in literals.of[used]], dtype=object),
            "version": np.array([labellers[place].version for place in literals.of[used]], dtype=object),
        }
    }
    give_back()
    _, rows = labelled_rows(store, "validation", samples["validation"], d_sae, texts, labellers, names)
    for what, fitted in (("rules", rules), ("lists", lists)):
        scores = score_rules(fitted, rows, workers=workers)
        columns = {name: fitted[name] for name in RULE.names or ()} | {name: scores[name] for name in SCORE.names or ()}
        found[what] = columns | {"text": np.array([describe(rule, names) for rule in fitted], dtype=object)}
    return found


def _used(fitted: Sequence[np.ndarray]) -> np.ndarray:
    """The literals that any rule is made of, by which rules are renumbered."""
    numbers = [rules[name].ravel() for rules in fitted for name in ("any", "only", "but")]
    used = np.unique(np.concatenate(numbers))
    used = used[used >= 0]
    for rules in fitted:
        for name in ("any", "only", "but"):
            rules[name] = np.where(rules[name] >= 0, np.searchsorted(used, rules[name]), -1)
    return used


def streams(store: Store, split: str, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Stream]]:
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


def labelled_rows(
    store: Store,
    split: str,
    sample: Sample,
    d_sae: int,
    texts: Sequence[bytes],
    labellers: Sequence[Labeller],
    only: Sequence[str] | None = None,
) -> tuple[Literals, Rows]:
    """The literals of a sample's rows, and with them what fires there."""
    documents = store.document_names()
    columns: dict[str, list[np.ndarray]] = {"tokens": [], "position": [], "doc_id": []}

    def stretches() -> Iterator[Stretch]:
        with progress(len(sample.rows), f"label {split} rows", "row") as bar:
            for wanted, stream in streams(store, split, sample.rows):
                for name, parts in columns.items():
                    parts.append(getattr(stream, name)[wanted])
                yield Stretch(stream, texts, documents, wanted)
                bar.update(len(wanted))

    literals = label(stretches(), labellers, only=only, least=_LEAST)
    give_back()
    rows = Rows(
        firing(sample, d_sae).tocsc(),
        literals.holds,
        **{name: np.concatenate(parts) for name, parts in columns.items()},
    )
    return literals, rows
