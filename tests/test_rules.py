"""Rules of literals: planted latents are found again, and what is random stays at chance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from transformers import AutoTokenizer

import saebench.demo
from saebench.index.grow import fit_rules
from saebench.index.rules import (
    EXCEPTIONS,
    LISTED,
    MINIMUM,
    RULE,
    WINDOW,
    Rows,
    describe,
    halves,
    holding,
    score_rules,
)
from saebench.labels import Literals, Stream, Stretch, label
from saebench.labels.tokens import is_token
from saebench.pieces import TokenBytes
from saebench.sae.sparse import SparseCode
from saebench.text import Document, encoder_of, pack

TOKENIZER = AutoTokenizer.from_pretrained(Path(saebench.demo.__file__).parent / "model")
TEXTS = TokenBytes(TOKENIZER).all()


def module(seed: int) -> str:
    """A made-up module with all that the planted latents fire on."""
    rng = np.random.default_rng(seed)
    words = ["area", "total", "name", "path", "size", "value", "index", "count"]
    parts = [f'"""Module {seed}."""\nimport os\n']
    for number in range(6):
        a, b, c, d = rng.choice(words, 4, replace=False)
        parts.append(
            f'\ndef {a}({b}, {c}={number}):\n    """Return the {d} (of {b})."""\n    # the {d} of {a}\n    {d} = ({b} + {c}) * {number}\n'
            f"    for {a} in {d}:\n        print({a}, '{b}')\n    return {d}\n"
        )
    return "".join(parts)


def stream_of(seeds: range, length: int = 128) -> Stream:
    documents = (Document(seed, f"{seed}.py", str(seed), module(seed)) for seed in seeds)
    contexts = list(pack(documents, encoder_of(TOKENIZER), length, validation_fraction=1e-9))
    return Stream(*(np.concatenate([getattr(context, name) for context in contexts]) for name in Stream._fields))


FIT, HELD_OUT = stream_of(range(40)), stream_of(range(40, 60))


def literals_of(stream: Stream, only: list[str] | None = None) -> Literals:
    documents = {number: f"{number}.py" for number in range(60)}
    return label([Stretch(stream, TEXTS, documents, np.flatnonzero(stream.keep))], only=only, least=5)


FOUND = literals_of(FIT)
NAMES = FOUND.names
ALONE = np.array([is_token(name) for name in NAMES])
LITERALS = FOUND.holds, literals_of(HELD_OUT, NAMES).holds


def rows_of(stream: Stream, literals: sparse.csc_array, firing: np.ndarray) -> Rows:
    keep = stream.keep
    return Rows(sparse.csc_array(firing), literals, stream.tokens[keep], stream.position[keep], stream.doc_id[keep])


def planted(*rules: str) -> tuple[Rows, Rows]:
    """Rows on which latent f fires just where its rule holds: `A`, or `A | and | B`, `A | not | B`, `A | or | B`."""
    both = []
    for stream, literals in zip((FIT, HELD_OUT), LITERALS, strict=True):
        holds = literals.toarray()
        columns = []
        for rule in rules:
            first, *rest = rule.split(" | ")
            column = holds[:, NAMES.index(first)]
            if rest:
                other = holds[:, NAMES.index(rest[1])]
                column = {"and": column & other, "not": column & ~other, "or": column | other}[rest[0]]
            columns.append(column)
        both.append(rows_of(stream, literals, np.stack(columns, axis=1)))
    return both[0], both[1]


PLANTED = (
    "role: parameter",
    "inside docstring",
    "class: opens bracket | and | after role: function name",
    "inside string | not | inside docstring",
    "inside comment | or | role: assigned name",
    'token "("',
)  # fmt: skip


def test_planted_rules_are_recovered_and_hold_on_other_documents() -> None:
    fit, score = planted(*PLANTED)
    rules, _ = fit_rules(fit, ALONE)
    scores = score_rules(rules, score)
    for rule, scored, source in zip(rules, scores, PLANTED, strict=True):
        found = describe(rule, NAMES)
        assert rule["fit_f1"] == 1.0, found
        assert (
            min(scored["f1"], scored["precision"], scored["recall"], scored["detection"], scored["first_f1"]) > 0.97
        ), found
        assert scored["hard_negative"] > 0.97 or np.isnan(scored["hard_negative"]), found
        assert (describe(rule, NAMES).count(";") + describe(rule, NAMES).count(" or ")) <= (" | " in source), found
    assert describe(rules[0], NAMES) == "role: parameter"
    assert describe(rules[1], NAMES) == "inside docstring"
    assert describe(rules[5], NAMES) == 'token "("'
    assert scores["score_rows"][1] == score.firing[halves(score.doc_id)][:, [1]].nnz


def test_an_alternative_gives_way_to_one_that_is_better_beside_those_that_came_later() -> None:
    """`wide` is the best alone; beside two others `rest`, which adds nothing to it, is better in its place."""
    where: dict[str, Sequence[int]] = {"one": range(60), "two": range(60, 120), "rest": range(120, 140)}
    where["wide"] = [*range(55), *range(60, 115), *range(120, 140), *range(400, 430)]
    holds = np.zeros((1000, 4), bool)
    for number, rows in enumerate(where.values()):
        holds[list(rows), number] = True
    fires = np.zeros((1000, 1), bool)
    fires[:140] = True
    places = np.arange(1000)
    fit = Rows(sparse.csc_array(fires), sparse.csc_array(holds), places, places, places)
    (rule,), _ = fit_rules(fit, np.zeros(4, bool))
    assert sorted(describe(rule, list(where)).split("; ")) == ["one", "rest", "two"]
    assert rule["fit_f1"] == 1


def test_random_activations_score_at_chance() -> None:
    fit, score = planted(*PLANTED)
    rng = np.random.default_rng(0)
    shuffled = [
        rows._replace(firing=rows.firing.tocsr()[rng.permutation(len(rows.tokens))].tocsc()) for rows in (fit, score)
    ]
    rules, _ = fit_rules(shuffled[0], ALONE)
    scores = score_rules(rules, shuffled[1])
    assert np.abs(np.nanmean(scores["detection"]) - 0.5) < 0.07
    assert np.nanmax(scores["f1"]) < 0.4
    assert np.abs(np.nanmean(scores["hard_negative"]) - 0.5) < 0.07


def by_hand(
    firing: list[int], *holds: list[int], tokens: list[int] | None = None, documents: int = 40, n: int = 40 * WINDOW
) -> Rows:
    """`n` rows of one latent and some literals, in windows of `WINDOW` and in documents of equal lengths."""
    fires, literals = np.zeros((n, 1), dtype=bool), np.zeros((n, len(holds)), dtype=bool)
    fires[firing] = True
    for column, rows in enumerate(holds):
        literals[rows, column] = True
    token = np.zeros(n, dtype=np.int32) if tokens is None else np.array(tokens, dtype=np.int32)
    row = np.arange(n, dtype=np.int32)
    return Rows(sparse.csc_array(fires), sparse.csc_array(literals), token, row, row * documents // n)


def one_rule(fit: Rows) -> np.ndarray:
    return fit_rules(fit, np.zeros(fit.literals.shape[1], bool))[0]


def test_scores_by_hand() -> None:
    """Of the second half of the documents alone; the first has its F1."""
    every = list(range(0, 1280, 32))
    fit = by_hand(every, every)
    second = halves(fit.doc_id)
    documents = np.flatnonzero(second[::32])
    assert len(documents) == 20
    starts = (documents * 32).tolist()  # a window each
    firing = starts[:15]
    holds = [*firing[:12], *starts[15:17], starts[0] + 1, starts[1] + 1]  # the last two in active windows
    others = (np.flatnonzero(~second[::32]) * 32).tolist()
    score = by_hand([*firing, *others[:12]], [*holds, *others[:6]])
    (rule,) = scores = score_rules(one_rule(fit), score)
    assert rule["score_rows"] == 15
    assert rule["precision"] == np.float32(12 / 16)
    assert rule["recall"] == np.float32(12 / 15)
    assert rule["f1"] == np.float32(24 / 31)
    assert rule["first_f1"] == np.float32(2 * 6 / 18)
    assert np.isnan(rule["detection"])  # five windows of the half are silent
    assert len(scores) == 1


def test_detection_and_hard_negatives_by_hand() -> None:
    n = 80 * WINDOW
    every = list(range(0, n, 32))
    fit = by_hand(every, every, documents=80, n=n)
    starts = (np.flatnonzero(halves(fit.doc_id)[::32]) * 32).tolist()
    assert len(starts) == 40
    tokens = [1 if row % 32 < 2 else 2 for row in range(n)]  # token 1: rows 0 and 1 of each window
    firing = starts[:20]
    holds = [
        *firing[:10],
        *(start + 1 for start in starts[:30]),
    ]  # 10 of 20 firing rows, 30 of 60 silent ones of their token
    (rule,) = score_rules(one_rule(fit), by_hand(firing, holds, tokens=tokens, documents=80, n=n))
    assert rule["hard_negative"] == np.float32((10 / 20 + 30 / 60) / 2)
    assert rule["detection"] == np.float32((20 / 20 + 10 / 20) / 2)


def test_the_null_keeps_what_tells_documents_apart() -> None:
    """A latent that fires all over some documents is told by what holds all over them, and so are rotated activations; one of single tokens is not."""
    n = 160 * WINDOW
    row = np.arange(n)
    inside = np.flatnonzero(row * 40 // n % 4 == 0).tolist()
    (rule,) = score_rules(one_rule(by_hand(inside, inside, n=n)), by_hand(inside, inside, n=n))
    assert rule["null"] == rule["detection"] == 1.0
    rng = np.random.default_rng(0)
    some = np.sort(rng.permutation(n)[:60]).tolist()
    (rule,) = score_rules(one_rule(by_hand(some, some, n=n)), by_hand(some, some, n=n))
    assert rule["detection"] == 1.0
    assert rule["null"] < 0.75


def test_halves_are_whole_documents_and_half_of_the_rows() -> None:
    documents = np.repeat(np.arange(60), np.random.default_rng(0).integers(5, 50, 60))
    second = halves(documents)
    assert all(len(np.unique(second[documents == number])) == 1 for number in range(60))
    assert abs(second.mean() - 0.5) < 0.05
    other = halves(documents[::-1].copy())
    assert np.array_equal(other[::-1], second)  # whatever the order of the rows
    assert halves(np.zeros(5, np.int64)).all()  # of a single document all is shown


def test_windows_are_cut_at_contexts() -> None:
    fit = by_hand(list(range(0, 1280, 32)), list(range(0, 1280, 32)))
    halved = fit._replace(position=np.tile(np.arange(16, dtype=np.int32), len(fit.tokens) // 16))
    (whole,), (cut,) = (score_rules(one_rule(fit), rows) for rows in (fit, halved))
    assert np.isnan(whole["detection"])  # every window is active
    assert cut["detection"] == 1.0  # and every second one, where contexts are half as long


def test_too_few_firings_are_not_a_number() -> None:
    fit = by_hand(list(range(0, 640, 32)), list(range(0, 640, 32)))
    few = by_hand(list(range(MINIMUM - 1)), list(range(0, 640, 32)))
    unfitted = one_rule(few)
    assert unfitted["any"].max() == -1
    assert unfitted["fit_rows"] == MINIMUM - 1
    assert describe(unfitted[0], ["A"]) == ""
    (unscored,) = score_rules(one_rule(fit), few)
    names = ("first_f1", "f1", "precision", "detection", "null", "hard_negative")
    assert np.isnan([unscored[name] for name in names]).all()
    (dense,) = score_rules(one_rule(fit), by_hand(list(range(40 * WINDOW)), []))
    assert np.isnan(dense["detection"])  # there are no windows where it is silent
    assert dense["f1"] == 0.0
    (nothing,) = one_rule(by_hand(list(range(0, 640, 32)), [0]))  # one hit is not held for a rule
    assert nothing["any"].max() == -1


def test_a_rule_takes_alternatives_a_restriction_and_exceptions() -> None:
    n = 40 * WINDOW
    row = np.arange(n)
    a, b, only, but = row % 16 == 0, row % 16 == 5, row % 3 != 0, row % 7 == 0
    fires = np.flatnonzero((a | b) & only & ~but).tolist()
    literals = [np.flatnonzero(part).tolist() for part in (a, b, only, but, row % 2 == 0)]
    fit = by_hand(fires, *literals)
    (rule,) = one_rule(fit)
    assert rule["fit_f1"] == 1.0
    assert describe(rule, ["a", "b", "only", "but", "even"]) == "a; b; only only; not but"
    assert np.flatnonzero(holding(fit.literals, rule)).tolist() == fires


def test_what_later_alternatives_make_useless_is_dropped() -> None:
    """The best alone is of two halves that are exact together."""
    first, second = list(range(0, 640, 16)), list(range(5, 640, 16))
    middle = [*first[:30], *second[:30]]
    (rule,) = one_rule(by_hand([*first, *second], middle, first, second))
    assert sorted(rule["any"][rule["any"] >= 0].tolist()) == [1, 2]
    assert rule["fit_f1"] == 1.0


def test_a_list_is_the_best_of_its_length() -> None:
    """Of disjoint literals, against all choices."""
    rng = np.random.default_rng(0)
    n = 40 * WINDOW
    token = rng.integers(0, 14, n)
    fires = rng.random(n) < token / 20
    columns = [np.flatnonzero(token == number).tolist() for number in range(14)]
    fit = by_hand(np.flatnonzero(fires).tolist(), *columns)
    _, (found,) = fit_rules(fit, np.ones(14, bool))
    hits = np.array([fires[token == number].sum() for number in range(14)])
    counts = np.bincount(token, minlength=14)
    masks = np.array([[mask >> bit & 1 for bit in range(14)] for mask in range(2**14)], bool)
    masks = masks[masks.sum(1) <= LISTED]
    best = (2 * (masks @ hits) / (masks @ counts + fires.sum())).max()
    assert found["fit_f1"] == pytest.approx(best)
    assert (found["any"] >= 0).sum() <= LISTED
    assert found["but"].tolist() == [-1] * EXCEPTIONS


def test_only_literals_of_tokens_are_in_lists() -> None:
    fit, _ = planted("role: parameter")
    _, lists = fit_rules(fit, ALONE)
    assert all(is_token(NAMES[number]) for number in lists[0]["any"] if number >= 0)
    assert lists[0]["fit_f1"] < 0.8


def test_words_of_a_rule_are_grouped() -> None:
    names = ['token " bad"', 'token "worse"', 'token "x" in any case', 'token "y" in any case', "class: number", "in quotes", "token b'\\xff'", 'after tokens "a" "b"']  # fmt: skip
    rule = np.zeros(1, RULE)[0]
    rule["any"][:] = -1
    rule["any"][:8] = range(8)
    rule["only"], rule["but"][:] = 5, (4, -1)
    said = 'token " bad" or "worse" or b\'\\xff\'; token "x" or "y" in any case; class: number; in quotes; after tokens "a" "b"; only in quotes; not class: number'
    assert describe(rule, names) == said


def test_ties_go_to_the_first_literal_and_the_simpler_rule() -> None:
    rows = list(range(0, 640, 32))
    (rule,) = one_rule(by_hand(rows, rows, rows, rows))
    assert rule["any"].tolist()[:2] == [0, -1]
    assert (rule["only"], rule["but"].max()) == (-1, -1)


def test_the_same_rows_give_the_same_rules() -> None:
    fit, score = planted(*PLANTED)
    rng = np.random.default_rng(1)
    noisy = fit._replace(firing=sparse.csc_array(rng.random((len(fit.tokens), 30)) < 0.01))
    held_out = score._replace(firing=sparse.csc_array(rng.random((len(score.tokens), 30)) < 0.01))
    one, two = (fit_rules(noisy, ALONE, workers) for workers in (1, 3))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
    part, _ = fit_rules(noisy._replace(firing=noisy.firing[:, :7]), ALONE)
    assert part.tobytes() == one[0][:7].tobytes()  # a latent's rule does not depend on other latents
    scores = [score_rules(one[0], held_out, workers=workers) for workers in (1, 3)]
    assert scores[0].tobytes() == scores[1].tobytes()


def test_a_sparse_code_is_rows_of_firing() -> None:
    code = SparseCode(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 4, 0]), d_sae=5)
    firing = sparse.csr_array((np.ones(3, bool), code.latents.numpy(), code.offsets.numpy()), shape=(3, 5))
    assert firing.toarray().tolist() == [[0, 1, 0, 0, 1], [0] * 5, [1, 0, 0, 0, 0]]


def test_what_does_not_fit_together_is_refused() -> None:
    fit = by_hand(list(range(20)), list(range(20)))
    with pytest.raises(ValueError, match=r"have \[1280, 1280, 5, 1280, 1280\] rows; expected the same of each"):
        fit_rules(fit._replace(tokens=fit.tokens[:5]), np.zeros(1, bool))
