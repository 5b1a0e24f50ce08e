import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from conftest import CONTEXT, HOOK
from test_harvest import config as harvest_config
from test_harvest import contents, text
from test_train import same_saes

from saebench.cli import main
from saebench.files import locked, read_json, write_json
from saebench.harvest import harvest
from saebench.harvest.window import Windows, folder_of
from saebench.sae import SAE, read_config, save_sae
from saebench.store import Cursor, Shard, Store, open_store, shuffled_batches
from saebench.train import TrainConfig, train
from saebench.train.rolling import Rolling, rows_offered

HOOKS = ("blocks.0.hook_resid_post", HOOK)
N, PER_SHARD = 7, 64 * CONTEXT
HEAD, WINDOW = 2, 2  # shards: 7 // 3, and a half of what that leaves
TOKENS = 20_000  # more than the text has
SEEDS = max(int(os.environ.get("SAEBENCH_KILLS", "3")) // 3, 1)


def config(head: Store, out: Path, **options: object) -> TrainConfig:
    small = {"hook": HOOKS, "k": (4,), "d_sae": (48,), "tokens": TOKENS, "batch": 100, "rolling": N, "device": "cpu"}
    return TrainConfig(store=head.folder, out=out, **{**small, **options})  # type: ignore[arg-type]


def arguments(model: Path, corpus: Path, store: Path, out: Path) -> list[str]:
    return [
        "train", "--rolling", str(N), "--store", str(store), "--hook", ",".join(HOOKS), "--out", str(out), "--k", "4",
        "--d-sae", "48", "--tokens", str(TOKENS), "--batch", "100", "--device", "cpu",
        "--", "--model", str(model), "--dataset", str(corpus), "--validation-fraction", "0.2", "--layers", "0,1",
        "--context", str(CONTEXT), "--batch", "8", "--shard-contexts", "64", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip


def columns(shards: list[Shard], name: str) -> np.ndarray:
    return np.concatenate([shard.column(name) for shard in shards])


def windows_on_disk(store: Path) -> int:
    """Training shards behind the head, temporary ones too."""
    return sum(name.endswith((".h5", ".h5.tmp")) for _, _, names in os.walk(store / "rolling") for name in names)


@pytest.fixture(scope="module")
def all_of_it(checkpoints: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """All of the text in one ordinary store."""
    made = harvest(
        harvest_config(checkpoints["llama"], tmp_path_factory.mktemp("all") / "s", tokens=10**6), text(corpus)
    )
    assert made is not None
    return made


@pytest.fixture
def head(checkpoints: dict[str, Path], corpus: Path, tmp_path: Path) -> Store:
    made = harvest(harvest_config(checkpoints["llama"], tmp_path / "s", tokens=HEAD * PER_SHARD), text(corpus))
    assert made is not None
    return made


# ---------------------------------------------------------------------------------------- windows


def test_head_and_windows_are_the_text_in_order_and_then_the_text_again(head: Store, all_of_it: Store) -> None:
    windows = Windows(head, WINDOW, "cpu")
    places = [windows.make(number) for number in range(1, 12)]
    stores = [open_store(folder_of(head.folder, number)) for number in range(1, 12)]
    shards = [*head.of_split("train"), *(shard for store in stores for shard in store.shards)]
    whole = all_of_it.of_split("train")
    held_out = set(columns(all_of_it.of_split("validation"), "doc_id").tolist())
    length = all_of_it.rows("train")
    assert length < sum(shard.n_rows for shard in shards) < 2 * length
    for name in ("tokens", "doc_id", "position", "keep"):
        found, want = columns(shards, name), columns(whole, name)
        assert np.array_equal(found, np.concatenate([want, want])[: len(found)])
    assert held_out.isdisjoint(columns(shards, "doc_id").tolist())
    for hook in HOOKS:
        found, want = (torch.cat([shard.rows(hook) for shard in some]) for some in (shards, whole))
        assert torch.allclose(found, torch.cat([want, want])[: len(found)], atol=1e-4, rtol=1e-4)
    assert {place.passes for place in places} == {0, 1}
    assert places[-1].fresh == all_of_it.rows("train", kept=True)
    for store in stores:
        assert [shard.n_rows for shard in store.shards] == [PER_SHARD] * WINDOW
        assert store.verify() == []
        assert store.statistics(HOOK)["rows"] == store.rows("train", kept=True)


def test_a_window_has_the_same_bytes_however_it_comes_about(head: Store) -> None:
    """In its turn, after its neighbours were lost, and continued after a kill."""
    before = contents(head.folder)
    windows, folder = Windows(head, WINDOW, "cpu"), folder_of(head.folder, 9)
    for number in range(1, 10):
        windows.make(number)
    whole = contents(folder)
    shutil.rmtree(head.folder / "rolling")
    Windows(head, WINDOW, "cpu").make(9)
    assert contents(folder) == whole
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", manifest | {"complete": False, "shards": manifest["shards"][:1]})
    (folder / "shard-00001.h5").unlink()
    Windows(head, WINDOW, "cpu").make(9)
    assert contents(folder) == whole
    shutil.rmtree(head.folder / "rolling")
    assert contents(head.folder) == before


def test_a_stream_serves_every_row_of_each_epochs_shards_once(all_of_it: Store) -> None:
    """Epochs of different sizes, so that buffers grow and shrink."""
    shards = all_of_it.of_split("train")
    of_epoch = [shards[:1], shards[1:4], shards[4:5], shards[5:9]]
    kept = [torch.cat([s.rows(HOOK)[torch.from_numpy(s.column("keep"))] for s in some]) for some in of_epoch]
    batches = shuffled_batches(
        all_of_it, HOOK, 10, seed=3, buffer_rows=2**17 / (4 * all_of_it.d_in(HOOK)), shards=of_epoch.__getitem__
    )
    rows = torch.cat([rows for rows, _ in islice(batches, sum(map(len, kept)) // 10)])
    start = 0
    for want in kept:
        found = rows[start : start + len(want)]
        start += len(want)
        assert torch.equal(found.sort(0).values, want[: len(found)].sort(0).values) or len(found) < len(want)
        assert not torch.equal(found, want[: len(found)])


# ------------------------------------------------------------------------- the run, and its accidents


@pytest.fixture(scope="module")
def whole(
    checkpoints: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """(store, run, what was printed) of a rolling run by the command line without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    child = processes.start(*arguments(checkpoints["llama"], corpus, folder / "s", folder / "run"))
    most = 0
    while child.process.is_alive():
        most = max(most, windows_on_disk(folder / "s"))
        time.sleep(0.001)
    status, printed = child.ends()
    assert status == 0, printed
    assert 0 < most <= 2 * WINDOW <= N - HEAD
    return folder / "s", folder / "run", printed


def test_the_head_stays_and_the_windows_go(whole: tuple[Path, Path, str], head: Store, all_of_it: Store) -> None:
    folder, run, printed = whole
    assert contents(folder) == contents(head.folder)  # as a harvest alone makes it
    assert open_store(folder).verify() == []
    kept = all_of_it.rows("train", kept=True)
    assert f"the text ended after {kept:,} rows to train on, and was begun again" in printed
    assert re.search(r"has [\d,]+ held-out rows, those of its own stretch of text: figures on so few are not", printed)
    assert re.search(r"training waited \d+\.\d s for the harvester", printed)
    metadata = read_config(run / "saes" / f"topk-k4-{HOOK}")["metadata"]["saebench"]
    assert metadata["epochs"] == pytest.approx(TOKENS / kept)
    assert metadata["identity"]["window_shards"] == WINDOW


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_is_killed_the_same_command_ends_with_the_same_bits(
    seed: int, whole: tuple[Path, Path, str], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """The trainer, the harvester, a Ctrl-C, windows that are lost; a second run is refused meanwhile."""
    store, out, generator = tmp_path / "s", tmp_path / "run", random.Random(seed)
    shutil.copytree(whole[0], store)
    command = arguments(checkpoints["llama"], corpus, store, out)

    def start() -> processes.Child:
        return processes.start(*command, slow=0.01, checkpoint_seconds=0.2)

    def step() -> int:
        pointer = out / "saes" / "checkpoint.json"
        return read_json(pointer)["step"] if pointer.exists() else 0

    child, goal = start(), generator.randrange(25, 70)  # a head has 19 steps, and a window as many
    status, _ = processes.signal_when(child, lambda: step() >= goal, signal.SIGKILL)
    assert status == -signal.SIGKILL

    if seed % 3 == 0:
        shutil.rmtree(store / "rolling")
    child, goal = start(), step() // 19 + 2
    while not (shards := list(folder_of(store, goal).glob("*.h5"))):
        assert child.process.is_alive(), child.ends()
        time.sleep(0.002)
    assert shards
    with pytest.raises(
        ValueError, match="s is being written by another process; wait for it or choose another --store"
    ):
        train(config(open_store(store), tmp_path / "other"))
    process = int(re.findall(r"harvested by process (\d+)", child.output.read_text())[-1])
    os.kill(process, signal.SIGKILL)
    status, printed = child.ends()
    assert status == 2, printed
    assert f"error: the harvester of {store} was killed by signal 9" in printed
    assert "run the same command again to continue from the last checkpoint" in printed
    assert "Traceback" not in printed

    child = start()
    if seed % 2 == 0:  # while it waits for the first window
        status, printed = processes.signal_when(
            child, lambda: "harvested by process" in child.output.read_text(), signal.SIGINT
        )
    else:
        goal = step() + generator.randrange(10, 60)
        status, printed = processes.signal_when(child, lambda: step() >= goal, signal.SIGINT)
    assert status == 130, printed
    assert "the same command continues" in printed
    assert step() < 200

    status, printed = processes.run(*command)
    assert status == 0, printed
    assert same_saes(whole[1], out)
    assert contents(store) == contents(whole[0])


def test_a_harvester_that_fails_is_one_error(
    whole: tuple[Path, Path, str], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "s")
    limit = (tmp_path / "s" / "shard-00000.h5").stat().st_size - 1000
    command = arguments(checkpoints["llama"], corpus, tmp_path / "s", tmp_path / "run")
    status, printed = processes.run(*command, file_limit=limit)
    assert status == 2
    assert re.search(r"error: writing .*rolling/00000001/shard-00000.h5 failed: \[Errno 27\] File too large", printed)
    assert "Traceback" not in printed


def test_a_damaged_window_stops_the_training(head: Store, tmp_path: Path) -> None:
    Windows(head, WINDOW, "cpu").make(1)
    path = folder_of(head.folder, 1) / "shard-00001.h5"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"rolling/00000001/shard-00001.h5: rows \d+ to \d+ of .* do not match"):
        train(config(head, tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("cfg.json"))
    assert not folder_of(head.folder, 1).exists()  # so that the next run makes it again
    windows = Windows(head, WINDOW, "cpu")
    for number in (1, 2):
        windows.make(number)
    (folder_of(head.folder, 2) / "shard-00000.h5").unlink()
    with Rolling(head, WINDOW, 3000, [], lambda: False, device="cpu") as rolling:
        assert not folder_of(head.folder, 2).exists()
        assert len(rolling.shards(1)) == WINDOW
        assert rows_offered(head, WINDOW, [Cursor(1)]) > head.rows("train", kept=True)

        def batches() -> Iterator[None]:
            yield
            raise ValueError(f"row 3 of {folder_of(head.folder, 1)}/shard-00000.h5 is not finite")

        with pytest.raises(ValueError, match="is not finite$"):
            list(rolling.served(batches()))
        assert folder_of(head.folder, 1).exists()  # it is what was written: made again it would be the same


def test_a_stop_between_the_last_saves_loses_nothing(
    head: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On windows that are there already, which need no harvester."""
    caplog.set_level("INFO")
    saved: list[Path] = []

    def save_one(sae: SAE, folder: Path, facts: dict) -> None:
        if saved:
            raise OSError("no space left")
        saved.append(folder)
        save_sae(sae, folder, facts)

    def fail(folder: Path) -> None:
        raise OSError("not now")

    def roll(out: str) -> list[Path] | None:
        return train(config(head, tmp_path / out, tokens=3000))

    windows = Windows(head, WINDOW, "cpu")
    for out in ("whole", "run"):
        for number in (1, 2):
            windows.make(number)
        if out == "whole":
            assert roll(out)
            assert not (head.folder / "rolling").exists()
    monkeypatch.setattr("saebench.train.loop.save_sae", save_one)
    with pytest.raises(ValueError, match=r"its checkpoint is safe\) failed: no space left"):
        roll("run")
    monkeypatch.undo()
    monkeypatch.setattr("saebench.train.rolling.delete_windows", fail)
    with pytest.raises(OSError, match="not now"):
        roll("run")
    monkeypatch.undo()
    assert [path.name for path in (head.folder / "rolling").glob("[0-9]*")] != []
    assert roll("run")
    assert "all 2 SAEs are trained already" in caplog.text
    assert "harvested by" not in caplog.text
    assert same_saes(tmp_path / "whole", tmp_path / "run")
    assert not (head.folder / "rolling").exists()


# --------------------------------------------------------------------------------------- other ends


def test_a_run_that_ends_within_the_head_is_an_ordinary_one(
    head: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for out, rolling in ((tmp_path / "one", N), (tmp_path / "two", None)):
        assert train(config(head, out, rolling=rolling, tokens=1500))
    assert "harvested by process" not in caplog.text
    assert same_saes(tmp_path / "one", tmp_path / "two")
    assert not (head.folder / "rolling").exists()


def test_a_head_that_holds_all_of_its_text_is_trained_on_as_it_is(
    all_of_it: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for out, rolling in ((tmp_path / "one", 60), (tmp_path / "two", None)):
        assert train(config(all_of_it, out, rolling=rolling))
    assert same_saes(tmp_path / "one", tmp_path / "two")
    assert "holds all of its text: there are no windows to follow" in caplog.text
    assert "held-out rows" not in caplog.text


def test_hooks_leave_out_the_same_rows_and_stay_together(head: Store, tmp_path: Path) -> None:
    """A row that is too long at one of them: else one would get ahead, and need windows that the others have not reached."""
    folders = train(config(head, tmp_path / "run", exclude_outliers=1.1)) or []
    assert len(folders) == 2
    for folder in folders:
        identity = read_config(folder)["metadata"]["saebench"]["identity"]
        assert (identity["exclude_outliers"], identity["left_out_at"]) == (1.1, sorted(HOOKS))
    assert not (head.folder / "rolling").exists()
    longest = {hook: 1.1 * head.statistics(hook)["median_norm"] for hook in HOOKS}
    streams = [shuffled_batches(head, hook, 20, seed=0, longest=longest) for hook in HOOKS]
    for _ in range(20):
        places = [next(stream)[1] for stream in streams]
        assert places[0] == places[1]
    keep = torch.from_numpy(columns(head.of_split("train"), "keep"))
    rows = [torch.cat([shard.rows(hook) for shard in head.of_split("train")])[keep] for hook in HOOKS]
    short = torch.stack([one.norm(dim=1) <= longest[hook] for one, hook in zip(rows, HOOKS, strict=True)])
    shorter = int(short.all(0).sum())
    assert 20 < shorter < int(short[0].sum())  # which leaves out more than either alone
    first = islice(shuffled_batches(head, HOOKS[0], 10, seed=0, longest=longest), shorter // 10)
    served = torch.cat([batch for batch, cursor in first if cursor.epoch == 0])
    want = rows[0][short.all(0)]
    assert all(bool((want == row).all(1).any()) for row in served)


def test_what_cannot_roll_is_said(
    head: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="rolling is 2; expected at least 3 shards"):
        config(head, out, rolling=2)
    with pytest.raises(ValueError, match=r"rolling is 3 and .* has 2 training shards, which stay; expected at least 4"):
        train(config(head, out, rolling=3))
    with pytest.raises(ValueError, match=r"batch is 1000 and a window of 1 shards has about \d+ rows to train on"):
        train(config(head, out, batch=1000, rolling=4))
    with locked(head.folder), pytest.raises(ValueError, match="wait for it or choose another --store"):
        train(config(head, out))
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ValueError, match=r"windows of 2 shards behind .* need about 1\.4 MB and the disk has 0\.1 MB free"
    ):
        train(config(head, out))
    command = ["train", "--store", str(head.folder), "--out", str(out), "--k", "4"]
    for options, message in (
        (["--", "--layers", "0"], "options after `--` are those of `harvest` for --rolling N, which is not given"),
        (["--rolling", "7", "--", "--layers", "0", "--tokens", "5"], "--tokens and --out are not for you to give"),
        (["--rolling", "7", "--", "--layers", "0", "--out", "x"], "they follow from --rolling and --store"),
        (["--rolling", "7", "--", "--context", "8"], "context is 8 after `--`, and "),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
