"""Two models' stores read as one, and what a crosscoder of both says of each latent: on made-up rows."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest
from test_gradients import one_thread
from test_store import CONTEXT, provenance
from test_transcoders import interrupted

from saebench.browse.serve import app_script
from saebench.cli import main
from saebench.evaluate.diffing import KINDS, Diff, DiffConfig, LatentScaling, diff, read_diff
from saebench.files import hash_files, read_json, write_json
from saebench.models import parse_hook
from saebench.sae import SAE, Writes, load_sae, new_sae, read_config
from saebench.store import Store, joint_batches, open_store
from saebench.store.pair import PairedStore, open_pair
from saebench.store.writer import StoreWriter
from saebench.train import TrainConfig, train
from saebench.train.checkpoint import begun_as

__all__ = ["one_thread"]  # for all tests here: they are small

HOOK, OTHER = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TUNED = f"tuned:{HOOK}"


def features(n: int, seed: int = 0, n_features: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """(sparse activations of features `[n, N]`, their unit directions `[N, 16]`)."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, n_features, generator=generator) < 0.08
    directions = torch.randn(n_features, 16, generator=torch.Generator().manual_seed(7))
    return active * (1 + torch.rand(n, n_features, generator=generator)), directions / directions.norm(
        dim=1, keepdim=True
    )


def make(
    folder: Path,
    rows: torch.Tensor,
    *,
    hook: str = HOOK,
    change: Callable[[dict[str, np.ndarray]], None] = lambda columns: None,
    context: int = CONTEXT,
    dtype: Any = "float32",
    split: str = "validation",
    files: tuple[Path, ...] = (),
) -> Store:
    """A store of a shard of training rows and one of 640 held-out rows, whose provenance may be changed first."""
    writer = StoreWriter(
        folder,
        {"context": context, "tokenizer": {"files": hash_files(list(files))}},
        {hook: rows.shape[1]},
        dtype,
    )
    writer.add_tokenizer(list(files))
    for name, n in (("train", len(rows) - 640), (split, 640)):
        with writer.shard(n) as (shard, documents, attributes):
            columns = provenance(n)
            change(columns)
            shard.write(columns, {hook: (rows[:n] if name == "train" else rows[-n:]).to(getattr(torch, dtype))})
            documents.update({i: f"doc {i}" for i in range(-(-n // 10))})
            attributes.update(split=name, context=context, cursor=(1, 0))
    writer.complete({"rows": {}, "exhausted": True})
    return open_store(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Store]:
    """Of a base and a tuned model: feature 0 is the base's alone, feature 1 the tuned one's; the tuned one is three times as long."""
    folder = tmp_path_factory.mktemp("pair")
    active, directions = features(4000)
    base, tuned = active.clone(), active.clone()
    base[:, 1], tuned[:, 0] = 0, 0
    return make(folder / "base", base @ directions), make(folder / "tuned", 3 * tuned @ directions)


def config(stores: tuple[Store, Store], out: Path, **options: Any) -> TrainConfig:
    small = {"d_sae": (32,), "k": (3,), "tokens": 51_200, "batch": 128, "lr": (1e-2,), "device": "cpu"}
    pair = {"store": stores[0].folder, "beside": stores[1].folder, "kind": "crosscoder", "hook": (HOOK,)}
    return TrainConfig(out=out, **{**small, **pair, **options})


# ------------------------------------------------------------------------------------- the stores


def test_hooks_of_both_come_in_step_and_each_knows_its_own_rows(stores: tuple[Store, Store]) -> None:
    base, tuned = stores
    pair = open_pair(base.folder, tuned.folder)
    assert isinstance(pair, PairedStore)
    assert pair.hooks == [HOOK, TUNED]
    assert (pair.hash, pair.beside.hash) == (base.hash, tuned.hash)
    assert (pair.statistics(HOOK), pair.statistics(TUNED)) == (base.statistics(HOOK), tuned.statistics(HOOK))
    assert (pair.norm_histogram(TUNED) == tuned.norm_histogram(HOOK)).all()
    of_row = dict(zip(map(tuple, base.shards[0].rows(HOOK).tolist()), tuned.shards[0].rows(HOOK), strict=True))
    rows, _ = next(joint_batches(pair, [HOOK, TUNED], 64, seed=0))
    assert all(
        torch.equal(of_row[tuple(row.tolist())], other) for row, other in zip(rows[HOOK], rows[TUNED], strict=True)
    )
    held_out = next(pair.joint_rows([TUNED, HOOK], "validation"))
    assert torch.equal(held_out[TUNED], tuned.shards[1].rows(HOOK))
    assert type(open_pair(base.folder, None)) is Store


def test_a_hook_of_the_second_store_is_no_hook_of_a_model() -> None:
    with pytest.raises(ValueError, match=f"hook '{TUNED}' is not known; expected blocks.LAYER"):
        parse_hook(TUNED)


def vocabulary(folder: Path, words: list[str]) -> tuple[Path]:
    """The file of a tokenizer whose tokens are words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)
    return (folder / "tokenizer.json",)


def another_token(columns: dict[str, np.ndarray]) -> None:
    columns["tokens"][70:] += 5


def one_left_out(columns: dict[str, np.ndarray]) -> None:
    columns["keep"][33] = False


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"context": 2 * CONTEXT}, f"context is {2 * CONTEXT} in .*second and {CONTEXT} in .*base; expected the same rows"),
        ({"dtype": "float16"}, "dtype is float16 in .*second and float32 in .*base; .*with the same --tokens"),
        ({"split": "train"}, "train rows is 4000 in .*second and 3360 in .*base"),
        ({"rows": torch.ones(4128, 16)}, "train rows is 3488 in .*second and 3360 in .*base"),
        ({"change": another_token}, "row 70 of the train rows is token 75 .*in .*second and token 70 .*in .*base; expected the same tok"),
        ({"change": one_left_out}, "row 33 of the train rows is left out in .*second and kept in .*base"),
    ],
)  # fmt: skip
def test_stores_of_other_rows_are_refused(
    other: dict[str, Any], message: str, stores: tuple[Store, Store], tmp_path: Path
) -> None:
    second = make(tmp_path / "second", **{"rows": torch.ones(4000, 16), **other})
    with pytest.raises(ValueError, match=message):
        open_pair(stores[0].folder, second.folder)


def test_other_words_for_a_token_are_refused_and_more_tokens_are_not(tmp_path: Path) -> None:
    made = {
        name: make(tmp_path / name, torch.ones(1280, 16), files=vocabulary(tmp_path / f"of {name}", words.split()))
        for name, words in (("base", "a b c"), ("longer", "a b c d"), ("other", "a c b"))
    }
    assert open_pair(made["base"].folder, made["longer"].folder).hooks == [HOOK, TUNED]
    with pytest.raises(ValueError, match="token 1 is 'c' to the tokenizer of .*other and 'b' to that of .*base"):
        open_pair(made["base"].folder, made["other"].folder)


def test_shards_of_another_size_are_refused(stores: tuple[Store, Store], tmp_path: Path) -> None:
    shutil.copytree(stores[1].folder, tmp_path / "cut")
    manifest = read_json(tmp_path / "cut" / "manifest.json")
    manifest["shards"][0]["rows"], manifest["shards"][1]["rows"] = 640, 3360
    manifest["shards"][0]["split"], manifest["shards"][1]["split"] = "validation", "train"
    write_json(tmp_path / "cut" / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"rows of shard-00000.h5 \(train\) is not there in .*cut and 3360 in .*base"):
        open_pair(stores[0].folder, tmp_path / "cut")


# ----------------------------------------------------------------------------------- the training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sae"}, "beside is .*tuned of what does not read and write both models; expected --kind crosscoder"),
        ({"hook": (), "kind": "sae", "reads": (HOOK,), "writes": (TUNED,)}, f"hook is '{TUNED}', of a second model's store"),
        ({"hook": (), "reads": (HOOK, OTHER), "writes": (HOOK, OTHER)}, "beside is .*: its rows of the one are no input"),
        ({"hook": (), "kind": "transcoder", "layers": (0,)}, "beside is .*tuned of what does not read and write both"),
        ({"hook": (HOOK, TUNED)}, f"hook is '{TUNED}', of a second model's store; expected '{HOOK}'"),
        ({"beside": None, "kind": "sae", "hook": (TUNED,)}, f"hook is '{TUNED}', of a second model's store; .*--beside STORE"),
        ({"rolling": 3}, "beside is .* and rolling is 3; expected two finished stores"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_two_stores_is_refused(
    options: dict[str, Any], message: str, stores: tuple[Store, Store], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config(stores, tmp_path, **options)


def test_a_hook_that_the_second_store_lacks_is_named_with_that_store(
    stores: tuple[Store, Store], tmp_path: Path
) -> None:
    second = make(tmp_path / "second", torch.ones(4000, 16), hook=OTHER)
    with pytest.raises(ValueError, match=f"hook '{TUNED}' is not in .*second; it has .*tuned:{OTHER}"):
        train(config((stores[0], second), tmp_path / "run"))


def test_resumed_equals_uninterrupted_and_both_stores_are_part_of_the_identity(
    stores: tuple[Store, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"tokens": 6_400}
    (whole,) = train(config(stores, tmp_path / "whole", **options)) or []
    interrupted(lambda: train(config(stores, tmp_path / "cut", **options)), monkeypatch)
    (cut,) = train(config(stores, tmp_path / "cut", **options)) or []
    assert (whole / "sae_weights.safetensors").read_bytes() == (cut / "sae_weights.safetensors").read_bytes()
    metadata = read_config(cut)["metadata"]
    assert metadata["reads"] == metadata["writes"] == [HOOK, TUNED]
    assert [metadata["saebench"][name] for name in ("store", "beside")] == [str(store.folder) for store in stores]
    begun = begun_as(tmp_path / "cut" / "saes")[cut.name]
    assert [begun[name] for name in ("store", "beside")] == [store.hash for store in stores]
    with pytest.raises(ValueError, match="trained with other settings: beside: "):
        train(config((stores[0], stores[0]), tmp_path / "cut", **options))


# ------------------------------------------------------------------------------------ the figures


def by_hand(base: torch.Tensor, tuned: torch.Tensor) -> SAE:
    """A crosscoder that reads feature n where the base model has it, and else the tuned one, and writes these rows."""
    sae = new_sae("relu", 32, len(base), writes=Writes(parts=(16, 16)))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([base, tuned], 1))
        sae.W_enc.copy_(torch.linalg.pinv(sae.W_dec))
    return sae


def test_latent_scaling_is_the_least_squares_fit_of_each_latent() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = new_sae("relu", 12, 5, writes=Writes(parts=(6, 6)))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x, scale = torch.randn(300, 12, generator=generator), torch.tensor([2.0] * 6 + [0.5] * 6)
    scaling = LatentScaling(sae, scale)
    for part in x.split(100):
        scaling.add(part)
    found = scaling.diff()
    with torch.no_grad():
        out = sae(x)
        (d, y, written), f = (
            [(v * scale).double().chunk(2, dim=1) for v in (sae.W_dec, x - out.x_hat, out.x_hat - sae.b_dec)],
            out.acts.double(),
        )
    for latent in range(5):
        longer = int(d[1][latent].norm() > d[0][latent].norm())
        basis = (f[:, latent, None] * d[longer][latent]).flatten()[:, None]
        for name, targets in (
            ("error", [y[m] + f[:, latent, None] * d[m][latent] for m in (0, 1)]),
            ("reconstruction", written),
        ):
            beta = [float(torch.linalg.lstsq(basis, target.flatten()[:, None]).solution) for target in targets]
            expected = beta[1 - longer] / beta[longer] if beta[longer] > 0 else np.nan
            assert getattr(found, name)[latent] == pytest.approx(expected, rel=1e-4, nan_ok=True)
        norms = [float(part[latent].norm()) for part in d]
        assert found.relative[latent] == pytest.approx(norms[1] / sum(norms), rel=1e-5)
    assert (found.fires == (f > 0).sum(0).numpy()).all()


def test_bounds_are_those_of_the_papers_relative_difference_of_norms() -> None:
    """Δ = (1 + (t - b) / max(t, b)) / 2: 0.905 and 0.895, 0.605 and 0.595 for a longer row of the tuned model; the same below 1/2."""
    shorter, ones = np.array([0.19, 0.21, 0.79, 0.81]), np.ones(8)
    base, tuned = np.concatenate([shorter, ones[:4]]), np.concatenate([ones[:4], shorter])
    delta = (1 + (tuned - base) / np.maximum(tuned, base)) / 2
    np.testing.assert_allclose(delta, [0.905, 0.895, 0.605, 0.595, 0.095, 0.105, 0.395, 0.405])
    found = Diff(100, tuned / (base + tuned), ones, 0 * ones, 0 * ones, np.full(8, 99))
    kinds = [KINDS[kind] for kind in found.kinds]
    assert kinds == ["tuned-only", "between", "between", "shared", "base-only", "between", "between", "shared"]


def test_each_kind_is_what_was_put_in() -> None:
    """Feature 0 is the base model's alone, 1 the tuned one's, 2 both models' but written into the tuned one alone (complete shrinkage),
    3 both models' and written as one latent into each (decoupling), the others shared; the last never fires."""
    active, directions = features(4000, n_features=12)
    active[:, 11] = 0
    base, tuned = active.clone(), active.clone()
    base[:, 1], tuned[:, 0] = 0, 0
    x = torch.cat([base @ directions, tuned @ directions], 1)
    none = torch.zeros_like(directions)
    in_base, in_tuned = directions.clone(), directions.clone()
    in_base[[1, 2, 3]], in_tuned[0] = 0, 0
    extra = [torch.cat([part, row[3:4]]) for part, row in ((in_base, directions), (in_tuned, none))]
    sae = by_hand(*extra)
    with torch.no_grad():  # latents read what was put in, and no other: this is about what is written
        sae.W_enc.zero_()
        whole = torch.linalg.pinv(directions)
        sae.W_enc[:16, :12], sae.W_enc[:16, 12] = whole, whole[:, 3]
        sae.W_enc[:16, 1] = 0
        sae.W_enc[16:, 1] = whole[:, 1]
        sae.get_parameter("b_enc").fill_(-1e-3)
    scaling = LatentScaling(sae, torch.ones(32))
    scaling.add(x)
    found = scaling.diff()
    names = np.array(["shared", "base-only", "tuned-only", "unconfirmed", "between", "rare"])[found.kinds]
    assert names.tolist() == [
        "base-only",
        "tuned-only",
        "unconfirmed",
        "unconfirmed",
        *["shared"] * 7,
        "rare",
        "unconfirmed",
    ]
    assert found.error[[2, 3]] == pytest.approx([1.0, 0.0], abs=0.1)
    assert found.reconstruction[[3, 12]] == pytest.approx([1.0, 1.0], abs=0.3)
    assert found.counts() == {"shared": 7, "base-only": 1, "tuned-only": 1, "unconfirmed": 3, "between": 0, "rare": 1}
    assert found.of("shared").tolist() == sorted(range(4, 11), key=lambda latent: -found.fires[latent])


@pytest.fixture(scope="module")
def crosscoder(stores: tuple[Store, Store], tmp_path_factory: pytest.TempPathFactory) -> Path:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # `one_thread` is of tests
    (folder,) = train(config(stores, tmp_path_factory.mktemp("diffed") / "tiny")) or []
    torch.set_num_threads(before)
    return folder


def test_what_each_model_has_alone_is_found(crosscoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the direction of its row; the tuned model's rows are three times as long, which is no difference."""
    found, sae = diff(DiffConfig(sae=crosscoder, device="cpu")), load_sae(crosscoder)
    _, directions = features(1)
    assert found.rows == 640
    for kind, feature, part in (("base-only", 0, 0), ("tuned-only", 1, 1)):
        (latent,) = found.of(kind)
        row = sae.W_dec[latent].chunk(2)[part]
        assert float(torch.cosine_similarity(row, directions[feature], dim=0)) > 0.9
    assert found.counts()["shared"] >= 15
    again = read_diff(crosscoder)
    assert again is not None
    assert (again.kinds == found.kinds).all()
    assert main(["diff", "--sae", str(crosscoder)]) == 0
    printed = capsys.readouterr().out
    for model in ("tuned", "base"):
        latent = found.towards(model)[0]
        assert [latent] == found.of(f"{model}-only").tolist()
        assert f"{latent:>6}  {model}-only" in printed


def test_a_diff_of_other_weights_is_refused(crosscoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(crosscoder, tmp_path / "other"))
    diff(DiffConfig(sae=folder, device="cpu"))
    with open(folder / "sae_weights.safetensors", "ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match="is of other weights than .* has: run `saebench diff --sae"):
        read_diff(folder)
    write_json(folder / "diff.json", {"schema": "saebench-diff", "identity": {"version": 0}})
    with pytest.raises(ValueError, match="is none of this version's"):
        read_diff(folder)


def test_a_diff_of_other_bounds_opens_and_is_made_again(crosscoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(crosscoder, tmp_path / "other"))
    found, written = diff(DiffConfig(sae=folder, device="cpu")), read_json(folder / "diff.json")
    bounds = written["bounds"]
    write_json(folder / "diff.json", written | {"bounds": bounds | {"exclusive": 0.1}, "counts": {}})
    earlier = read_diff(folder)
    assert earlier is not None
    assert (earlier.kinds == found.kinds).all()
    diff(DiffConfig(sae=folder, device="cpu"))
    assert read_json(folder / "diff.json")["bounds"] == bounds
    assert read_json(folder / "diff.json")["counts"] == found.counts()


def test_only_a_crosscoder_of_two_models_is_taken_apart(stores: tuple[Store, Store], tmp_path: Path) -> None:
    (sae,) = train(config(stores, tmp_path, kind="sae", beside=None, tokens=640)) or []
    with pytest.raises(ValueError, match=f"reads {HOOK}; expected a crosscoder of two models' hooks: train one with"):
        diff(DiffConfig(sae=sae))
    wide = make(tmp_path / "wide", torch.randn(4000, 20, generator=torch.Generator().manual_seed(0)))
    (crossed,) = train(config((stores[0], wide), tmp_path / "wider", tokens=640)) or []
    with pytest.raises(
        ValueError, match=f"{HOOK} has width 16 in .*base and 20 in .*wide; expected models of one width"
    ):
        diff(DiffConfig(sae=crossed))


def test_two_equal_models_have_no_exclusive_latents(stores: tuple[Store, Store], tmp_path: Path) -> None:
    """Parts of a decoder row are drawn independently for each model: they are at right angles at first, and alike in the end."""
    equal = stores[0], stores[0]
    (folder,) = train(config(equal, tmp_path)) or []
    found = diff(DiffConfig(sae=folder, device="cpu"))
    counts = found.counts()
    assert counts["base-only"] == counts["tuned-only"] == 0
    assert counts["unconfirmed"] <= 1
    shared = found.kinds == 0
    assert shared.sum() >= 15
    assert found.cosine[shared].mean() > 0.9
    assert isinstance(found, Diff)


def test_the_page_shows_what_each_model_has_alone(crosscoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(app_script().parent))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # Streamlit puts the app in its place
    monkeypatch.setenv("SAEBENCH_APP_ROOT", str(crosscoder.parent.parent))
    (crosscoder / "diff.json").unlink(missing_ok=True)
    app = AppTest.from_file(str(app_script()), default_timeout=60)
    app.switch_page("views/diff.py")
    app.run()
    assert not app.exception
    assert any("saebench diff --sae" in part.value for part in app.caption)
    diff(DiffConfig(sae=crosscoder, device="cpu"))
    app.run()
    assert not app.exception
    assert not app.error
    assert any("most one model" in part.value for part in app.caption)
    assert any("Figures of 640 held" in part.value.replace("\\", "") for part in app.caption)
