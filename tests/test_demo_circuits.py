"""The demonstration of circuits: what it says of a prompt is what was measured there, once; and its pictures."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from test_circuit_view import A_GRAPH

from saebench.cli import main
from saebench.demo.circuits import SET, Case, Shown, graphs, stages, told
from saebench.models import LanguageModel, capture, hook_name, load_model, logits
from saebench.printed import show_cases
from saebench.sae import Writes, new_sae, save_sae
from saebench.train.settings import grid
from saebench.view.picture import picture

CASE = Case("bracket", "a bracket closes", "names = [first", "]", ")", (" [",))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def run(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of random transcoders of the model's layers 2 and 3."""
    folder, ids = tmp_path_factory.mktemp("run"), torch.tensor([model.tokens_of(CASE.prompt)])
    for layer in (2, 3):
        read, written = hook_name(layer, "mlp_in"), hook_name(layer, "mlp_out")
        sae, generator = new_sae("jumprelu", 256, 32, writes=Writes(256)), torch.Generator().manual_seed(layer)
        with torch.no_grad():
            for name in ("W_enc", "W_dec"):
                sae.get_parameter(name).copy_(torch.randn(sae.get_parameter(name).shape, generator=generator))
            sae.get_parameter("b_enc").copy_(-(capture(model, ids, [read])[read][0] @ sae.W_enc).quantile(0.5, dim=0))
        said = {
            "model_name": model.id,
            "set": "s",
            "hook_name": read,
            "hook_name_out": written,
            "reads": [read],
            "writes": [written],
        }
        save_sae(sae, folder / "saes" / f"s-{layer}", said)
    return folder


@pytest.fixture(scope="module")
def shown(run: Path) -> Shown:
    found = graphs(run, [CASE], "s")
    assert found is not None
    return found[0]


def test_a_case_is_what_was_measured(model: LanguageModel, shown: Shown) -> None:
    """A change of one logit over another is that of the logarithm of their chances."""
    (one,) = shown.ablations
    with torch.no_grad():
        chances_V = logits(model, torch.tensor([model.tokens_of(CASE.prompt)]))[0, -1].softmax(-1)
    target, against = (model.encoder.encode([text])[0][0] for text in "])")
    before, after, other, other_after = one.chances
    assert (before, other) == (pytest.approx(float(chances_V[target])), pytest.approx(float(chances_V[against])))
    assert math.log(after / before) - math.log(other_after / other) == pytest.approx(one.free, abs=1e-4)
    assert len(one.latents) == 8
    assert {id.split("_")[2] for id in one.latents} == {"3"}  # where ' [' is
    assert len(one.random) == 20
    assert one.predicted != 0
    content = json.loads(shown.path.read_text())
    there = {node["node_id"] for node in content["nodes"]}
    (name, *group), *_ = content["qParams"]["supernodes"]
    assert name == "latents at ' ['"
    assert set(group) == set(one.latents) & there
    assert set(group) <= set(content["qParams"]["pinnedIds"])
    text = show_cases([shown])
    assert told(CASE, one) in text
    (row,) = [line for line in text.splitlines() if line.startswith("8 at ' ['")]
    assert row.split()[-3:] == [f"{each:+.2f}" for each in (one.predicted, one.held, one.free)]


def test_what_is_there_stays_and_what_is_of_others_does_not(run: Path, shown: Shown) -> None:
    before = shown.path.stat().st_mtime_ns
    assert graphs(run, [CASE], "s") == [shown]
    assert shown.path.stat().st_mtime_ns == before
    shown.path.write_text(shown.path.read_text().replace('"weights": "', '"weights": "of-others-'))
    assert graphs(run, [CASE], "s") == [shown]  # made anew, and the same
    assert shown.path.stat().st_mtime_ns != before


def test_the_command_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "circuits", "--help"])
    assert "runs/demo-circuits" in re.sub(r"\s+", " ", capsys.readouterr().out).replace("- ", "-")
    made = stages(Path("runs/x"))
    assert made.train is not None
    specs = grid(made.train, 256, made.train.places(made.harvest.hooks))
    assert [spec.set for spec in specs] == [SET] * 4


def test_lines_of_a_picture_are_as_broad_as_the_walks_that_take_them() -> None:
    """Of the logit's two edges, 1 and -3, a quarter and three quarters; each latent has one of its token."""
    graph = copy.deepcopy(A_GRAPH)
    graph["nodes"][1]["clerp"] = "<b> &"
    graph["metadata"]["prompt_tokens"][0] = "\n       "
    graph["qParams"] = {"supernodes": [["pair", "0_7_1", "0_8_1"]]}
    drawn = picture(graph, ["a < b"])
    lines = re.findall(r'<path class="(\w+)" stroke-width="([\d.]+)".*?<title>([\d.]+%)', drawn)
    assert [(way, share) for way, _, share in lines] == [("up", "25.0%"), ("down", "75.0%"), ("up", "100.0%")]
    assert float(lines[1][1]) == pytest.approx(3 * float(lines[0][1]))
    assert "&lt;b&gt; &amp;" in drawn
    assert ">pair<" in drawn
    assert ">a &lt; b<" in drawn
    assert ">↵7␣<" in drawn
    assert "L0/8" in drawn
    assert "L0/7" not in picture(graph, latents=1)
