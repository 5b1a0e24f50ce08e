import shutil
import signal
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import HOOK
from test_harvest import config, contents, text

from saebench.files import read_json, write_json, write_text
from saebench.harvest import ExtendConfig, extend, harvest
from saebench.index import IndexConfig, build_index, open_feature_index
from saebench.sae import ReLUSAE, save_sae
from saebench.store import Store, open_store
from saebench.store.schema import EXTENSION, MANIFEST
from saebench.text import SPLITS


def column(store: Store, split: str, name: str) -> np.ndarray:
    return np.concatenate([shard.column(name) for shard in store.of_split(split)])


def rows(store: Store, split: str) -> torch.Tensor:
    return torch.cat([shard.rows(HOOK) for shard in store.of_split(split)])


def by(tokens: int) -> ExtendConfig:
    return ExtendConfig(tokens=tokens, device="cpu")


@pytest.fixture(scope="module")
def short(checkpoints: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of 5,000 training tokens, to be copied."""
    made = harvest(config(checkpoints["llama"], tmp_path_factory.mktemp("short") / "s", tokens=5_000), text(corpus))
    assert made is not None
    return made


def copied(store: Store, folder: Path) -> Path:
    shutil.copytree(store.folder, folder)
    return folder


def cut_at_the_end(folder: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extend a store as far as its manifest, which is not written."""

    def cut(path: Path, content: str) -> None:
        if path.name == MANIFEST:
            raise OSError("cut")
        write_text(path, content)

    monkeypatch.setattr("saebench.store.manifest.write_text", cut)
    with pytest.raises(OSError, match="cut"):
        extend(folder, by(tokens))
    monkeypatch.undo()


def test_an_extended_store_holds_the_rows_of_one_harvested_at_once(short: Store, store: Store, tmp_path: Path) -> None:
    """In the same order within each split, though in other shards: the short store's last ones are not full."""
    folder = copied(short, tmp_path / "s")
    grown = extend(folder, by(3_000))
    assert grown is not None
    grown = extend(folder, by(4_000))
    assert grown is not None
    assert grown.rows("train") == store.rows("train")
    for split in SPLITS:
        n = min(store.rows(split), grown.rows(split))
        for name in ("tokens", "doc_id", "position", "keep"):
            assert np.array_equal(column(grown, split, name)[:n], column(store, split, name)[:n])
        assert torch.allclose(rows(grown, split)[:n], rows(store, split)[:n], atol=1e-4, rtol=1e-4)
    assert grown.statistics(HOOK)["rows"] == grown.rows("train", kept=True)
    assert set(grown.document_names().items()) >= set(store.document_names().items())
    assert grown.manifest["identity"]["tokens"] == 12_000
    assert grown.manifest["identity"]["extended_from"] == [5_000, 8_000]
    before, after = contents(short.folder), contents(folder)
    assert all(after[name] == data for name, data in before.items() if name.endswith(".h5"))
    assert "extension.json" not in after
    checked: list[int] = []
    assert grown.verify(checked.append) == []
    assert sum(checked) == grown.rows("train") + grown.rows("validation")


def test_a_killed_extension_leaves_the_store_as_it_was_and_continues(short: Store, tmp_path: Path) -> None:
    whole, folder = copied(short, tmp_path / "whole"), copied(short, tmp_path / "s")
    extend(whole, by(6_000))
    command = ["store", "extend", str(folder), "--tokens", "6000", "--device", "cpu"]
    child = processes.start(*command, slow=0.01)
    there = len(short.shards)
    processes.signal_when(child, lambda: len(list(folder.glob("shard-*.h5"))) >= there + 3, signal.SIGKILL)
    after = contents(folder)
    assert {name: after[name] for name in contents(short.folder)} == contents(short.folder)
    assert len(open_store(folder).shards) == there
    open_store(folder).verify_beside()
    with pytest.raises(
        ValueError, match=r"is being extended by 6000 tokens, not 100: finish that first, with `saebench"
    ):
        extend(folder, by(100))
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.h5")}
    status, printed = processes.run(*command)
    assert status == 0, printed
    assert contents(folder) == contents(whole)
    assert {name: (folder / name).stat().st_mtime_ns for name in there} == there


def test_an_extension_that_is_cut_at_its_very_end_names_the_remedy(
    short: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(short, tmp_path / "s")

    cut_at_the_end(folder, 4_000, monkeypatch)
    lines = open_store(folder).verify()
    assert all("not what the harvest wrote: finish the extension that was begun" in line for line in lines)
    assert ["manifest.json" in lines[0], "documents.parquet" in lines[1]] == [True, True]
    grown = extend(folder, by(4_000))
    assert grown is not None
    assert grown.verify() == []


def test_an_extension_that_is_killed_once_it_is_whole_is_not_begun_again(
    short: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(short, tmp_path / "s")

    def killed(path: Path) -> None:
        raise OSError("killed")

    monkeypatch.setattr("saebench.store.manifest.drop_unfinished", killed)
    with pytest.raises(OSError, match="killed"):
        extend(folder, by(4_000))
    monkeypatch.undo()
    assert (folder / EXTENSION).exists()
    again = extend(folder, by(4_000))
    assert again is not None
    assert again.manifest["identity"]["tokens"] == short.manifest["identity"]["tokens"] + 4_000
    assert not (folder / EXTENSION).exists()
    assert again.verify() == []


def test_an_index_of_the_shorter_store_is_read_while_it_grows_and_afterwards(
    short: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are still the same rows. Whoever has the shorter store open goes on knowing it by the same hash."""
    before = open_store(copied(short, tmp_path / "s"))
    sae = tmp_path / "run" / "saes" / "one"
    weights = ReLUSAE(before.d_in(HOOK), 8)
    torch.nn.init.normal_(weights.W_enc, generator=torch.Generator().manual_seed(0))
    save_sae(weights, sae, {"hook_name": HOOK, "saebench": {"store": str(before.folder)}})
    settings = IndexConfig(sae=sae, sample=500, rules=False, logits=False)
    path = build_index(settings)
    assert path is not None

    def shown() -> list[tuple[int, list[int]]]:
        with open_feature_index(path) as index:
            examples = [example for latent in range(8) for example in index[latent].top[:3]]
            return [(example.row, index.context_of(example.row).tokens.tolist()) for example in examples]

    then = shown()
    assert len(then) > 8

    cut_at_the_end(before.folder, 1_000, monkeypatch)
    built = path.read_bytes()
    assert open_store(before.folder).hash == before.hash
    assert build_index(settings) == path
    assert path.read_bytes() == built
    assert shown() == then
    for number in range(2):
        grown = extend(before.folder, by(1_000))
        assert grown is not None
        assert grown.grown_from[0] == before.hash != grown.hash
        assert len(grown.grown_from) == number + 1
        assert shown() == then
    with pytest.raises(ValueError, match=r"one.h5 was made from another store: it says \w{32}, this one is \w{32}"):
        other = harvest_again(short, tmp_path / "other")
        open_feature_index(path, store=other)


def harvest_again(store: Store, folder: Path) -> Path:
    """A store of the same rows, known by another hash."""
    shutil.copytree(store.folder, folder)
    write_json(folder / MANIFEST, store.manifest | {"exhausted": True})
    return folder


def test_text_that_ends_is_said_and_no_token_comes_twice(
    short: Store, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(short, tmp_path / "s")
    grown = extend(folder, by(10**6))
    assert grown is not None
    n = grown.rows("train")
    assert f"the data set ended after {n:,} training tokens of the 1,005,000 asked for" in caplog.text
    at_once = harvest(config(checkpoints["llama"], tmp_path / "once", tokens=10**6), text(corpus))
    assert at_once is not None
    for split in SPLITS:
        assert np.array_equal(column(grown, split, "tokens"), column(at_once, split, "tokens"))
    with pytest.raises(
        ValueError, match=f"holds all {n:,} training tokens of .*: there is no more text to extend it with"
    ):
        extend(folder, by(16))


def test_other_text_or_another_model_is_refused_by_name(
    short: Store, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(checkpoints["llama"], tmp_path / "model")
    store = harvest(config(tmp_path / "model", tmp_path / "s", tokens=2_000), text(tmp_path / "corpus"))
    assert store is not None
    before = contents(tmp_path / "s")
    for file, message in (
        ("corpus/00.txt", r"text\.fingerprint: '\w+' -> '\w+'\. Restore them, or harvest a new store"),
        ("model/tokenizer_config.json", r"tokenizer\.files: '\w+' -> '\w+'"),
    ):
        kept = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(kept + b" ")
        with pytest.raises(ValueError, match=message):
            extend(tmp_path / "s", by(1_000))
        (tmp_path / file).write_bytes(kept)
    shutil.copy(checkpoints["llama"] / "model.safetensors", tmp_path / "kept")
    weights = bytearray((tmp_path / "kept").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.weights: '\w+' -> '\w+'"):
        extend(tmp_path / "s", by(1_000))
    assert contents(tmp_path / "s") == before


def test_an_extended_store_is_not_the_one_of_a_harvest_at_once(
    short: Store, checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    folder = copied(short, tmp_path / "s")
    extend(folder, by(1_000))
    with pytest.raises(ValueError, match=r"made with other settings: extended_from: \[5000\] -> None\. Use"):
        harvest(config(checkpoints["llama"], folder, tokens=6_000), text(corpus))
    assert read_json(folder / "manifest.json")["complete"]


def test_what_cannot_be_extended_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens is 0; expected at least 1"):
        by(0)
    with pytest.raises(ValueError, match="holds no activation store"):
        extend(tmp_path, by(1))
