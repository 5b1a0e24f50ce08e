"""What a harvest survives. `make faults` kills it twenty times, the suite three."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import processes
import pytest
import torch
from conftest import CONTEXT, HOOK
from test_harvest import arguments, config, contents, text
from transformers import AutoModelForCausalLM, AutoTokenizer

from saebench.cli import main
from saebench.files import read_json
from saebench.harvest import harvest, pipeline
from saebench.store import ShardWriter
from saebench.store.manifest import read_manifest

KILLS = int(os.environ.get("SAEBENCH_KILLS", "3"))
SLOW = 0.004  # seconds by which every hook of every forward pass is longer
SCRIPT = Path(__file__).parent.parent / "scripts" / "harvest.py"


@pytest.fixture(scope="module")
def whole(
    checkpoints: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], float]:
    """The contents of a store harvested without interruption, and the seconds that it took."""
    out = tmp_path_factory.mktemp("whole") / "s"
    started = time.monotonic()
    status, stderr = processes.start(*arguments(checkpoints["llama"], corpus, out), slow=SLOW).ends()
    assert status == 0, stderr
    return contents(out), time.monotonic() - started


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(
    seed: int, whole: tuple[dict[str, bytes], float], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    command = arguments(checkpoints["llama"], corpus, tmp_path / "s")
    expected, seconds = whole
    child = processes.start(*command, slow=SLOW)
    time.sleep(random.Random(seed).uniform(0, seconds))
    child.process.kill()
    child.ends()
    status, stderr = processes.run(*command)
    assert status == 0, stderr
    assert contents(tmp_path / "s") == expected


# ------------------------------------------------------------------------------- several processes


def test_torchrun_makes_the_store_that_one_process_makes(
    whole: tuple[dict[str, bytes], float], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*launcher, str(SCRIPT), *arguments(checkpoints["llama"], corpus, tmp_path / "s")[1:]]
    made = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120
    )
    assert made.returncode == 0, made.stderr
    assert contents(tmp_path / "s") == whole[0]
    assert made.stdout.count("12,000 rows") == 1  # one process speaks for all


def test_no_thread_of_the_group_outlives_it(tmp_path: Path) -> None:
    """Whatever is imported meanwhile: one that still ran as a rank exited aborted it, now and then."""
    script = tmp_path / "rank.py"
    script.write_text(
        "from pathlib import Path\n"
        "from saebench.harvest.ranks import joined\n"
        "with joined() as world:\n"
        "    world.gather('here')\n"
        "    import torch.distributed.nn.functional\n"
        "print([task.joinpath('comm').read_text().strip() for task in Path('/proc/self/task').iterdir()])\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--standalone"]
    made = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert "gloo" not in made.stdout


@pytest.mark.parametrize("seed", range(max(2, KILLS // 2)))
def test_a_killed_rank_ends_the_others_and_loses_no_whole_shard(
    seed: int, whole: tuple[dict[str, bytes], float], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    command = arguments(checkpoints["llama"], corpus, out)
    generator = random.Random(seed)
    victim, shards = seed % 2, generator.randrange(1, 9)
    ranks = processes.start_ranks(2, *command, slow=4 * SLOW)
    processes.signal_when(ranks[victim], lambda: len(list(out.glob("shard-*.h5"))) >= shards, signal.SIGKILL)
    status, stderr = ranks[1 - victim].ends()
    assert status == 2, stderr
    assert "ended early" in stderr
    assert "Traceback" not in stderr
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.h5")}
    assert len(there) >= shards
    resumed = processes.start_ranks(2, *command) if seed % 3 == 0 else [processes.start(*command)]
    for child in resumed:
        status, stderr = child.ends()
        assert status == 0, stderr
    assert contents(out) == whole[0]
    assert {name: (out / name).stat().st_mtime_ns for name in there} == there


def test_ctrl_c_stops_every_rank_after_its_shard(
    whole: tuple[dict[str, bytes], float], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s"
    command = arguments(checkpoints["llama"], corpus, out)
    ranks = processes.start_ranks(2, *command, slow=4 * SLOW)
    while not (out / "shard-00001.h5").exists():
        assert all(child.process.is_alive() for child in ranks)
        time.sleep(0.01)
    for child in ranks:
        assert child.process.pid
        os.kill(child.process.pid, signal.SIGINT)
    for child in ranks:
        status, stderr = child.ends()
        assert status == 130, stderr
        assert "the same command continues" in stderr
    assert not list(out.glob(".*.tmp"))
    assert not read_json(out / "manifest.json")["complete"]
    status, stderr = processes.run(*command)
    assert status == 0, stderr
    assert contents(out) == whole[0]


def test_what_stops_one_rank_before_it_begins_stops_all_with_its_message(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    command = arguments(checkpoints["llama"], corpus, tmp_path / "s")
    holder = processes.start(*command, slow=0.05)
    while not (tmp_path / "s" / "shard-00000.h5").exists():
        time.sleep(0.01)
    leader, other = (child.ends() for child in processes.start_ranks(2, *command))
    holder.process.kill()
    holder.ends()
    assert leader[0] == other[0] == 2
    assert "is being written by another process" in leader[1]
    assert "process 0 of this harvest failed" in other[1]
    assert "is being written by another process" in other[1]


# ------------------------------------------------------------------------------- one process


def test_a_second_harvest_into_the_same_folder_is_refused_and_harms_nothing(
    whole: tuple[dict[str, bytes], float], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    command = arguments(checkpoints["llama"], corpus, tmp_path / "s")
    first = processes.start(*command, slow=2 * SLOW)
    while not (tmp_path / "s" / "shard-00000.h5").exists():
        assert first.process.is_alive()
        time.sleep(0.01)
    status, stderr = processes.run(*command)
    assert status == 2
    assert "is being written by another process; wait for it or choose another --out" in stderr
    status, stderr = first.ends()
    assert status == 0, stderr
    assert contents(tmp_path / "s") == whole[0]


def test_a_disk_that_fills_in_mid_shard_ends_the_harvest_with_that_error(
    whole: tuple[dict[str, bytes], float], checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """The limit falls in the middle of the first shard's rows, so that the writer fails while the model goes on."""
    command = arguments(checkpoints["llama"], corpus, tmp_path / "s")
    status, stderr = processes.run(*command, file_limit=len(whole[0]["shard-00000.h5"]) // 2)
    assert status == 2
    assert "shard-00000.h5 failed: [Errno 27] File too large. The 0 whole shards before it are safe" in stderr
    assert "Traceback" not in stderr
    assert not list((tmp_path / "s").glob(".*.tmp"))


def test_vectors_too_large_for_the_stores_dtype_stop_the_harvest(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[5:].mul_(1e8)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"row 1 of shard-00000.h5 at blocks.0.hook_resid_post is not finite \(float16 ends"
    ):
        harvest(config(tmp_path / "model", tmp_path / "s", dtype="float16"), text(corpus))
    assert not list((tmp_path / "s").glob("*shard*"))


def test_an_error_of_the_writer_is_the_harvests_own(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, write, threads = RuntimeError("in the writer"), ShardWriter.write, []

    def fail(shard: ShardWriter, *args: object) -> None:
        threads.append(threading.current_thread())
        if len(threads) == 20:
            raise error
        write(shard, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWriter, "write", fail)
    before = threading.active_count()
    with pytest.raises(RuntimeError) as caught:
        harvest(config(checkpoints["llama"], tmp_path / "s"), text(corpus))
    assert caught.value is error
    assert len(threads) == 20
    assert len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()
    assert threading.active_count() == before
    monkeypatch.undo()
    assert harvest(config(checkpoints["llama"], tmp_path / "s"), text(corpus)) is not None


def test_an_error_of_the_model_leaves_whole_shards_only(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, calls = pipeline.Landing.take, []

    def fail(*args: object) -> None:
        calls.append(1)
        if len(calls) == 45:  # two hooks, eight batches a shard: in the middle of the third
            raise RuntimeError("in the model")
        take(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline.Landing, "take", fail)
    with pytest.raises(RuntimeError, match="in the model"):
        harvest(config(checkpoints["llama"], tmp_path / "s"), text(corpus))
    assert sorted(path.name for path in (tmp_path / "s").glob("*shard*")) == ["shard-00000.h5", "shard-00001.h5"]
    assert len(read_manifest(tmp_path / "s")["shards"]) == 2


def test_the_model_never_runs_further_ahead_than_there_are_buffers(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, put, ahead, sets = ShardWriter.write, pipeline.BackgroundWriter.put, [0], set()

    def slow(shard: ShardWriter, *args: object) -> None:
        time.sleep(0.003)
        write(shard, *args)  # type: ignore[arg-type]
        ahead.append(ahead[-1] - 1)

    def counted(background: pipeline.BackgroundWriter, landing: pipeline.Landing) -> None:
        ahead.append(ahead[-1] + 1)
        sets.add(id(landing))
        put(background, landing)

    monkeypatch.setattr(ShardWriter, "write", slow)
    monkeypatch.setattr(pipeline.BackgroundWriter, "put", counted)
    store = harvest(config(checkpoints["llama"], tmp_path / "s", tokens=4_000), text(corpus))
    assert store is not None
    assert len(ahead) > 2 * 4_000 / (8 * CONTEXT)
    assert max(ahead) <= pipeline.SETS
    assert len(sets) == pipeline.SETS


def test_shards_without_a_manifest_are_neither_taken_for_ones_own_nor_lost(
    checkpoints: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Also not by a harvest of other settings."""
    other = harvest(config(checkpoints["gpt2"], tmp_path / "other"), text(corpus))
    assert other
    (tmp_path / "other" / "manifest.json").unlink()
    before = contents(tmp_path / "other")
    for model in ("llama", "gpt2"):
        with pytest.raises(
            ValueError, match=r"holds 16 shards, shard-00000.h5 for one, and no manifest.json .*restore it"
        ):
            harvest(config(checkpoints[model], tmp_path / "other"), text(corpus))
    assert contents(tmp_path / "other") == before


def test_a_manifest_lost_is_named_by_every_command_and_nothing_is_lost_with_it(
    whole: tuple[dict[str, bytes], float],
    checkpoints: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Restoring the file heals."""
    folder, run = tmp_path / "s", tmp_path / "run"
    command = arguments(checkpoints["llama"], corpus, folder)
    before = whole[0]
    for name, data in before.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "manifest.json").unlink()
    fit = ["train", "--store", str(folder), "--hook", HOOK, "--out", str(run), "--k", "4", "--d-sae", "48"]
    for argv in (
        command,
        [*fit, "--tokens", "1000", "--batch", "100", "--device", "cpu"],
        ["store", "verify", str(folder)],
        ["store", "info", str(folder)],
        ["store", "extend", str(folder), "--tokens", "100", "--device", "cpu"],
    ):
        assert main(argv) == 2
        printed = capsys.readouterr().err
        assert re.search(r"shard-00000.h5.* no manifest.json that says what (it is|they are): .*restore it", printed)
    assert contents(folder) == {name: data for name, data in before.items() if name != "manifest.json"}
    assert not run.exists() or not list(run.rglob("*.safetensors"))
    (folder / "manifest.json").write_bytes(before["manifest.json"])
    assert main(["store", "verify", str(folder)]) == main(command) == 0
    assert contents(folder) == before
