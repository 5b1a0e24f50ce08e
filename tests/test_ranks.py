"""Training by several processes: the figures of one, and what they say when one of them fails. `make faults` kills it twenty times."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import ranked
import torch
import torch.distributed as dist
from conftest import HOOK
from test_faults import KILLS
from test_train import log_of, same_saes

from saebench.files import read_json, write_json
from saebench.harvest.ranks import Watch, World
from saebench.sae import load_sae
from saebench.store import Cursor, Store
from saebench.train import TrainConfig, grid
from saebench.train.identity import Run
from saebench.train.loop import _opened
from saebench.train.ranks import Ranks
from saebench.train.rolling import Whole
from saebench.train.shares import SHARES, Share

SCRIPT = Path(__file__).parent.parent / "scripts" / "train.py"
SLOW = 0.004  # seconds by which a step is longer


def arguments(store: Store, out: Path, *more: str) -> tuple[str, ...]:
    """Three SAEs of 60 steps."""
    return (
        "train", "--store", str(store.folder), "--hook", HOOK, "--out", str(out), "--arch", "relu,topk,gated", "--target-l0", "6",
        "--d-sae", "64", "--tokens", "6000", "--batch", "100", "--lr", "0.003", "--device", "cpu", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid trained by one process."""
    out = tmp_path_factory.mktemp("whole")
    status, printed = processes.run(*arguments(store, out))
    assert status == 0, printed
    return out


def assert_finished(out: Path, whole: Path) -> None:
    assert same_saes(out, whole)
    assert len(log_of(out / "saes" / "topk-k6")) == 2
    assert not list(out.rglob("checkpoint*"))


# ----------------------------------------------------------------------------------- a grid dealt out


def test_torchrun_deals_out_a_grid_to_two_nodes_and_it_ends_as_by_one_process(
    store: Store, whole: Path, tmp_path: Path
) -> None:
    """Two agents that meet at a rendezvous, a process for each."""
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d",
        "--rdzv-id", "test", "--rdzv-endpoint", f"127.0.0.1:{processes.free_port()}",
    ]  # fmt: skip
    command = [*launcher, str(SCRIPT), *arguments(store, tmp_path)[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert sum(text.count("next: saebench eval") for text in printed) == 1
    assert_finished(tmp_path, whole)


@pytest.mark.parametrize("seed", range(1 if KILLS <= 3 else KILLS))
def test_killed_with_a_rank_and_resumed_equals_uninterrupted(
    seed: int, store: Store, whole: Path, tmp_path: Path
) -> None:
    victim, command, generator = seed % 2, arguments(store, tmp_path), random.Random(seed)
    ranks = processes.start_ranks(2, *command, slow=SLOW, checkpoint_seconds=0.0)
    logs = tmp_path / "saes" / "topk-k6" / "metrics.jsonl"
    wait = generator.uniform(0, 0.5)
    processes.signal_when(ranks[victim], lambda: logs.exists() and not time.sleep(wait), signal.SIGKILL)
    status, printed = ranks[1 - victim].ends()
    assert status == 2, printed
    assert re.search(rf"process {victim} (\(\S+, pid {ranks[victim].process.pid}\)|or the machine)", printed), printed
    assert "ended early or stands still" in printed
    assert "Traceback" not in printed
    for child in processes.start_ranks(2, *command):
        status, printed = child.ends()
        assert status == 0, printed
    assert_finished(tmp_path, whole)


def test_ctrl_c_stops_all_at_one_step_and_another_number_of_processes_is_refused(store: Store, tmp_path: Path) -> None:
    command = arguments(store, tmp_path)
    ranks = processes.start_ranks(2, *command, slow=5 * SLOW, checkpoint_seconds=0.0)
    begun = tmp_path / "saes" / "checkpoint.json"
    status, printed = processes.signal_when(ranks[0], begun.exists, signal.SIGINT)
    other = ranks[1].ends()
    assert status == other[0] == 130, printed
    stopped = re.compile(r"stopped after step (\d+) of 60")
    assert stopped.findall(printed) == stopped.findall(other[1]) == [str(read_json(tmp_path / "saes/checkpoint.json")["step"])]  # fmt: skip
    status, printed = processes.run(*command)
    assert status == 2
    assert "processes: 2 -> 1. Start as many, with the same --ranks, to continue it" in printed


def test_a_rank_that_hangs_is_named_by_those_who_wait(store: Store, tmp_path: Path) -> None:
    ranks = processes.start_ranks(2, *arguments(store, tmp_path), slow=5 * SLOW, patience=4.0)
    logs = tmp_path / "saes" / "topk-k6" / "metrics.jsonl"
    while not logs.exists():
        time.sleep(0.01)
    stopped = ranks[1].process.pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    status, printed = ranks[0].ends()
    os.kill(stopped, signal.SIGKILL)
    ranks[1].ends()
    assert status == 2
    assert re.search(rf"process 1 \(\S+, pid {stopped}\) of this training has ended early or stands still", printed)


def test_a_rank_that_lives_and_does_not_come_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saebench.harvest.ranks._BEAT", 0.05)
    monkeypatch.setattr("saebench.harvest.ranks._QUIET", 1.0)
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    watches = [Watch(store, rank, 3) for rank in range(3)]
    for watch, met in zip(watches, ([5, 9], [4, 2], [5, 2]), strict=True):
        watch.met = met
    assert watches[0].missing(range(3)) == f"process 1 ({socket.gethostname()}, pid {os.getpid()})"
    store.delete_key("saebench/missing")
    assert watches[2].missing(range(1, 3), circle=True) == "another process"
    watches[1].end()
    assert watches[0].missing(range(3)).startswith("process 1 (")
    watches[0].end()  # as the first to find out does
    assert watches[2].missing(range(3)).startswith("process 1 (")
    watches[2].end()


def test_a_full_disk_on_one_rank_ends_all_with_that_message(store: Store, tmp_path: Path) -> None:
    """Of the second, which trains TopK."""
    command = arguments(store, tmp_path)
    ranks = processes.start_ranks(2, *command, last={"file_limit": 20_000})
    (leader, first), (other, second) = (child.ends() for child in ranks)
    assert leader == other == 2
    said = "writing the checkpoint of step 60 in .* failed"
    assert re.search(f"process 1 of this training failed: {said}", first), first
    assert re.search(said, second)


def test_processes_that_were_told_otherwise_are_refused_by_all(store: Store, tmp_path: Path) -> None:
    for child in processes.start_ranks(2, *arguments(store, tmp_path), last={"argv": ("--k", "8")}):
        status, printed = child.ends()
        assert status == 2
        assert "process 0 and process 1 of this training were told otherwise: k: [] -> [8]" in printed, printed
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("size", "more", "message"),
    [
        (3, {"ranks": "grid"}, "there are 3 processes and 2 SAEs to deal out; expected no more processes than SAEs"),
        (6, {"share": 2}, "there are 3 circles of 2 processes and 2 SAEs to deal out; .* --nproc-per-node 4, or another --share"),
        (4, {"ranks": "rows", "share": 3}, "share is 3 in 4 processes; expected a number that divides 4"),
        (1, {"ranks": "rows", "share": 2}, "share is 2 in 1 processes; expected a number that divides 1"),
        (2, {"ranks": "latents", "d_sae": (65,)}, "d_sae is 65 in 2 processes; expected a multiple of 2: .* 64 would do, or 66"),
        (3, {}, "d_sae is 64 in 3 processes"),
        (2, {"ranks": "rows", "batch": 101}, "batch is 101 in 2 processes; expected a multiple of 2"),
        (4, {"ranks": "latents", "share": 2, "replicas": 3}, "share is 2 times replicas, 3, in 4 processes; expected a number that divides 4"),
        (2, {"replicas": 2}, "share is 2 times replicas, 2, in 2 processes; expected a number that divides 2"),
        (4, {"replicas": 2, "batch": 101}, "batch is 101 in 2 processes; expected a multiple of 2"),
        (4, {"replicas": 2, "d_sae": (65,)}, "d_sae is 65 in 2 processes; expected a multiple of 2"),
        (4, {"replicas": 2, "partitions": 5}, "partitions is 5 of rows that 2 processes share; expected a multiple of 2"),
        (1, {"partitions": 3}, "partitions is 3 and batch 100; expected a number that divides the batch"),
        (4, {"ranks": "rows", "partitions": 2}, "partitions is 2 of rows that 4 processes share; expected a multiple of 4"),
    ],
)  # fmt: skip
def test_what_processes_cannot_share_is_refused(size: int, more: dict[str, Any], message: str) -> None:
    sizes = {"d_sae": (64,), "batch": 100} | more
    config = TrainConfig(store=Path("store"), out=Path("run"), arch=("topk",), k=(4, 8), **sizes)
    with pytest.raises(ValueError, match=message):
        Ranks(World(size=size), config, grid(config, 32), config.partitions or 1)


@pytest.mark.parametrize("ranks", ["rows", "latents", "grid", None])
def test_one_process_shares_nothing_whatever_the_way(ranks: Any) -> None:
    config = TrainConfig(store=Path("store"), out=Path("run"), arch=("topk",), k=(4,), d_sae=(64,), ranks=ranks)
    made = Ranks(World(), config, grid(config, 32))
    assert (made.share.over, made.own) == ("grid", ["topk-k4"])


def test_a_circle_is_of_several_processes_and_windows_are_of_one(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share is 2 of a grid that is dealt out; expected at least 2 processes, with"):
        TrainConfig(store=store.folder, out=tmp_path, k=(4,), ranks="grid", share=2)
    with pytest.raises(ValueError, match="share is 1; expected at least 2 processes"):
        TrainConfig(store=store.folder, out=tmp_path, k=(4,), share=1)
    with pytest.raises(ValueError, match="replicas is 2 with ranks rows; expected at least 2, with --ranks latents"):
        TrainConfig(store=store.folder, out=tmp_path, k=(4,), ranks="rows", replicas=2)
    with pytest.raises(ValueError, match="replicas is 1 with ranks None; expected at least 2"):
        TrainConfig(store=store.folder, out=tmp_path, k=(4,), replicas=1)
    with pytest.raises(ValueError, match="rolling is 5 in 2 processes; expected one"):
        _opened(TrainConfig(store=store.folder, out=tmp_path, k=(4,), rolling=5), World(size=2))


def test_processes_that_share_rows_read_disjoint_parts_of_the_batches_of_one(store: Store, tmp_path: Path) -> None:
    config = TrainConfig(store=store.folder, out=tmp_path, hook=(HOOK,), k=(4,), batch=96, partitions=4)
    run, source = Run.of(config, store), Whole(store)
    shares = [Share(), *(SHARES["rows"](World(rank, 2), 96) for rank in range(2))]
    streams = [run.batches((HOOK,), share.partitions(4), {}, source.shards, "cpu") for share in shares]
    n_rows = store.rows("train", kept=True)
    read: list[set[tuple[float, ...]]] = [set(), set()]
    cursors: dict[str, Cursor] = {}
    for _ in range(n_rows // 96):
        (whole, cursors), *parts = [next(stream) for stream in streams]
        for rank, (part, own) in enumerate(parts):
            assert torch.equal(part[HOOK], whole[HOOK].chunk(2)[rank])
            assert own.items() <= cursors.items()
            read[rank] |= {tuple(row) for row in part[HOOK].tolist()}
    assert len(cursors) == 4
    # Equal beginnings of documents give equal rows.
    unique = {tuple(row) for rows in store.usual_rows(HOOK, "train") for row in rows.tolist()}
    assert len(read[0] & read[1]) < 0.1 * len(unique)
    again, _ = next(run.batches((HOOK,), range(4), cursors, source.shards, "cpu"))
    assert torch.equal(again[HOOK], next(streams[0])[0][HOOK])


def test_partitions_are_those_of_the_processes_that_share_rows_or_as_begun(store: Store, tmp_path: Path) -> None:
    common: dict[str, Any] = {"store": store.folder, "out": tmp_path, "hook": (HOOK,), "k": (4,)}
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 1), ({"ranks": "rows"}, 6), ({"ranks": "rows", "share": 3}, 3), ({"partitions": 5}, 5),
        ({"ranks": "rows", "partitions": 12}, 12), ({"ranks": "latents"}, 1), ({"ranks": "latents", "replicas": 2}, 2), ({"replicas": 3}, 3),
    ]  # fmt: skip
    for more, expected in cases:
        run = Run.of(TrainConfig(**common, **more), store, 6)
        assert run.partitions == expected
        assert run.identity["topk-k4"].get("partitions", 1) == expected
    write_json(tmp_path / "saes" / "checkpoint.json", {"identity": Run.of(TrainConfig(**common), store).identity})
    assert Run.of(TrainConfig(**common, ranks="rows"), store, 6).partitions == 1
    assert SHARES["rows"](World(2, 6), 96).partitions(1) == range(1)
    with pytest.raises(ValueError, match="partitions is 2 and rolling is 5; expected one of them"):
        TrainConfig(**common, partitions=2, rolling=5)


# ------------------------------------------------------------------------- an SAE shared, by rows or latents


@pytest.fixture(scope="module")
def shared(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[int, Any]]]:
    """What those who share it have of a case: two, of two circles that deal the cases out, by rows and by latents; all four by both."""
    folder = tmp_path_factory.mktemp("shared")
    processes.together(ranked.run, 4, folder, store.folder)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(4)]
    found: dict[str, list[dict[int, Any]]] = {}
    for over in (*SHARES, "both"):
        of = [{number: ways[over] for number, ways in rank.items() if over in ways} for rank in ranks]
        found[over] = of if over == "both" else [of[rank] | of[rank + 2] for rank in range(2)]
    return found


@pytest.mark.parametrize("number", range(len(ranked.CASES)), ids=lambda n: "-".join(map(str, ranked.CASES[n])))
def test_shared_by_several_processes_an_sae_learns_what_it_learns_in_one(
    number: int, shared: dict[str, list[dict[int, Any]]], store: Store
) -> None:
    """AuxK and resampling included: four latents are dead from the first step on, and count as such from the eighth. By rows of a store
    too, of which each process reads its own partitions."""
    case = ranked.CASES[number]
    lines, weights = ranked.course(case, Share(), store.folder)
    expected = torch.tensor(lines, dtype=torch.float64)
    revived = [w["b_gate" if "b_gate" in w else "b_enc"][3] > -10.0 for w in weights]
    assert all(revived) if case.specs[0].k is None else expected[8, 7] <= ranked.F - 4
    rtol, atol = (1e-9, 1e-12) if case.dtype == torch.float64 else (1e-5, 1e-6)
    for of in (of for of in shared.values() if number in of[0]):
        (found, one), *others = [rank[number][0] for rank in of]
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=rtol, atol=atol)
        for other_found, other in others:
            assert other_found == found
            for mine, theirs in zip(one, other, strict=True):
                assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        if case.dtype == torch.float64:
            for mine, alone in zip(one, weights, strict=True):
                assert all(torch.allclose(alone[name], mine[name], rtol=1e-6, atol=1e-9) for name in alone)


def test_a_shared_sae_goes_on_from_its_state_with_the_same_bits(shared: dict[str, list[dict[int, Any]]]) -> None:
    compared = 0
    for rank in (rank for of in shared.values() for rank in of):
        for number, (whole, resumed) in rank.items():
            if resumed is not None:
                assert whole[0] == resumed[0], ranked.CASES[number]
                assert all(torch.equal(a[n], b[n]) for a, b in zip(whole[1], resumed[1], strict=True) for n in a)
                compared += 1
    assert compared == (2 + 2 + 4) * len(ranked.RESUMED)


TWO = ("--arch", "relu,topk", "--tokens", "2000")
WAYS = {
    "rows": ("--ranks", "rows"),
    "latents": ("--ranks", "latents"),
    "both": ("--ranks", "latents", "--replicas", "2"),
}


@pytest.fixture(scope="module")
def pairs(store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A grid of two by one process, of rows from one partition and from two, and by two or four that share each SAE."""
    told = {"one": (), "partitions": ("--partitions", "2"), **WAYS}
    found = {name: tmp_path_factory.mktemp(name) for name in told}
    for name, out in found.items():
        command, size = arguments(store, out, *TWO, *told[name]), 4 if name == "both" else 2
        for child in processes.start_ranks(size, *command) if name in WAYS else [processes.start(*command)]:
            status, printed = child.ends()
            assert status == 0, printed
    return found


@pytest.mark.parametrize("over", WAYS)
def test_a_shared_grid_is_saved_as_by_one_process(over: str, pairs: dict[str, Path]) -> None:
    """Which draws its rows from as many partitions."""
    for folder in (pairs["one" if over == "latents" else "partitions"] / "saes").iterdir():
        mine = pairs[over] / "saes" / folder.name
        one, two = log_of(folder), log_of(mine)
        assert two[-1]["fvu"] == pytest.approx(one[-1]["fvu"], rel=1e-4)
        assert [line["step"] for line in two] == [line["step"] for line in one]
        assert load_sae(mine).W_dec.shape == load_sae(folder).W_dec.shape


@pytest.mark.parametrize(
    ("over", "seed"),
    [("latents", 0)] if KILLS <= 3 else [(over, seed) for over in WAYS for seed in range(KILLS // 2)],
)
def test_a_shared_grid_dealt_out_to_circles_and_killed_and_resumed_has_the_same_bits(
    over: str, seed: int, store: Store, pairs: dict[str, Path], tmp_path: Path
) -> None:
    """Of two processes, in turns with two circles of two; or of four that share both."""
    size = 4 if over == "both" or (over == "latents") == (seed % 2 == 0) else 2
    command = arguments(store, tmp_path, *TWO, *WAYS[over], *(("--share", "2") if size == 4 else ()))
    ranks = processes.start_ranks(size, *command, slow=SLOW, checkpoint_seconds=0.0)
    begun, wait = tmp_path / "saes" / "checkpoint.json", random.Random(seed).uniform(0, 0.3) * (seed > 0)
    processes.signal_when(ranks[1], lambda: begun.exists() and not time.sleep(wait), signal.SIGKILL)
    for rank in (ranks[0], *ranks[2:]):
        status, printed = rank.ends()
        assert status == 2, printed
        assert re.search(rf"process 1 \(\S+, pid {ranks[1].process.pid}\) of this training has ended early", printed), (
            printed
        )
    for child in processes.start_ranks(size, *command):
        status, printed = child.ends()
        assert status == 0, printed
    assert same_saes(tmp_path, pairs[over])
    assert not list(tmp_path.rglob("checkpoint*"))
