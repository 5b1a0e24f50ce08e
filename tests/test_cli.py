import json
import shutil
from pathlib import Path

import pytest
from conftest import CONTEXT, HOOK

from saebench.cli import main
from saebench.printed import format_table
from saebench.store import Store


def test_the_pipeline_by_commands(
    checkpoints: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    harvest = [
        "harvest", "--model", str(checkpoints["neox"]), "--dataset", str(corpus), "--layers", "1", "--tokens", "8k",
        "--context", str(CONTEXT), "--validation-fraction", "0.2", "--out", "activations/small",
    ]  # fmt: skip
    assert main(harvest) == 0
    assert "8,000 rows" in capsys.readouterr().out
    assert (
        main(
            [
                "train",
                "--store",
                "activations/small",
                "--arch",
                "topk",
                "--k",
                "4,8",
                "--d-sae",
                "64",
                "--tokens",
                "16k",
                "--batch",
                "128",
                "--out",
                "runs/small",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "runs/small/saes/topk-k4\nruns/small/saes/topk-k8\nnext: saebench eval --run runs/small" in out
    assert main(["eval", "--run", "runs/small"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:3] == ["SAE", "L0", "FVU"]
    assert "report: runs/small/report.html" in out
    summary = json.loads(Path("runs/small/summary.json").read_text())
    assert summary["store"] == "activations/small"
    assert [sae["path"] for sae in summary["saes"]] == ["runs/small/saes/topk-k4", "runs/small/saes/topk-k8"]
    assert main(["store", "verify", "activations/small"]) == 0
    assert "every block matches its checksum" in capsys.readouterr().out


def test_store_info_shows_what_is_there(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "info", str(store.folder)]) == 0
    out = capsys.readouterr().out
    assert "12,000 rows" in out
    assert f"{HOOK}  d_in 32, median norm" in out


def test_a_damaged_store_fails_verification(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(store.folder, tmp_path / "s")
    path = tmp_path / "s" / "shard-00001.h5"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main(["store", "verify", str(tmp_path / "s")]) == 2
    assert "shard-00001.h5: rows" in capsys.readouterr().err


def test_bad_input_is_one_line_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "info", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"saebench: error: {tmp_path} holds no activation store")
    assert len(err.splitlines()) == 1


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no activation store"):
        main(["-v", "store", "info", str(tmp_path)])


def test_tables_are_aligned() -> None:
    assert format_table([["a", "bb"], ["ccc", "1"]]) == "a    bb\n-------\nccc   1"
