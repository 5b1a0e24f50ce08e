"""Dictionaries that read here and write there, by hand: indexed, steered with, ablated, attributed to, and how they feed each other."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, WIDTH
from torch import Tensor

from saebench.evaluate.attribution import ablation_effects, attribute, logit_of, read
from saebench.harvest import HarvestConfig, harvest
from saebench.index import FeatureIndex, IndexConfig, build_index, open_feature_index
from saebench.index.connections import connected, connections
from saebench.index.decoder import to_stream
from saebench.index.examples import show
from saebench.index.page import hooks_html
from saebench.index.search import features_for_text
from saebench.models import LanguageModel, capture, depth, edits, load_model, logits
from saebench.sae import SAE, Ends, ReLUSAE, Writes, latent_encoder, load_sae, new_sae, save_sae
from saebench.steer import Intervention, Sampling, Where, generate, mask_of, open_bench, steered
from saebench.steer.dose import held_out, top_tokens
from saebench.steer.scores import ScoreConfig, score
from saebench.store import Store
from saebench.text import TextConfig
from saebench.view.tokens import number

LATENTS, LATENT = 24, 5
IN, OUT = "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"
STREAM = "blocks.{}.hook_resid_post"
ENDS = {
    "transcoder": Ends((IN.format(1),), (OUT.format(1),)),
    "deeper": Ends((IN.format(2),), (OUT.format(2),)),
    "cross-layer": Ends((IN.format(0),), (OUT.format(0), OUT.format(1))),
    "crosscoder": Ends((STREAM.format(0), STREAM.format(2)), (STREAM.format(0), STREAM.format(2))),
}
TEXT = "def house then return value over a blue dog and"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], corpus: Path) -> Store:
    config = HarvestConfig(
        model=str(checkpoints["llama"]), layers=(0, 1, 2), kinds=("mlp_in", "mlp_out", "resid_post"), tokens=3_000,
        context=CONTEXT, batch=8, shard_contexts=64, dtype="float32", out=tmp_path_factory.mktemp("store"),
    )  # fmt: skip
    made = harvest(config, TextConfig(dataset=str(corpus), validation_fraction=0.3))
    assert made is not None
    return made


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> LanguageModel:
    return load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")


@torch.no_grad()
def made(ends: Ends, store: Store, seed: int = 0) -> SAE:
    """Random weights, each latent firing on a fifth of what is read; a transcoder of one hook has a linear map, too."""
    reads, writes = len(ends.reads), len(ends.writes)
    parts = (WIDTH,) * writes if writes > 1 else ()
    of = Writes(parts=parts) if ends.tied else Writes(d_out=writes * WIDTH, skip=writes == 1, parts=parts)
    sae = new_sae("relu", reads * WIDTH, LATENTS, writes=of)
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 6)
    rows = next(iter(store.joint_rows(ends.reads, "train")))
    x = torch.cat([rows[hook] for hook in ends.reads], 1)
    assert isinstance(sae, ReLUSAE)
    sae.b_enc.copy_(-sae.project(x).quantile(0.8, dim=0))
    return sae


@pytest.fixture(scope="module")
def saes(store: Store, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each of ENDS, in one run."""
    run, found = tmp_path_factory.mktemp("run"), {}
    for seed, (name, ends) in enumerate(ENDS.items()):
        metadata = {
            "model_name": str(checkpoints["llama"]), "hook_name": ends.reads[0], "context_size": CONTEXT,
            "reads": list(ends.reads), "writes": list(ends.writes), "saebench": {"store": str(store.folder)},
        }  # fmt: skip
        found[name] = run / "saes" / name
        save_sae(made(ends, store, seed), found[name], metadata)
    return found


@pytest.fixture(scope="module")
def indexes(saes: dict[str, Path]) -> dict[str, FeatureIndex]:
    for name in ("transcoder", "crosscoder"):
        build_index(IndexConfig(sae=saes[name], sample=1_000, rules=False))
    return {
        name: open_feature_index(saes[name].parent.parent / "index" / f"{name}.h5")
        for name in ("transcoder", "crosscoder")
    }


def ids_of(model: LanguageModel, text: str = TEXT) -> Tensor:
    return torch.tensor([model.tokens_of(text)])


def logits_with(model: LanguageModel, ids: Tensor, changes: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
    with torch.inference_mode(), edits(model, changes)():
        return logits(model, ids)[0]


def near(left: Tensor, right: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance * float(right.abs().max()))


def written(ends: Ends, sae: SAE, latent: int = LATENT) -> dict[str, Tensor]:
    """A latent's part at each hook."""
    return dict(zip(ends.writes, sae.W_dec[latent].detach().split(sae.parts), strict=True))


# ------------------------------------------------------------------------------------------ index


def test_an_index_of_what_reads_and_writes_elsewhere_has_its_own_activations(
    indexes: dict[str, FeatureIndex], saes: dict[str, Path], store: Store
) -> None:
    for name, index in indexes.items():
        sae, ends = load_sae(saes[name]), ENDS[name]
        assert (index.ends, str(index.ends)) == (
            ends,
            " → ".join([" + ".join(ends.reads)] + [ends.writes[0]] * (not ends.tied)),
        )
        rows = list(store.joint_rows(ends.reads, "train"))
        acts = sae.encode(torch.cat([torch.cat([some[hook] for hook in ends.reads], 1) for some in rows])).detach()
        assert np.array_equal(index.columns["fires"], (acts > 0).sum(0).numpy())
        assert np.allclose(index.columns["max"], acts.amax(0).numpy(), rtol=1e-4)
        latent = index[LATENT]
        (shown,) = show(index, sae, LATENT, latent.top[:1])
        assert shown.values[shown.context.peak] == pytest.approx(latent.top[0].value, rel=1e-4)
        assert ("encoder_cosine" in index.columns) == ends.tied
        lengths = sae.lengths_FH[LATENT].detach().numpy() if len(ends.writes) > 1 else np.zeros(0)
        assert np.allclose(latent.lengths, lengths)
        bars = re.findall(r"<title>(blocks[^<]*): ([\d.]+)", hooks_html(index, latent))
        assert bars == [(hook, number(length)) for hook, length in zip(ends.writes, lengths.tolist(), strict=False)]
    assert "reads blocks.1.mlp.hook_in, writes blocks.1.hook_mlp_out" in hooks_html(
        indexes["transcoder"], indexes["transcoder"][0]
    )


def test_a_row_massive_at_one_of_the_hooks_read_is_left_out(
    indexes: dict[str, FeatureIndex], model: LanguageModel, saes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    index, sae = indexes["crosscoder"], load_sae(saes["crosscoder"])
    x_LD = read(model, ids_of(model), index.ends)[0][0]
    norms = x_LD[:, WIDTH:].norm(dim=1)
    assert isinstance(index.longest, tuple)
    monkeypatch.setattr(index, "longest", (index.longest[0], float(norms[1:].median())))
    found = features_for_text(model, sae, index, TEXT, limit=None)
    assert np.array_equal(found.massive[1:], (norms > norms[1:].median()).numpy()[1:])
    on = {int(place) for firing in found.firings for place in firing.positions}
    assert on
    assert not on & set(np.flatnonzero(found.massive).tolist())


def test_what_goes_into_the_stream_adds_up_and_stream_after_stream_is_told_by_the_deepest(store: Store) -> None:
    def of(*writes: str, before: str | None = None) -> list[int] | None:
        sae = new_sae("relu", 2, 1, writes=Writes(d_out=len(writes), parts=(1,) * len(writes)))
        sae.W_dec.data.copy_(torch.tensor([[10.0**place for place in range(len(writes))]]))
        found = to_stream(sae, writes, before)
        return None if found is None else found.detach().int().flatten().tolist()

    assert of(STREAM.format(0), STREAM.format(2)) == [10]
    assert of(OUT.format(0), "blocks.1.hook_attn_out") == [11]
    assert of(OUT.format(0), STREAM.format(1), OUT.format(2)) == [110]
    assert of(IN.format(1)) is None
    assert of("blocks.1.attn.hook_z") is None
    assert of("blocks.1.ln2.hook_normalized") is None
    assert of(OUT.format(0), "blocks.1.hook_resid_mid", OUT.format(1)) == [110]
    assert of(OUT.format(0), OUT.format(1), OUT.format(2), before=IN.format(2)) == [11]
    assert of(OUT.format(1), before=IN.format(1)) is None
    hooks = ["resid_pre", "attn_out", "mlp_in", "mlp_out", "resid_post"]
    names = [f"blocks.1.mlp.hook_{hook[4:]}" if hook == "mlp_in" else f"blocks.1.hook_{hook}" for hook in hooks]
    assert sorted(sorted(names), key=depth) == names


def test_logit_effects_are_those_of_a_forward_pass(
    model: LanguageModel, indexes: dict[str, FeatureIndex], saes: dict[str, Path]
) -> None:
    """What a latent adds to the stream behind the last layer, times the final norm's scale there: an RMSNorm's is a division."""
    ids, last = ids_of(model), STREAM.format(2)
    for name, index in indexes.items():
        sae, latent = load_sae(saes[name]), index[LATENT]
        d_D = written(index.ends, sae)[index.ends.writes[-1]]
        x_LD = capture(model, ids, [last])[last][0]
        eps = model.module.config.rms_norm_eps
        scaled = [
            logits_with(model, ids, {last: lambda old, x=x: x[None]}) * (x.square().mean(1, keepdim=True) + eps).sqrt()
            for x in (x_LD, x_LD + d_D)
        ]
        effects_V = (scaled[1] - scaled[0])[1]
        near(torch.tensor(latent.top_logits.values), effects_V[latent.top_logits.ids], 1e-3)
        near(torch.tensor(latent.bottom_logits.values), effects_V[latent.bottom_logits.ids], 1e-3)


@pytest.mark.parametrize(
    ("ends", "writes", "message"),
    [
        (Ends((IN.format(7),), (OUT.format(1),)), WIDTH, r"hook 'blocks.7.mlp.hook_in' is not in .*; it has .*saebench harvest"),
        (Ends((IN.format(1),), (OUT.format(9),)), WIDTH, r"hook 'blocks.9.hook_mlp_out' is not in"),
        (Ends((IN.format(1),), (OUT.format(1),)), WIDTH + 1, r"has d_out 33, but blocks.1.hook_mlp_out in .* has 32; give"),
        (Ends((IN.format(1), IN.format(2)), (OUT.format(1),)), WIDTH, r"has d_in 32, but .*1.* \+ .*2.mlp.hook_in in .* has 32 \+ 32;"),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_a_store_is_named(
    ends: Ends, writes: int, message: str, store: Store, tmp_path: Path
) -> None:
    folder = tmp_path / "saes" / "t"
    metadata = {"reads": ends.reads, "writes": ends.writes, "saebench": {"store": str(store.folder)}}
    save_sae(new_sae("relu", WIDTH, 4, writes=Writes(d_out=writes)), folder, metadata)
    with pytest.raises(ValueError, match=message):
        build_index(IndexConfig(sae=folder))


# --------------------------------------------------------------------------------------- steering


@pytest.mark.parametrize("mode", ["add", "clamp", "scale", "ablate", "orthogonal"])
@pytest.mark.parametrize("name", ["transcoder", "cross-layer"])
def test_steering_reads_before_the_mlp_and_changes_what_it_writes(
    name: str, mode: Any, model: LanguageModel, saes: dict[str, Path]
) -> None:
    """f is what the latent reads in that very pass, and every hook written has its part; BOS is as it was."""
    sae, ends, ids, c = load_sae(saes[name]), ENDS[name], ids_of(model), 3.0
    x_LD = read(model, ids, ends)[0][0]
    f_L = sae.encode(x_LD)[:, LATENT]
    times_L = {
        "clamp": c - f_L, "scale": (c - 1) * f_L, "ablate": -f_L
    }.get(mode, torch.full_like(f_L, c))  # fmt: skip
    times_L[0] = 0
    assert bool((f_L[1:] > 0).any())

    def change(value: Tensor, d: Tensor) -> Tensor:
        if mode == "orthogonal":
            unit = d / d.norm()
            value = value - (times_L != 0)[:, None] * torch.outer(value[0] @ unit, unit)
        return value + torch.outer(times_L, d)

    with steered(model, [Intervention(sae=sae, ends=ends, latent=LATENT, mode=mode, strength=c)]):
        got = logits_with(model, ids, {})
    by_hand = {hook: lambda value, d=d: change(value, d) for hook, d in written(ends, sae).items()}
    near(got, logits_with(model, ids, by_hand))
    assert not torch.allclose(got, logits_with(model, ids, {}), atol=1e-3)


def test_a_vector_massive_where_it_is_read_is_left_alone_where_it_is_written(
    model: LanguageModel, saes: dict[str, Path]
) -> None:
    sae, ends, ids = load_sae(saes["transcoder"]), ENDS["transcoder"], ids_of(model)
    norms_L = read(model, ids, ends)[0][0].norm(dim=1)
    longest = float(norms_L[1:].median())
    short_L = (norms_L <= longest) & (torch.arange(len(norms_L)) > 0)
    with steered(model, [Intervention(sae=sae, ends=ends, latent=LATENT, strength=4.0, longest=longest)]):
        got = logits_with(model, ids, {})
    d = sae.W_dec[LATENT]
    near(got, logits_with(model, ids, {ends.writes[0]: lambda value: value + torch.outer(4.0 * short_L, d)}))


def test_a_crosscoder_has_its_part_at_each_hook(model: LanguageModel, saes: dict[str, Path]) -> None:
    sae, ends, ids = load_sae(saes["crosscoder"]), ENDS["crosscoder"], ids_of(model)
    there_L = (torch.arange(ids.shape[1]) > 0).float()
    one = Intervention(sae=sae, ends=ends, latent=LATENT, strength=4.0)
    with steered(model, [one]):
        got = logits_with(model, ids, {})
    parts = written(ends, sae)
    by_hand = {hook: lambda value, d=d: value + torch.outer(4.0 * there_L, d) for hook, d in parts.items()}
    near(got, logits_with(model, ids, by_hand))
    control = Intervention(sae=sae, ends=ends, latent=LATENT, strength=4.0, random=1)
    for hook, other in control.directions().items():
        assert float(other.norm()) == pytest.approx(float(parts[hook].norm()), rel=1e-4)
        assert not torch.allclose(other, parts[hook])


@pytest.mark.parametrize("mode", ["clamp", "scale", "ablate"])
def test_what_writes_before_all_is_read_takes_its_activation_from_the_model_left_alone(
    mode: Any, checkpoints: dict[str, Path], model: LanguageModel, saes: dict[str, Path]
) -> None:
    """In float64 by hand: f of a clean pass, and (new - old) d at each hook of a second one. A vector massive at the last hook
    read is left alone at the first, too."""
    sae, ends, ids, c = load_sae(saes["crosscoder"]), ENDS["crosscoder"], ids_of(model), 3.0
    exact = load_model(str(checkpoints["llama"]), device="cpu", dtype="float32")
    exact.module.double()
    seen = capture(exact, ids, list(ends.reads))
    x_LD = torch.cat([seen[hook][0] for hook in ends.reads], 1)
    f_L = load_sae(saes["crosscoder"]).double().encode(x_LD)[:, LATENT].detach()
    last_L = seen[ends.reads[1]][0].norm(dim=1)
    longest = 1.001 * float(last_L[1:].median())
    times_L = {"clamp": c - f_L, "scale": (c - 1) * f_L, "ablate": -f_L}[mode]
    times_L[(last_L > longest) | (torch.arange(len(f_L)) == 0)] = 0
    assert (times_L != 0).sum() >= 2
    one = Intervention(sae=sae, ends=ends, latent=LATENT, mode=mode, strength=c, longest=(float("inf"), longest))
    with steered(model, [one], tokens=ids):
        got = logits_with(model, ids, {})
    parts = written(ends, sae)
    by_hand = {hook: lambda value, d=d: value + torch.outer(times_L, d.double()) for hook, d in parts.items()}
    near(got.double(), logits_with(exact, ids, by_hand), 1e-5)


def test_an_activation_set_to_what_it_is_changes_no_bit(model: LanguageModel, saes: dict[str, Path]) -> None:
    sae, ends, ids = load_sae(saes["crosscoder"]), ENDS["crosscoder"], ids_of(model)
    x_LD = read(model, ids, ends)[0][0]
    place = int(sae.encode(x_LD[1:])[:, LATENT].argmax()) + 1
    f = float(latent_encoder(sae, [LATENT])(x_LD[[place]]))
    common = {"sae": sae, "ends": ends, "latent": LATENT, "positions": mask_of([place], ids.shape[1])}
    clean = logits_with(model, ids, {})
    with steered(model, [Intervention(**common, mode="clamp", strength=f)], tokens=ids):
        assert torch.equal(logits_with(model, ids, {}), clean)
    with steered(model, [Intervention(**common, mode="ablate")], tokens=ids):
        assert not torch.equal(logits_with(model, ids, {}), clean)


def test_arms_that_look_ahead_are_generated_as_whole_passes_have_it(
    model: LanguageModel, saes: dict[str, Path]
) -> None:
    """Prompts of two lengths, several arms at once, each token with caches against one pass over its own text alone."""
    sae, ends, prompts = load_sae(saes["crosscoder"]), ENDS["crosscoder"], [TEXT, "the red cat runs"]
    other, its_ends = load_sae(saes["transcoder"]), ENDS["transcoder"]
    common = {"sae": sae, "ends": ends, "latent": LATENT}
    clamp = Intervention(**common, mode="clamp", strength=20.0)
    arms = {
        "clamp": [clamp],
        "add": [Intervention(**common, strength=20.0)],
        "where": [Intervention(**common, strength=20.0, where=Where(3))],
        "two": [clamp, Intervention(sae=other, ends=its_ends, latent=1, mode="scale", strength=9.0)],
        "generated": [Intervention(**common, mode="scale", strength=30.0, positions="generated")],
    }
    made = generate(model, prompts, arms, Sampling(max_new_tokens=5, n_samples=2, temperature=0.0))
    for text in made.texts[::2]:
        prompt = ids_of(model, prompts[text.prompt])
        whole = torch.cat([prompt, torch.from_numpy(text.tokens)[None]], 1)
        clean = logits_with(model, whole, {})[prompt.shape[1] - 1 : -1].log_softmax(-1)
        with steered(model, arms.get(text.arm, []), prompt_length=prompt.shape[1], tokens=whole):
            own = logits_with(model, whole, {})[prompt.shape[1] - 1 : -1].log_softmax(-1)
        assert text.tokens.tolist() == own[:, : len(model.tokenizer)].argmax(-1).tolist()
        np.testing.assert_allclose(text.logp, own[torch.arange(len(text.tokens)), text.tokens], atol=2e-3)
        np.testing.assert_allclose(text.kl, (clean.exp() * (clean - own)).sum(-1), atol=2e-3)
    for arm in arms:
        assert any(text.kl.max() > 0.01 for text in made.of(arm)), arm
        assert any(text.diverges is not None for text in made.of(arm)), arm


def test_a_pass_of_tokens_that_were_not_looked_at_is_refused(model: LanguageModel, saes: dict[str, Path]) -> None:
    sae, ends, ids = load_sae(saes["crosscoder"]), ENDS["crosscoder"], ids_of(model)
    clean = logits_with(model, ids, {})
    wrongs: list[dict[str, Any]] = [{"mode": "ablate"}, {"where": Where(3)}]
    for wrong in wrongs:
        one = Intervention(sae=sae, ends=ends, latent=LATENT, strength=1.0, **wrong)
        for tokens in (None, ids.flip(1)):
            expected = "which writes blocks.0.hook_resid_post before it has read blocks.2.hook_resid_post, and this pass is of "
            with pytest.raises(ValueError, match=expected), steered(model, [one], tokens=tokens):
                logits_with(model, ids, {})
    assert torch.equal(logits_with(model, ids, {}), clean)


def test_the_bench_knows_units_of_what_is_written_and_scores_by_it(
    indexes: dict[str, FeatureIndex], saes: dict[str, Path], store: Store
) -> None:
    """The output score of a latent: what its top tokens gain where it is clamped, by a plain pass under the intervention."""
    config = ScoreConfig(prompts=2, prompt_tokens=6, whole=LATENTS)
    for name in indexes:
        bench = open_bench(saes[name], device="cpu")
        assert bench.index is not None
        median = sum(store.norms(hook).median ** 2 for hook in ENDS[name].writes) ** 0.5
        one = bench.intervention(LATENT, "0.5n")
        assert one.strength * float(bench.sae.W_dec[LATENT].norm()) == pytest.approx(0.5 * median, rel=1e-5)
        assert score(bench.model, bench.sae, bench.index, config) is not None
    bench = open_bench(saes["transcoder"], device="cpu")
    assert bench.index is not None
    scores = score(bench.model, bench.sae, bench.index, config)
    assert scores is not None
    prompts = torch.tensor(np.stack(held_out(store, 2, 6, 0)))
    gains = []
    for prompt in prompts[:, None]:
        before = logits_with(bench.model, prompt, {})[-1].softmax(0)
        with steered(bench.model, [bench.intervention(LATENT, "0.5n", "clamp")]):
            after = logits_with(bench.model, prompt, {})[-1].softmax(0)
        gains.append(float((after - before)[top_tokens(bench.index)[LATENT]].sum()))
    assert float(scores.output[LATENT]) == pytest.approx(np.mean(gains), abs=1e-5)


# ------------------------------------------------------------------------------------ attribution


@pytest.mark.parametrize("name", list(ENDS))
def test_ablation_takes_a_latents_part_off_what_is_written(
    name: str, model: LanguageModel, saes: dict[str, Path]
) -> None:
    sae, ends, ids = load_sae(saes[name]), ENDS[name], ids_of(model)
    f_L = sae.encode(read(model, ids, ends)[0][0])[:, LATENT]
    f_L[0] = 0
    got, _ = ablation_effects(model, sae, ends, ids[0].numpy(), LATENT)
    off = {hook: lambda value, d=d: value - torch.outer(f_L, d) for hook, d in written(ends, sae).items()}
    near(got, logits_with(model, ids, off) - logits_with(model, ids, {}), 1e-3)
    assert float(got.abs().max()) > 0


@pytest.mark.parametrize("name", ["transcoder", "cross-layer"])
def test_an_effect_is_activation_times_gradient_where_it_is_written(
    name: str, model: LanguageModel, saes: dict[str, Path]
) -> None:
    """By finite differences with everything else that is written held; effects and errors are all of what is written but its base."""
    sae, ends, ids = load_sae(saes[name]), ENDS[name], ids_of(model)
    metric = logit_of(5)
    got = attribute(model, sae, ends, ids[0].numpy(), metric)
    x, y = (part[0] for part in read(model, ids, ends))
    place = int(np.argmax(np.abs(got.effects)))
    position, latent = int(got.positions[place]), int(got.latents[place])
    assert float(got.activations[place]) == pytest.approx(float(sae.encode(x)[position, latent]), rel=1e-4)

    def at(step: float) -> float:
        moved = y.clone()
        moved[position] += step * got.activations[place] * sae.W_dec[latent]
        held = dict(zip(ends.writes, moved.split(WIDTH, 1), strict=True))
        return float(metric(logits_with(model, ids, {hook: lambda _, v=v: v[None] for hook, v in held.items()})))

    assert got.effects[place] == pytest.approx((at(0.01) - at(-0.01)) / 0.02, rel=0.02)
    integrated = attribute(model, sae, ends, ids[0].numpy(), metric, steps=12)
    assert integrated.total == pytest.approx(
        integrated.metric - integrated.baseline, abs=0.05 * abs(integrated.metric - integrated.baseline) + 0.02
    )


# ------------------------------------------------------------------------------------ connections


def test_connections_are_products_of_what_is_written_with_what_is_read_later(saes: dict[str, Path]) -> None:
    sae = {name: load_sae(folder) for name, folder in saes.items()}
    assert set(connected(saes["deeper"])) == {"transcoder", "cross-layer", "crosscoder"}
    found = connections(saes["deeper"], LATENT)
    column = sae["deeper"].W_enc[:, LATENT]
    want = {("transcoder", place): float(w) for place, w in enumerate(sae["transcoder"].W_dec @ column)}
    both = sae["cross-layer"].W_dec[:, :WIDTH] + sae["cross-layer"].W_dec[:, WIDTH:]
    want |= {("cross-layer", place): float(w) for place, w in enumerate(both @ column)}
    want |= {("crosscoder", place): float(w) for place, w in enumerate(sae["crosscoder"].W_dec[:, :WIDTH] @ column)}
    best = sorted(want, key=lambda key: -abs(want[key]))[:10]
    assert [one[:2] for one in found.fed_by] == best
    assert [one.weight for one in found.fed_by] == pytest.approx([want[key] for key in best], rel=1e-4)
    (strongest, *_) = found.feeds
    later = sae["deeper"].W_dec[LATENT] @ sae["crosscoder"].W_enc[WIDTH:]
    assert strongest == (
        "crosscoder",
        int(later.abs().argmax()),
        pytest.approx(float(later[later.abs().argmax()]), rel=1e-4),
    )
    with pytest.raises(ValueError, match=f"latent is {LATENTS}; "):
        connections(saes["deeper"], LATENTS)


def test_of_a_set_only_its_members_are_connected(saes: dict[str, Path], store: Store, tmp_path: Path) -> None:
    for name, of in (("transcoder", "a"), ("deeper", "a"), ("cross-layer", "b")):
        ends = ENDS[name]
        metadata = {"model_name": "m", "reads": ends.reads, "writes": ends.writes, "set": of}
        save_sae(made(ends, store), tmp_path / name, metadata)
    assert set(connected(tmp_path / "deeper")) == {"transcoder"}
