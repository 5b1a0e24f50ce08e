"""Rules of two literals: planted latents are found again, and what is random stays at chance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from transformers import AutoTokenizer

import saebench.demo
from saebench.index.rules import MINIMUM, OPERATORS, RULE, WINDOW, Rows, describe, fit_rules
from saebench.labels import Stream, Vocabulary, choose_literals, label
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
VOCABULARY: Vocabulary = choose_literals(FIT, TEXTS, least=5)
NAMES = VOCABULARY.names


def literals_of(stream: Stream) -> sparse.csr_array:
    return label(stream, VOCABULARY, {number: f"{number}.py" for number in range(60)})[np.flatnonzero(stream.keep)]


LITERALS = literals_of(FIT), literals_of(HELD_OUT)


def rows_of(stream: Stream, literals: sparse.csr_array, firing: np.ndarray) -> Rows:
    keep = stream.keep
    return Rows(sparse.csr_array(firing), literals, stream.tokens[keep], stream.position[keep])


def planted(*rules: str) -> tuple[Rows, Rows]:
    """Rows on which latent f fires just where the rule `A`, or `A | and not | B`, holds."""
    both = []
    for stream, literals in zip((FIT, HELD_OUT), LITERALS, strict=True):
        holds = literals.toarray()
        columns = []
        for rule in rules:
            first, *rest = rule.split(" | ")
            column = holds[:, NAMES.index(first)]
            if rest:
                other = holds[:, NAMES.index(rest[1])]
                column = {"and": column & other, "and not": column & ~other, "or": column | other}[rest[0]]
            columns.append(column)
        both.append(rows_of(stream, literals, np.stack(columns, axis=1)))
    return both[0], both[1]


PLANTED = (
    "role: parameter",
    "inside docstring",
    'class: opens bracket | and | after role: function name',
    "inside string | and not | inside docstring",
    "inside comment | or | role: assigned name",
    'token is "("',
)  # fmt: skip


def test_planted_rules_are_recovered_and_hold_on_other_documents() -> None:
    rules = fit_rules(*planted(*PLANTED))
    holds = LITERALS[1].toarray()
    for rule, source in zip(rules, PLANTED, strict=True):
        found = describe(rule, NAMES)
        assert rule["f1"] == rule["precision"] == rule["recall"] == rule["fit_f1"] == rule["detection"] == 1.0, found
        assert rule["hard_negative"] == 1.0 or np.isnan(rule["hard_negative"]), found
        assert bool(rule["second"] >= 0) <= (" | " in source), found
        assert rule["score_rows"] == planted(source)[1].firing.sum()
    assert describe(rules[0], NAMES) == "role: parameter"
    assert describe(rules[1], NAMES) == "inside docstring"
    assert describe(rules[5], NAMES) == 'token is "("'
    assert holds[:, rules[3]["first"]].sum() > 0


def test_what_token_identity_explains_is_flagged() -> None:
    by_token, by_role = fit_rules(*planted('token is "("', "role: parameter"))
    assert by_token["by_token"]
    assert by_token["token_f1"] == 1.0
    assert not by_role["by_token"]
    assert by_role["token_f1"] < 0.8
    assert np.isnan(by_token["hard_negative"])  # where it always fires on a token, nothing tells more than the token
    assert by_role["hard_negative"] == 1.0


def test_random_activations_score_at_chance() -> None:
    fit, score = planted(*PLANTED)
    rng = np.random.default_rng(0)
    shuffled = [rows._replace(firing=rows.firing[rng.permutation(len(rows.tokens))]) for rows in (fit, score)]
    rules = fit_rules(*shuffled)
    assert np.abs(np.nanmean(rules["detection"]) - 0.5) < 0.05
    assert np.nanmax(rules["f1"]) < 0.35
    assert np.abs(np.nanmean(rules["hard_negative"]) - 0.5) < 0.05


def test_the_null_is_at_chance_for_rules_that_hold() -> None:
    rules = fit_rules(*planted(*PLANTED))
    assert np.abs(np.nanmean(rules["null"]) - 0.5) < 0.05


def by_hand(firing: list[int], holds: list[int], tokens: list[int] | None = None) -> Rows:
    """Ninety-six rows in windows of `WINDOW`... one latent, two literals, the second of which never holds."""
    n = 40 * WINDOW
    fires, literal = np.zeros((n, 1), dtype=bool), np.zeros((n, 2), dtype=bool)
    fires[firing] = True
    literal[holds, 0] = True
    token = np.zeros(n, dtype=np.int32) if tokens is None else np.array(tokens, dtype=np.int32)
    return Rows(sparse.csr_array(fires), sparse.csr_array(literal), token, np.arange(n, dtype=np.int32))


def test_scores_by_hand() -> None:
    fit = by_hand(list(range(0, 640, 32)), list(range(0, 640, 32)))
    # Twenty windows of forty are active; the rule is right in 15 of them, and wrong in 4 of the others.
    firing = list(range(0, 640, 32))
    holds = [*firing[:15], *range(640, 768, 32), 33, 1]  # 33 and 1 lie in active windows
    (rule,) = fit_rules(fit, by_hand(firing, holds))
    assert (rule["first"], rule["second"], rule["fit_f1"]) == (0, -1, 1.0)
    assert rule["precision"] == np.float32(15 / 21)
    assert rule["recall"] == np.float32(15 / 20)
    assert rule["f1"] == np.float32(30 / 41)
    assert rule["detection"] == np.float32((15 / 20 + 16 / 20) / 2)


def test_hard_negatives_by_hand() -> None:
    n = 40 * WINDOW
    tokens = [1 if row % 32 < 2 else 2 for row in range(n)]  # token 1: rows 0 and 1 of each window
    firing = list(range(0, 640, 32))  # 20 of the 80 rows with token 1
    holds = [*firing[:10], *range(1, 961, 32)]  # 10 firing rows and 30 of the 60 silent ones of the same token
    (rule,) = fit_rules(by_hand(firing, firing, tokens), by_hand(firing, holds, tokens))
    assert rule["hard_negative"] == np.float32((10 / 20 + 30 / 60) / 2)


def test_windows_are_cut_at_contexts() -> None:
    fit = by_hand(list(range(0, 640, 32)), list(range(0, 640, 32)))
    half = fit._replace(position=np.tile(np.arange(16, dtype=np.int32), len(fit.tokens) // 16))
    (whole,), (cut,) = fit_rules(fit, fit), fit_rules(fit, half)
    assert whole["detection"] == cut["detection"] == 1.0
    assert whole["null"] != cut["null"]  # forty windows and eighty


def test_too_few_firings_are_not_a_number() -> None:
    fit = by_hand(list(range(0, 640, 32)), list(range(0, 640, 32)))
    few = by_hand(list(range(MINIMUM - 1)), list(range(0, 640, 32)))
    (unfitted,) = fit_rules(few, fit)
    assert (unfitted["first"], unfitted["second"]) == (-1, -1)
    assert np.isnan(unfitted["f1"])
    assert describe(unfitted, ["A", "B"]) == "no rule: fires on 9 rows of the fit, fewer than 10"
    (unscored,) = fit_rules(fit, few)
    assert unscored["fit_f1"] == 1.0
    assert np.isnan(
        [unscored[name] for name in ("f1", "precision", "detection", "null", "hard_negative", "token_f1")]
    ).all()
    (dense,) = fit_rules(fit, by_hand(list(range(40 * WINDOW)), []))
    assert np.isnan(dense["detection"])  # there are no windows where it is silent
    assert dense["f1"] == 0.0


def test_a_literal_absent_from_held_out_documents_scores_nothing() -> None:
    firing = list(range(0, 640, 32))
    (rule,) = fit_rules(by_hand(firing, firing), by_hand(firing, []))
    assert (rule["first"], rule["precision"], rule["recall"], rule["f1"], rule["detection"]) == (0, 0, 0, 0, 0.5)


def test_ties_go_to_the_smaller_literal_and_the_simpler_rule() -> None:
    fit = by_hand(list(range(0, 640, 32)), list(range(0, 640, 32)))
    twice = fit._replace(literals=sparse.csr_array(sparse.hstack([fit.literals, fit.literals, fit.literals])))
    (rule,) = fit_rules(twice, twice)
    assert (rule["first"], rule["operator"], rule["second"]) == (0, 0, -1)
    assert RULE.names is not None
    assert OPERATORS[rule["operator"]] == ""


def test_the_same_rows_give_the_same_rules() -> None:
    fit, score = planted(*PLANTED)
    rng = np.random.default_rng(1)
    noisy = fit._replace(firing=sparse.csr_array(rng.random((len(fit.tokens), 30)) < 0.01))
    held_out = score._replace(firing=sparse.csr_array(rng.random((len(score.tokens), 30)) < 0.01))
    one, two = fit_rules(noisy, held_out), fit_rules(noisy, held_out)
    assert one.tobytes() == two.tobytes()
    part = fit_rules(noisy._replace(firing=noisy.firing[:, :7]), held_out._replace(firing=held_out.firing[:, :7]))
    assert part.tobytes() == one[:7].tobytes()  # a latent's rule does not depend on other latents


def test_a_sparse_code_is_rows_of_firing() -> None:
    code = SparseCode(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 4, 0]), d_sae=5)
    firing = sparse.csr_array((np.ones(3, bool), code.latents.numpy(), code.offsets.numpy()), shape=(3, 5))
    assert firing.toarray().tolist() == [[0, 1, 0, 0, 1], [0] * 5, [1, 0, 0, 0, 0]]


def test_what_does_not_fit_together_is_refused() -> None:
    fit = by_hand(list(range(20)), list(range(20)))
    with pytest.raises(ValueError, match="literals of the fit has 2 columns and literals of the scoring 1"):
        fit_rules(fit, fit._replace(literals=fit.literals[:, :1]))
    with pytest.raises(ValueError, match=r"have \[1280, 1280, 5, 1280\] rows; expected the same of each"):
        fit_rules(fit, fit._replace(tokens=fit.tokens[:5]))
