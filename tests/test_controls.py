"""SAEs trained under constraints, as controls."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_gradients import one_thread
from test_train import config

from saebench.cli import main
from saebench.sae import initialise, load_sae, new_sae
from saebench.store import Store
from saebench.train import TrainConfig, loop, train
from saebench.train.controls import NEAR, keep_near

__all__ = ["one_thread"]

CONTROLS = ("frozen-decoder", "soft-frozen", "frozen-encoder")


def cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(one, other, dim=1)


def test_rows_are_turned_back_to_their_start_in_the_plane_of_both() -> None:
    start = torch.eye(3)
    rows = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 4.0], [1.0, 0.0, 0.0]])
    keep_near(rows, start)
    # The second: of norm 5, at cosine 0.6 to its start, turned to 0.8. The third was at a right angle.
    assert rows.tolist() == [pytest.approx(row, abs=1e-6) for row in ([2.0, 0, 0], [0, 4.0, 3.0], [0.6, 0, 0.8])]


@pytest.fixture(scope="module")
def run(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("controls")
    train(config(store, out, arch=("topk", "relu"), target_l0=(4.0,), k=(), control=CONTROLS, lr=(1e-2,)))
    return out


@pytest.mark.parametrize("arch", ["topk-k4", "relu-l0-4"])
def test_each_keeps_what_it_may_not_learn(arch: str, run: Path, store: Store) -> None:
    saes = {control: load_sae(run / "saes" / f"{arch}-{control}") for control in CONTROLS}
    sae = saes["frozen-decoder"]
    start = new_sae("topk", sae.d_in, sae.d_sae, k=4)
    initialise(
        start, torch.zeros(sae.d_in), torch.Generator().manual_seed(0)
    )  # directions are those of any mean and gain
    at_start = {control: cosines(sae.W_dec, start.W_dec) for control, sae in saes.items()}
    assert at_start["frozen-decoder"].min() > 1 - 1e-6
    assert at_start["soft-frozen"].min() > NEAR - 1e-5
    assert (at_start["soft-frozen"] < NEAR + 1e-3).any()  # some went as far as they may
    assert at_start["frozen-encoder"].min() < NEAR
    encoders = {control: cosines(sae.W_enc.T, start.W_enc.T) for control, sae in saes.items()}
    assert encoders["frozen-encoder"].min() > 1 - 1e-6
    assert encoders["frozen-decoder"].min() < 0.95  # while its rows stay


def test_a_control_that_was_stopped_goes_on_exactly(
    run: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = config(store, tmp_path, arch=("topk",), target_l0=(4.0,), k=(), control=("soft-frozen",), lr=(1e-2,))
    step, left = loop.team_step, iter([*range(told.n_steps // 2), signal.SIGINT])

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is signal.SIGINT:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "team_step", interrupted)
    assert train(told) is None
    assert train(told) == [tmp_path / "saes/topk-k4-soft-frozen"]
    one, other = (load_file(out / "saes/topk-k4-soft-frozen/sae_weights.safetensors") for out in (run, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_no_control_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--store", str(store.folder), "--out", str(tmp_path), "--k", "4", "--control", "frozen"])
    assert TrainConfig(store=store.folder, out=tmp_path, k=(4,)).control == ()
