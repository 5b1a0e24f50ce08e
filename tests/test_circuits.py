"""Circuits: every target is the sum of its edges, every edge is what a change of its source does, and the model stays itself."""

import json
import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saebench.circuits import (
    Graph,
    Logit,
    Replacement,
    agreement,
    chosen_logits,
    measured,
    paths,
    predicted,
    prune,
    scores,
    trace,
)
from saebench.circuits import graph as graphs
from saebench.circuits.graph import directions, preactivations
from saebench.circuits.influence import by_influence, influence_of
from saebench.circuits.replacement import Latents
from saebench.cli import main
from saebench.evaluate.measure import Dictionary
from saebench.models import LanguageModel, capture, edits, hook_name, last_states, load_model, logits
from saebench.sae import SAE, Ends, Writes, new_sae, save_sae

WIDTH, LATENTS = 32, 24
TEXT = "the red cat sees a blue dog and then runs"
SHAPES = ("gpt2", "llama", "gemma2", "qwen3")


@pytest.fixture(scope="module")
def models(
    checkpoints: dict[str, Path], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, LanguageModel]:
    folders = checkpoints | {"qwen3": families.make("qwen3", tmp_path_factory.mktemp("qwen3"), tokenizer)}
    return {name: load_model(str(folders[name]), device="cpu", dtype="float32") for name in SHAPES}


@torch.no_grad()
def filled(sae: SAE, x_LD: Tensor, seed: int) -> SAE:
    """Random weights, of which about every fourth latent is active on a row, and nothing of which is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.05 if name == "r_mag" else 0.3))
    pre_LF = x_LD @ sae.W_enc
    bias_F = -pre_LF.quantile(0.75, dim=0)
    for name in ("b_enc", "b_mag", "b_gate"):
        if hasattr(sae, name):
            sae.get_parameter(name).copy_(bias_F)
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(0.01)
    return sae.requires_grad_(False)


def a_set(model: LanguageModel, kind: str, layers: range = range(3), read: str = "mlp_in") -> list[Dictionary]:
    """Random dictionaries in the places of some layers' MLPs: `clt`, or transcoders of an architecture, with a skip path where the kind ends in +skip."""
    ids = torch.tensor([model.tokens_of(TEXT)])
    architecture, _, skip = kind.partition("+")
    found = []
    for layer in layers:
        hook: Any = hook_name(layer, read)  # type: ignore[arg-type]
        written = range(layer, layers.stop) if architecture == "clt" else [layer]
        ends = Ends((hook,), tuple(hook_name(at, "mlp_out") for at in written))
        writes = Writes(WIDTH * len(ends.writes), bool(skip), (WIDTH,) * len(ends.writes))
        sae = new_sae("jumprelu" if architecture == "clt" else architecture, WIDTH, LATENTS, k=6, writes=writes)
        found.append(
            Dictionary(Path(f"{kind}-{layer}"), filled(sae, capture(model, ids, [hook])[hook][0], layer), ends)
        )
    return found


def replaced(model: LanguageModel, kind: str, layers: range = range(3), read: str = "mlp_in") -> Replacement:
    return Replacement(model, a_set(model, kind, layers, read), torch.tensor(model.tokens_of(TEXT)), {})


def traced(replacement: Replacement, **options: Any) -> Graph:
    graph = trace(replacement, chosen_logits(replacement, most=3), **options)
    assert graph is not None
    return graph


def close(left: Tensor, right: Tensor, relative: float = 1e-4) -> bool:
    return bool((left - right).abs().max() <= relative * right.abs().max())


CASES = [
    *((name, kind, range(3), "mlp_in") for name in SHAPES for kind in ("jumprelu", "clt+skip")),
    ("llama", "relu+skip", range(1, 2), "resid_mid"), ("qwen3", "gated", range(1, 3), "ln2_normalized"),
    ("gpt2", "topk", range(0, 2), "resid_mid"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "layers", "read"), CASES)
def test_edges_and_bias_sum_to_what_the_model_has(
    models: dict[str, LanguageModel], name: str, kind: str, layers: range, read: str
) -> None:
    """Also where the set begins behind the first layer, whose stream is then what embeddings are elsewhere, or ends before the last."""
    model = models[name]
    before = model.module.config._attn_implementation
    of = replaced(model, kind, layers, read)
    graph = traced(of)
    assert graph.layers == tuple(range(layers.start, 3))
    ids = of.ids[None]
    for number, one in enumerate(of.members):
        own = graph.latents.member == number
        acts_LF = one.sae.encode(capture(model, ids, [one.ends.reads[0]])[one.ends.reads[0]][0])
        want = acts_LF[graph.latents.position[own], graph.latents.latent[own]]
        assert close(graph.latents.activation[own], want)
        assert int(own.sum()) == int((acts_LF[1:] > 0).sum())  # BOS has none
        assert close(graph.values[: graph.n_latents][own], want)
    with torch.no_grad():
        logits_V = logits(model, ids)[0, -1]
    if name == "gemma2":  # before its soft cap
        logits_V = 30 * torch.atanh(logits_V / 30)
    want = torch.stack([logits_V[logit.token] - logits_V.mean() for logit in graph.logits])
    assert close(graph.values[graph.n_latents :], want)
    sums = graph.edges.sum(1) + graph.bias
    assert ((sums - graph.values).abs() <= 1e-4 * (graph.edges.abs().sum(1) + graph.bias.abs())).all()
    assert float(graph.left_out.abs().max()) == 0
    assert graph.bias.abs().max() > 0
    assert model.module.config._attn_implementation == before  # and the model is as it was
    assert torch.equal(last_states(model, ids), last_states(model, ids))


def in_float64(of: Replacement, kind: str) -> Replacement:
    """The same model and set anew, in double precision."""
    model, members = load_model(of.model.id, device="cpu", dtype="float32"), a_set(of.model, kind)
    model.module.double()
    for one in members:
        one.sae.double()
    return Replacement(model, members, of.ids, {})


@pytest.mark.parametrize(
    ("name", "kind", "double"),
    [
        ("llama", "relu+skip", False), ("gemma2", "clt", True), ("qwen3", "clt+skip", True), ("gpt2", "relu", False),
        ("llama", "gated", True),
    ],
)  # fmt: skip
def test_edges_are_what_taking_a_source_away_changes(
    models: dict[str, LanguageModel], name: str, kind: str, double: bool
) -> None:
    """With patterns and denominators held, and every other latent as it is; and sums are of the values themselves, whatever cancels."""
    of = replaced(models[name], kind)
    of, exact = (in_float64(of, kind), 1e-9) if double else (of, 2e-4)
    graph = traced(of)
    if double:
        sums = graph.edges.sum(1) + graph.bias
        assert ((sums - graph.values).abs() <= 1e-9 * graph.values.abs()).all()
    into, offsets = directions(of.model, graph.logits)
    written = {layer: of.written[layer] - of.skipped(layer, of.reads) for layer in of.layers}

    def targets(stream: Tensor, without: dict[int, Tensor]) -> Tensor:
        reads, states = of.run(stream[None], lambda layer, _: (written[layer] - without.get(layer, 0))[None])
        return torch.cat([preactivations(of, reads, graph.latents)[0], states[0, -1] @ into.T + offsets])

    with torch.no_grad():
        clean = targets(of.stream, {})
        allowed = exact * clean.abs().max()
        assert (clean - graph.values).abs().max() <= allowed
        for node in range(0, graph.n_latents, 41):
            one = graph.latents.of(torch.tensor([node]))
            off = {layer: torch.zeros_like(of.stream) for layer in of.layers}
            for layer in of.layers:
                off[layer][one.position] = of.decoded(layer, one) * one.activation
            assert (clean - targets(of.stream, off) - graph.edges[:, node]).abs().max() <= allowed
        position, layer = 4, 1
        off = torch.zeros_like(of.stream)
        off[position] = of.errors[layer][position]
        error = graph.error_nodes.start + layer * len(graph.ids) + position
        assert (clean - targets(of.stream, {layer: off}) - graph.edges[:, error]).abs().max() <= allowed
        stream = of.stream.clone()
        stream[position] = 0
        token = graph.token_nodes.start + position
        assert (clean - targets(stream, {}) - graph.edges[:, token]).abs().max() <= allowed


def test_the_set_with_its_errors_is_the_model(models: dict[str, LanguageModel]) -> None:
    """Latents that are encoded anew give what the model has, held or free, and nothing changes where nothing is clamped."""
    of = replaced(models["qwen3"], "clt+skip")
    graph = traced(of)
    for frozen in (True, False):
        same = measured(of, graph, [{}, {0: float(graph.latents.activation[0])}], frozen=frozen)
        assert same.latents.abs().max() <= 1e-4 * graph.latents.activation.max()
        assert same.logits.abs().max() <= 1e-4 * graph.values.abs().max()


def test_a_small_change_does_what_the_graph_says(models: dict[str, LanguageModel]) -> None:
    """Along all paths, held: small enough that no latent falls silent or awakes."""
    of = replaced(models["llama"], "clt")
    graph = traced(of)
    nodes = influence_of(graph)[: graph.n_latents].topk(8).indices.tolist()
    clamps = [{node: 1.0001 * float(graph.latents.activation[node])} for node in nodes]
    clamps.append({node: value for clamp in clamps[:2] for node, value in clamp.items()})
    says, does = predicted(graph, clamps), measured(of, graph, clamps)
    assert (says.latents - does.latents).norm() <= 0.05 * says.latents.norm()
    assert (says.logits - does.logits).norm() <= 0.05 * says.logits.norm()


def test_ablations_of_one_layer_do_what_the_graph_says_of_the_logits(models: dict[str, LanguageModel]) -> None:
    """No later latents stand between."""
    of = replaced(models["gemma2"], "relu", range(1, 2))
    held = agreement(of, traced(of))
    assert held.logits == pytest.approx(1, abs=1e-6)
    assert math.isnan(held.latents)
    assert held.logits_free != held.logits


def test_massive_rows_have_errors_alone(models: dict[str, LanguageModel]) -> None:
    """As BOS has, and at every layer; sums are met all the same."""
    model, members = models["llama"], a_set(models["llama"], "clt+skip")
    ids, hook = torch.tensor(model.tokens_of(TEXT)), "blocks.1.mlp.hook_in"
    norms_L = capture(model, ids[None], [hook])[hook][0].norm(dim=1)
    bound = float(norms_L[1:].sort().values[-2:].mean())
    of = Replacement(model, members, ids, {hook: bound})
    graph, longest = traced(of), int(norms_L[1:].argmax()) + 1
    assert of.alone.nonzero()[:, 0].tolist() == [0, longest]
    assert not torch.isin(graph.latents.position, torch.tensor([0, longest])).any()
    for layer in of.layers:
        assert torch.equal(of.errors[layer][of.alone], of.written[layer][of.alone])
    assert ((graph.edges.sum(1) + graph.bias - graph.values).abs() <= 1e-4 * graph.edges.abs().sum(1)).all()


def test_free_an_ablation_is_what_it_is_in_the_model(models: dict[str, LanguageModel]) -> None:
    """Of one layer, in whose own reading it changes nothing: what the latent writes is taken off, and the layers above do as they do."""
    of = replaced(models["llama"], "relu", range(1, 2))
    graph = traced(of)
    node = int(influence_of(graph)[: graph.n_latents].argmax())
    one = graph.latents.of(torch.tensor([node]))
    off = torch.zeros_like(of.stream)
    off[one.position] = of.decoded(1, one) * one.activation
    with torch.no_grad():
        before_V = logits(of.model, of.ids[None])[0, -1]
        with edits(of.model, {"blocks.1.hook_mlp_out": lambda value: value - off})():
            change_V = logits(of.model, of.ids[None])[0, -1] - before_V
    want = change_V[[logit.token for logit in graph.logits]] - change_V.mean()
    assert close(measured(of, graph, [{node: 0.0}], frozen=False).logits[0], want, 1e-3)
    assert not close(measured(of, graph, [{node: 0.0}]).logits[0], want, 1e-2)


def test_of_many_latents_the_most_influential_are_nodes(
    models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = replaced(models["llama"], "jumprelu")
    whole, part = traced(of), traced(of, most=20)
    assert (part.n_latents, part.n_active) == (20, whole.n_latents)
    sums = part.edges.sum(1) + part.left_out + part.bias
    assert close(sums, part.values)
    names = [set(zip(*(column.tolist() for column in one.latents[:3]), strict=True)) for one in (whole, part)]
    assert names[1] < names[0]
    monkeypatch.setattr(graphs, "_EDGES", 4000)
    with pytest.raises(
        ValueError,
        match=r"active latents: a graph with .* of them as nodes has .* edges, 4,000 fit; give a shorter prompt, or at most \d+ latents",
    ):
        traced(of)
    assert trace(of, chosen_logits(of, 5), most=3, stopped=lambda: True) is None


def a_graph() -> Graph:
    """Two latents, an error, a token and a logit, all at one position: by hand."""
    #         latent 0, latent 1, error, token
    edges = torch.tensor([[0.0, 0, 0, 2], [1, 0, 1, 2], [3, -4, 1, 2]])
    latents = Latents(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([3, 4]), torch.tensor([2.0, 4.0]))
    values = edges.sum(1)
    none = torch.zeros(3)
    return Graph(
        torch.tensor([7]),
        (0,),
        latents,
        torch.tensor([0, 1]),
        (Logit(5, None, 1.0, 0.5),),
        edges,
        none,
        none,
        values,
        2,
    )


def test_influence_and_scores_worked_by_hand() -> None:
    graph = a_graph()
    # Into the logit 0.3, 0.4, 0.1, 0.2; latent 1 gives 0.25, 0, 0.25, 0.5 of its 0.4 on; latent 0 all of its 0.3 + 0.1 to the token.
    assert influence_of(graph).tolist() == pytest.approx([0.4, 0.4, 0.2, 0.8])
    shares = torch.zeros(5, 5)
    shares[[0, 1, 4], :4] = graph.edges.abs() / graph.edges.abs().sum(1, keepdim=True)
    start = torch.tensor([0.0, 0, 0, 0, 1])
    inverse = torch.linalg.inv(torch.eye(5) - shares) - torch.eye(5)
    assert (start @ inverse)[:4].tolist() == pytest.approx(influence_of(graph).tolist())
    found = scores(graph)
    assert found.replacement == pytest.approx(0.8 / 1.0)
    # 1 for latent 0, error and token, 0.75 for latent 1, 0.9 for the logit, by influence 0.4, 0.2, 0.8, 0.4 and 1.
    assert found.completeness == pytest.approx((0.4 + 0.2 + 0.8 + 0.75 * 0.4 + 0.9) / 2.8)
    best = paths(graph, 3)
    assert [path.nodes for path in best] == [(3, 0, 4), (3, 1, 4), (3, 4)]
    assert [path.share for path in best] == pytest.approx([0.3, 0.2, 0.2])
    assert sum(path.share for path in paths(graph, 9)) == pytest.approx(0.8)  # the rest begins at the error


def test_pruning_keeps_what_has_most_influence() -> None:
    graph = a_graph()
    whole = prune(graph, 1.0, 1.0)
    assert whole.nodes.all()
    assert torch.equal(whole.edges, graph.adjacency != 0)
    # The token has 0.8 of 1.8, either latent 0.4; the error goes, and with it its edges.
    kept = prune(graph, 0.85, 1.0)
    assert kept.nodes.tolist() == [True, True, False, True, True]
    assert not kept.edges[:, 2].any()
    assert kept.reached[3] == pytest.approx(0.8 / 1.8)
    assert kept.reached[2] == pytest.approx(1.0)
    few = prune(graph, 0.4, 0.5)  # the token alone, and logits always stay
    assert few.nodes.tolist() == [False, False, False, True, True]
    assert few.edges.nonzero().tolist() == [[4, 3]]
    with pytest.raises(ValueError, match="nodes is 1.5; expected a share of influence, 0 to 1"):
        prune(graph, 1.5)


def test_walks_are_counted_from_some_rows_as_from_all() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = torch.cat([torch.randn(6, 9, generator=generator), torch.randn(2, 9, generator=generator)])
    edges[:6, :6] = edges[:6, :6].tril(-1)
    weights, order = torch.tensor([0.6, 0.3]), torch.randperm(6, generator=generator)
    want = by_influence(edges, torch.arange(6), weights)
    assert torch.allclose(by_influence(torch.cat([edges[order], edges[6:]]), order, weights), want)


def test_logits_are_chosen_and_refused(models: dict[str, LanguageModel]) -> None:
    of = replaced(models["llama"], "relu", range(2, 3))
    likely = chosen_logits(of, most=512, share=0.5)
    assert sum(logit.weight for logit in likely) >= 0.5 > sum(logit.weight for logit in likely[:-1])
    graph = trace(of, chosen_logits(of, 5, 9))
    assert graph is not None
    assert graph.logits == (Logit(5, 9, 1.0, graph.logits[0].probability),)
    with torch.no_grad():
        logits_V = logits(of.model, of.ids[None])[0, -1]
    assert float(graph.values[-1]) == pytest.approx(float(logits_V[5] - logits_V[9]), rel=1e-3)
    for token, against, message in (
        (512, None, "target token is 512; model .* has 0 to 511"), (None, 3, "against is token 3, and no target is given"),
        (3, 3, "target and against are both token 3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            chosen_logits(of, token, against)


def test_what_cannot_be_held_is_refused(
    models: dict[str, LanguageModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    llama = models["llama"]
    ids = torch.tensor(llama.tokens_of(TEXT))
    with pytest.raises(
        ValueError, match="replaces the MLPs of layers 0, 2 and not of 1; expected layers without a gap"
    ):
        Replacement(llama, [*a_set(llama, "relu", range(1)), *a_set(llama, "relu", range(2, 3))], ids, {})
    recurrent = load_model(str(families.make("qwen3_next", tmp_path, tokenizer)), device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="is called with more than rows|has 3 layers, and 1 of them have attention"):
        replaced(recurrent, "relu", range(1))
    gate = llama.blocks[1].get_submodule("self_attn.o_proj").register_forward_hook(lambda _, __, y: y * y.sigmoid())
    try:
        with pytest.raises(
            ValueError, match=r"is not linear once patterns and denominators are held: a target differs"
        ):
            traced(replaced(llama, "relu"))
    finally:
        gate.remove()


def saved_run(folder: Path, model: LanguageModel, kind: str, **metadata: Any) -> Path:
    for one in a_set(model, kind):
        said = {
            "model_name": model.id,
            "context_size": 16,
            "set": "s",
            "hook_name": one.ends.reads[0],
            "hook_name_out": one.ends.writes[0],
        }
        said |= {"reads": list(one.ends.reads), "writes": list(one.ends.writes), "joint": kind == "clt"}
        save_sae(one.sae, folder / "saes" / one.folder.name, said | metadata)
    return folder


def test_the_command_writes_what_viewers_take(
    models: dict[str, LanguageModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run(tmp_path / "run", models["llama"], "clt")
    command = ["circuits", "--run", str(run), "--set", "s", "--prompt", TEXT, "--device", "cpu"]
    assert main([*command, "--name", "g", "--target", " cat", "--against", " dog", "--nodes", "0.9"]) == 0
    out = capsys.readouterr().out
    assert "' cat' over ' dog'" in out
    assert "replacement score" in out
    assert "ablated one at a time" in out
    content = json.loads((run / "circuits" / "g.json").read_text())
    assert content["metadata"] | {"saebench": None} == {
        "slug": "g", "scan": "s", "transcoder_list": [], "prompt": TEXT, "node_threshold": 0.9, "schema_version": 1,
        "prompt_tokens": ["<|endoftext|>", "the", *(f" {word}" for word in TEXT.split()[1:])], "saebench": None,
    }  # fmt: skip
    nodes = {node["node_id"]: node for node in content["nodes"]}
    assert len(nodes) == len(content["nodes"])
    assert {end for link in content["links"] for end in (link["source"], link["target"])} <= nodes.keys()
    kinds = [node["feature_type"] for node in content["nodes"]]
    assert kinds.count("embedding") == len(content["metadata"]["prompt_tokens"])
    assert kinds.count("logit") == 1
    latent = next(node for node in content["nodes"] if node["feature_type"] == "cross layer transcoder")
    layer, number, position = map(int, latent["node_id"].split("_"))
    assert (latent["layer"], latent["ctx_idx"]) == (str(layer), position)
    assert latent["feature"] == (layer + number) * (layer + number + 1) // 2 + number
    assert latent["activation"] > 0


def test_the_command_refuses_in_a_line(
    models: dict[str, LanguageModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run(tmp_path / "run", models["llama"], "clt")

    def refused(*options: str) -> str:
        assert (
            main(["circuits", "--run", str(run), "--device", "cpu", "--set", "s", "--prompt", "a cat", *options]) == 2
        )
        return capsys.readouterr().err.splitlines()[-1]

    assert "has no set 'other'; it has s" in refused("--set", "other")
    assert "target ' catdog' is 2 tokens" in refused("--target", " catdog")
    assert "the model takes at most 64" in refused("--prompt", TEXT * 9)
    assert "name is 'a/b'; expected letters, digits" in refused("--name", "a/b")
    assert "the text is empty" in refused("--prompt", "")
    assert "target '' is 0 tokens" in refused("--target", "")
    assert "and no target is given" in refused("--against", " cat")
    assert "node '0_99_1' is not in the graph" in refused("--pin", "0_99_1")
    assert not (run / "circuits").exists() or not list((run / "circuits").glob("*.json"))
    wider = models["llama"].module.config.to_dict() | {
        "hidden_size": 64,
        "num_attention_heads": 8,
        "initializer_range": 0.5,
    }
    del wider["head_dim"]
    other = LlamaForCausalLM(LlamaConfig(**wider))
    other.save_pretrained(tmp_path / "wider")
    for file in Path(models["llama"].id).glob("*token*"):
        (tmp_path / "wider" / file.name).write_bytes(file.read_bytes())
    assert "it is of another model" in refused("--model", str(tmp_path / "wider"))
    config = run / "saes" / "clt-1" / "cfg.json"
    said = config.read_text()
    config.write_text(said.replace(models["llama"].id, models["gpt2"].id))
    assert "expected a set of one model" in refused()
    config.write_text(said.replace("blocks.1.mlp.hook_in", "blocks.1.hook_resid_post"))
    assert "expected what a set replaces" in refused()
    config.unlink()
    assert "its member that reads blocks.1.mlp.hook_in is missing" in refused()
