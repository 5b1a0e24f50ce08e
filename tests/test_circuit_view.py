"""A circuit's graph as a figure."""

from typing import Any

import pytest

from saebench.view.circuit import circuit, grouped, latent_of, links_of, shown_nodes, title_of


def node(id: str, layer: str, position: int, kind: str, influence: float | None, name: str = "") -> dict[str, Any]:
    return {
        "node_id": id,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "influence": influence,
        "clerp": name,
        "activation": 1.5 if kind == "cross layer transcoder" else None,
    }


A_GRAPH: dict[str, Any] = {
    "metadata": {
        "prompt": "a prompt", "prompt_tokens": ["the", " cat"],
        "saebench": {
            "members": ["topk-k2"], "first_layer": 0, "active": 3, "model": "m", "sentences": ["50.0%: the first token raises it"],
            "scores": {"replacement": 0.5, "completeness": 0.75},
            "agreement": {"ablated": [0], "latents": None, "logits": 0.5, "latents_free": 0.25, "logits_free": 0.5},
        },
    },
    "qParams": {},
    "nodes": [
        node("E_5_0", "E", 0, "embedding", 0.9), node("0_7_1", "0", 1, "cross layer transcoder", 0.3, "<b>bold</b>"),
        node("0_8_1", "0", 1, "cross layer transcoder", 0.7), node("0_error_1", "0", 1, "mlp reconstruction error", 0.5),
        node("2_9_1", "2", 1, "logit", None, "Output ' sat' (p=0.500)"),
    ],
    "links": [
        {"source": "E_5_0", "target": "0_7_1", "weight": 0.5}, {"source": "E_5_0", "target": "0_8_1", "weight": 2.0},
        {"source": "0_7_1", "target": "2_9_1", "weight": 1.0}, {"source": "0_8_1", "target": "2_9_1", "weight": -3.0},
    ],
}  # fmt: skip


def test_nodes_are_left_out_by_influence_but_tokens_and_logits() -> None:
    assert [one["node_id"] for one in shown_nodes(A_GRAPH, 0.6)] == ["E_5_0", "0_7_1", "0_error_1", "2_9_1"]
    figure = circuit(A_GRAPH, 0.6)
    raises, lowers, tokens, latents, errors, logits, _ = figure.data
    assert list(raises.y) == [1.0, 2.0, None, 0.0, 1.0, None]  # from the latent to the logit, and from the token to it
    assert list(lowers.x) == []
    assert [list(one.customdata) for one in (tokens, latents, errors, logits)] == [
        ["E_5_0"],
        ["0_7_1"],
        ["0_error_1"],
        ["2_9_1"],
    ]
    assert (latents.x[0], errors.x[0]) == (pytest.approx(0.8), pytest.approx(1.2))  # beside each other, about token 1
    assert latents.text[0] == "L0/7 &lt;b&gt;bold&lt;/b&gt; at &#x27; cat&#x27; (1)"
    assert list(figure.layout.yaxis.ticktext) == ["tokens", "L0", "logits"]


def test_a_chosen_node_has_its_edges_alone() -> None:
    raises, lowers, *_ = circuit(A_GRAPH, 1.0, ["0_8_1"]).data
    assert len(raises.x) == len(lowers.x) == 3
    into, out_of = links_of(A_GRAPH, "2_9_1")
    assert [link["weight"] for link in into] == [-3.0, 1.0]
    assert out_of == []
    assert latent_of(A_GRAPH["nodes"][2]) == 8
    words = [title_of(one, ["the", " cat"]) for one in A_GRAPH["nodes"]]
    assert words[0] == "'the' (0)"
    assert words[2:] == ["L0/8 at ' cat' (1)", "error of layer 0 at ' cat' (1)", "Output ' sat' (p=0.500)"]


def test_a_group_is_one_node_with_the_sum_of_its_edges() -> None:
    graph = grouped(A_GRAPH, {"both": ("0_7_1", "0_8_1", "9_9_9"), "gone": ("9_9_8",)})
    assert [one["node_id"] for one in graph["nodes"]] == ["E_5_0", "0_error_1", "2_9_1", "group:both"]
    box = graph["nodes"][-1]
    assert (box["layer"], box["ctx_idx"], box["influence"]) == ("0", 1, 0.3)
    links = {(link["source"], link["target"]): link["weight"] for link in graph["links"]}
    assert links == {("E_5_0", "group:both"): 2.5, ("group:both", "2_9_1"): -2.0}
    figure = circuit(graph, 0.1, ["group:both"])  # whatever its influence
    raises, lowers, *_, groups = figure.data
    assert list(groups.customdata) == ["group:both"]
    assert groups.text[0].split("<br>")[0] == "both: 2 nodes together"
    assert len(groups.text[0].split("<br>")) == 3
    assert len(raises.x) == len(lowers.x) == 3
    assert figure.layout.annotations[0].text == "both (2)"
    inside = grouped(A_GRAPH, {"path": ("E_5_0", "0_7_1")})  # an edge within is none
    assert {(link["source"], link["target"]) for link in inside["links"]} == {
        ("group:path", "0_8_1"),
        ("group:path", "2_9_1"),
        ("0_8_1", "2_9_1"),
    }


def test_what_is_pinned_is_shown_whatever_its_influence() -> None:
    assert [one["node_id"] for one in shown_nodes(A_GRAPH, 0.6, ["0_8_1"])][2] == "0_8_1"
    shown = [id for one in circuit(A_GRAPH, 1.0, (), ["0_8_1"], marked=True).data[2:] for id in one.customdata]
    assert shown == ["0_8_1", "2_9_1"]


def test_a_token_with_many_nodes_has_a_wide_column() -> None:
    many = [node(f"0_{latent}_0", "0", 0, "cross layer transcoder", 0.1) for latent in range(8)]
    figure = circuit(A_GRAPH | {"nodes": [*many, *A_GRAPH["nodes"]]}, 1.0)
    latents = figure.data[3]
    assert latents.x[1] - latents.x[0] == pytest.approx(0.2)
    assert list(figure.layout.xaxis.tickvals) == [0.5, 2.0]
