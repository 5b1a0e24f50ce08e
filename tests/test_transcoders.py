"""Training of dictionaries that read at some hooks and write at others: on stores of made-up rows, of several hooks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_gradients import one_thread
from test_store import CONTEXT, provenance

from saebench.files import hash_files, read_json
from saebench.sae import kind_of, load_sae, read_config
from saebench.store import Store, open_store
from saebench.store.writer import StoreWriter
from saebench.train import Member, Spec, TrainConfig, loop, train
from saebench.train.checkpoint import Checkpoint, begun_as
from saebench.train.recipes import RECIPES

__all__ = ["one_thread"]  # for all tests here: they are small

IN, OUT, PRE = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_pre"
IN_1, OUT_1 = IN.replace("0", "1"), OUT.replace("0", "1")


def make(folder: Path, rows: dict[str, torch.Tensor]) -> Store:
    """A store of these rows at several hooks, and a shard of validation that nobody reads."""
    writer = StoreWriter(
        folder,
        {"context": CONTEXT, "tokenizer": {"files": hash_files([])}},
        {hook: vectors.shape[1] for hook, vectors in rows.items()},
        "float32",
    )
    for split in ("train", "validation"):
        n = len(next(iter(rows.values()))) if split == "train" else 64
        with writer.shard(n) as (shard, documents, attributes):
            shard.write(provenance(n), {hook: vectors[:n] for hook, vectors in rows.items()})
            documents.update({i: f"doc {i}" for i in range(-(-n // 10))})
            attributes.update(split=split, context=CONTEXT, cursor=(1, 0))
    writer.complete({"rows": {}, "exhausted": True})
    return open_store(folder)


def rows_of_a_layer(n: int = 3200, seed: int = 0) -> dict[str, torch.Tensor]:
    """An MLP's input of some mean, its output: ReLUs of the input, and the stream. Units as they come."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator) * 3 + 1
    up, down = torch.randn(8, 12, generator=generator), torch.randn(12, 6, generator=generator)
    return {IN: x, OUT: torch.relu(x @ up - 4) @ down * 0.1 + 2, PRE: x + 0.1 * torch.randn(n, 8, generator=generator)}


def rows_of_two_layers(n: int = 3200) -> dict[str, torch.Tensor]:
    """The layer, and one above it, half of whose output comes from the input of the first."""
    first, second = rows_of_a_layer(n), rows_of_a_layer(n, 1)
    again = rows_of_a_layer(n)[OUT] @ torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
    return {
        IN: first[IN],
        OUT: first[OUT],
        IN_1: second[IN],
        OUT_1: second[OUT] + again * (second[OUT].std() / again.std()),
    }


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make(tmp_path_factory.mktemp("layer") / "store", rows_of_a_layer())


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make(tmp_path_factory.mktemp("layers") / "store", rows_of_two_layers())


def config(store: Store, out: Path, **options: Any) -> TrainConfig:
    small = {
        "kind": "transcoder",
        "d_sae": (48,),
        "k": (4,),
        "tokens": 6_400,
        "batch": 64,
        "lr": (5e-3,),
        "device": "cpu",
    }
    return TrainConfig(store=store.folder, out=out, **{**small, **options})


def unexplained(sae: Any, x: torch.Tensor, y: torch.Tensor) -> float:
    """FVU of what is written."""
    with torch.no_grad():
        return float((y - sae(x).x_hat).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("arch", list(RECIPES))
def test_a_transcoder_writes_what_it_was_trained_to_in_the_models_own_units(
    arch: str, store: Store, tmp_path: Path
) -> None:
    """Whatever the architecture. The log is of the last batches, on which weights still changed."""
    (folder,) = (
        train(config(store, tmp_path, arch=(arch,), target_l0=(4.0,), k=(), skip=arch in ("topk", "relu"))) or []
    )
    rows, sae = rows_of_a_layer(), load_sae(folder)
    facts = read_config(folder)["metadata"]
    assert (facts["hook_name"], facts["hook_name_out"], facts["reads"], facts["writes"]) == (IN, OUT, [IN], [OUT])
    assert (sae.d_in, sae.d_out, sae.writes.skip) == (8, 6, arch in ("topk", "relu"))
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(48), atol=1e-5)
    log = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if line]
    fvu = float(log[-1].split('"fvu": ')[1].split(",")[0])
    assert unexplained(sae, rows[IN], rows[OUT]) == pytest.approx(fvu, rel=0.4)
    assert fvu < 0.9
    assert folder.name.endswith("-skip-transcoder" if sae.writes.skip else "-transcoder")


def test_a_linear_map_is_recovered_by_a_skip_transcoder() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(24, 16, generator=generator) / 24**0.5
    spec = Spec(name="s", reads=("a",), writes=("b",), skip=True, architecture="topk", d_sae=32, k=2, lr=1e-2, seed=0)
    member = Member(spec, torch.ones(24), 10**6, 400, "cpu", mean_E=torch.zeros(16))
    for step in range(400):
        x = torch.randn(128, 24, generator=generator) + 1
        member.step(x, step, x @ weights)
    x = torch.randn(1000, 24, generator=generator) + 1
    assert unexplained(member.sae, x, x @ weights) < 1e-4


def interrupted(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies right after its first checkpoint."""
    save = Checkpoint.save

    def save_and_cut(self: Checkpoint, *args: Any) -> None:
        save(self, *args)
        raise InterruptedError("cut")

    with monkeypatch.context() as patch:
        patch.setattr("saebench.train.clock.CHECKPOINT_SECONDS", 0.0)
        patch.setattr(Checkpoint, "save", save_and_cut)
        with pytest.raises(InterruptedError, match="cut"):
            run()


@pytest.mark.parametrize(
    "options",
    [
        {"arch": ("jumprelu", "batchtopk"), "target_l0": (4.0,), "k": (), "skip": True, "dead_tokens": 640},
        {"kind": "crosscoder", "hook": (IN, OUT), "arch": ("relu", "matryoshka"), "target_l0": (4.0,), "k": ()},
        {
            "kind": "clt",
            "layers": (0, 1),
            "arch": ("relu", "batchtopk"),
            "target_l0": (4.0,),
            "k": (),
            "dead_tokens": 640,
        },
    ],
)
def test_resumed_equals_uninterrupted(
    options: dict[str, Any], store: Store, two_layers: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options, store = options | {"tokens": 3_200}, two_layers if options.get("kind") == "clt" else store
    train(config(store, whole, **options))
    interrupted(lambda: train(config(store, cut, **options)), monkeypatch)
    assert 0 < read_json(cut / "saes" / "checkpoint.json")["step"] < 50
    for folder in train(config(store, cut, **options)) or []:
        other = whole / folder.relative_to(cut) / "sae_weights.safetensors"
        assert (folder / "sae_weights.safetensors").read_bytes() == other.read_bytes()


def test_resampled_latents_read_a_badly_written_row_and_write_what_is_missing_there() -> None:
    generator = torch.Generator().manual_seed(1)
    spec = Spec(name="s", reads=("a",), writes=("b",), architecture="relu", d_sae=32, l1=0.1, lr=1e-3, seed=0)
    member = Member(spec, torch.full((8,), 0.5), 5, 100, "cpu", mean_E=torch.zeros(6))
    x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 6, generator=generator)
    member.step(x, 0, y)
    member._pool(torch.cat([x, y], 1), y.square().sum(1), 3)
    member.silent_steps[:4] = 5
    best = member.pool[:4]
    with torch.no_grad():
        missing = best[:, 8:] - member.sae(best[:, :8]).x_hat
        member._resample()
    directions = torch.nn.functional.normalize(member.sae.W_dec[:4], dim=1)
    assert torch.allclose(directions, torch.nn.functional.normalize(missing, dim=1), atol=1e-5)
    read = torch.nn.functional.normalize(member.sae.W_enc.T[:4], dim=1)
    assert torch.allclose(read, torch.nn.functional.normalize(best[:, :8] - 0.5, dim=1), atol=1e-5)


def test_a_crosscoder_weighs_each_hook_alike_and_knows_its_rows_there(store: Store, tmp_path: Path) -> None:
    """The stream and a hundredth of it: equal shares of every decoder row, each hook's in its own units."""
    rows = rows_of_a_layer(1600)
    both = make(tmp_path / "store", {PRE: rows[PRE], IN: rows[PRE] / 100})
    (folder,) = train(config(both, tmp_path, kind="crosscoder", hook=(PRE, IN), tokens=6_400)) or []
    sae, config_of = load_sae(folder), read_config(folder)
    assert folder.name == "batchtopk-k4-crosscoder"  # the default where several hooks are written
    assert config_of["metadata"]["training_architecture"] == "batchtopk"
    assert (config_of["architecture"], kind_of(sae), sae.parts) == ("jumprelu_crosscoder", "crosscoder", (8, 8))
    assert config_of["metadata"]["writes"] == config_of["metadata"]["reads"] == [PRE, IN]
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(48), atol=1e-5)
    x = torch.cat([rows[PRE], rows[PRE] / 100], 1)
    out = sae(x).x_hat
    for part in (slice(8), slice(8, 16)):
        assert (x[:, part] - out[:, part]).square().sum() < 0.3 * (x[:, part] - x[:, part].mean(0)).square().sum()
    shares = sae.lengths_FH * torch.tensor([1.0, 100.0])
    used = sae.encode(x).sum(0) > 0
    assert 0.2 < float((shares[used, 1] / shares[used].sum(1)).mean()) < 0.8


def test_a_cross_layer_transcoder_writes_at_each_hook_what_its_members_add_up_to(
    two_layers: Store, tmp_path: Path
) -> None:
    """Better than the members of its own layer alone could; a set whose files say what belongs to it."""
    folders = (
        train(
            config(two_layers, tmp_path, kind="clt", arch=("batchtopk", "gated"), target_l0=(4.0,), k=(), tokens=16_000)
        )
        or []
    )
    assert [folder.name for folder in folders] == [
        f"{name}-clt-{hook}" for hook in (IN, IN_1) for name in ("batchtopk-k4", "gated-l0-4")
    ]
    rows = rows_of_two_layers()
    for first, second in (folders[::2], folders[1::2]):
        facts = [read_config(folder)["metadata"] for folder in (first, second)]
        assert [known["writes"] for known in facts] == [[OUT, OUT_1], [OUT_1]]
        assert [known["set_reads"] for known in facts] == [[IN, IN_1]] * 2
        assert {(known["set"], known["joint"]) for known in facts} == {(first.name.removesuffix(f"-{IN}"), True)}
        below, above = load_sae(first), load_sae(second)
        assert (below.parts, above.parts) == ((6, 6), (6,))
        assert torch.allclose(below.W_dec.norm(dim=1), torch.ones(48), atol=1e-5)
        assert below.b_dec[6:].abs().max() == 0 < below.b_dec[:6].abs().min()
        near, far = below(rows[IN]).x_hat.split(6, 1)
        written = {OUT: near, OUT_1: far + above(rows[IN_1]).x_hat}
        fvus = [
            float((rows[h] - w).square().sum() / (rows[h] - rows[h].mean(0)).square().sum()) for h, w in written.items()
        ]
        assert max(fvus) < 0.3
        without = (rows[OUT_1] - above(rows[IN_1]).x_hat).square().sum()  # of the lower layer's
        assert without > 0.3 * (rows[OUT_1] - rows[OUT_1].mean(0)).square().sum()


def test_of_a_joint_set_all_are_trained_or_none(
    two_layers: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed between the saving of two members: the last steps are taken again, and the same bytes written."""
    options = {"kind": "clt", "arch": ("batchtopk",), "tokens": 1_280}
    whole = train(config(two_layers, tmp_path / "whole", **options)) or []

    def save_one(run: Any, member: Member, *rest: Any) -> None:
        if member is not member.company[0]:
            raise InterruptedError("cut")
        save(run, member, *rest)

    save = loop._save
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", save_one)
        with pytest.raises(InterruptedError, match="cut"):
            train(config(two_layers, tmp_path / "cut", **options))
    assert (tmp_path / "cut/saes" / whole[0].name / "cfg.json").exists()
    again = train(config(two_layers, tmp_path / "cut", **options)) or []
    for one, other in zip(again, whole, strict=True):
        assert (one / "sae_weights.safetensors").read_bytes() == (other / "sae_weights.safetensors").read_bytes()


def test_where_one_of_a_joint_set_diverges_all_stop(two_layers: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clt-blocks.0.mlp.hook_in stopped at step"):
        train(
            config(two_layers, tmp_path / "run", kind="clt", arch=("relu",), k=(), l1=(1e-3,), lr=(1e30,), tokens=3_200)
        )
    log = (tmp_path / "run/saes").glob("*/metrics.jsonl")
    assert all(not path.read_text() for path in log)


def test_a_row_that_is_massive_at_one_hook_is_left_out_at_all(tmp_path: Path) -> None:
    """A thousand times as long where it is written, and there alone: row by row what is read stays with what is written."""
    rows = rows_of_a_layer(1600)
    usual = rows[IN] @ torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    massive = torch.arange(1600) % 100 == 7
    rows[OUT] = torch.where(massive[:, None], 1000 * usual, usual)
    store = make(tmp_path / "store", rows)
    (folder,) = train(config(store, tmp_path, skip=True, tokens=6_400)) or []
    sae = load_sae(folder)
    assert unexplained(sae, rows[IN][~massive], usual[~massive]) < 0.3  # rows out of step have 1
    assert begun_as(tmp_path / "saes")[folder.name]["exclude_outliers"] == 10.0


def test_what_is_read_and_written_is_part_of_the_identity_and_of_no_saes(store: Store, tmp_path: Path) -> None:
    options = {"tokens": 640, "layers": (0,)}
    (folder,) = train(config(store, tmp_path, **options)) or []
    (sae,) = train(config(store, tmp_path, kind="sae", hook=(OUT,), tokens=640)) or []
    begun = begun_as(tmp_path / "saes")
    assert {name: begun[folder.name].get(name) for name in ("hook", "reads", "writes", "skip")} == {
        "hook": None, "reads": [IN], "writes": [OUT], "skip": False,
    }  # fmt: skip
    assert begun[sae.name]["hook"] == OUT
    assert not {"reads", "writes", "skip"} & begun[sae.name].keys()
    assert train(config(store, tmp_path, **options)) == [folder]
    named = {"kind": "sae", "reads": (IN,), "writes": (OUT,), "tokens": 640}
    assert train(config(store, tmp_path, **named)) == [folder]
    with pytest.raises(
        ValueError, match=r"trained with other settings: reads: \['blocks.0.mlp.hook_in'\] -> \['blocks.0"
    ):
        train(config(store, tmp_path, **{**named, "reads": (PRE,)}))
    assert load_file(sae / "sae_weights.safetensors").keys() == {"W_enc", "W_dec", "b_enc", "b_dec"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (49,)}, "k is 49; expected more than 0 and at most d_sae = 48"),
        ({"kind": "sae", "reads": (IN,)}, f"reads is '{IN}' and writes is ''; expected both, or neither"),
        ({"kind": "sae", "writes": (IN,)}, f"reads is '' and writes is '{IN}'; expected both, or neither"),
        ({"reads": (IN,), "writes": (OUT,), "layers": (0,)}, "beside hook or layers; expected one of them"),
        ({"reads": (IN,), "writes": (IN,)}, "kind is transcoder and reads is '.*', writes '.*'; expected the same of a"),
        ({"hook": (IN,)}, f"hook is '{IN}' of a transcoder; expected --layers, or --reads and --writes"),
        ({"kind": "crosscoder", "hook": (IN,)}, f"hook is '{IN}' of a crosscoder; expected two or more: of one it is an SAE"),
        ({"kind": "crosscoder", "hook": (IN, IN)}, f"hook has {IN} twice; expected each hook once"),
        ({"kind": "crosscoder", "hook": (IN, OUT), "arch": ("topk",)}, "arch is topk where several hooks are written; exp"),
        ({"kind": "crosscoder", "hook": (IN, OUT), "skip": True}, "skip is True of what writes what it reads"),
        ({"kind": "clt", "layers": (1,)}, r"layers is \(1,\) of a clt; expected --layers, two or more of them: of one it is"),
        ({"kind": "clt", "reads": (IN,), "writes": (OUT,)}, "reads is '.*' of a clt; expected --layers"),
        ({"kind": "clt", "hook": (IN,)}, f"hook is '{IN}' of a clt; expected --layers"),
        ({"kind": "clt", "arch": ("topk",)}, "arch is topk where several hooks are written"),
        ({"kind": "sae", "hook": (IN,), "layers": (0,)}, r"layers is \(0,\) of a sae; expected --hook, or --kind transc"),
        (
            {"layers": (0, 5)},
            r"hook 'blocks.5.mlp.hook_in' is not in .*; it has .*: harvest a store that has all of them \(`saebench harvest",
        ),
    ],
)  # fmt: skip
def test_impossible_ends_are_named(options: dict[str, Any], message: str, store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(store, tmp_path, **options))


def test_a_store_without_an_mlps_input_says_what_to_harvest(tmp_path: Path) -> None:
    rows = rows_of_a_layer(640)
    bare = make(tmp_path / "store", {PRE: rows[PRE], OUT: rows[OUT]})
    with pytest.raises(ValueError, match=r"has no MLP's input and output; it has .*: harvest .* --kinds mlp`"):
        train(config(bare, tmp_path / "run"))
