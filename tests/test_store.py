import json
import os
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import CONTEXT, HOOK, WIDTH
from transformers import PreTrainedTokenizerFast

from saebench.files import block_checksums, hash_files, read_json, write_json
from saebench.store import Cursor, Partition, Store, StoreWriter, joint_batches, open_store, shuffled_batches
from saebench.store.coding import PEAKS, TAIL, decode, encode, from_disk, to_disk
from saebench.store.feed import prefetched
from saebench.store.manifest import begin_manifest, check_manifest, publish_manifest, read_manifest
from saebench.store.norms import norm_report, usual_moments
from saebench.store.norms import show as describe_norms
from saebench.store.schema import (
    BLOCK_ROWS,
    MANIFEST_HASH,
    NORM_BINS,
    PROVENANCE,
    Moments,
    column_digest,
    digest,
    norm_quantile,
    shard_name,
)
from saebench.store.shuffle import _Buffer, quality, shuffled_documents
from saebench.store.writer import _shards_in

README = Path(__file__).parent.parent / "activations" / "README.md"


def provenance(rows: int, keep: np.ndarray | None = None) -> dict[str, np.ndarray]:
    return {
        "tokens": np.arange(rows, dtype=np.int32),
        "doc_id": np.arange(rows, dtype=np.int32) // 10,
        "position": np.arange(rows, dtype=np.int32) % CONTEXT,
        "keep": np.ones(rows, dtype=bool) if keep is None else keep,
    }


def make(
    folder: Path,
    shards: list[tuple[str, torch.Tensor, np.ndarray]],
    dtype: str = "float32",
    identity: dict | None = None,
    beside: Callable[[StoreWriter], None] = lambda writer: None,
) -> Store:
    """A store of (split, rows, keep) shards with one hook, and what `beside` adds to it."""
    folder.mkdir(exist_ok=True)
    writer = StoreWriter(
        folder,
        identity or {"context": CONTEXT, "tokenizer": {"files": hash_files([])}},
        {HOOK: shards[0][1].shape[1] if shards else 2},
        dtype,
    )  # type: ignore[arg-type]
    for split, rows, keep in shards:
        with writer.shard(len(rows)) as (shard, documents, attributes):
            for start in range(0, len(rows), 48):
                part = slice(start, start + 48)
                columns = {name: column[part] for name, column in provenance(len(rows), keep).items()}
                shard.write(columns, {HOOK: encode(rows[part], dtype)})  # type: ignore[arg-type]
            documents.update({i: f"doc {i}" for i in range(-(-len(rows) // 10))})
            attributes.update(split=split, context=CONTEXT, cursor=(1, 0))
    beside(writer)
    writer.complete({"rows": {}, "exhausted": True})
    return open_store(folder)


def random_rows(n: int, seed: int = 0, d: int = 8) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(tmp_path: Path) -> Store:
    """Two training shards of 320 and 200 rows and a validation shard; every eighth row is not kept."""
    keep = np.arange(320) % 8 != 0
    return make(
        tmp_path / "store",
        [
            ("train", random_rows(320, 0), keep),
            ("validation", random_rows(96, 1), keep[:96]),
            ("train", random_rows(200, 2), keep[:200]),
        ],
    )


def kept_training_rows(store: Store) -> torch.Tensor:
    parts = [shard.rows(HOOK)[torch.tensor(np.array(shard.column("keep")))] for shard in store.of_split("train")]
    return torch.cat(parts).float()


# ----------------------------------------------------------------------------- writing and reading


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_come_back_as_written(tmp_path: Path, dtype: str) -> None:
    rows = random_rows(100)
    store = make(tmp_path / "s", [("train", rows, np.ones(100, dtype=bool))], dtype)
    got = store.shards[0].rows(HOOK)
    assert got.dtype == getattr(torch, dtype)
    assert torch.equal(got, rows.to(got.dtype))
    assert torch.equal(store.shards[0].rows(HOOK, 37, 71), rows[37:71].to(got.dtype))
    assert store.shards[0].column("tokens", 5, 9).tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_the_format_document_is_enough_to_read_a_store(tmp_path: Path, dtype: str) -> None:
    """Runs the code that activations/README.md shows."""
    keep = np.arange(100) % 3 != 0
    rows = random_rows(100)
    folder = tmp_path / "s"
    make(folder, [("train", rows, keep), ("validation", random_rows(64, 5), keep[:64])], dtype)
    match = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert match is not None
    code = match[1].replace("activations/demo", str(folder)).replace("blocks.2.hook_resid_post", HOOK)
    names: dict[str, np.ndarray] = {}
    exec(code, names)
    assert np.array_equal(names["x"], decode(encode(rows, dtype)).float().numpy()[keep])  # type: ignore[arg-type]


def test_columns_are_contiguous_unfiltered_and_mappable(small: Store) -> None:
    with h5py.File(small.shards[0].path) as file:
        for name in ("tokens", "doc_id", "position", "keep", f"activations/{HOOK}"):
            dataset = file[name]
            assert dataset.chunks is None
            assert dataset.compression is None
            mapped = np.memmap(small.shards[0].path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)
            assert np.array_equal(mapped, dataset[:])


def test_statistics_are_those_of_the_kept_training_rows(small: Store) -> None:
    rows = kept_training_rows(small).double()
    statistics = small.statistics(HOOK)
    assert statistics["rows"] == len(rows) == small.rows("train", kept=True)
    assert np.allclose(statistics["mean"], rows.mean(0))
    assert statistics["mean_squared_norm"] == pytest.approx(rows.pow(2).sum(1).mean().item())
    assert statistics["median_norm"] == pytest.approx(rows.norm(dim=1).median().item(), rel=0.02)


def test_norm_quantiles_are_within_half_a_percent() -> None:
    norms = np.linspace(1.0, 100.0, 20_001)
    moments = Moments.of(norms[:, None])
    assert moments.norm_histogram.sum() == 20_001
    assert len(moments.norm_histogram) == NORM_BINS
    for q in (0.1, 0.5, 0.99):
        assert norm_quantile(moments.norm_histogram, q) == pytest.approx(np.quantile(norms, q), rel=0.006)
    assert norm_quantile(Moments.zero(3).norm_histogram, 0.5) == 0.0
    assert norm_quantile(Moments.of(np.zeros((2, 3))).norm_histogram, 0.5) < 1e-5


def test_documents_are_merged_into_one_table(small: Store) -> None:
    assert small.document_names()[3] == "doc 3"
    assert small.manifest["documents"] == 32


def test_the_tokenizer_travels_with_the_store(store: Store, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = store.shards[0].column("tokens", 0, 50).tolist()
    assert store.tokenizer().decode(ids) == tokenizer.decode(ids)
    store.verify_beside()


# ------------------------------------------------------------------------------------------- int8


def test_int8_rows_come_back_within_half_a_step_and_massive_coordinates_exactly(tmp_path: Path) -> None:
    rows = random_rows(200, d=64)
    rows[3] *= 1e5  # a massive norm
    rows[7, 5], rows[7, 9] = 3e5, -2e5  # massive coordinates, beyond float16
    rows[11] = 0.0
    store = make(tmp_path / "s", [("train", rows, np.ones(200, dtype=bool))], "int8")
    got = store.shards[0].rows(HOOK)
    assert got.dtype == torch.float32
    ordinary = rows.abs().sort(dim=1).values[:, -PEAKS - 1]
    error = (got - rows).abs()
    assert (error <= (ordinary / 127 / 2 * 1.001)[:, None]).all()
    assert torch.equal(got[7, [5, 9]], torch.tensor([3e5, -2e5]))
    assert error[7].max() < 0.02
    assert torch.equal(got[11], torch.zeros(64))
    assert torch.equal(store.shards[0].rows(HOOK, 37, 71), got[37:71])
    assert store.shards[0].path.stat().st_size < 200 * (64 + TAIL) + 60_000
    batch, _ = next(shuffled_batches(store, HOOK, 200, seed=0))
    assert torch.equal(sorted_rows(batch), sorted_rows(got))
    assert store.statistics(HOOK)["mean_squared_norm"] == pytest.approx(got.double().pow(2).sum(1).mean().item())


def test_int8_rows_that_are_not_finite_are_refused_where_they_are_kept(tmp_path: Path) -> None:
    rows, keep = random_rows(64), np.ones(64, dtype=bool)
    rows[50, 3] = torch.nan
    with pytest.raises(ValueError, match=r"row 50 of shard-00000.h5 at .* is not finite"):
        make(tmp_path / "s", [("train", rows, keep)], "int8")
    keep[50] = False
    store = make(tmp_path / "t", [("train", rows, keep)], "int8")
    assert next(shuffled_batches(store, HOOK, 63, seed=0))[0].isfinite().all()


# ------------------------------------------------------------------------------------------ norms


def test_massive_rows_do_not_hide_which_of_the_others_dominate(store: Store, tmp_path: Path) -> None:
    rows, usual = random_rows(4000, d=16), torch.ones(4000, dtype=torch.bool)
    rows[[10, 20, 30, 40]] *= 6.0
    rows[[17, 1000]] *= 1e3
    usual[[17, 1000]] = False
    made = make(tmp_path / "s", [("train", rows, np.ones(4000, dtype=bool))])
    shutil.copytree(store.folder / "tokenizer", made.folder / "tokenizer")
    report = norm_report(made, HOOK)
    assert report.massive == 2
    apart = (rows[usual] - rows[usual].mean(0)).square().sum(1)
    assert report.top_share == pytest.approx(float(apart.topk(4).values.sum() / apart.sum()), rel=1e-3)


def test_a_few_rows_that_dominate_are_named_counted_and_left_out(store: Store, tmp_path: Path) -> None:
    rows, keep = random_rows(4000, d=16), np.ones(4000, dtype=bool)
    rows[[17, 1000, 3999]] *= 40.0
    keep[5], rows[5] = False, 1e6
    made = make(tmp_path / "s", [("train", rows, keep)])
    shutil.copytree(store.folder / "tokenizer", made.folder / "tokenizer")
    report = norm_report(made, HOOK)
    norms = rows.norm(dim=1)[torch.from_numpy(keep)]
    assert report.rows == report.sampled == 3999
    assert report.massive == 3 == int((norms > 10 * norms.median()).sum())
    assert report.counts.sum() == 3999
    assert len(report.edges) == len(report.counts) + 1
    assert report.quantiles[0.9] == pytest.approx(norms.quantile(0.9).item(), rel=0.01)
    assert {carrier.token for carrier in report.carriers} >= {17, 1000, 3999}  # tokens count up
    assert report.massive_share == pytest.approx(1 - 3995 / (3995 + 1600 * 3), abs=0.15)
    assert not report.dominated  # by those that are left
    assert report.top_share < 0.01
    assert "3 of 3,999 rows are longer than 10 × the median and are left out" in "\n".join(describe_norms(HOOK, report))
    bounds = made.norms(HOOK)
    longest = 10 * made.statistics(HOOK)["median_norm"]
    assert (bounds.bound, bounds.rows, bounds.massive) == (longest, 3999, 3)
    assert bounds.median == pytest.approx(norms[norms < longest].median().item(), rel=0.01)
    batches = islice(shuffled_batches(made, HOOK, 1998, seed=0, longest={HOOK: longest}), 2)
    seen = torch.cat([batch for batch, _ in batches])
    assert torch.equal(sorted_rows(seen), sorted_rows(rows[torch.from_numpy(keep) & (rows.norm(dim=1) <= longest)]))
    assert torch.equal(sorted_rows(torch.cat(list(made.usual_rows(HOOK, "train")))), sorted_rows(seen))
    assert torch.equal(sorted_rows(torch.cat(list(made.usual_rows(HOOK, "train", spread=10**6)))), sorted_rows(seen))
    mean, squared = usual_moments(made, HOOK)
    assert np.allclose(mean, seen.double().mean(0), atol=1e-6)
    assert squared == pytest.approx(seen.double().pow(2).sum(1).mean().item())


def test_rows_are_read_whole_from_the_first_or_spread_over_the_split(tmp_path: Path) -> None:
    shards = [("train", random_rows(300, d=4, seed=seed), np.arange(300) % 3 > 0) for seed in range(4)]
    made = make(tmp_path / "s", [*shards, ("validation", *shards[0][1:])])
    want = torch.cat([rows[torch.from_numpy(keep)] for _, rows, keep in shards])

    def read(**which: int) -> torch.Tensor:
        return torch.cat(list(made.usual_rows(HOOK, "train", **which)))

    assert torch.equal(read(), want)
    assert torch.equal(read(first=250), want[:250])
    assert list(made.usual_rows(HOOK, "train", first=0)) == []
    assert torch.equal(read(spread=1200), want)  # of shards that end within a stretch, too
    ends = torch.cat([want[:170], want[-30:]])  # rows 0 to 255 and 1156 to 1199: the stretches at both ends
    assert torch.equal(read(spread=512), ends)


def test_a_store_whose_manifest_has_no_histogram_is_read_from_its_shards(small: Store) -> None:
    want = small.norm_histogram(HOOK)
    assert want.sum() == 455
    del small.manifest["hooks"][HOOK]["statistics"]["norms"]
    assert np.array_equal(small.norm_histogram(HOOK), want)


# ------------------------------------------------------------------------------------- versions


def as_before_version_3(folder: Path, complete: bool = True) -> None:
    """Make a store what version 1 or 2 has written."""
    manifest = read_json(folder / "manifest.json")
    columns = [*PROVENANCE, *(f"activations/{hook}" for hook in manifest["hooks"])]
    version = 2 if manifest["dtype"] == "int8" else 1
    for entry in manifest["shards"]:
        path = folder / entry["file"]
        with h5py.File(path, "r+") as file:
            del file["digests"]
            file.attrs["schema_version"] = version
            entry["digest"] = digest({name: file[f"checksums/{name}"][:] for name in columns})  # pyright: ignore
        del entry["digests"]
        entry |= {"bytes": path.stat().st_size, "hash": hash_files([path])}
    publish_manifest(folder / "manifest.json", manifest | {"schema_version": version})
    if not complete:
        write_json(folder / "manifest.json", manifest | {"schema_version": version, "complete": False})


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_store_of_an_earlier_version_is_read_and_not_rewritten(dtype: str, tmp_path: Path) -> None:
    whole = np.ones(320, dtype=bool)
    store = make(tmp_path / "s", [("train", random_rows(320, seed), whole) for seed in range(2)], dtype)
    rows = [shard.rows(HOOK) for shard in store.shards]
    as_before_version_3(store.folder)
    before = {path.name: path.read_bytes() for path in store.folder.iterdir() if path.is_file()}
    old = open_store(store.folder)
    assert old.manifest["schema_version"] == (2 if dtype == "int8" else 1)
    assert old.verify() == []
    assert all(torch.equal(shard.rows(HOOK), had) for shard, had in zip(old.shards, rows, strict=True))
    StoreWriter(store.folder, old.manifest["identity"], {HOOK: 8}, dtype)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in store.folder.iterdir() if path.is_file()} == before
    with h5py.File(store.shards[1].path, "r+") as file:
        file["checksums/tokens"][3] += np.uint64(1)  # pyright: ignore
    with pytest.raises(ValueError, match="shard-00001.h5 is not the shard that the manifest describes"):
        open_store(store.folder).shards[1].rows(HOOK)


def test_a_harvest_begun_by_an_earlier_version_continues(tmp_path: Path) -> None:
    """With the last of its shards on disk and not in the manifest, as a kill leaves it."""
    parts = [("train", random_rows(64, seed), np.ones(64, dtype=bool)) for seed in range(4)]
    whole = make(tmp_path / "whole", parts)
    make(tmp_path / "s", parts[:3])
    as_before_version_3(tmp_path / "s", complete=False)
    manifest = read_json(tmp_path / "s" / "manifest.json")
    write_json(tmp_path / "s" / "manifest.json", manifest | {"shards": manifest["shards"][:2]})
    begun = (tmp_path / "s" / "manifest.json").read_bytes()
    assert len(StoreWriter(tmp_path / "s", manifest["identity"], {HOOK: 8}, "float32").shards) == 3
    assert (tmp_path / "s" / "manifest.json").read_bytes() == begun
    made = make(tmp_path / "s", parts[3:])
    assert made.manifest["schema_version"] == 3
    assert ["digests" in entry for entry in made.manifest["shards"]] == [False, False, False, True]
    assert made.verify() == []
    assert made.shards[3].path.read_bytes() == whole.shards[3].path.read_bytes()
    assert torch.equal(kept_training_rows(made), kept_training_rows(whole))
    assert not (tmp_path / "s" / "manifest.jsonl").exists()


def test_a_reader_loads_the_checksums_of_what_it_reads(small: Store) -> None:
    """And those alone: others may be damaged, of which reading a damaged column is told."""
    path = small.shards[0].path
    with h5py.File(path, "r+") as file:
        file["checksums/doc_id"][0] += np.uint64(1)  # pyright: ignore
    shard = open_store(small.folder).shards[0]
    assert len(shard.rows(HOOK)) == len(shard.column("keep")) == 320
    shard.check()
    for read in (lambda: shard.column("doc_id"), shard.verify):
        with pytest.raises(ValueError, match="shard-00000.h5: the checksums of doc_id are not those that were written"):
            read()
    with h5py.File(path, "r+") as file:
        file["digests"][3] = file["digests"][2]  # pyright: ignore
    with pytest.raises(ValueError, match="shard-00000.h5 is not the shard that the manifest describes"):
        open_store(small.folder).shards[0].rows(HOOK)


# -------------------------------------------------------------------------------------- journal

PARTS = [("train", random_rows(BLOCK_ROWS, seed, d=2), np.ones(BLOCK_ROWS, dtype=bool)) for seed in range(3)]


def begun(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The journal and the identity of a harvest that has written three shards and goes on."""
    store = make(folder, PARTS)
    manifest = store.manifest | {"complete": False, "shards": []}
    begin_manifest(folder / "manifest.json", manifest)
    (folder / "manifest.xxh3").unlink(missing_ok=True)
    StoreWriter(folder, manifest["identity"], {HOOK: 2}, "float32")
    return folder / "manifest.jsonl", manifest["identity"]


def test_whole_shards_go_to_the_journal_and_the_manifest_stays(tmp_path: Path) -> None:
    journal, identity = begun(tmp_path / "s")
    before = (tmp_path / "s" / "manifest.json").read_bytes()
    assert read_json(tmp_path / "s" / "manifest.json")["shards"] == []
    assert [entry["file"] for entry in read_manifest(tmp_path / "s")["shards"]] == [shard_name(i) for i in range(3)]
    writer = StoreWriter(tmp_path / "s", identity, {HOOK: 2}, "float32")
    assert (len(writer.shards), len(journal.read_bytes().splitlines())) == (3, 3)
    assert (tmp_path / "s" / "manifest.json").read_bytes() == before
    writer.complete({"rows": {}, "exhausted": True})
    assert not journal.exists()
    assert len(read_json(tmp_path / "s" / "manifest.json")["shards"]) == 3


def test_a_line_that_a_kill_has_cut_short_is_taken_from_its_shard_again(tmp_path: Path) -> None:
    journal, identity = begun(tmp_path / "s")
    whole = journal.read_bytes()
    last = whole[:-1].rindex(b"\n") + 1
    for cut in range(last, len(whole), 7):
        journal.write_bytes(whole[:cut])
        assert len(read_manifest(tmp_path / "s")["shards"]) == 2
        assert len(StoreWriter(tmp_path / "s", identity, {HOOK: 2}, "float32").shards) == 3
        assert journal.read_bytes() == whole


def test_every_byte_of_a_journal_is_looked_at(tmp_path: Path) -> None:
    """What is not what was written is named, and deleting the journal heals it."""
    journal, identity = begun(tmp_path / "s")
    raw, unseen = journal.read_bytes(), []
    few = None if "SAEBENCH_KILLS" in os.environ else 60
    places = range(len(raw)) if few is None else random.Random(0).sample(range(len(raw)), few)
    for place in places:
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        journal.write_bytes(damaged)
        if "manifest.jsonl is not what was written: delete this file" not in verified(tmp_path / "s"):
            unseen.append(place)
    assert set(unseen) <= {len(raw) - 1}  # the end of the last line: as if it had been cut short
    journal.unlink()
    StoreWriter(tmp_path / "s", identity, {HOOK: 2}, "float32")
    assert journal.read_bytes() == raw


def test_a_journal_that_outlives_its_store_is_no_part_of_it(tmp_path: Path) -> None:
    """Killed after the whole manifest was written, before the journal went."""
    journal, identity = begun(tmp_path / "s")
    kept = journal.read_bytes()
    store = make(tmp_path / "s", [])
    journal.write_bytes(kept)
    assert len(open_store(tmp_path / "s").shards) == 3
    assert StoreWriter(tmp_path / "s", identity, {HOOK: 2}, "float32").manifest == store.manifest
    assert not journal.exists()


# ---------------------------------------------------------------------------------------- damage


def flip_byte(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("column", ["tokens", "keep", f"activations/{HOOK}"])
def test_a_flipped_bit_is_found_by_reader_and_verify(small: Store, column: str) -> None:
    with h5py.File(small.shards[0].path) as file:
        offset, size = file[column].id.get_offset(), file[column].dtype.itemsize
        width = file[column].shape[1] if file[column].ndim == 2 else 1
    flip_byte(small.shards[0].path, offset + 70 * size * width)
    shard = open_store(small.folder).shards[0]
    message = (
        f"shard-00000.h5: rows 64 to 95 of {re.escape(column)} do not match their checksum: it was damaged or exchanged"
    )
    with pytest.raises(ValueError, match=message):
        shard.verify()
    with pytest.raises(ValueError, match=message):
        shard.rows(HOOK, 70, 71) if column.startswith("act") else shard.column(column, 70, 71)
    shard.rows(HOOK, 0, 64)  # what is whole can still be read


def test_a_header_that_lies_about_a_column_is_found(small: Store) -> None:
    """Headers carry no checksum of their own: a bit there may turn one type into another."""
    path = small.shards[0].path
    with h5py.File(path, "r+") as file:
        file.move("keep", "kept")
        file.create_dataset("keep", data=file["kept"][:].astype("i1"))
        del file["kept"]
    small.manifest["shards"][0]["bytes"] = path.stat().st_size
    (small.folder / "manifest.json").write_text(json.dumps(small.manifest))
    with pytest.raises(ValueError, match=r"cannot be read as HDF5 \(keep is int8 \(\d+,\), expected bool \(\d+,\)\)"):
        open_store(small.folder).shards[0].column("keep")


@pytest.mark.parametrize("name", ["documents.parquet", "tokenizer/tokenizer.json", "unembedding.safetensors"])
@pytest.mark.parametrize("gone", [False, True])
def test_verify_looks_beside_the_shards(name: str, gone: bool, store: Store, tmp_path: Path) -> None:
    shutil.copytree(store.folder, tmp_path / "s")
    path = tmp_path / "s" / name
    path.unlink() if gone else flip_byte(path, 100)
    with pytest.raises(ValueError, match=f"{name.split('/')[0]} is not what the harvest wrote: restore it"):
        open_store(tmp_path / "s").verify_beside()


def test_every_byte_of_a_store_is_looked_at(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Each byte of the shards and of the manifest with another value, and some of all other files; the suite takes fewer."""
    files = [Path(file) for file in sorted(tokenizer.save_pretrained(tmp_path / "tokenizer")) if Path(file).exists()]

    def beside(writer: StoreWriter) -> None:
        writer.add_tokenizer(files)
        writer.add_unembedding(random_rows(2, d=512), torch.ones(2), centred=True, scale=1.0)

    identity = {"context": CONTEXT, "tokenizer": {"files": hash_files(files)}}
    whole = np.ones(BLOCK_ROWS, dtype=bool)
    folder = make(
        tmp_path / "s", [("train", random_rows(BLOCK_ROWS, d=2), whole)], identity=identity, beside=beside
    ).folder
    assert verified(folder) == ""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    named = {path: path.relative_to(folder).parts[0] for path in paths}
    every = [path for path in paths if path.suffix == ".h5" or path.name == "manifest.json"]
    assert {*named.values()} == {
        "shard-00000.h5", "manifest.json", "manifest.xxh3", "documents.parquet", "tokenizer", "unembedding.safetensors"
    }  # fmt: skip
    assert sum(path.stat().st_size for path in every) <= 2**16
    few = "SAEBENCH_KILLS" not in os.environ
    random, unseen = np.random.default_rng(0), []
    for path in paths:
        raw = path.read_bytes()
        n = min((100 if few else len(raw)) if path in every else (30 if few else 200), len(raw))
        for place in random.choice(len(raw), n, replace=False).tolist():
            damaged = bytearray(raw)
            damaged[place] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            if named[path] not in verified(folder):
                unseen.append((path.name, place))
        path.write_bytes(raw)
    assert unseen == []
    assert verified(folder) == ""


def verified(folder: Path) -> str:
    """What `store verify` says is wrong."""
    try:
        check_manifest(folder)
        return "\n".join(open_store(folder).verify())
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.xxh3"])
def test_a_manifest_that_is_gone_is_named(name: str, small: Store) -> None:
    (small.folder / name).unlink()
    assert name in verified(small.folder)


def test_a_damaged_block_stops_training_batches_before_they_are_used(small: Store) -> None:
    with h5py.File(small.shards[2].path) as file:
        offset = file[f"activations/{HOOK}"].id.get_offset()
    flip_byte(small.shards[2].path, offset + 5)
    with pytest.raises(ValueError, match="shard-00002.h5: rows 0 to 31"):
        next(shuffled_batches(open_store(small.folder), HOOK, 64, seed=0))


def test_a_truncated_shard_is_named_with_both_sizes(small: Store) -> None:
    path = small.shards[0].path
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(ValueError, match=f"shard-00000.h5 has {size - 100} bytes, the manifest says {size}"):
        open_store(small.folder).shards[0].rows(HOOK)


def test_a_shard_overwritten_with_something_else_is_named(small: Store) -> None:
    path = small.shards[0].path
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(ValueError, match=r"shard-00000.h5 cannot be read as HDF5"):
        open_store(small.folder).shards[0].rows(HOOK)


def test_a_shard_exchanged_for_another_of_the_same_size_is_named(tmp_path: Path) -> None:
    keep = np.ones(64, dtype=bool)
    one = make(tmp_path / "one", [("train", random_rows(64, 1), keep)])
    two = make(tmp_path / "two", [("train", random_rows(64, 2), keep)])
    shutil.copy(two.shards[0].path, one.shards[0].path)
    with pytest.raises(ValueError, match="is not the shard that the manifest describes"):
        open_store(one.folder).shards[0].rows(HOOK)


def test_a_missing_shard_is_named(small: Store) -> None:
    small.shards[1].path.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.h5 is missing; restore it or harvest again"):
        open_store(small.folder).shards[1].rows(HOOK)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("column", ["tokens", "doc_id", "position", "keep", f"activations/{HOOK}"])
def test_one_flipped_bit_anywhere_in_a_column_is_found_before_a_wrong_row_is_read(
    column: str, dtype: str, tmp_path: Path
) -> None:
    keep = np.arange(320) % 8 != 0
    store = make(tmp_path / "s", [("train", random_rows(320, seed), keep) for seed in range(2)], dtype)
    path = store.shards[1].path
    with h5py.File(path) as file:
        offset, size = file[column].id.get_offset(), file[column].dtype.itemsize * int(file[column].size)
    whole = path.read_bytes()
    for place in random.Random(column).sample(range(size), 10):
        flip_byte(path, offset + place)
        row = place // (size // 320) // BLOCK_ROWS * BLOCK_ROWS
        message = f"shard-00001.h5: rows {row} to {row + 31} of {column} do not match their checksum"
        assert [message in line for line in open_store(store.folder).verify()] == [True]
        with pytest.raises(ValueError, match=re.escape(message)):
            open_store(store.folder).shards[1].rows(HOOK) if column.startswith("act") else store.shards[1].column(
                column
            )
        if column == "keep" or column.startswith("act"):  # what training reads
            with pytest.raises(ValueError, match=re.escape(message)):
                next(shuffled_batches(open_store(store.folder), HOOK, 64, seed=0))
        path.write_bytes(whole)


def test_one_flipped_bit_anywhere_in_a_shard_is_found_or_changes_nothing(small: Store) -> None:
    """Headers have no checksum; a bit there is found by what it does, or does nothing."""
    path, rows = small.shards[0].path, small.shards[0].rows(HOOK)
    columns = {name: small.shards[0].column(name) for name in PROVENANCE}
    whole, found = path.read_bytes(), 0
    for place in random.Random(0).sample(range(len(whole)), 150):
        flip_byte(path, place)
        store = open_store(small.folder)
        if store.verify():
            found += 1
        else:
            assert torch.equal(store.shards[0].rows(HOOK), rows)
            assert all(np.array_equal(store.shards[0].column(name), columns[name]) for name in PROVENANCE)
        path.write_bytes(whole)
    assert found > 30  # half of so small a shard is statistics


def test_verify_names_every_damaged_shard(tmp_path: Path) -> None:
    keep = np.ones(64, dtype=bool)
    store = make(tmp_path / "s", [("train", random_rows(64, seed), keep) for seed in range(7)])
    assert store.verify() == []
    paths = [shard.path for shard in store.shards]
    paths[1].unlink()
    with open(paths[2], "r+b") as file:
        file.truncate(500)
    swapped = paths[3].read_bytes(), paths[4].read_bytes()
    paths[3].write_bytes(swapped[1])
    paths[4].write_bytes(swapped[0])
    with h5py.File(paths[6]) as file:
        offset = file["tokens"].id.get_offset()
    flip_byte(paths[6], offset)
    rows: list[int] = []
    damage = open_store(store.folder).verify(rows.append)
    assert [re.sub(r"^.*(shard-\d+\.h5)(:? .*?)(;|:|,).*$", r"\1\2", line) for line in damage] == [
        "shard-00001.h5 is missing",
        "shard-00002.h5 has 500 bytes",
        "shard-00003.h5 is not the shard that the manifest describes",
        "shard-00004.h5 is not the shard that the manifest describes",
        "shard-00006.h5: rows 0 to 31 of tokens do not match their checksum",
    ]
    assert sum(rows) == 64 * 2  # of the whole ones
    for name in (1, 2, 3, 4, 6):
        with pytest.raises(ValueError, match=f"shard-0000{name}.h5"):
            open_store(store.folder).shards[name].column("tokens")
    with pytest.raises(ValueError, match="shard-0000"):
        next(shuffled_batches(open_store(store.folder), HOOK, 300, seed=0))


def test_a_newer_schema_is_refused(small: Store) -> None:
    manifest = read_json(small.folder / "manifest.json")
    write_json(small.folder / "manifest.json", manifest | {"schema_version": 4})
    with pytest.raises(ValueError, match="has schema version 4, this saebench reads 1 and 2 and 3"):
        open_store(small.folder)
    write_json(small.folder / "manifest.json", manifest | {"schema": "other"})
    with pytest.raises(ValueError, match="is not the manifest of an activation store: schema is 'other'"):
        open_store(small.folder)


def test_a_folder_without_a_store_and_an_unfinished_store_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no activation store"):
        open_store(tmp_path)
    StoreWriter(tmp_path, {"context": CONTEXT}, {HOOK: 8}, "float32")
    with pytest.raises(ValueError, match=r"is unfinished \(0 shards so far\); run the same harvest again"):
        open_store(tmp_path)


def test_an_unknown_hook_names_those_there_are(small: Store) -> None:
    with pytest.raises(ValueError, match=f"hook 'blocks.7.hook_resid_post' is not in .*; it has {HOOK}"):
        small.d_in("blocks.7.hook_resid_post")


def test_rows_that_are_not_finite_are_refused_by_shard_and_row(tmp_path: Path) -> None:
    rows = random_rows(64)
    rows[50, 3] = 1e6  # beyond float16
    keep = np.ones(64, dtype=bool)
    with pytest.raises(ValueError, match=r"row 50 of shard-00000.h5 at .* is not finite \(float16 ends at 65504"):
        make(tmp_path / "s", [("train", rows, keep)], "float16")
    assert not list((tmp_path / "s").glob("*shard*"))
    keep[50] = False  # a special token may overflow: nobody reads it
    make(tmp_path / "t", [("train", rows, keep)], "float16")


def test_rows_that_are_not_finite_in_a_store_stop_the_reader_by_shard_and_row(tmp_path: Path) -> None:
    store = make(tmp_path / "s", [("train", random_rows(96), np.arange(96) % 8 != 0)])
    # As another program might have written it: the checksums are right, a value is not.
    with h5py.File(store.shards[0].path, "r+") as file:
        file[f"activations/{HOOK}"][70, 1] = np.nan
        checksums = block_checksums(file[f"activations/{HOOK}"][:], BLOCK_ROWS)
        file[f"checksums/activations/{HOOK}"][:] = checksums
        columns = sorted((*PROVENANCE, f"activations/{HOOK}"))
        file["digests"][columns.index(f"activations/{HOOK}")] = column_digest(checksums)
        vouched = digest(dict(zip(columns, file["digests"][:], strict=True)))
    manifest = read_json(store.folder / "manifest.json")
    manifest["shards"][0]["digests"] = vouched
    write_json(store.folder / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"row 70 of .*shard-00000.h5 at .* is not finite"):
        next(shuffled_batches(open_store(store.folder), HOOK, 16, seed=0))


def test_a_store_of_other_settings_is_refused_with_the_values(tmp_path: Path) -> None:
    one = ("train", random_rows(64), np.ones(64, dtype=bool))
    make(tmp_path, [one], identity={"context": 16, "model": {"id": "a"}})
    with pytest.raises(ValueError, match="made with other settings: context: 16 -> 32; model.id: 'a' -> 'b'"):
        StoreWriter(tmp_path, {"context": 32, "model": {"id": "b"}}, {HOOK: 8}, "float32")


def test_shards_without_a_manifest_are_not_lost(tmp_path: Path) -> None:
    """Nor where it has none of them yet, and is of other settings."""
    store = make(tmp_path / "s", [("train", random_rows(64), np.ones(64, dtype=bool))])
    shard = store.shards[0].path
    before = shard.read_bytes()
    manifest = read_json(store.folder / "manifest.json")
    (store.folder / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"holds 1 shards, shard-00000.h5 for one, and no manifest.json .*: restore it"
    ):
        StoreWriter(store.folder, manifest["identity"], {HOOK: 8}, "float32")
    write_json(store.folder / "manifest.json", manifest | {"shards": [], "complete": False})
    with pytest.raises(ValueError, match="made with other settings: context: 16 -> 32"):
        StoreWriter(store.folder, manifest["identity"] | {"context": 32}, {HOOK: 8}, "float32")
    assert shard.read_bytes() == before
    assert len(StoreWriter(store.folder, manifest["identity"], {HOOK: 8}, "float32").shards) == 1


def test_what_is_verified_is_not_kept_and_rows_of_nothing_are_none(tmp_path: Path) -> None:
    """Nor does a store that is begun keep the hash of one that was there before."""
    store = make(tmp_path / "s", [("train", random_rows(64), np.ones(64, dtype=bool))])
    assert store.verify() == []
    assert all(not shard._columns for shard in store.shards)
    assert store.shards[0].rows(HOOK, 0, 0).shape == (0, 8)
    assert store.shards[0].rows(HOOK, 32, 32).shape == (0, 8)
    (tmp_path / "t").mkdir()
    shutil.copyfile(store.folder / MANIFEST_HASH, tmp_path / "t" / MANIFEST_HASH)
    StoreWriter(tmp_path / "t", {"context": 16}, {HOOK: 8}, "float32")
    assert not (tmp_path / "t" / MANIFEST_HASH).exists()


def test_numbers_of_shards_may_have_more_digits(tmp_path: Path) -> None:
    for number in (7, 99_999, 100_000, 1_234_567):
        (tmp_path / shard_name(number)).touch()
    (tmp_path / "shard-1.h5").touch()
    assert sorted(_shards_in(tmp_path)) == [7, 99_999, 100_000, 1_234_567]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_moments_computed_where_the_rows_are_are_those_of_the_writer(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(3000, 24, generator=generator) * torch.logspace(-4, 4, 3000)[:, None]).to(dtype)
    rows[5] = 0.0
    keep = torch.rand(3000, generator=generator) < 0.9
    rows[~keep] = torch.inf  # what is not kept may be anything
    found, want = Moments.unpacked(Moments.packed(rows, keep).numpy()), Moments.of(rows[keep].float().numpy())
    assert found.rows == want.rows == int(keep.sum())
    assert np.allclose(found.total, want.total, rtol=1e-12)
    assert found.total_squared_norm == pytest.approx(want.total_squared_norm, rel=1e-12)
    assert (
        np.abs(np.cumsum(found.norm_histogram) - np.cumsum(want.norm_histogram)).max() <= 1
    )  # log2 rounds as it likes
    for bad in (torch.inf, torch.nan):
        rows[keep.nonzero()[7, 0], 3] = bad
        assert not np.isfinite(Moments.unpacked(Moments.packed(rows, keep).numpy()).total_squared_norm)


def test_a_shard_takes_the_moments_it_is_given_and_refuses_rows_that_they_say_are_not_finite(tmp_path: Path) -> None:
    rows, keep = torch.randn(64, 8), np.ones(64, dtype=bool)
    provenance = {name: np.zeros(64, kind) for name, kind in PROVENANCE.items()} | {"keep": keep}
    stores = []
    for given in (False, True):
        writer = StoreWriter(tmp_path / str(given), {"context": 16}, {HOOK: 8}, "float32")
        with writer.shard(64) as (shard, _, attributes):
            packed = Moments.packed(rows, torch.from_numpy(keep)).numpy()
            shard.write(provenance, {HOOK: rows}, {HOOK: Moments.unpacked(packed)} if given else None)
            attributes |= {"split": "train", "context": 16, "cursor": (0, 0)}
        writer.complete({})
        stores.append(open_store(writer.folder).statistics(HOOK))
    for name in ("rows", "mean", "mean_squared_norm", "median_norm"):
        assert stores[0][name] == pytest.approx(stores[1][name])
    rows[9, 2] = torch.nan
    writer = StoreWriter(tmp_path / "bad", {"context": 16}, {HOOK: 8}, "float32")
    found = {HOOK: Moments.unpacked(Moments.packed(rows, torch.from_numpy(keep)).numpy())}
    with (
        pytest.raises(ValueError, match="row 9 of shard-00000.h5 at .* is not finite"),
        writer.shard(64) as (shard, *_),
    ):
        shard.write(provenance, {HOOK: rows}, found)


# ---------------------------------------------------------------------------------------- shuffling


def test_items_are_made_ahead_in_their_order_with_the_error_at_its_place() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the text is gone")

    found = prefetched(items())
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="the text is gone"):
        next(found)
    assert list(prefetched(iter("abc"))) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["<f2", "<u2", "<f4", "i1"])
def test_rows_gathered_on_all_cores_are_those_gathered_on_one(kind: str) -> None:
    rows = np.random.default_rng(0).integers(0, 100, (500, 42)).astype(kind)
    buffer = _Buffer(0, 0, (rows,), np.random.default_rng(1).permutation(500))
    found = [torch.empty(300, 42, dtype=from_disk(rows).dtype) for _ in range(2)]
    for out, all_cores in zip(found, (False, True), strict=True):
        buffer.serve(100, 0, out, all_cores)
        assert np.array_equal(to_disk(out), rows[buffer.order[100:400]])


@pytest.mark.parametrize(("buffer_rows", "least", "most"), [(10**6, 0.97, 1.0), (1000, 0.5, 0.95), (200, 0.2, 0.6)])
def test_the_quality_that_is_told_is_that_of_the_batches(
    store: Store, buffer_rows: int, least: float, most: float
) -> None:
    batch = 128
    told = quality(store, batch, buffer_rows)
    n_batches = store.rows("train", kept=True) // batch
    documents = islice(shuffled_documents(store, batch, seed=0, buffer_rows=buffer_rows), n_batches)
    here = np.mean([len(rows.unique()) for rows in documents])
    perfect = np.mean(
        [len(rows.unique()) for rows in islice(shuffled_documents(store, batch, seed=0, buffer_rows=10**9), n_batches)]
    )
    assert told == pytest.approx(here / perfect, abs=0.08)
    assert least <= told <= most


def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(rows.tolist()))


@pytest.mark.parametrize("buffer_rows", [10**6, 5 * BLOCK_ROWS])
def test_an_epoch_is_a_permutation_of_the_kept_training_rows(small: Store, buffer_rows: int) -> None:
    want = kept_training_rows(small)  # 455 rows: batches of 91 end with the epoch
    batches = shuffled_batches(small, HOOK, 91, seed=3, buffer_rows=buffer_rows)
    first, second = (torch.cat([rows for rows, _ in islice(batches, 5)]) for _ in range(2))
    assert torch.equal(sorted_rows(first), sorted_rows(want))
    assert torch.equal(sorted_rows(second), sorted_rows(want))
    assert not torch.equal(first, second)
    assert not torch.equal(first, want)


@pytest.mark.parametrize("buffer_rows", [10**6, 5 * BLOCK_ROWS])
@pytest.mark.parametrize("batch", [7, 64, 200])
def test_the_stream_continues_exactly_from_every_cursor(small: Store, buffer_rows: int, batch: int) -> None:
    whole = list(islice(shuffled_batches(small, HOOK, batch, seed=3, buffer_rows=buffer_rows), 20))
    start = Cursor()
    for number in range(20):
        (rows, _), *_ = islice(shuffled_batches(small, HOOK, batch, seed=3, buffer_rows=buffer_rows, start=start), 1)
        assert torch.equal(rows, whole[number][0])
        start = whole[number][1]


def test_the_order_follows_the_seed(small: Store) -> None:
    one, again, other = (next(shuffled_batches(small, HOOK, 64, seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("buffer_rows", [10**6, 5 * BLOCK_ROWS])
def test_partitions_have_each_row_once_the_same_in_every_epoch_and_go_on_from_cursors(
    small: Store, buffer_rows: int
) -> None:
    options: dict[str, Any] = {"seed": 3, "buffer_rows": buffer_rows}
    n_blocks = sum(-(-shard.n_rows // BLOCK_ROWS) for shard in small.of_split("train"))
    epochs = []
    for number in range(3):
        partition = Partition(number, 3)
        n_rows = len(mine := rows_of_blocks(small, partition.deal(n_blocks, 3)))
        stream = joint_batches(small, [HOOK], 1, **options, partition=partition)
        drawn = [(rows[HOOK], cursor) for rows, cursor in islice(stream, 2 * n_rows)]
        first, second = (torch.cat([rows for rows, _ in drawn[span]]) for span in (slice(n_rows), slice(n_rows, None)))
        assert torch.equal(sorted_rows(first), sorted_rows(mine))
        assert torch.equal(sorted_rows(second), sorted_rows(mine))
        assert not torch.equal(first, second)
        for after in (0, n_rows // 2, n_rows + 5):
            rows, _ = next(joint_batches(small, [HOOK], 1, **options, partition=partition, start=drawn[after][1]))
            assert torch.equal(rows[HOOK], drawn[after + 1][0])
        epochs.append(first)
    assert torch.equal(sorted_rows(torch.cat(epochs)), sorted_rows(kept_training_rows(small)))


def rows_of_blocks(store: Store, blocks: np.ndarray) -> torch.Tensor:
    """Kept ones, of blocks numbered among those of all training shards."""
    rows = [shard.rows(HOOK).split(BLOCK_ROWS) for shard in store.of_split("train")]
    keep = [torch.tensor(np.array(shard.column("keep"))).split(BLOCK_ROWS) for shard in store.of_split("train")]
    pairs = [pair for of_shard in zip(rows, keep, strict=True) for pair in zip(*of_shard, strict=True)]
    return torch.cat([pairs[n][0][pairs[n][1]] for n in blocks]).float()


@pytest.mark.parametrize("n_buffers", [1, 2])
def test_of_one_partition_the_order_is_that_of_before_there_were_several(small: Store, n_buffers: int) -> None:
    """So that runs go on that were begun then."""
    batch, _ = next(shuffled_batches(small, HOOK, 91, seed=3, buffer_rows=520 // n_buffers))
    n_blocks = sum(-(-shard.n_rows // BLOCK_ROWS) for shard in small.of_split("train"))
    chosen = np.array_split(np.random.default_rng([3, 0]).permutation(n_blocks), n_buffers)[0]
    rows = rows_of_blocks(small, np.sort(chosen))
    served = torch.empty_like(rows)
    served[np.random.default_rng([3, 0, 0, 1]).permutation(len(rows))] = rows
    assert torch.equal(batch, served[:91])


def test_partitions_that_are_too_many_or_have_no_rows_are_refused(small: Store, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"partitions is 40 and \S+ has 17 blocks of 32 rows to train on; expected no more"
    ):
        next(joint_batches(small, [HOOK], 1, seed=0, partition=Partition(39, 40)))
    with pytest.raises(ValueError, match="has 455 training rows, fewer than a batch of 480"):
        next(joint_batches(small, [HOOK], 240, seed=0, partition=Partition(1, 2)))
    with pytest.raises(
        ValueError, match=r"no row of \S+ in partition 2 of 2 is one to train on; use fewer --partitions"
    ):
        next(joint_batches(small, [HOOK], 9, seed=0, partition=Partition(1, 2), longest={HOOK: 0.0}))


def test_hooks_read_side_by_side_give_the_same_tokens_and_wait_for_nobody(store: Store) -> None:
    """Two readers of one store advance in turn, by threads of their own, and keep step with the documents."""
    hooks, buffer_rows = store.hooks, 3000
    alone = [
        [rows for rows, _ in islice(shuffled_batches(store, h, 300, seed=3, buffer_rows=buffer_rows), 50)]
        for h in hooks
    ]
    streams = [shuffled_batches(store, hook, 300, seed=3, buffer_rows=buffer_rows) for hook in hooks]
    documents = shuffled_documents(store, 300, seed=3, buffer_rows=buffer_rows)
    documents_of: dict[tuple[float, ...], set[int]] = defaultdict(set)
    for shard in store.of_split("train"):
        for row, doc in zip(shard.rows(hooks[0]).tolist(), shard.column("doc_id").tolist(), strict=True):
            documents_of[tuple(row)].add(doc)  # equal beginnings of documents give equal rows
    pairs = {
        tuple(one): other
        for shard in store.of_split("train")
        for one, other in zip(shard.rows(hooks[0]).tolist(), shard.rows(hooks[1]).tolist(), strict=True)
    }
    for step in range(50):
        (one, cursor), (two, other_cursor) = (next(stream) for stream in streams)
        assert cursor == other_cursor
        assert torch.equal(one, alone[0][step])
        assert torch.equal(two, alone[1][step])
        assert [pairs[tuple(row)] for row in one.tolist()] == two.tolist()
        pairs_of = zip(next(documents).tolist(), one.tolist(), strict=True)
        assert all(doc in documents_of[tuple(row)] for doc, row in pairs_of)


def two_hooks(folder: Path) -> Store:
    """300 training rows at hooks of 8 and 4 dimensions; every eighth is not kept, row 5 is massive at the first, 6 and 70 at the second."""
    folder.mkdir()
    keep = np.arange(300) % 8 != 0
    rows = {"blocks.0.mlp.hook_in": random_rows(300), "blocks.0.hook_mlp_out": random_rows(300, seed=1, d=4)}
    for hook, row in ((0, 5), (1, 6), (1, 70)):
        list(rows.values())[hook][row] *= 1000
    identity = {"context": CONTEXT, "tokenizer": {"files": hash_files([])}}
    writer = StoreWriter(folder, identity, {hook: value.shape[1] for hook, value in rows.items()}, "float32")
    for split in ("train", "validation"):
        with writer.shard(300) as (shard, documents, attributes):
            shard.write(provenance(300, keep), {hook: encode(value, "float32") for hook, value in rows.items()})
            documents.update({i: f"doc {i}" for i in range(30)})
            attributes.update(split=split, context=CONTEXT, cursor=(1, 0))
    writer.complete({"rows": {}, "exhausted": True})
    return open_store(folder)


@pytest.mark.parametrize("buffer_rows", [10**6, 100])
def test_hooks_read_together_are_each_as_by_itself(tmp_path: Path, buffer_rows: int) -> None:
    store = two_hooks(tmp_path / "s")
    longest = {hook: store.norms(hook).bound for hook in store.hooks}
    options = {"seed": 3, "buffer_rows": buffer_rows, "longest": longest}
    start = Cursor()
    alone = [shuffled_batches(store, hook, 70, **options) for hook in store.hooks]
    together = islice(joint_batches(store, store.hooks, 70, **options), 12)
    for (rows, cursor), *apart in zip(together, *alone, strict=False):
        assert list(rows) == store.hooks
        for hook, (want, want_cursor) in zip(store.hooks, apart, strict=True):
            assert torch.equal(rows[hook], want)
            assert cursor == want_cursor
        again, after = next(joint_batches(store, store.hooks, 70, **options, start=start))
        assert after == cursor
        assert all(torch.equal(again[hook], rows[hook]) for hook in store.hooks)
        start = cursor


def test_rows_of_several_hooks_are_of_the_same_tokens_without_those_massive_at_any(tmp_path: Path) -> None:
    store = two_hooks(tmp_path / "s")
    places = np.array([row for row in range(300) if row % 8 and row not in (5, 6, 70)])
    shard = store.of_split("train")[0]
    for given in (store.joint_rows(store.hooks, "train"), store.joint_rows(store.hooks, "train", spread=300)):
        found = list(given)
        for hook in store.hooks:
            assert torch.equal(torch.cat([rows[hook] for rows in found]), shard.rows(hook)[torch.from_numpy(places)])
    first = list(store.joint_rows(store.hooks, "validation", first=40))
    assert {len(rows[hook]) for rows in first for hook in store.hooks} == {40}
    assert sum(len(rows) for rows in store.usual_rows(store.hooks[0], "train")) > len(
        places
    )  # its own massive rows alone
    taken = joint_batches(
        store, store.hooks, len(places), seed=0, longest={hook: store.norms(hook).bound for hook in store.hooks}
    )
    rows, _ = next(taken)
    order = {tuple(row): number for number, row in enumerate(shard.rows(store.hooks[0]).tolist())}
    numbers = [order[tuple(row)] for row in rows[store.hooks[0]].tolist()]
    assert sorted(numbers) == places.tolist()
    assert torch.equal(rows[store.hooks[1]], shard.rows(store.hooks[1])[numbers])


def test_threads_that_open_a_shard_at_once_read_the_same(small: Store) -> None:
    shard = small.shards[0]
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda _: shard.rows(HOOK), range(8)))
    assert all(torch.equal(rows, read[0]) for rows in read)


def test_a_store_smaller_than_a_batch_is_refused(small: Store) -> None:
    with pytest.raises(ValueError, match="has 455 training rows, fewer than a batch of 456"):
        next(shuffled_batches(small, HOOK, 456, seed=0))


def test_harvested_store_has_the_width_of_the_model(store: Store) -> None:
    assert store.d_in(HOOK) == WIDTH
