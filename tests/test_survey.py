"""What latents need: which sets of tokens come again, how strength is shared out, and the rule that these sets make."""

import importlib
import json
import math
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from saebench.browse.table import LatentTable, Query
from saebench.cli import main
from saebench.index import FeatureIndex, open_feature_index
from saebench.index.names import Names
from saebench.index.needs import Needed, Needs, Set, needs_path, read_needed, read_needs, write_needed
from saebench.index.notes import Notes
from saebench.index.page import candidates_html, needs_html
from saebench.index.ruled import Rule
from saebench.interactions import InteractionsConfig, survey
from saebench.interactions.found import Interaction, Interactions
from saebench.interactions.mobius import and_only
from saebench.interactions.transfer import Transferred, by_order, conjunctions, transferred
from saebench.labels import Stream, Stretch
from saebench.labels.places import REACH, Conjunction, Member, Places

TEXTS = [b"<s>", b" the", b" cat", b" Dog", b"7", b",", b" cat"]  # the last reads as token 2
THE, CAT, DOG, SEVEN, COMMA, TWIN = range(1, 7)


def stretch(tokens: Sequence[int], doc_id: Sequence[int] | None = None) -> Stretch:
    """All rows of one context."""
    ids = np.array(tokens)
    documents = np.zeros(len(ids), np.int64) if doc_id is None else np.array(doc_id)
    return Stretch(Stream(ids, documents, np.arange(len(ids)), ids > 0), TEXTS, {}, np.arange(len(ids)))


def explained(
    tokens: Sequence[int], whole: float, empty: float, *sets: tuple[str, tuple[int, ...], float]
) -> Interactions:
    """Interactions of a text of one-token units, each the token in its place, the last one fired on."""
    split = and_only(np.array([empty, whole]))
    found = tuple(Interaction("or" if kind == "or" else "and", units, strength) for kind, units, strength in sets)
    units = tuple((place,) for place in range(len(tokens) - 1))
    pieces = tuple(TEXTS[token].decode() for token in tokens)
    return Interactions(
        "latent 0", tuple(tokens), pieces, units, 0, "unattended", whole, empty, found, None, (), None, None, 0.0, split,
        np.array([empty, whole]),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- places


def test_a_conjunction_holds_where_all_of_its_members_do() -> None:
    places = Places(TEXTS, [stretch([0, THE, CAT, COMMA, THE, DOG, COMMA]), stretch([TWIN, COMMA])])
    comma, cat_before, number = Member(COMMA, 0), Member(CAT, 1), next(iter(places.facts(SEVEN, 1)[2:]))
    assert places.holds((comma,)).nonzero()[0].tolist() == [3, 6, 8]
    assert places.holds((comma, cat_before)).nonzero()[0].tolist() == [3, 8]  # the twin reads the same
    assert places.holds((comma, Member(CAT, None))).nonzero()[0].tolist() == [3, 6, 8]
    assert places.holds((comma, Member(THE, 5))).nonzero()[0].tolist() == [6]
    assert not places.holds((number,)).any()
    assert places.said((comma, cat_before)) == 'token "," and " cat" at −1'
    assert places.said((Member(CAT, None), number)) == '" cat" before and class: number at −1'


def test_what_is_before_ends_with_the_document_and_the_reach() -> None:
    places = Places(TEXTS, [stretch([CAT, COMMA, COMMA], [0, 0, 1]), stretch([CAT] + [COMMA] * (REACH + 2))])
    there = places.holds((Member(CAT, None),)).nonzero()[0]
    assert there.tolist() == [1, *range(4, 4 + REACH)]
    assert places.facts(0, 1) != []
    assert places.facts(len(TEXTS), 1) == []


# ---------------------------------------------------------------------------------------- transfer


def test_strength_is_shared_out_by_order_and_examples_count_by_activation() -> None:
    strong = explained([THE, CAT, DOG, COMMA], 3.0, 1.0, ("and", (0,), 1.0), ("and", (0, 1), 1.5), ("or", (1, 2), -0.5))
    weak = explained([THE, CAT, DOG, COMMA], 1.0, 0.0, ("and", (0, 1, 2), 50.0))
    assert by_order([strong]) == pytest.approx((0.25, 0.25, 0.5, 0.0))
    assert by_order([strong, weak]) == pytest.approx((0.75 / 4, 0.75 / 4, 1.5 / 4, 1 / 4))
    assert by_order([strong], alone=3.0) == pytest.approx((0.625, 0.125, 0.25, 0.0))
    assert by_order([]) == ()


def test_a_set_transfers_by_what_its_members_have_in_common() -> None:
    places = Places(TEXTS)
    first = explained([0, THE, CAT, COMMA], 2.0, 0.0, ("and", (1, 2), 1.5), ("and", (1,), 0.5))
    second = explained([0, DOG, THE, CAT, COMMA], 1.0, 0.0, ("and", (2, 3), 3.0))
    again = transferred([first, second], places)
    assert again.share == pytest.approx((2 * 0.75 + 1) / 3)  # of ' the' alone only one example has a set
    assert places.said((*again.shown[0].own, *again.shown[0].members)) == 'token "," and " the" at −2 and " cat" at −1'
    told = {places.said(one) for one in conjunctions(again)}
    assert {'" the" before and " cat" at −1', 'token "," and " the" at −2 and class: word at −1'} <= told
    opposite = explained([0, DOG, THE, CAT, COMMA], 1.0, 0.0, ("and", (2, 3), -3.0))
    assert transferred([first, opposite], places).shown == []
    assert math.isnan(transferred([], places).share)


def test_a_class_transfers_where_tokens_differ_and_members_of_an_or_stand_alone() -> None:
    places = Places(TEXTS)
    texts = ([0, SEVEN, CAT, COMMA], [0, SEVEN, DOG, COMMA])
    again = transferred([explained(text, 1.0, 0.0, ("or", (1, 2), 1.0)) for text in texts], places)
    told = {places.said(one) for one in conjunctions(again)}
    assert {'token "," and "7" at −2', "class: word at −1"} <= told
    assert not any('" cat"' in one for one in told)
    assert not any('"7"' in one and "class: word" in one for one in told)


# ------------------------------------------------------------------------------------------- names


@pytest.fixture
def index(run: Path, tmp_path: Path) -> FeatureIndex:
    """A copy of an index, so that nothing is left beside the one that others read."""
    path = next((run / "index").glob("*.h5"))
    shutil.copy(path, tmp_path / path.name)
    return open_feature_index(tmp_path / path.name, sae=run / "saes" / path.stem)


def needs(first: float, second: float) -> Needs:
    rule = Rule('token "," and " cat" at −1', 0.8, first, 0.7, 0.7, second, 0.9, 0.5, math.nan, 40)
    return Needs(6, 2, (0.4, 0.3, 0.2, 0.1), 0.5, (Set('" cat" at −1', 0.4, 3),), rule)


def test_a_rule_of_interactions_is_the_name_where_it_is_better_on_the_first_half(index: FeatureIndex) -> None:
    latent = next(one for one in range(index.d_sae) if index[one].rule is not None)
    best = max(index.first_f1(what)[latent] for what in ("rules", "lists"))
    better, worse, unnamed = needs(best + 0.01, 0.31), needs(best, 0.99), needs(best + 0.01, 0.29)
    names = Names(index, needs={latent: better})
    assert names[latent].source == "interactions"
    assert names[latent][:1] == ('token "," and " cat" at −1',)
    assert names[latent].f1 == 0.31  # of the second half, whatever the others have there
    assert "Interactions: the name" in candidates_html(index[latent], names[latent], better)
    assert Names(index, needs={latent: worse})[latent] == Names(index)[latent]
    assert not Names(index, needs={latent: unnamed})[latent].explained
    assert "cat" in names.searched(latent)


def test_needs_are_written_read_and_held_to_their_index(index: FeatureIndex) -> None:
    assert read_needs(index) == {}
    none = Needs(0, 0, (), math.nan, (), None)
    write_needed(index, Needed({"n": 6}, {3: needs(0.5, 0.6), 1: none}))
    found = read_needed(index)
    assert found is not None
    assert found.settings == {"n": 6}
    assert repr(found.latents) == repr({1: none, 3: needs(0.5, 0.6)})
    assert needs_html(found.latents[1]) == needs_html(None) == ""
    assert "Contextuality 0.30" in needs_html(found.latents[3])
    table = LatentTable(index, Notes(index.path.with_suffix(".notes.json"), "", index.d_sae), needs=found.latents)
    assert table.order(Query(sort="contextuality", descending=True))[0] == 3
    path = needs_path(index.path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"of": content["of"] | {"sae": "other"}}))
    with pytest.raises(ValueError, match="was made from another sae: it says other"):
        read_needs(index)
    del content["latents"]["3"]["rule"]["text"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged .*; move it away, and run `saebench interactions` again"):
        read_needs(index)


# ----------------------------------------------------------------------------------------- command


def test_an_index_of_earlier_labellers_is_told_and_gets_no_rule(
    index: FeatureIndex, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of what few examples need alone latent 11 would have one."""
    path = tmp_path / "old.h5"
    shutil.copy(index.path, path)
    with h5py.File(path, "a") as file:
        file["literals/version"][:] = "old"  # pyright: ignore[reportIndexIssue]
    sae = run / "saes" / index.path.stem
    found = survey(InteractionsConfig(sae=sae, index=path, latents=(11,), n=2, examples=2, misses=0))
    assert found is not None
    assert found[1][11].sets
    assert found[1][11].rule is None
    assert "earlier labellers: no rule is made of interactions; `saebench index`" in caplog.text


def test_interactions_are_found_stopped_and_gone_on_with(
    index: FeatureIndex, run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = run / "saes" / index.path.stem
    config = InteractionsConfig(sae=sae, index=index.path, sample=2, n=2, examples=2, misses=1)
    whole = survey(config)
    assert whole is not None
    _, found = whole
    assert len(found) == 2
    assert all(sum(one.by_order) == pytest.approx(1) for one in found.values() if one.examples)
    assert any(one.examples == 2 for one in found.values())
    written = needs_path(index.path).read_bytes()
    needs_path(index.path).unlink()

    left = iter([*range(1), signal.SIGINT])

    def interrupted(again: Transferred) -> list[Conjunction]:
        if next(left, None) is signal.SIGINT:
            signal.raise_signal(signal.SIGINT)
        return conjunctions(again)

    module = importlib.import_module("saebench.interactions.survey")
    monkeypatch.setattr(module, "conjunctions", interrupted)
    assert survey(InteractionsConfig(sae=sae, index=index.path, all=True, n=2, examples=2, misses=1)) is None
    assert len(read_needs(index)) == 2  # the third was under way
    settings = ["--n", "2", "--examples", "2", "--misses", "1"]
    command = ["interactions", "--sae", str(sae), "--index", str(index.path), *settings]
    assert main([*command, "--sample", "2"]) == 0  # and costs nothing: they are there
    assert needs_path(index.path).read_bytes() == written
    assert "have the rule that their interactions make as name" in capsys.readouterr().out
    for wrong, message in (
        ([*command, "--n", "4"], "was made otherwise: n: 2 -> 4; give the same settings, or move the file away"),
        ([*command, "--latents", "999"], "latent is 999; the SAE has 0 to"),
        ([*command, "--latents", "1", "--all"], "--latents and --all are both given"),
        ([*command, "--sample", "0"], "sample is 0; expected 1 or more"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
