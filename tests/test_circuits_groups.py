"""Circuits: pins and groups outlive the graph that they are of, and an intervention on a group is what its latents do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_circuits import TEXT, WIDTH, models, replaced, saved_run, traced

from saebench.circuits import (
    CircuitConfig,
    Marks,
    Replacement,
    change_marks,
    circuits,
    effects,
    marks_of,
    measured,
    parse_acts,
    parse_groups,
    predicted,
    read_circuit,
)
from saebench.circuits.export import node_ids
from saebench.circuits.influence import influence_of
from saebench.circuits.interventions import Act, clamp_of
from saebench.circuits.opened import open_set
from saebench.cli import main
from saebench.files import read_json, write_json
from saebench.models import LanguageModel
from saebench.sae.formats.circuit_tracer import members as set_files

__all__ = ["models"]  # the fixture


def test_a_node_is_in_one_group_and_pinned() -> None:
    marks = Marks(("a",)).grouped({"one": ("a", "b", "b"), "two": ("c",)})
    assert marks.groups == {"one": ("a", "b"), "two": ("c",)}
    assert marks.pins == ("a", "b", "c")
    moved = marks.grouped({"two": ("b", "c")})
    assert moved.groups == {"one": ("a",), "two": ("b", "c")}
    assert moved.grouped({"one": ()}).groups == {"two": ("b", "c")}
    assert moved.unpinned("a") == Marks(("b", "c"), {"two": ("b", "c")})
    assert moved.params() == {"pinnedIds": ["a", "b", "c"], "supernodes": [["one", "a"], ["two", "b", "c"]]}
    with pytest.raises(ValueError, match=r"g.json: node 'c' of group 'two' is not in the graph"):
        moved.check(["a", "b"], Path("g.json"))


def test_what_a_viewer_saves_is_read() -> None:
    """circuit-tracer's has them as in an address, and calls every group the same."""
    where, groups = Path("g.json"), [["supernode", "a"], ["supernode", "b", "c"]]
    for params in (
        {"pinnedIds": ["a", "b"], "supernodes": groups},
        {"pinnedIds": "a,b", "supernodes": json.dumps(groups)},
    ):
        marks = marks_of(params, where)
        assert marks == Marks(("a", "b", "c"), {"supernode": ("a",), "supernode 2": ("b", "c")})
        assert marks_of(marks.params(), where) == marks
    assert marks_of({}, where) == Marks()
    for wrong in ({"supernodes": "so"}, {"supernodes": [[]]}, {"pinnedIds": [3]}):
        with pytest.raises(ValueError, match=r"g.json: pinnedIds is .* expected ids of nodes"):
            marks_of(wrong, where)


def test_groups_and_interventions_are_written_in_a_line() -> None:
    assert parse_groups("opens = 0_1_2, 1_3_2;a=b=2_2_2; gone=") == {
        "opens": ("0_1_2", "1_3_2"),
        "a=b": ("2_2_2",),
        "gone": (),
    }
    acts = parse_acts("opens*0; a=b=-2.5e1;0_1_2*1.5")
    assert acts == (Act("opens", 0.0), Act("a=b", -25.0, False), Act("0_1_2", 1.5))
    assert parse_acts("; ".join(map(str, acts))) == acts
    for read, text in ((parse_groups, "opens"), (parse_acts, "opens"), (parse_acts, ""), (parse_acts, "a*x")):
        with pytest.raises(ValueError, match="expected NAME"):
            read(text)


def test_an_intervention_on_a_group_is_that_of_its_latents(models: dict[str, LanguageModel]) -> None:
    of = replaced(models["llama"], "clt")
    graph = traced(of)
    ids = node_ids(graph)
    assert len(set(ids)) == len(ids) == graph.adjacency.shape[0]
    nodes = {id: node for node, id in enumerate(ids)}
    first, second, third = influence_of(graph)[: graph.n_latents].topk(3).indices.tolist()
    groups = {"both": (ids[first], ids[second]), "token": (ids[graph.token_nodes.start],)}
    acts = parse_acts(f"both*0.5; {ids[third]}=2")
    clamp = clamp_of(acts, graph, nodes, groups)
    active = graph.latents.activation
    assert clamp == {first: float(active[first]) * 0.5, second: float(active[second]) * 0.5, third: 2.0}
    found = effects(of, graph, clamp, {"both": [first, second]}, lambda node: ids[node])
    both, *others = found
    assert both[:2] == ("both", pytest.approx(float(active[[first, second]].sum())))
    assert both[2:] == pytest.approx([both.before / 2] * 3)
    says, held = predicted(graph, [clamp]), measured(of, graph, [clamp])
    for row in others:
        node = nodes[row.name]
        if node < graph.n_latents:
            want = [float(active[node] + one.latents[0, node]) for one in (says, held)]
        else:
            place = node - graph.edges.shape[1]
            want = [float(graph.values[graph.n_latents + place] + one.logits[0, place]) for one in (says, held)]
        assert [row.predicted, row.held] == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert [row.name for row in others][-len(graph.logits) :] == ids[-len(graph.logits) :]
    assert len(others) == 8 + len(graph.logits)
    for text, message in (
        ("neither*0", r"'neither' is neither a group nor a node of the graph; its groups are 'both', 'token'"),
        ("token*0", "'token' has no latents"),
        (f"both*0; {ids[first]}=3", "a latent of it is set by another"),
    ):
        with pytest.raises(ValueError, match=message):
            clamp_of(parse_acts(text), graph, nodes, groups)


def test_constrained_other_latents_up_to_the_last_layer_stay(models: dict[str, LanguageModel]) -> None:
    """And those behind it answer to what is written alone: with nothing silent or awake, as the graph says."""
    of = replaced(models["qwen3"], "relu+skip")
    graph = traced(of)
    layers = graph.latent_layers
    best = influence_of(graph)[: graph.n_latents].clone()
    early = int(best.masked_fill(layers != 0, -1).argmax())
    middle = int(best.masked_fill(layers != 1, -1).argmax())
    others = (layers <= 1) & ~torch.isin(torch.arange(graph.n_latents), torch.tensor([early, middle]))
    noise = 1e-4 * float(graph.latents.activation.max())
    ablated = {early: 0.0, middle: 0.0}
    for frozen in (True, False):
        free = measured(of, graph, [ablated, {}], frozen=frozen).latents
        held = measured(of, graph, [ablated, {}], frozen=frozen, constrained=True).latents
        assert held[0, others].abs().max() <= noise < 100 * noise < free[0, others].abs().max()
        assert held[1].abs().max() <= noise  # nothing is set, and nothing held
    clamp = {node: 1.0001 * float(graph.latents.activation[node]) for node in (early, middle)}
    says, does = (
        predicted(graph, [clamp], constrained=True),
        measured(of, graph, [clamp], constrained=True),
    )
    assert says.latents[0, others].abs().max() == 0
    assert (says.latents - does.latents).norm() <= 0.05 * says.latents.norm()
    assert (says.logits - does.logits).norm() <= 0.05 * says.logits.norm()
    assert not torch.equal(says.logits, predicted(graph, [clamp]).logits)


@pytest.fixture
def run(models: dict[str, LanguageModel], tmp_path: Path) -> Path:
    return saved_run(tmp_path / "run", models["llama"], "clt")


def test_marks_outlive_their_graph(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"run": run, "set": "s", "prompt": TEXT, "device": "cpu", "target": " cat"}
    made = circuits(CircuitConfig(**settings, nodes=0.6, ablations=1))
    assert made is not None
    path = made.path
    assert path.name == "s-he-red-cat-sees-a-blue-dog-and-then-runs-cat.json"
    few = {node["node_id"] for node in read_circuit(path)["nodes"]}
    silent = next(id for id in node_ids(made.graph)[: made.graph.n_latents] if id not in few)
    with pytest.raises(ValueError, match=f"node '{silent}' is not in the graph"):
        change_marks(path, lambda marks: marks.pinned([silent]))
    command = ["circuits", "--run", str(run), "--device", "cpu", "--name", path.stem]
    one = next(id for id in node_ids(made.graph)[: made.graph.n_latents] if id in few)
    assert main([*command, "--groups", f"pair={silent},{one}", "--intervene", "pair*0", "--constrained"]) == 0
    out = capsys.readouterr().out
    assert "pair*0, other latents up to its layers held" in out
    assert next(line for line in out.splitlines() if line.startswith("pair ")).split()[2:] == ["0.00"] * 3
    content = read_circuit(path)
    assert {silent, *few} <= {node["node_id"] for node in content["nodes"]}  # pinned, whatever its influence
    assert content["qParams"]["supernodes"] == [["pair", silent, one]]
    change_marks(path, lambda marks: marks.grouped({"pair": (), "other": (one,)}).pinned(["E_0_0"]))
    write_json(path, content | {"qParams": read_circuit(path)["qParams"] | {"sg_pos": "1"}})
    again = circuits(CircuitConfig(**settings, name=path.stem, intervene=parse_acts(f"{one}=1")))
    assert again is not None
    content = read_circuit(path)
    assert content["qParams"]["supernodes"] == [["other", one]]
    assert content["qParams"]["sg_pos"] == "1"
    assert [row["acts"] for row in content["metadata"]["saebench"]["interventions"]] == [f"{one}=1"]  # the pair is gone
    assert again.tried[0].effects[0].name == "other"
    graphs = read_json(path.with_name("graph-metadata.json"))["graphs"]
    assert [graph["slug"] for graph in graphs] == [path.stem]


def test_a_graph_is_not_overwritten_by_another(run: Path) -> None:
    settings: dict[str, Any] = {"run": run, "set": "s", "device": "cpu", "name": "g", "ablations": 1}
    first = circuits(CircuitConfig(**settings, prompt="a cat", pin=("E_0_0",)))
    assert first is not None
    with pytest.raises(ValueError, match=r"g.json is a graph of prompt 'a cat', and this one is not; .* --overwrite"):
        circuits(CircuitConfig(**settings, prompt="a dog"))
    with pytest.raises(ValueError, match="is a graph of target None"):
        circuits(CircuitConfig(run=run, name="g", target=" dog", device="cpu"))
    assert circuits(CircuitConfig(**settings, prompt="a dog", overwrite=True)) is not None
    assert read_circuit(first.path)["qParams"]["pinnedIds"] == []
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"name": "no"}, "has no graph 'no'; expected --set and --prompt"),
        ({"prompt": "a cat"}, "--prompt is given, and no --set"),
        ({"name": "graph-metadata", "prompt": "a", "set": "s"}, "name is 'graph-metadata'; expected"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            circuits(CircuitConfig(run=run, **given))
    old = read_circuit(first.path)
    del old["metadata"]["saebench"]["settings"]
    write_json(first.path, old)
    with pytest.raises(ValueError, match="is of a version that did not note how it was made; give --set and --prompt"):
        circuits(CircuitConfig(run=run, name="g"))
    assert circuits(CircuitConfig(**settings, prompt="a dog")) is not None  # and is made anew


@pytest.mark.parametrize("kind", ["jumprelu+skip", "clt"])
def test_a_set_goes_out_and_comes_back_as_circuit_tracers(
    models: dict[str, LanguageModel], tmp_path: Path, kind: str
) -> None:
    """By its folder, its config.yaml, and with files of other names, which that lists: the same graph."""
    run, folder = saved_run(tmp_path / "run", models["llama"], kind), tmp_path / "theirs"
    if kind == "clt":  # what a layer's own part does not write, none does
        for path in (run / "saes").glob("*/sae_weights.safetensors"):
            tensors = load_file(path)
            tensors["b_dec"][WIDTH:] = 0
            save_file(tensors, path)
    settings: dict[str, Any] = {"prompt": "a red cat", "device": "cpu", "name": "g", "ablations": 1}
    ours = circuits(CircuitConfig(run=run, set="s", export=folder, **settings))
    assert ours is not None
    with pytest.raises(ValueError, match="choose another"):
        circuits(CircuitConfig(run=run, set="s", export=folder, **settings))
    theirs = circuits(CircuitConfig(run=tmp_path / "again", set=str(folder), **settings))
    assert theirs is not None
    assert torch.allclose(theirs.graph.edges, ours.graph.edges, atol=1e-4 * float(ours.graph.edges.abs().max()))
    assert theirs.graph.latents.latent.tolist() == ours.graph.latents.latent.tolist()
    assert set_files(folder / "config.yaml") == set_files(folder)
    if kind != "clt":
        listed = tmp_path / "listed"
        listed.mkdir()
        for layer in range(3):
            (listed / f"{'cab'[layer]}.safetensors").write_bytes((folder / f"layer_{layer}.safetensors").read_bytes())
        said = (folder / "config.yaml").read_text()
        (listed / "config.yaml").write_text(f"{said}transcoders: [c.safetensors, a.safetensors, b.safetensors]\n")
        for one, other in zip(open_set(run, str(listed)), open_set(run, str(folder)), strict=True):
            assert one.ends == other.ends
            assert torch.equal(one.sae.W_dec, other.sae.W_dec)
    last = sorted(folder.glob("layer_*" if kind != "clt" else "W_enc_*"))[1]
    last.unlink()
    with pytest.raises(ValueError, match="not of 1; expected layers without a gap|hook_in is missing"):
        Replacement(models["llama"], open_set(run, str(folder), "cpu"), torch.tensor([0, 1]), {})


def test_files_of_a_set_that_lie_elsewhere_are_asked_for(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model_kind: transcoder_set\ntranscoders: [hf://a/b/c.safetensors]\n")
    with pytest.raises(ValueError, match="expected names of files that lie beside it: download them there"):
        open_set(tmp_path / "run", str(tmp_path))
    config.write_text("model_kind: transcoder_set\ntranscoders: [c.safetensors]\n")
    with pytest.raises(ValueError, match=r"names c.safetensors, which is not beside it; download it there"):
        open_set(tmp_path / "run", str(tmp_path))
    with pytest.raises(ValueError, match=r"has no set 'nothing'; .* no folder of circuit-tracer's of that name"):
        open_set(tmp_path / "run", "nothing")
