"""A look before trust: each fault that is made on purpose is named, and a sound SAE gets no word.

Rows are sums of few features of a known dictionary, so that a sound SAE can be written down.
"""

import logging
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.cli import main
from saebench.evaluate.check import Look, look, look_at_others
from saebench.files import hash_files
from saebench.models import same_model
from saebench.sae import SAE, JumpReLUSAE, Writes, new_sae, save_sae
from saebench.store import Store, StoreWriter, open_store
from saebench.store.coding import encode
from saebench.store.schema import PROVENANCE

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.2.hook_attn_out")
WIDTH, FEATURES, ACTIVE, ROWS = 32, 24, 3, 2048


def dictionary(layer: int) -> tuple[Tensor, Tensor]:
    """(features `[F, D]`, orthonormal, and what is added to all rows `[D]`, longer than they) of a hook."""
    vectors = torch.linalg.qr(torch.randn(WIDTH, FEATURES + 1, generator=torch.Generator().manual_seed(layer)))[0].T
    return vectors[1:], 30 * vectors[0]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of hooks that show the same features in directions of their own, the last of them at many lengths."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.zeros(ROWS, FEATURES)
    places = torch.rand(ROWS, FEATURES, generator=generator).topk(ACTIVE).indices
    acts.scatter_(1, places, 3 + 2 * torch.rand(ROWS, ACTIVE, generator=generator))
    acts += 0.3 * torch.randn(acts.shape, generator=generator)  # which thresholds are there for
    rows = {hook: acts @ dictionary(n)[0] + dictionary(n)[1] for n, hook in enumerate(HOOKS)}
    rows[HOOKS[3]] *= torch.randn(ROWS, 1, generator=generator).mul(0.7).exp()
    folder = tmp_path_factory.mktemp("known")
    identity = {"context": 16, "tokenizer": {"files": hash_files([])}, "model": {"id": "maker/tiny", "weights": "0"}}
    writer = StoreWriter(folder, identity, dict.fromkeys(HOOKS, WIDTH), "float32")
    with writer.shard(ROWS) as (shard, documents, attributes):
        columns = {name: np.zeros(ROWS, dtype=kind) for name, kind in PROVENANCE.items()}
        shard.write(
            columns | {"keep": np.ones(ROWS, dtype=bool)}, {hook: encode(x, "float32") for hook, x in rows.items()}
        )
        documents.update({0: "all"})
        attributes.update(split="train", context=16, cursor=(1, 0))
    writer.complete({"rows": {}, "exhausted": True})
    return open_store(folder)


@torch.no_grad()
def sound(architecture: str, layer: int = 1, writes: int | None = None) -> SAE:
    """The SAE of a hook's features, or the transcoder from there to those of another."""
    features, mean = dictionary(layer)
    sae = new_sae(architecture, WIDTH, FEATURES, k=ACTIVE, writes=Writes(d_out=None if writes is None else WIDTH))
    sae.W_enc.copy_(features.T)
    sae.W_dec.copy_(features if writes is None else dictionary(writes)[0])
    sae.b_dec.copy_(mean if writes is None else dictionary(writes)[1])
    if writes is not None:
        sae.shift_projections(-mean @ sae.W_enc)
    if isinstance(sae, JumpReLUSAE):
        sae.threshold.fill_(2.4)
    return sae


def seen(sae: SAE, store: Store, folder: Path, **told: object) -> Look:
    """What a look finds at it, saved with so much said of itself."""
    save_sae(sae, folder, {"model_name": "tiny", "hook_name": HOOKS[1], "context_size": 16} | told)
    return look(folder, store, device="cpu")


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_sound_sae_gets_no_word(known: Store, tmp_path: Path, architecture: str) -> None:
    found = seen(sound(architecture), known, tmp_path / "sound", stated_l0=ACTIVE)
    assert found.warnings == ()
    assert (found.rows, found.stated, found.silent) == (ROWS, ACTIVE, 0.0)
    assert found.l0 == pytest.approx(ACTIVE, abs=0.01)
    assert found.fvu < 0.1
    assert found.decoder == pytest.approx((1, 1, 1), abs=1e-5)
    rows = torch.cat(list(known.usual_rows(HOOKS[1], "train")))
    assert found.read == found.written == pytest.approx(float(rows.square().sum(1).mean().sqrt()), rel=1e-4)


@pytest.mark.parametrize(
    ("architecture", "how"), [("topk", "d_in"), ("topk", "thirty"), ("jumprelu", "one"), ("jumprelu", "third")]
)
def test_a_wrong_scale_is_named_with_the_factor_that_mends_it(
    known: Store, tmp_path: Path, architecture: str, how: str
) -> None:
    square = known.statistics(HOOKS[1])["mean_squared_norm"]
    factor, named = {
        "d_in": (
            math.sqrt(WIDTH / square),
            ", which is a mean squared norm of d_in, as by SAELens' expected_average_only_in",
        ),
        "one": (1 / math.sqrt(square), ", which is a mean squared norm of 1, as by dictionary_learning"),
        "third": (1 / 3, ""),
        "thirty": (30.0, ""),
    }[how]
    sae = sound(architecture)
    sae.rescale_input(1 / factor)
    warning, *_ = seen(sae, known, tmp_path / "scaled", stated_l0=ACTIVE).warnings
    found = re.match(r"wrong scale: it was trained on rows times ([\d.]+)(, which [^:]*)?: there its FVU", warning)
    assert found, warning
    assert float(found[1]) == pytest.approx(factor, rel=0.1)
    assert (found[2] or "") == named


def test_rows_normalised_one_by_one_are_named(known: Store, tmp_path: Path) -> None:
    sae = sound("topk", 3)
    sae.rescale_input(31 / math.sqrt(WIDTH))
    (warning,) = seen(sae, known, tmp_path / "each", hook_name=HOOKS[3]).warnings
    assert warning.startswith("wrong scale: it was trained on rows each brought to norm √d_in: there its FVU is 0.0")


def test_a_wrong_layer_is_named_where_the_store_has_the_right_one(known: Store, tmp_path: Path) -> None:
    for n, architecture in ((0, "topk"), (2, "jumprelu")):
        (warning,) = seen(sound(architecture, n), known, tmp_path / architecture, stated_l0=ACTIVE).warnings
        assert warning.startswith(
            f"wrong layer or place: it says {HOOKS[1]}, and fits {HOOKS[n]}: there its FVU is 0.0"
        )


def test_another_model_is_named(known: Store, tmp_path: Path) -> None:
    name, fit = seen(sound("jumprelu", 7), known, tmp_path / "other", stated_l0=ACTIVE, model_name="gpt2").warnings
    assert name.startswith("it states model 'gpt2', the store is of 'maker/tiny'")
    assert f"it is of another model, layer or place than {HOOKS[1]}" in fit
    wide = new_sae("topk", 2 * WIDTH, FEATURES, k=ACTIVE)
    with pytest.raises(
        ValueError, match="takes vectors of 64, blocks.2.hook_resid_post in .* has 32: it is of another model"
    ):
        seen(wide, known, tmp_path / "wide")


@pytest.mark.parametrize(("factor", "mends"), [(0.1, "7.1"), (1.9, "0.37")])
def test_thresholds_off_by_a_factor_are_named(known: Store, tmp_path: Path, factor: float, mends: str) -> None:
    sae = sound("jumprelu")
    with torch.no_grad():
        sae.threshold *= factor
    (warning,) = seen(sae, known, tmp_path / "off", stated_l0=ACTIVE).warnings
    assert warning.startswith(f"thresholds off by a factor: these times {mends}"), warning
    assert "its L0 3.0 instead of" in warning
    assert "SAELens" not in warning


def test_thresholds_that_saelens_left_off_by_the_norm_are_named(known: Store, tmp_path: Path) -> None:
    """In units of rows scaled to a mean squared norm of d_in, where all else is folded."""
    sae = sound("jumprelu")
    with torch.no_grad():
        sae.threshold.fill_(1.7 * math.sqrt(WIDTH) / 31)
    (warning,) = seen(sae, known, tmp_path / "off", stated_l0=ACTIVE).warnings
    assert "by which SAELens before 6.54.9 left those of BatchTopK off" in warning


def test_a_transcoder_is_looked_at_by_what_it_writes(known: Store, tmp_path: Path) -> None:
    sae = sound("topk", 1, 2)
    found = seen(sae, known, tmp_path / "sound", hook_name_out=HOOKS[2])
    assert (found.warnings, found.fvu < 0.1) == ((), True)
    sae.rescale_hooks(1.0, 5.0)
    (warning,) = seen(sae, known, tmp_path / "scaled", hook_name_out=HOOKS[2]).warnings
    assert warning.startswith("wrong scale: it was trained on rows times 1, and what it writes is to be taken times 5:")


def test_damaged_weights_are_named(known: Store, tmp_path: Path) -> None:
    sae = sound("topk")
    with torch.no_grad():
        sae.W_dec[3, 4] = math.nan
    assert "not finite: its weights are damaged" in seen(sae, known, tmp_path / "nan").warnings[-1]


def test_others_saes_are_looked_at_and_ours_are_trusted(
    known: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    seen(sound("topk", 0), known, tmp_path / "sae")
    seen(sound("topk", 0), known, tmp_path / "ours", saebench={})
    for folder in ("sae", "ours"):
        look_at_others(tmp_path / folder, known, "cpu")
    first, warning = caplog.messages
    assert first.startswith("sae on 2,048 rows: L0 3.0 (it states 3), FVU ")
    assert "wrong layer or place" in warning
    assert main(["check", str(tmp_path / "sae"), "--store", str(known.folder)]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("warning: wrong layer or place")
    assert main(["check", str(tmp_path / "sae")]) == 2
    assert "does not say what it was trained on; give a store of its hook with --store" in capsys.readouterr().err


def test_names_of_one_model() -> None:
    assert same_model("gpt2-small", "openai-community/gpt2")
    assert same_model("/models/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M")
    assert not same_model("gpt2", "gpt2-medium")
