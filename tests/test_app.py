"""The app's pages, run without a browser: their logic, and what they say of what is missing."""

import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from streamlit.testing.v1 import AppTest
from test_circuit_view import A_GRAPH

from saebench.bench.results import Figure, Results
from saebench.bench.stability import RETURNS
from saebench.browse.runs import saes_of
from saebench.browse.serve import app_script
from saebench.browse.why import Explaining, Question
from saebench.evaluate import EvalConfig, evaluate
from saebench.files import hash_files, read_json, write_json
from saebench.index import open_feature_index
from saebench.index.notes import Note, Notes
from saebench.sae import weights_of
from saebench.steer import open_bench
from saebench.view.charts import density_histogram

SAE = "topk-k4"


@pytest.fixture
def opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Opens a page on the run, or on another root."""
    monkeypatch.syspath_prepend(str(app_script().parent))
    monkeypatch.chdir(run.parent)
    # Streamlit puts the app in the place of the main module, which a process spawned by a later test would run.
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])

    def open_page(page: str, /, root: Path = run, **parameters: str) -> AppTest:
        monkeypatch.setenv("SAEBENCH_APP_ROOT", str(root))
        app = AppTest.from_file(str(app_script()), default_timeout=60)
        app.query_params.update(parameters)
        app.switch_page(f"views/{page}.py")
        return app.run()

    return open_page


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run of one's own to break."""
    return Path(shutil.copytree(run, tmp_path / "copied"))


def said(app: AppTest) -> str:
    """All that a page says in words."""
    parts = [*app.title, *app.error, *app.warning, *app.info, *app.caption, *app.markdown, *app.subheader]
    return bare("\n".join(str(part.value) for part in parts))


def bare(markdown: str) -> str:
    """Without the backslashes that keep it from being markup."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown)


@pytest.mark.parametrize(
    "page", ["overview", "features", "texts", "map", "prompt", "steering", "compare", "diff", "circuits", "bench"]
)
def test_every_page_opens_without_an_error(opened: Any, page: str) -> None:
    app = opened(page)
    assert not app.exception
    assert not app.error


def test_what_a_page_is_about_stands_at_its_head(opened: Any) -> None:
    heads = {
        page: opened(page, **more).title[0].value
        for page, more in (
            ("overview", {}), ("features", {"sae": SAE}), ("features", {"sae": "topk-k2", "latent": "7"}), ("prompt", {}),
        )
    }  # fmt: skip
    assert heads == {"overview": "tiny", "features": "Latent 7", "prompt": "Prompt"}
    assert opened("features", sae=SAE).title[0].value == SAE


def test_without_a_run_the_overview_says_how_to_make_one(opened: Any, tmp_path: Path) -> None:
    app = opened("overview", root=tmp_path / "nothing")
    assert app.title[0].value == "No run yet"
    assert "saebench demo --out" in said(app)
    for page in ("features", "texts", "map", "prompt", "steering", "compare", "diff", "circuits", "bench"):
        other = opened(page, root=tmp_path / "nothing")
        assert not other.exception
        assert other.info or other.warning


def test_an_sae_without_an_index_is_told_how_to_get_one(opened: Any) -> None:
    for page in ("features", "prompt"):
        app = opened(page, sae="relu-l0-4")
        assert not app.exception
        assert "saebench index --sae" in said(app)
    assert "strengths can only be given raw" in said(opened("steering", sae="relu-l0-4", turns="3:add:12"))


def test_without_an_index_a_latent_is_added_in_raw_units(opened: Any) -> None:
    app = opened("steering", sae="relu-l0-4", turns="3:add:0.5n")
    assert "the median norm is not known without an index" in bare(app.error[0].value)
    assert {"Remove", "Generate", "Stop"} <= {button.label for button in app.button}
    assert next(button for button in app.button if button.label == "Generate").disabled
    raw = next(field for field in app.number_input if field.label == "Raw")
    raw.set_value(12.0)
    app.run()
    assert not app.error
    assert app.query_params["turns"] == "3:add:12"
    assert not next(button for button in app.button if button.label == "Generate").disabled


def test_latents_of_several_saes_are_turned_together(opened: Any) -> None:
    app = opened("steering", sae=SAE, turns="3:add:0.5n,5@topk-k2:add:1n,7@relu-l0-4:add:12,9@gone:add:1")
    assert "no SAE 'gone' lies beside" in bare(app.error[0].value)
    assert "**Latent 5** of topk-k2" in said(app)
    assert "no name" in said(app)  # of the one that has no index
    [button for button in app.button if button.label == "Remove"][3].click()
    app.run()
    assert not app.error
    assert "'3:add:0.5n,5@topk-k2:add:1n,7@relu-l0-4:add:12'" in app.code[0].value
    next(box for box in app.selectbox if box.label == "of SAE").set_value("topk-k2")
    next(box for box in app.text_input if box.label == "Add a latent").set_value("11")
    app.run()
    assert not app.exception
    assert not app.error
    assert app.session_state["added of"] == "topk-k2"
    next(button for button in app.button if button.label == "Generate").click()
    app.run()
    assert not app.error
    live = app.session_state["made"].live
    assert live.wait(60.0)
    assert live.error is None
    assert len(live.result.texts) == 4


def test_the_map_is_offered_shown_with_what_it_keeps_and_made_again_for_another_sae(opened: Any, copy: Path) -> None:
    assert f"saebench map --sae {copy / 'saes' / SAE}" in said(opened("map", root=copy, sae=SAE))
    with open_feature_index(copy / "index" / f"{SAE}.h5", need_store=False) as index:
        density, sae = index.columns["density"], index.identity["sae"]
    places = [[float(latent), 0.0] for latent in range(48)]
    path = copy / "index" / f"{SAE}.map.json"
    made = {"schema": "saebench-map", "schema_version": 1, "sae": sae, "recall": 0.25, "places": places}
    write_json(path, made)
    app = opened("map", root=copy, sae=SAE)
    assert not app.error
    assert "25% are among its 20 nearest here (by chance 42.6%): most neighbours are lost" in said(app)
    assert f"{(density == 0).sum()} latents that never fire are left out" in said(app)
    for wrong, words in (
        ({"sae": "0"}, "was made from another sae: it says 0"),
        ({"places": places[1:]}, "holds places (47, 2); expected (48, 2)"),
        ({"places": "x"}, "holds no places of latents"),
        ({"schema_version": 2}, "is no map of version 1"),
    ):
        write_json(path, made | wrong)
        app = opened("map", root=copy, sae=SAE)
        assert words in bare(app.error[0].value)
        assert any(button.label == "Make the map" for button in app.button)


def test_one_bad_intervention_leaves_the_others_and_their_controls(opened: Any) -> None:
    app = opened("steering", sae=SAE, turns="99999:add:1,12:add:0.5n")
    assert "latent is 99999; the SAE has 0 to 47" in bare(app.error[0].value)
    assert [button.label for button in app.button].count("Remove") == 2
    next(button for button in app.button if button.label == "Remove").click()
    app.run()
    assert not app.error
    assert app.query_params["turns"] == "12:add:0.5n"


def test_an_index_that_cannot_be_read_is_named_and_its_sae_stays(opened: Any, copy: Path) -> None:
    (copy / "index" / f"{SAE}.h5").write_bytes(b"\x89HDF\r\n\x1a\n cut")
    app = opened("features", root=copy, sae=SAE)
    assert not app.exception
    assert app.title[0].value == SAE
    assert "cannot be read" in bare(app.error[0].value)
    assert "delete it and index again" in bare(app.error[0].value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluation.json", "[]"), ("evaluation.json", '{"fvu": 1}'), ("cfg.json", "[1]"),
        ("cfg.json", '{"architecture": "topk", "metadata": null}'),
        ("cfg.json", '{"architecture": "topk", "metadata": {"saebench": null}}'),
    ],
)  # fmt: skip
def test_one_sae_with_nonsense_for_a_file_leaves_the_others(opened: Any, copy: Path, file: str, content: str) -> None:
    (copy / "saes" / "topk-k2" / file).write_text(content)
    app = opened("overview", root=copy, sae=SAE)
    assert not app.exception
    assert app.title[0].value == "copied"


def test_refitted_figures_have_a_table_of_their_own(opened: Any, copy: Path) -> None:
    assert "Refitted" not in said(opened("overview", root=copy))
    evaluate(EvalConfig(run=copy, tokens=480, dead_rows=480, refit=True))
    app = opened("overview", root=copy)
    assert not app.exception
    assert "Refitted" in said(app)


def test_metrics_that_are_none_name_their_file(opened: Any, copy: Path) -> None:
    path = copy / "saes" / "topk-k2" / "metrics.jsonl"
    path.write_text("[1, 2]\n" + path.read_text())
    app = opened("overview", root=copy)
    assert not app.exception
    assert "line 1 of" in bare(app.error[0].value)
    assert "metrics.jsonl is no line of metrics" in bare(app.error[0].value)


def test_weights_that_cannot_be_read_are_said_where_they_are_needed(opened: Any, copy: Path) -> None:
    (copy / "saes" / SAE / "sae_weights.safetensors").write_bytes(b"junk")
    for page in ("features", "prompt", "steering"):
        app = opened(page, root=copy, sae=SAE, latent="3", text="the cat", turns="3:add:1")
        assert not app.exception
        assert app.error


def test_a_sweep_that_is_none_is_named(opened: Any, copy: Path) -> None:
    (copy / "sweeps").mkdir()
    (copy / "sweeps" / f"{SAE}-3-add.json").write_text('{"a": 1}')
    app = opened("steering", root=copy, sae=SAE, turns="3:add:0.5n")
    assert not app.exception
    assert "is no dose-response: measure again" in bare(app.error[0].value)


def test_an_sae_is_compared_with_one_of_another_run_and_one_of_another_hook_is_not(
    opened: Any, run: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        shutil.copytree(run, tmp_path / "runs" / name)
    app = opened("compare", root=tmp_path / "runs", run="one", sae=SAE, other=f"two/{SAE}")
    assert not app.exception
    assert not app.error
    box = next(box for box in app.selectbox if "against" in box.label)
    assert (box.value, box.options) == (f"two/{SAE}", ["topk-k2", "two/topk-k2", f"two/{SAE}"])
    assert "48 latents, the first 48 of them" in said(app)  # each is its own counterpart
    assert "latents have a mean cosine (PW-MCC) of 1.000" in said(app)
    other = Path(shutil.copytree(run, tmp_path / "runs" / "three"))
    with h5py.File(other / "index" / f"{SAE}.h5", "r+") as file:
        file.attrs["ends"] = json.dumps([["blocks.0.hook_resid_post"]] * 2)
    config = read_json(other / "saes" / "topk-k2" / "cfg.json")
    config["metadata"]["hook_name"] = "blocks.0.hook_resid_post"
    write_json(other / "saes" / "topk-k2" / "cfg.json", config)
    app = opened("compare", root=tmp_path / "runs", run="one", sae=SAE, other=f"three/{SAE}")
    assert "differ in hook: blocks.1.hook_resid_post and blocks.0.hook_resid_post; index both on one" in said(app)
    assert "and so not compared: three/topk-k2 (blocks.0.hook_resid_post)." in said(app)


def test_compare_shows_what_a_bench_has_found_since(opened: Any, copy: Path) -> None:
    words = "latents have a mean cosine (PW-MCC) of "
    before = said(opened("compare", root=copy, sae=SAE, other="topk-k2")).partition(words)[2]
    assert before
    assert not before.startswith("0.125")
    weights = [hash_files(weights_of(copy / "saes" / name)) for name in (SAE, "topk-k2")]
    found = [Figure(SAE, "pair", "pw_mcc", None, 0.125, n=7)]
    found += [Figure(SAE, "pair", "returning", least, 0.5) for least in RETURNS]
    Results(copy / "bench/stability.json", "stability").put("pair", {"weights": weights}, found)
    assert f"7 {words}0.125" in said(opened("compare", root=copy, sae=SAE, other="topk-k2"))


def test_what_the_address_asks_for_in_vain_is_said(opened: Any) -> None:
    assert "sae 'nothing' is not here" in said(opened("features", sae="nothing"))


@pytest.mark.parametrize("more", [{"focus": "99999"}, {"at": "9999"}, {"focus": "1261", "density": "at most 0.1%"}])
def test_a_token_or_latent_that_is_not_in_the_text_is_as_if_it_were_not_there(
    opened: Any, more: dict[str, str]
) -> None:
    app = opened("prompt", sae=SAE, text="the red cat", **more)
    assert not app.exception
    assert not app.error
    assert "Only token" not in said(app)


def test_an_index_being_built_is_shown_as_far_as_it_is(opened: Any, copy: Path) -> None:
    with h5py.File(copy / "index" / f"{SAE}.h5", "r+") as file:
        file.attrs["complete"], file.attrs["share_done"] = False, 0.4
    app = opened("features", root=copy, sae=SAE)
    assert not app.exception
    assert "Indexed so far: 40%" in said(app)
    assert "saebench index --sae" in said(opened("overview", root=copy, sae=SAE))


def test_a_model_that_cannot_be_loaded_leaves_browsing_as_it_is(opened: Any, copy: Path) -> None:
    config = read_json(copy / "saes" / "relu-l0-4" / "cfg.json")
    config["metadata"]["model_name"] = config["metadata"]["saebench"]["store"] = "./no-such-model"
    write_json(copy / "saes" / "relu-l0-4" / "cfg.json", config)
    app = opened("steering", root=copy, sae="relu-l0-4", turns="3:add:1")
    assert not app.exception
    assert "model './no-such-model' is not a directory" in bare(app.error[0].value)
    assert not opened("features", root=copy, sae=SAE, latent="3").error


def test_every_page_refuses_a_model_that_was_replaced_in_place(opened: Any, copy: Path, tmp_path: Path) -> None:
    """Also under the old date, and though it was open before; browsing stays as it is."""
    config = read_json(copy / "saes" / SAE / "cfg.json")
    model = Path(shutil.copytree(config["metadata"]["model_name"], tmp_path / "model"))
    config["metadata"]["model_name"] = str(model)
    write_json(copy / "saes" / SAE / "cfg.json", config)
    pages = {
        "prompt": {"text": "the cat"},
        "steering": {"turns": "3:add:1"},
        "features": {"latent": "3", "try": "the cat"},
    }
    for page, more in pages.items():
        assert not opened(page, root=copy, sae=SAE, **more).error
    weights, when = load_file(model / "model.safetensors"), (model / "model.safetensors").stat()
    save_file({name: value * 1.5 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    os.utime(model / "model.safetensors", ns=(when.st_atime_ns, when.st_mtime_ns))
    for page, more in pages.items():
        app = opened(page, root=copy, sae=SAE, **more)
        assert not app.exception
        assert re.search(r"has weights \w+, store .* was made with \w+: use the model", bare(app.error[0].value))
    assert not opened("features", root=copy, sae=SAE, latent="3").error


def test_an_sae_that_was_trained_again_is_noticed_whatever_its_files_are_dated(opened: Any, copy: Path) -> None:
    path = copy / "saes" / "relu-l0-4" / "sae_weights.safetensors"
    opened("steering", root=copy, sae="relu-l0-4", turns="3:add:12")
    from opened import bench_of, weights_of  # the app's own, once it is on the path

    sae = saes_of(copy)[0]["relu-l0-4"]
    before, (bench, _) = weights_of(sae), bench_of(sae)
    assert bench.sae is before  # nothing is moved or copied
    assert weights_of(sae) is before
    weights, when = load_file(path), path.stat()
    save_file({name: value * 2 for name, value in weights.items()}, path)
    os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert torch.equal(weights_of(sae).W_dec, before.W_dec * 2)
    assert bench_of(sae)[0].key != bench.key


def test_a_circuit_is_shown_with_the_inputs_of_a_node(opened: Any, copy: Path) -> None:
    write_json(copy / "circuits/g.json", A_GRAPH)
    app = opened("circuits", root=copy, node="0_7_1")
    assert not app.exception
    assert "a prompt" in app.code[0].value
    shown = said(app)
    assert "L0/7 <b>bold</b> at ' cat' (1)" in shown
    assert "the first token raises it" in shown
    assert "latent=7" in shown
    (copy / "circuits/g.json").write_text("{}")
    assert "is no graph that `saebench circuits` wrote" in bare(opened("circuits", root=copy).error[0].value)


def test_a_circuits_nodes_are_pinned_and_grouped_on_its_page(opened: Any, copy: Path) -> None:
    path = copy / "circuits/g.json"
    tried = {"acts": "warm*0", "constrained": True, "groups": [], "effects": [["warm <b>", 2.0, 0.0, -0.0, 1.0]]}
    own = A_GRAPH["metadata"]["saebench"] | {"interventions": [tried]}
    write_json(path, A_GRAPH | {"metadata": A_GRAPH["metadata"] | {"saebench": own}})
    app = opened("circuits", root=copy, node="0_7_1")
    assert app.expander[0].label == r"**warm\*0, other latents up to its layers held**"
    next(button for button in app.button if button.label == "Pin").click().run()
    assert read_json(path)["qParams"] == {"pinnedIds": ["0_7_1"], "supernodes": []}
    group = next(box for box in app.selectbox if box.label == "Group")
    group.options.append("warm")  # as one is typed
    group.select("warm").run()
    assert not app.exception
    assert read_json(path)["qParams"]["supernodes"] == [["warm", "0_7_1"]]
    assert app.query_params["node"] == "group:warm"
    assert "warm: 1 node together" in said(app)
    assert "The groups were others then" in said(app)
    assert any(f"circuits --run {copy} --name g --intervene 'warm*0'" in bare(one.value) for one in app.caption)
    next(button for button in app.button if button.label == "Unpin").click().run()
    next(button for button in app.button if button.label == "Forget").click().run()
    assert not app.exception
    assert read_json(path)["qParams"] == {"pinnedIds": [], "supernodes": []}
    assert read_json(path)["metadata"]["saebench"]["interventions"] == []


def test_what_benches_found_is_shown_with_its_intervals(opened: Any, copy: Path) -> None:
    results = Results(copy / "bench/synthetic.json", "synthetic")
    for seed, f1 in enumerate((0.5, 0.6, 0.7)):
        figures = [
            Figure("<b>topk</b>", "synthetic", "f1", None, f1),
            Figure("<b>topk</b>", "synthetic", "mcc", None, None),
        ]
        results.put(
            f"mini-topk-l0-6-seed{seed}", {"seed": seed}, [*figures, Figure("oracle", "synthetic", "f1", None, 1.0)]
        )
    app = opened("bench", root=copy)
    assert not app.exception
    assert "Synthetic: train on data with known features" in said(app)
    (chart,) = (json.loads(chart.proto.spec) for chart in app.get("plotly_chart"))
    bar = chart["data"][0]
    assert (bar["name"], bar["x"], bar["y"]) == (
        "&lt;b&gt;topk&lt;/b&gt;",
        [pytest.approx(0.6)],
        ["&lt;b&gt;topk&lt;/b&gt;"],
    )
    assert bar["error_x"]["array"] == [pytest.approx(0.2484, abs=1e-3)]
    (copy / "bench/synthetic.json").write_text("{}")
    assert "expected 'synthetic', version 1: move it away" in bare(opened("bench", root=copy).error[0].value)


def test_what_an_evaluation_can_tell_is_on_the_page_of_benches(opened: Any, copy: Path) -> None:
    summary = read_json(copy / "summary.json")
    found = {"fvu": {"topk": {"values": [0.2, 0.1], "halves": [0.01, 0.02], "mean": 0.15, "behind": 0.0, "behind_half": 0.0},
                     "<i>relu</i>": {"values": [0.3, 0.2], "halves": [None, None], "mean": 0.25, "behind": 0.1, "behind_half": 0.2}}}  # fmt: skip
    summary["equal_l0"] = [{"hook": "h", "d_sae": 8, "store": "s", "l0s": [16.0, 32.0], "figures": found}]
    write_json(copy / "summary.json", summary)
    app = opened("bench", root=copy)
    assert not app.exception
    assert not app.error
    (chart,) = (json.loads(chart.proto.spec) for chart in app.get("plotly_chart"))
    lines = {line["name"]: line for line in chart["data"]}
    assert lines.keys() == {"topk", "&lt;i&gt;relu&lt;/i&gt;"}
    assert (lines["topk"]["x"], lines["topk"]["y"]) == ([16, 32], [0.2, 0.1])
    assert lines["topk"]["error_y"]["array"] == [pytest.approx(0.01), pytest.approx(0.02)]
    assert "Least differences" in said(app)
    assert "FVU at equal L0" in said(app)
    (copy / "summary.json").write_text("[]")
    assert opened("bench", root=copy).error


def test_of_a_store_that_is_gone_figures_and_logits_still_show(opened: Any, run: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(run.parent.parent, tmp_path / "moved"))
    config = read_json(whole / "runs" / "tiny" / "saes" / SAE / "cfg.json")
    with h5py.File(whole / "runs" / "tiny" / "index" / f"{SAE}.h5", "r+") as file:
        file.attrs["store"] = str(whole / "store")
    config["metadata"]["saebench"]["store"] = str(whole / "store")
    write_json(whole / "runs" / "tiny" / "saes" / SAE / "cfg.json", config)
    assert not opened("features", root=whole / "runs", sae=SAE, latent="3").warning
    shutil.rmtree(whole / "store")
    app = opened("features", root=whole / "runs", sae=SAE, latent="3")
    assert not app.exception
    assert not app.error
    assert "Its store is gone" in bare(app.warning[0].value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"latent": "99999999"}, {"latent": "-1"}, {"latent": "<script>"}, {"sort": "nonsense.desc"}, {"page": "9" * 30},
        {"page": "-3"}, {"size": "7"}, {"sae": "../../etc"}, {"run": "../.."}, {"having": "nonsense"}, {"rule": "nan"},
    ],
)  # fmt: skip
def test_absurd_parameters_are_as_if_they_were_not_there(opened: Any, parameters: dict[str, str]) -> None:
    app = opened("features", **parameters)
    assert not app.exception
    assert not app.error
    assert app.title[0].value in ("topk-k2", SAE)


@pytest.mark.parametrize("turns", ["x", "1:push:2", "1:add:2:3", "99999:add:0.5n", "1:add:much"])
def test_interventions_that_cannot_be_read_are_named(opened: Any, turns: str) -> None:
    app = opened("steering", sae=SAE, turns=turns)
    assert not app.exception
    assert len(app.error) == 1
    assert "expected" in bare(app.error[0].value) or "the SAE has 0 to 47" in bare(app.error[0].value)


def test_a_prompt_longer_than_the_context_is_told_so(opened: Any) -> None:
    app = opened("prompt", sae=SAE, text="cat dog " * 200)
    assert not app.exception
    assert "the model takes at most 64" in bare(app.error[0].value)


def test_a_bar_of_the_densities_is_a_filter_of_the_table(opened: Any, run: Path) -> None:
    density = open_feature_index(run / "index" / f"{SAE}.h5").columns["density"]
    (bar,) = density_histogram(density, SAE).data
    assert sum(bar.y) == (density > 0).sum()
    place = int(np.argmax(bar.y))
    app = opened("features", sae=SAE, between=bar.customdata[place])
    assert f"{bar.y[place]} of 48 latents, page 1" in said(app)
    next(button for button in app.button if button.label == "Any density").click()
    assert "48 of 48 latents" in said(app.run())
    assert "48 of 48 latents" in said(opened("features", sae=SAE, between="nan_inf"))


def test_a_text_is_ranked_and_a_token_chosen(opened: Any) -> None:
    app = opened("prompt", sae=SAE, text="the red cat sees", rank="Attribution", at="2")
    assert not app.error
    assert "What follows token 2" in said(app)
    assert "Attributed to the logit of" in said(app)
    assert re.search(r"the SAE's error [+-][\d.]+ \(\d+%\), BOS and massive activations", said(app))
    {field.label: field for field in app.text_input}["Token"].input("·dog")
    app.run()
    assert not app.error
    assert "Attributed to the logit of `·dog`" in said(app)
    {field.label: field for field in app.text_input}["Compared with"].input("dog cat")
    app.run()
    assert "expected one" in said(app)


def test_what_the_model_says_next_is_told_in_the_end_and_at_each_layer(opened: Any) -> None:
    for lens in ("false", "true"):
        app = opened("prompt", sae=SAE, text="the red cat sees", at="2", lens=lens)
        assert not app.exception
        assert not app.error
        assert "**The model's next token** after `·red`" in said(app)


def test_latents_are_found_by_what_their_examples_hold(opened: Any) -> None:
    app = opened("texts", sae=SAE, holds="<SCRIPT>")
    assert not app.exception
    assert not app.error
    assert re.search(r"\d+ of 48 latents", said(app))
    assert "No strongest example of any latent holds that" in said(opened("texts", sae=SAE, holds="no such words"))


def test_two_texts_are_told_apart(opened: Any) -> None:
    app = opened("prompt", sae=SAE, text="the red cat sees", other="the blue dog runs", two="true")
    assert not app.exception
    assert not app.error
    assert "the difference of their strongest activations on the two" in said(app)
    assert "Type or paste two texts" in said(opened("prompt", sae=SAE, text="the red cat", two="true"))


def test_a_text_is_passed_through_the_model_once_until_what_it_depends_on_changes(opened: Any, copy: Path) -> None:
    words = {"sae": SAE, "text": "the red cat sees", "rank": "Attribution"}
    app = opened("prompt", root=copy, **words)
    shown = said(app)
    from opened import model_of  # the app's own, once it is on the path

    with model_of(saes_of(copy)[0][SAE]).lock:  # no pass can run meanwhile
        again = opened("prompt", root=copy, **words)
        assert not again.exception
        assert said(again) == shown
    for folder, name in (("saes", "sae_weights.safetensors"), ("saes", "cfg.json")):
        shutil.copy(copy / folder / "topk-k2" / name, copy / folder / SAE / name)
    (copy / "index" / "topk-k2.h5").replace(copy / "index" / f"{SAE}.h5")  # as a build does: the old one is still open
    other = said(opened("prompt", root=copy, **words))
    assert "Attributed to the logit of" in other
    assert other != shown


def test_a_note_is_written_and_a_second_writer_told(opened: Any, copy: Path) -> None:
    app = opened("features", root=copy, sae=SAE, latent="3")
    notes = Notes(
        copy / "index" / f"{SAE}.notes.json", hash_files([copy / "saes" / SAE / "sae_weights.safetensors"]), 48
    )
    fields = {field.label: field for field in app.text_input}
    fields["Label"].input("cats")
    fields["Tags"].input("animal, short")
    next(button for button in app.button if button.label == "Save").click()
    app.run()
    assert not app.exception
    assert notes[3] == Note("cats", ("animal", "short"))
    assert app.title[0].value == "Latent 3: cats"
    notes.write(3, Note("dogs"))
    {field.label: field for field in app.text_input}["Label"].input("birds")
    next(button for button in app.button if button.label == "Save").click()
    app.run()
    assert "noted by someone else meanwhile, as 'dogs'" in bare(app.error[0].value)
    assert notes[3] == Note("dogs")
    next(button for button in app.button if button.label == "Discard").click()
    app.run()
    assert {field.label: field for field in app.text_input}["Label"].value == "dogs"
    assert app.title[0].value == "Latent 3: dogs"


def test_a_latent_is_listed_on_its_page_and_the_list_is_a_filter(opened: Any, copy: Path) -> None:
    app = opened("features", root=copy, sae=SAE, latent="7")
    {field.label: field for field in app.multiselect}["Lists"].set_value(["to steer"])
    assert not app.run().error
    assert read_json(copy / "index" / f"{SAE}.lists.json")["lists"] == {"to steer": [7]}
    table = opened("features", root=copy, sae=SAE, list="to steer")
    assert "1 of 48 latents" in said(table)
    assert "to steer: 1 latent" in said(table)
    next(button for button in table.button if button.label == "Delete").click()
    assert "48 of 48 latents" in said(table.run())
    (copy / "index" / f"{SAE}.lists.json").write_text("{}")
    assert "is not a file of lists of latents" in said(opened("features", root=copy, sae=SAE))


def test_what_is_not_saved_stays_while_one_looks_around(opened: Any, copy: Path) -> None:
    app = opened("features", root=copy, sae=SAE, latent="3")
    {field.label: field for field in app.text_input}["Label"].input("half a thou")
    next(button for button in app.button if button.label == "Next").click()
    app.run()
    assert app.title[0].value == "Latent 4"
    assert {field.label: field for field in app.text_input}["Label"].value == ""
    next(button for button in app.button if button.label == "Previous").click()
    app.run()
    assert {field.label: field for field in app.text_input}["Label"].value == "half a thou"
    assert "not saved yet" in said(app)
    {field.label: field for field in app.text_input}["Tags"].input("a, b, a")
    next(button for button in app.button if button.label == "Save").click()
    app.run()
    assert "not saved yet" not in said(app)
    notes = Notes(
        copy / "index" / f"{SAE}.notes.json", hash_files([copy / "saes" / SAE / "sae_weights.safetensors"]), 48
    )
    assert notes[3] == Note("half a thou", ("a", "b"))


def test_markup_in_a_label_or_an_error_is_shown_as_it_is(opened: Any, copy: Path) -> None:
    hostile = "[a](http://b) $x$ **c** :material/home: <b>"
    notes = Notes(
        copy / "index" / f"{SAE}.notes.json", hash_files([copy / "saes" / SAE / "sae_weights.safetensors"]), 48
    )
    notes.write(3, Note(hostile))
    app = opened("features", root=copy, sae=SAE, latent="3")
    assert bare(app.title[0].value) == f"Latent 3: {hostile}"
    assert not re.search(
        r"(?<!\\)[\[$*:<]", app.title[0].value.removeprefix("Latent 3: ").replace("\\:", "").replace(": ", "")
    )
    error = opened("steering", sae=SAE, turns="**x**").error[0].value
    assert "**" not in error
    assert "'**x**' is no intervention" in bare(error)


def test_whoever_has_a_models_turn_has_its_threads_and_has_it_alone(opened: Any) -> None:
    opened("overview")
    from opened import Turn  # the app's own, once it is on the path

    turn, usual, seen = Turn(3), torch.get_num_threads(), []

    def take() -> None:
        with turn:
            seen.append(torch.get_num_threads())

    with turn:
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.1)
        assert (torch.get_num_threads(), seen) == (3, [])
    thread.join()
    assert (torch.get_num_threads(), seen) == (usual, [3])


def test_a_broken_sae_is_named_and_the_others_stay(opened: Any, copy: Path) -> None:
    (copy / "saes" / "topk-k2" / "cfg.json").write_text("{")
    app = opened("overview", root=copy)
    assert not app.exception
    assert "topk-k2 cannot be read" in said(app)
    assert app.title[0].value == "copied"


@pytest.mark.parametrize("page", ["features", "prompt", "compare"])
def test_an_error_of_any_kind_is_said_in_words_and_its_traceback_logged(
    opened: Any, copy: Path, page: str, caplog: pytest.LogCaptureFixture
) -> None:
    with h5py.File(copy / "index" / f"{SAE}.h5", "r+") as file:
        del file["latents/density"]
    app = opened(page, root=copy, sae=SAE, text="the cat", latent="3")
    assert not app.exception
    assert "This is a fault of the app (" in bare(app.error[0].value)
    assert "Load the page again" in bare(app.error[0].value)
    assert "Traceback" not in said(app)
    assert "Traceback" in caplog.text


def test_notes_edited_into_nonsense_are_named(opened: Any, copy: Path) -> None:
    (copy / "index" / f"{SAE}.notes.json").write_text("[]")
    app = opened("features", root=copy, sae=SAE)
    assert not app.exception
    assert "is not a file of notes" in bare(app.error[0].value)


def test_another_sae_under_the_name_of_the_indexed_one_is_refused(opened: Any, copy: Path) -> None:
    shutil.copy(copy / "saes" / "topk-k2" / "sae_weights.safetensors", copy / "saes" / SAE / "sae_weights.safetensors")
    app = opened("features", root=copy, sae=SAE)
    assert "was made from another sae" in bare(app.error[0].value)


def test_the_script_is_found_and_starts_offline() -> None:
    config = (app_script().parent / ".streamlit" / "config.toml").read_text()
    assert "gatherUsageStats = false" in config
    assert 'address = "localhost"' in config
    assert os.access(app_script(), os.R_OK)


def an_example(run: Path) -> tuple[int, int]:
    """(a latent of the SAE, the row of its strongest firing that has some tokens before it)."""
    with open_feature_index(run / "index" / f"{SAE}.h5") as index:
        for latent in range(index.d_sae):
            found = index[latent]
            if found.top and index.context_of(found.top[0].row).peak > 4:
                return latent, found.top[0].row
    raise AssertionError


def explained(app: AppTest) -> AppTest:
    """The page once what it explains is found."""
    assert app.session_state["explaining"].wait(60.0)
    return app.run()


def test_why_an_example_fires_is_in_the_address(opened: Any, run: Path) -> None:
    latent, row = an_example(run)
    asked = {"sae": SAE, "latent": str(latent), "why": f"{latent}:{row}", "units": "3"}
    app = explained(opened("features", **asked))
    assert not app.exception
    assert not app.error
    found = app.session_state["explaining"].result
    assert (found.scalar, len(found.units), found.way) == (f"latent {latent}", 3, "unattended")
    assert f"**latent {latent}** is **{found.whole:.3g}**" in said(app)
    assert "the 3 that matter most of the" in said(app)
    assert f"{found.agreement:.0%} of all that count under either way" in said(app)
    assert "in all 8 maskings at R²" in said(app)
    # The same question is answered once; another way of masking is another question.
    again = app.session_state["explaining"]
    app.run()
    assert app.session_state["explaining"] is again
    next(box for box in app.selectbox if box.label == "A masked one is").set_value("neutral")
    app = explained(app.run())
    assert app.session_state["explaining"].result.way == "neutral"
    assert "replaced by a neutral token" in said(app)
    for wrong in (f"{latent + 1}:{row}", f"{latent}:{10**9}", f"{latent}:x", "", f"{latent}:{row}:1:1"):
        app = opened("features", **(asked | {"why": wrong}))
        assert not app.error
        assert "Sets shown" not in {slider.label for slider in app.slider}


def test_why_one_of_your_own_lines_fires(opened: Any, run: Path) -> None:
    latent, row = an_example(run)
    with open_feature_index(run / "index" / f"{SAE}.h5") as index:
        context = index.context_of(row, 6)
        line = "".join(context.pieces[: context.peak + 1]).replace("\n", " ")
    asked = {"sae": SAE, "latent": str(latent), "try": f"the cat\n{line}"}
    app = explained(opened("features", **asked, why=f"{latent}:1:1"))
    # The first token after BOS has nothing before it that may be masked.
    assert "there is nothing to mask before token 1" in bare(app.error[0].value)
    app = opened("features", **asked, why=f"{latent}:9:1")  # a line that there is not is as if it were not asked about
    assert not app.error


def test_why_a_token_comes_next_and_not_another(opened: Any) -> None:
    app = explained(opened("prompt", sae=SAE, text="the red cat sees a", explain="true", units="3"))
    assert not app.error
    assert "log p(" in said(app)
    assert "in all 8 maskings at R²" in said(app)
    other = next(box for box in app.text_input if box.label == "Rather than")
    other.set_value("·dog")
    app = explained(app.run())
    assert "− log p(' dog')" in said(app)
    next(box for box in app.text_input if box.label == "Next token").set_value("two tokens")
    app.run()
    assert "expected one: a leading space, written ·" in bare(app.error[0].value)


def test_a_stopped_explanation_is_begun_again_when_it_is_wanted(run: Path) -> None:
    lock, bench = threading.Lock(), open_bench(run / "saes" / SAE, device="cpu")
    tokens = tuple(bench.model.tokens_of("the red cat sees a blue dog"))
    question = Question(tokens, token=40, n=3)
    with lock:  # somebody else's turn
        found = Explaining(bench, question, lock)
        assert not found.wait(0.1)
        found.stop()
        assert (found.done, found.stopped, found.result) == (True, True, None)
    again = Explaining(bench, question, lock)
    assert again.wait(60.0)
    assert (again.stopped, again.error, again.share) == (False, None, 1.0)
    assert again.result is not None
    assert len(again.result.values) == 8
    assert not lock.locked()
    refused = Explaining(bench, question._replace(n=13), lock)
    assert refused.wait(60.0)
    assert (refused.error or "").startswith("n is 13")
    assert not lock.locked()
