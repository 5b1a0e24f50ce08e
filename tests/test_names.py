"""What latents are called: candidates, the half they are chosen on, the half they are shown with, and one name everywhere."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import CONTEXT, HOOK, LATENTS, WIDTH, an_sae
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from saebench.browse.table import LatentTable, Query
from saebench.index import FeatureIndex, IndexConfig, build_index, explain, open_feature_index
from saebench.index.explanations import Explanation, Tally
from saebench.index.export import ExportConfig, export
from saebench.index.names import LEAST_DETECTION, LEAST_F1, Name, Names
from saebench.index.notes import Note, Notes
from saebench.index.page import candidates_html, name_html
from saebench.labels import LABELLERS
from saebench.sae import save_sae
from saebench.store import Store


@pytest.fixture(scope="module")
def token(store: Store) -> int:
    """The commonest token of the first shard."""
    shard = store.of_split("train")[0]
    ids, counts = np.unique(shard.column("tokens")[shard.column("keep")], return_counts=True)
    return int(ids[counts.argmax()])


@pytest.fixture(scope="module")
def saved(store: Store, token: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE whose latent 0 fires where the linear discriminant of that token's vectors says so; the last one is dead."""
    shard = store.of_split("train")[0]
    tokens, keep = shard.column("tokens"), shard.column("keep")
    x_RD = shard.rows(HOOK).float()
    there = torch.from_numpy((tokens == token) & keep)
    centred = x_RD - x_RD.mean(0)
    direction = torch.linalg.solve(
        centred.T @ centred / len(x_RD) + 1e-3 * torch.eye(WIDTH), x_RD[there].mean(0) - x_RD[~there].mean(0)
    )
    scores = x_RD @ direction
    sae = an_sae("relu", store)
    with torch.no_grad():
        sae.W_enc[:, 0] = direction
        sae.b_enc[0] = -(scores[there].quantile(0.05)) + sae.b_dec @ direction
    folder = tmp_path_factory.mktemp("run") / "saes" / "planted"
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(sae, folder, metadata)
    return folder


@pytest.fixture(scope="module")
def index(saved: Path) -> Iterator[FeatureIndex]:
    build_index(IndexConfig(sae=saved))
    with open_feature_index(saved.parent.parent / "index" / "planted.h5") as opened:
        yield opened


def test_a_planted_latent_is_named_by_the_token_it_fires_on(index: FeatureIndex, store: Store, token: int) -> None:
    shard = store.of_split("train")[0]
    tokens, keep = shard.column("tokens"), shard.column("keep")
    latent, name = index[0], Names(index)[0]
    piece = index.pieces(np.array([token]))[0]
    assert latent.rule is not None
    assert latent.tokens_rule is not None
    assert latent.tokens_rule.text == f'token "{piece}"'
    assert latent.tokens_rule.text.removeprefix("token ") in latent.rule.text
    assert name.source in ("rule", "tokens")
    assert name.f1 > 0.4
    assert name.detection > 0.7
    assert abs(latent.rule.null - 0.5) < 0.15
    held = index.holds(0, [tokens[:200], tokens[200:250], tokens[:0]], "lists")
    assert held is not None
    assert np.array_equal(held[0], (tokens[:200] == token) & keep[:200])
    assert np.array_equal(held[1], (tokens[200:250] == token) & keep[200:250])
    assert held[2].shape == (0,)
    assert index.columns["rule_detection"][0] == pytest.approx(latent.rule.detection)


def test_an_index_of_before_has_fewer_alternatives(
    index: FeatureIndex, saved: Path, store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "before.h5"
    shutil.copy(index.path, path)
    with h5py.File(path, "a") as file:
        any_ = file["rules/any"][:, :12]
        assert (file["rules/any"][0, 12:] < 0).all()
        del file["rules/any"]
        file["rules/any"] = any_
    tokens = store.of_split("train")[0].column("tokens")[:200]
    with open_feature_index(path, sae=saved) as before:
        assert before.applies("rules", 0)
        held, now = before.holds(0, [tokens]), index.holds(0, [tokens])
        assert held is not None
        assert now is not None
        assert np.array_equal(held[0], now[0])


def test_a_latent_that_never_fires_has_no_name(index: FeatureIndex) -> None:
    dead = LATENTS - 1
    assert index[dead].rule is index[dead].tokens_rule is None
    assert index[dead].no_rule == "it fires on 0 rows of the fit, fewer than 10"
    assert index[0].no_rule == ""
    assert index.holds(dead, [np.zeros(9, np.int32)]) is None
    assert index.described("rules")[dead] == ""
    name = Names(index)[dead]
    assert (name.text, name.source, name.explained, name.scored) == ("", "", False, "")


def test_rules_do_not_depend_on_how_much_is_labelled_at_once(
    index: FeatureIndex, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of the sample are fitted, which come from all shards; a document that is cut at a chunk's end is labelled in one."""
    samples = {split: index.sample(split) for split in ("train", "validation")}
    ends = np.cumsum([shard.n_rows for shard in store.shards])
    shards = {int(number) for number in np.searchsorted(ends, samples["train"].rows, "right")}
    assert shards == {number for number, shard in enumerate(store.shards) if shard.split == "train"}
    monkeypatch.setattr(explain, "_CHUNK", 1000)
    found = explain.explain(store, samples, LATENTS, LABELLERS)
    assert found["rules"]["fit_rows"].tolist() == samples["train"].fires(LATENTS).tolist()
    for what in ("rules", "lists"):
        assert found[what]["text"].tolist() == [text.decode() for text in index._data[f"{what}/text"][:]]
        assert np.array_equal(found[what]["f1"], index._data[f"{what}/f1"][:], equal_nan=True)


@pytest.fixture
def scored(index: FeatureIndex, saved: Path, tmp_path: Path) -> Iterator[FeatureIndex]:
    """The index with scores of our own for latents 1 to 5, of rules and of lists: on the first half, and what is shown."""
    path = tmp_path / "scored.h5"
    shutil.copy(index.path, path)
    figures = {  # first F1 of both, F1 of both, detection of both
        1: (0.8, 0.7, 0.4, 0.9, 0.7, 0.9),  # the rule was better on the first half, whatever the other is
        2: (0.7, 0.7, 0.5, 0.5, 0.7, 0.8),  # as good: the list is simpler
        3: (0.9, 0.1, LEAST_F1 - 0.01, 0.9, 0.9, 0.9),  # what was chosen falls short on the second half
        4: (0.9, 0.1, 0.9, 0.9, LEAST_DETECTION - 0.01, 0.9),
        5: (math.nan, math.nan, math.nan, math.nan, math.nan, math.nan),
    }
    with h5py.File(path, "a") as file:
        for latent, values in figures.items():
            for number, (name, what) in enumerate(
                (n, w) for n in ("first_f1", "f1", "detection") for w in ("rules", "lists")
            ):
                file[f"{what}/{name}"][latent] = values[number]
    with open_feature_index(path, sae=saved) as opened:
        yield opened


def test_a_name_is_chosen_on_one_half_and_shown_with_the_score_of_the_other(scored: FeatureIndex) -> None:
    names = Names(scored)
    assert [names[latent].source for latent in (1, 2, 3, 4, 5)] == ["rule", "tokens", "", "", ""]
    assert names[1].f1 == pytest.approx(0.4)
    assert names[1].scored == "F1 0.40, detection 0.70"
    assert names[1].text == scored.described("rules")[1]
    assert names[2].text == scored.described("lists")[2]
    assert names[5].scored == ""
    assert names.columns["explained"][1:6].tolist() == [True, True, False, False, False]
    np.testing.assert_allclose(names.columns["name_f1"][1:5], [0.4, 0.5, LEAST_F1 - 0.01, 0.9], rtol=1e-6)


def test_a_candidate_that_is_the_name_is_not_said_again(scored: FeatureIndex) -> None:
    names = Names(scored)
    for latent, what in ((1, "Rule"), (2, "Tokens")):
        shown = candidates_html(scored[latent], names[latent])
        assert f"<summary>{what}: the name</summary>" in shown
        assert shown.count("the name</summary>") == 1
    assert "the name</summary>" not in candidates_html(scored[3], names[3])
    assert "the name</summary>" not in candidates_html(scored[1], Name("mine", "yours", 0.4, 0.7))


def test_what_is_unexplained_shows_its_tokens_and_blanks_alone_as_examples_do(
    scored: FeatureIndex, tokenizer: PreTrainedTokenizerFast
) -> None:
    scored.top_tokens[3, :5] = tokenizer.convert_tokens_to_ids(["\u010a", "\u0120", "c", "\u0120a", "."])
    assert scored.pieces(scored.top_tokens[3, :5]) == ["\n", " ", "c", " a", "."]
    name = Names(scored)[3]
    assert name.text == "\u21b5 \u00b7 c a ."
    assert 'class="sb-unexplained"' in name_html(name)


def test_your_label_wins(scored: FeatureIndex, tmp_path: Path) -> None:
    notes = Notes(tmp_path / "n.notes.json", scored.identity["sae"], LATENTS)
    notes.write(3, Note("my <name>"))
    name = Names(scored, notes)[3]
    assert (name.text, name.source) == ("my <name>", "yours")
    assert "my &lt;name&gt;" in name_html(name)
    assert 'class="sb-yours"' in name_html(name)


def judged(first: int, second: int, rule: int, tokens: int) -> Explanation:
    """An explanation that tells so many windows of ten active ones of either half; rule and list those of the first."""
    halves = tuple(Tally(10, right, 0, 0, 10, 10, 0) for right in (first, second))
    others = [(Tally(10, right, 0, 0, 10, 10, 0), Tally()) for right in (rule, tokens)]
    return Explanation("says a judge", "saebench-judge", (halves[0], halves[1]), rule=others[0], tokens=others[1])


def test_a_judge_names_what_it_tells_better_on_the_same_windows(scored: FeatureIndex) -> None:
    better, worse, short = judged(9, 8, 5, 6), judged(6, 9, 7, 2), judged(9, 1, 0, 0)
    names = Names(scored, judged={1: better, 2: worse, 3: short, 4: better})
    assert names[1]._replace(f1=0.0) == Name("says a judge", "judge", 0.0, 0.9)
    assert math.isnan(names[1].f1)
    assert [names[latent].source for latent in (2, 3, 4)] == ["tokens", "", "judge"]
    assert names.columns["explained"][1:5].tolist() == [True, True, False, True]
    assert names.columns["name_detection"][4] == pytest.approx(0.9)
    assert "says a judge" in names.searched(2)


def test_the_search_is_for_what_rules_name_and_not_for_how(scored: FeatureIndex, saved: Path, tmp_path: Path) -> None:
    """All rules share words of grammar: a search for `token` found nearly every latent."""
    path = tmp_path / "worded.h5"
    shutil.copy(scored.path, path)
    with h5py.File(path, "a") as file:
        for what in ("rules", "lists"):
            file[f"{what}/text"][:] = 'token " cat" or "; dog" in any case; only class: number'
            file[f"{what}/text"][4] = 'after token " token"; inside comment'
            file[f"{what}/fit_f1"][:] = 0.5
    with open_feature_index(path, sae=saved) as opened:
        names = Names(opened)
        assert names.searched(1).split() == ['"', 'cat"', '";', 'dog"', "number"] * 2
        assert names.searched(4).split() == ['"', 'token"', "inside", "comment"] * 2


def test_one_name_everywhere(index: FeatureIndex, saved: Path, tmp_path: Path) -> None:
    """In the table, its search, the page and Neuronpedia's bodies."""
    notes = Notes(index.path.with_suffix(".notes.json"), index.identity["sae"], LATENTS)
    notes.write(1, Note("mine"))
    try:
        names = Names(index, notes)
        table = LatentTable(index, notes)
        named = [latent for latent in range(LATENTS) if names[latent].explained and index.columns["fires"][latent] > 0]
        assert 0 in named
        assert all(table.names[latent][:2] == names[latent][:2] for latent in named)
        assert table.find(Query(text="mine")).latents.tolist() == [1]
        assert set(table.find(Query(having=("explained",), size=100)).latents) == set(
            np.flatnonzero(names.columns["explained"])
        )
        (page,) = export(ExportConfig(sae=saved, format="html", latents=(0, 1), out=tmp_path / "page.html"))
        text = page.read_text()
        assert all(name_html(names[latent]) in text for latent in (0, 1))
        files = export(ExportConfig(sae=saved, format="neuronpedia", out=tmp_path / "np"))
        said = {
            feature["index"]: [each["text"] for each in feature["explanations"]]
            for file in files
            for feature in json.loads(file.read_text())["features"]
        }
        assert said[1] == ["mine"]
        assert said[0][0].startswith(names[0].text)
        assert all(bool(said[latent]) == names[latent].explained for latent in said)
    finally:
        notes.write(1, Note())


def test_sorting_by_scores_of_candidates(scored: FeatureIndex, tmp_path: Path) -> None:
    table = LatentTable(scored, Notes(tmp_path / "n.notes.json", scored.identity["sae"], LATENTS))
    for name in ("name_f1", "name_detection", "rule_f1", "tokens_f1"):
        found = table.order(Query(sort=name, descending=True))
        values = table.columns[name][found]
        assert (np.diff(values[~np.isnan(values)]) <= 0).all()
        assert np.isnan(values[np.isnan(values).argmax() :]).all() or not np.isnan(values).any()


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    """A static embedding model of three words and a word of no kin."""
    model2vec = pytest.importorskip("model2vec", reason="model2vec is not installed")
    vocabulary = {"[UNK]": 0, "cat": 1, "kitten": 2, "bank": 3, "of": 4}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    vectors = np.array([[0, 0, 0], [1, 0.2, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]], np.float32)
    model2vec.StaticModel(vectors, tokenizer).save_pretrained(str(tmp_path / "static"))
    return tmp_path / "static"


def test_names_are_found_by_meaning(index: FeatureIndex, embedder: Path, tmp_path: Path) -> None:
    """Also of names that share no letter, and of those given meanwhile; what has no name is not found."""
    notes = Notes(tmp_path / "n.notes.json", index.identity["sae"], LATENTS)
    notes.write(7, Note("cat"))
    notes.write(9, Note("bank of"))
    table = LatentTable(index, notes, embedder=embedder)
    assert table.order(Query(text="~kitten")).tolist()[0] == 7
    notes.write(3, Note("kitten of cat"))
    found = table.order(Query(text="~ kitten")).tolist()
    assert found[0] == 7
    assert 3 in found
    assert set(found) <= set(np.flatnonzero(table.names.columns["explained"])) | {3, 7, 9}
    assert table.order(Query(text="~kitten", descending=True)).tolist() == found[::-1]
    assert table.order(Query(text="~kitten", having=("labelled",))).tolist()[0] == 7
    with pytest.raises(
        ValueError, match=r"searched by meaning, with a static embedding model: `saebench app --embedder DIR`"
    ):
        LatentTable(index, notes).order(Query(text="~kitten"))
    with pytest.raises(ValueError, match="is no folder; expected a static embedding model"):
        LatentTable(index, notes, embedder=tmp_path / "none").order(Query(text="~kitten"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read as a static embedding model"):
        LatentTable(index, notes, embedder=tmp_path / "empty").order(Query(text="~kitten"))


def test_rules_of_other_labellers_are_words_that_are_not_applied(
    index: FeatureIndex, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.h5"
    shutil.copy(index.path, path)
    with h5py.File(path, "a") as file:
        versions = file["literals/version"].asstr()[:]
        file["literals/version"][...] = np.array([f"{version} of before" for version in versions], dtype=object)
    with open_feature_index(path, sae=saved) as opened:
        assert opened[0].rule == index[0].rule
        assert Names(opened)[0].text == Names(index)[0].text
        assert opened.holds(0, [np.arange(5)]) is None
        assert not opened.applies("rules", 0)
    with h5py.File(path, "a") as file:
        file["literals/version"][...] = versions
        labellers = file["literals/labeller"].asstr()[:]
        file["literals/labeller"][...] = np.array(["wordnet:/nowhere" for _ in labellers], dtype=object)
    with open_feature_index(path, sae=saved) as opened:
        assert opened.holds(0, [np.arange(5)]) is None


def test_an_index_is_made_anew_where_labellers_are_others(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = IndexConfig(sae=saved, out=tmp_path / "i.h5", tokens=500, logits=False)
    build_index(config)
    before = config.path.stat().st_mtime_ns
    build_index(config)
    assert config.path.stat().st_mtime_ns == before
    newer = [labeller._replace(version="of tomorrow") for labeller in LABELLERS]
    monkeypatch.setattr("saebench.index.plan.LABELLERS", newer)
    build_index(config)
    with open_feature_index(config.path, sae=saved) as opened:
        assert "of tomorrow" in opened._data["literals/version"].asstr()[0]
