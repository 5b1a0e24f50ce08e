"""Exports of an index: the forms that others read."""

import copy
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, HOOK, WIDTH

from saebench.index import FeatureIndex, IndexConfig, build_index, open_feature_index
from saebench.index.export import BATCH, Correlated, ExportConfig, _dashboard_feature, check_neuronpedia, export
from saebench.index.names import Names
from saebench.index.notes import Note, Notes
from saebench.index.page import Evidence
from saebench.models import load_model
from saebench.sae import SAE, initialise, load_sae, new_sae, save_sae
from saebench.store import Store

LATENTS = 150  # more than one file


@pytest.fixture(scope="module")
def saved(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TopK SAE on disk, indexed; its last latent never fires."""
    sae = new_sae("topk", WIDTH, LATENTS, k=5)
    initialise(sae, torch.tensor(store.statistics(HOOK)["mean"]), torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc[-1] = -1e6
    folder = tmp_path_factory.mktemp("run") / "saes" / "topk-k5"
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(sae, folder, metadata)
    assert build_index(IndexConfig(sae=folder, sample=2_000)) is not None
    return folder


@pytest.fixture(scope="module")
def index(saved: Path) -> Iterator[FeatureIndex]:
    with open_feature_index(saved.parent.parent / "index" / "topk-k5.h5") as opened:
        yield opened


@pytest.fixture(scope="module")
def sae(saved: Path) -> SAE:
    return load_sae(saved)


def written(files: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


@pytest.fixture(scope="module")
def dashboard(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("export") / "dashboard"
    return written(export(ExportConfig(sae=saved, format="saedashboard", out=out, around=3)))


@pytest.fixture(scope="module")
def bodies(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("export") / "neuronpedia"
    config = ExportConfig(sae=saved, format="neuronpedia", out=out, around=3, model_id="tiny", source="0-mine")
    return written(export(config))


def test_every_latent_that_fires_is_in_one_body(bodies: list[dict[str, Any]], index: FeatureIndex) -> None:
    assert {(body["modelId"], body["source"]) for body in bodies} == {("tiny", "0-mine")}
    assert [len(body["features"]) for body in bodies[:-1]] == [BATCH] * (len(bodies) - 1)
    found = [feature["index"] for body in bodies for feature in body["features"]]
    assert found == np.flatnonzero(index.columns["fires"]).tolist()
    assert LATENTS - 1 not in found


def test_an_upload_body_has_the_index_s_evidence(bodies: list[dict[str, Any]], index: FeatureIndex, sae: SAE) -> None:
    feature = bodies[0]["features"][7]
    latent = index[feature["index"]]
    assert feature["density"] == pytest.approx(latent.figures["density"], rel=1e-3)
    assert [entry["token"] for entry in feature["topLogits"]] == index.pieces(latent.top_logits.ids)
    np.testing.assert_allclose(
        [entry["value"] for entry in feature["bottomLogits"]], latent.bottom_logits.values, rtol=1e-3
    )
    n_examples = len(latent.top) + sum(len(interval.examples) for interval in latent.intervals)
    assert len(feature["activations"]) == n_examples
    for example, activation in zip(latent.top, feature["activations"], strict=False):
        context = index.context_of(example.row, 3)
        assert activation["tokens"] == context.pieces
        rows, keep = index.vectors(context.rows)
        expected = sae.encode(rows.float()).detach().numpy()[:, latent.latent] * keep
        np.testing.assert_allclose(activation["values"], expected, rtol=1e-3, atol=1e-5)
        assert "quantileMin" not in activation
    fractions = {a["quantileMin"]: a["quantileFraction"] for a in feature["activations"] if "quantileMin" in a}
    assert sum(fractions.values()) == pytest.approx(1, abs=0.01)
    for activation in feature["activations"][len(latent.top) :]:
        assert activation["quantileMin"] * 0.999 <= max(activation["values"])


def test_labels_written_by_hand_come_before_the_rule(saved: Path, index: FeatureIndex, tmp_path: Path) -> None:
    latent = int(index.columns["fires"].argmax())
    notes = Notes(index.path.with_suffix(".notes.json"), index.identity["sae"], index.d_sae)
    notes.write(latent, Note(label="x" * 600))
    try:
        files = export(ExportConfig(sae=saved, format="neuronpedia", out=tmp_path / "np", latents=(latent,)))
        [body] = written(files)
        first = body["features"][0]["explanations"][0]
        assert first == {"text": "x" * 512, "methodName": "hand-written"}
        page = tmp_path / "page.html"
        export(ExportConfig(sae=saved, format="html", out=page, latents=(latent,)))
        assert "x" * 600 in page.read_text(encoding="utf-8")
    finally:
        notes.write(latent, Note())


def test_dashboard_features_have_every_field(dashboard: list[dict[str, Any]], index: FeatureIndex, sae: SAE) -> None:
    assert {"model_id", "layer", "sae_set", "sae_id_suffix", "features"} == set(dashboard[0])
    feature = dashboard[0]["features"][3]
    latent = index[feature["feature_index"]]
    row_D = sae.W_dec[latent.latent].detach().numpy()
    assert feature["neuron_alignment_indices"] == np.argsort(-row_D)[:3].tolist()
    np.testing.assert_allclose(
        feature["neuron_alignment_l1"], np.sort(row_D)[::-1][:3] / np.abs(row_D).sum(), rtol=1e-3
    )
    assert sum(feature["freq_hist_data_bar_heights"]) == latent.figures["fires"]
    assert len(feature["freq_hist_data_bar_values"]) == len(feature["freq_hist_data_bar_heights"])
    model = load_model(index.store.manifest["identity"]["model"]["id"], dtype="float32")
    assert sum(feature["logits_hist_data_bar_heights"]) == len(model.tokenizer)
    for activation in feature["activations"]:
        value = activation["values"][activation["qualifying_token_index"]]
        top = activation["bin_contains"] == -1
        low, high = (0, activation["bin_max"]) if top else (activation["bin_min"], activation["bin_max"])
        assert low * 0.998 <= value <= high * 1.002


def test_a_bin_of_firings_without_an_end_has_a_middle(index: FeatureIndex, sae: SAE) -> None:
    latent = index[int(index.columns["fires"].argmax())]
    strong = copy.copy(index)  # as of an SAE whose strongest activations are in the last bin
    strong.bin_edges = index.bin_edges.copy()
    strong.bin_edges[np.flatnonzero(latent.histogram)[-1] + 1 :] = np.inf
    evidence = Evidence(latent, Names(index)[latent.latent], None, [], [[] for _ in latent.intervals])
    middles = _dashboard_feature(evidence, strong, sae, Correlated(index))["freq_hist_data_bar_values"]
    assert middles == sorted(middles)
    assert middles[-1] <= latent.figures["max"]


def test_correlations_are_those_of_the_sampled_activations(index: FeatureIndex) -> None:
    sample = index.sample("train")
    acts_RF = np.zeros((len(sample.rows), index.d_sae))
    acts_RF[np.repeat(np.arange(len(sample.rows)), np.diff(sample.offsets)), sample.latents] = sample.values
    latent = int(index.columns["fires"].argmax())
    others, cosines, pearsons = Correlated(index)(latent)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(np.corrcoef(acts_RF.T)[latent], nan=-1)
    expected[latent] = -1
    assert others == np.argsort(-expected, kind="stable")[:3].tolist()
    np.testing.assert_allclose(pearsons, expected[others], rtol=1e-3)
    norms = np.linalg.norm(acts_RF, axis=0)
    np.testing.assert_allclose(
        cosines, acts_RF[:, others].T @ acts_RF[:, latent] / (norms[others] * norms[latent]), rtol=1e-3
    )


class Outside(HTMLParser):
    """What a page would fetch, and whether its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.fetched += [value for name in ("src", "href") if (value := found.get(name)) and not value.startswith("#")]
        self.ids += [value for value in [found.get("id")] if value]
        self.depth += tag not in {"meta", "br", "rect", "line"}

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag not in {"meta", "br", "rect", "line"}


def test_a_page_stands_alone(saved: Path, index: FeatureIndex, tmp_path: Path) -> None:
    latents = tuple(int(latent) for latent in np.flatnonzero(index.columns["fires"])[[3, 8]])
    [path] = export(ExportConfig(sae=saved, format="html", out=tmp_path / "page.html", latents=latents))
    text = path.read_text(encoding="utf-8")
    outside = Outside()
    outside.feed(text)
    assert outside.fetched == []
    assert outside.depth == 0
    assert outside.ids == [f"latent-{latent}" for latent in latents]
    assert "<script" not in text


def test_text_of_the_corpus_is_shown_and_never_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = "<script>alert(1)</script>"
    monkeypatch.setattr(FeatureIndex, "pieces", lambda self, tokens: [evil for _ in tokens])
    [path] = export(ExportConfig(sae=saved, format="html", out=tmp_path / "page.html", latents=(3, 8)))
    text = path.read_text(encoding="utf-8")
    assert evil not in text
    assert "&lt;script&gt;alert(1)" in text


def test_limits_are_checked() -> None:
    def body(**changes: Any) -> dict[str, Any]:
        feature = {"index": 4, "activations": [{"tokens": ["a"], "values": [1.0]}]} | changes
        return {"modelId": "m", "source": "s", "features": [feature]}

    check_neuronpedia(body())
    for wrong, message in (
        ({"activations": []}, "latent 4 has no activations"),
        ({"activations": [{"tokens": ["a"], "values": []}]}, "1 tokens and 0 values"),
        ({"activations": [{"tokens": ["a"] * 1025, "values": [0.0] * 1025}]}, r"1025; Neuronpedia takes 1 to 1024"),
        ({"topLogits": [{}] * 21}, "latent 4, topLogits: 21"),
        ({"explanations": [{"text": "x" * 513}]}, "characters of an explanation: 513"),
    ):
        with pytest.raises(ValueError, match=message):
            check_neuronpedia(body(**wrong))
    with pytest.raises(ValueError, match="features in a body: 129"):
        check_neuronpedia(body() | {"features": body()["features"] * 129})
    with pytest.raises(ValueError, match="modelId is ''"):
        check_neuronpedia(body() | {"modelId": ""})


def test_what_cannot_be_exported_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"latent is {LATENTS}; .* has 0 to {LATENTS - 1}"):
        export(ExportConfig(sae=saved, format="html", out=tmp_path / "a.html", latents=(LATENTS,)))
    with pytest.raises(ValueError, match="none of these latents fires"):
        export(ExportConfig(sae=saved, format="html", out=tmp_path / "a.html", latents=(LATENTS - 1,)))
    (tmp_path / "batch-0.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        export(ExportConfig(sae=saved, format="neuronpedia", out=tmp_path))
    with pytest.raises(ValueError, match="is a folder; name a file"):
        export(ExportConfig(sae=saved, format="html", out=tmp_path))
    assert not (tmp_path / "a.html").exists()
