"""SAEs by their names on the hub, and by SAELens' names of releases, from a hub on this machine; and SAEs pushed to it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub, hub
from test_formats import FOREIGN

from saebench.cli import main
from saebench.files import hash_files, write_json
from saebench.sae import load_sae, new_sae, read_config, save_sae
from saebench.sae.hub import Remote, local, parse, released

METADATA = {"model_name": "maker/tiny", "hook_name": "blocks.1.hook_resid_post", "context_size": 16}
SCRIPT = """
import json, logging, sys
from pathlib import Path
import huggingface_hub
from saebench.evaluate.push import PushConfig, push
from saebench.sae.hub import local
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
for name in ("httpx", "httpx2", "huggingface_hub"):
    logging.getLogger(name).setLevel(logging.ERROR)
def said(action, *arguments, **options):
    try:
        print("=>", action(*arguments, **options))
    except ValueError as error:
        print("!!", error)
for line in sys.argv[1:]:
    print(f"== {line}")
    if line == "offline":
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    elif line.startswith("push "):
        _, sae, to, *dry = line.split()
        said(push, PushConfig(sae=Path(sae), to=to, dry_run=Path(dry[0]) if dry else None))
    else:
        said(local, line.split()[0], *map(Path, line.split()[1:]))
"""


@torch.no_grad()
def an_sae(folder: Path, seed: int = 0, **metadata: Any) -> None:
    sae = new_sae("topk", 8, 16, k=2)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    save_sae(sae, folder, METADATA | metadata)


def evaluated(folder: Path) -> None:
    """An SAE of this machine, with figures."""
    an_sae(
        folder, model_name="/home/me/tiny", dataset_path="/home/me/texts.jsonl",
        saebench={"store": "activations/mine", "tokens_trained": 5000},
    )  # fmt: skip
    write_json(
        folder / "evaluation.json",
        {
            "metrics": {"l0": 2.0, "fvu": 0.25, "n_tokens_eval": 4000, "massive_rows": 0},
            "intervals": {"l0": [2.0, 2.0], "fvu": [0.24, 0.26]},
            "baselines": {"pca_fvu": 0.5},
            "interval_method": "95%, 100 bootstrap samples of 9 documents",
            "mask": "kept tokens",
            "store": "/home/me/activations/mine",
        },
    )


def run(folder: Path, served: Hub, *lines: str) -> dict[str, list[str]]:
    """What was said to each line, in one process, since libraries ask once where the hub is."""
    settings = {
        "HF_ENDPOINT": served.address, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_of_this_test", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, *lines]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    said: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("== "):
            now = said.setdefault(line[3:], [])
        else:
            now.append(line)
    return said


def test_saes_on_the_hub_are_fetched_pinned_and_pushed(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    an_sae(repo / "layers.1" / "wide", 1)
    an_sae(repo / "layers.1" / "narrow", 2)
    (repo / "layers.1" / "wide" / "training.log").write_text("what nobody needs")
    an_sae(tmp_path / "locked", 3)
    evaluated(tmp_path / "runs" / "mine" / "saes" / "topk-k2")
    with hub() as served:
        commit = served.add("models", "maker/saes", repo)
        served.add("models", "maker/locked", tmp_path / "locked")
        served.add("models", "maker/clt", FOREIGN / "circuit-tracer/clt")
        served.gated = {"maker/locked"}
        served.pushed = tmp_path / "pushed"
        said = run(
            tmp_path, served, "hf:maker/saes", "hf:maker/saes/layers.2", "hf:maker/none", "hf:maker/locked", "hf:maker/saes@v9/layers.1/wide",
            "hf:maker/saes/layers.1/wide", "hf:maker/saes/layers.1/wide runs/saes",
            "hf:maker/saes/layers.1/wide/sae_weights.safetensors", "hf:maker/clt", "hf:maker/clt/W_enc_0.safetensors",
            "push runs/mine/saes/topk-k2 hf:me/mine/k2 dry", "push runs/mine/saes/topk-k2 hf:me/mine/k2", "hf:me/mine",
            "push repo/layers.1/wide hf:me/mine", "offline", "hf:maker/saes/layers.1/wide runs/elsewhere",
            f"hf:maker/saes@{commit}/layers.1/wide runs/elsewhere", "hf:maker/saes/layers.1/narrow", "hf:maker/other/x",
        )  # fmt: skip
        asked = served.asked
    listing = ["  hf:maker/saes/layers.1/narrow", "  hf:maker/saes/layers.1/wide"]
    assert said["hf:maker/saes"] == ["!! hf:maker/saes has 2 SAEs: name one", *listing]
    assert said["hf:maker/saes/layers.2"] == ["!! hf:maker/saes/layers.2 is no SAE; the repository has these", *listing]
    assert said["hf:maker/none"][0].startswith("!! the hub has no repository maker/none")
    assert said["hf:maker/locked"][0].startswith(
        "!! maker/locked is gated: accept its terms at https://huggingface.co/maker/locked"
    )
    assert said["hf:maker/saes@v9/layers.1/wide"] == [
        "!! maker/saes has no revision 'v9'; expected a branch, a tag or a commit"
    ]
    pinned = f"hf:maker/saes@{commit}/layers.1/wide"
    here = "runs/saes/saes/layers.1-wide"
    assert said["hf:maker/saes/layers.1/wide"] == [f"{pinned} → {here}", f"=> {here}"]
    assert said["hf:maker/saes/layers.1/wide runs/saes"] == [f"{here} is {pinned}, fetched before", f"=> {here}"]
    assert said["hf:maker/saes/layers.1/wide/sae_weights.safetensors"] == [f"=> {here}"]
    parts = [
        f"hf:maker/clt/W_enc_{layer}.safetensors" for layer in range(2)
    ]  # each with its decoder, a file of its own
    assert said["hf:maker/clt"] == ["!! hf:maker/clt has 2 SAEs: name one", *(f"  {part}" for part in parts)]
    part = load_sae(tmp_path / said[parts[0]][-1].removeprefix("=> "))
    assert torch.equal(part.W_dec, load_sae(FOREIGN / "circuit-tracer/clt/W_enc_0.safetensors").W_dec)
    assert (
        read_config(tmp_path / here)["metadata"].items()
        >= (
            METADATA
            | {
                "source": {
                    "path": pinned,
                    "weights": hash_files([repo / "layers.1" / "wide" / "sae_weights.safetensors"]),
                }
            }
        ).items()
    )
    got, had = load_sae(tmp_path / here), load_sae(repo / "layers.1" / "wide")
    assert all(torch.equal(one, other) for one, other in zip(got.parameters(), had.parameters(), strict=True))
    assert not [line for line in asked if "narrow/" in line or "training.log" in line]  # only the files needed
    # Offline: what the hub's cache has, and how to get the rest.
    assert said["hf:maker/saes/layers.1/wide runs/elsewhere"][-1] == "=> runs/elsewhere/saes/layers.1-wide"
    assert said[f"{pinned} runs/elsewhere"] == ["=> runs/elsewhere/saes/layers.1-wide"]
    for name, get in (
        ("hf:maker/saes/layers.1/narrow", "maker/saes --include 'layers.1/narrow/*'"),
        ("hf:maker/other/x", "maker/other --include 'x/*'"),
    ):
        assert said[name][0].startswith(f"!! {name} is n")
        assert f"Where there is a network: `hf download {get}`" in "\n".join(said[name])
    # What is pushed is what a dry run writes, and says nothing of this machine.
    assert said["push runs/mine/saes/topk-k2 hf:me/mine/k2 dry"][-1] == "=> dry"
    there = tmp_path / "pushed" / "me" / "mine" / "k2"
    names = {"README.md", "cfg.json", "evaluation.json", "sae_weights.safetensors"}
    assert {path.name for path in there.iterdir()} == {path.name for path in (tmp_path / "dry").iterdir()} == names
    assert all((there / name).read_bytes() == (tmp_path / "dry" / name).read_bytes() for name in names)
    assert not [
        name
        for name in names
        if b"/home/me" in (there / name).read_bytes() or b"activations/mine" in (there / name).read_bytes()
    ]
    card = (there / "README.md").read_text()
    assert "| FVU | 0.2500 | 0.2400 to 0.2600 |" in card
    assert "| FVU of PCA | 0.5000 |  |" in card
    assert "saebench run tiny --dataset YOUR_TEXT --sae hf:me/mine/k2" in card
    assert said["hf:me/mine"][-1] == "=> runs/mine/saes/k2"  # and is there for others
    assert "was not evaluated" in said["push repo/layers.1/wide hf:me/mine"][0]


def test_what_names_nothing_on_the_hub_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("hf:me/mine") == Remote("me/mine")
    assert parse("hf:me/mine@main/a/b/") == Remote("me/mine", "main", "a/b")
    for text in ("hf:mine", "hf:me/mine/../other", "hf:"):
        with pytest.raises(ValueError, match="names nothing on the hub; expected hf:OWNER/REPO"):
            parse(text)
    assert local(tmp_path / "here") == tmp_path / "here"
    for command in (
        ["eval", "--run", "r", "--sae", "hf:x"],
        ["index", "--sae", "hf:x"],
        ["check", "hf:x"],
        ["steer", "--sae", "hf:x"],
    ):
        assert main(command) == 2
        assert "'hf:x' names nothing on the hub" in capsys.readouterr().err
    an_sae(tmp_path / "sae")
    assert main(["push", str(tmp_path / "sae"), "hf:me/mine@main"]) == 2
    assert "names a revision" in capsys.readouterr().err


def test_names_of_releases_are_those_of_saelens_own_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="comes with its package: `pip install --no-deps sae-lens`"):
        released("tiny-res//layer_1")
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("raise ImportError('only its list is read')")
    releases = """
tiny-res:
  repo_id: maker/saes
  model: tiny
  conversion_func: null
  config_overrides: {dataset_path: maker/texts}
  saes:
  - {id: layer_1, path: layers.1/wide, l0: 71.5, norm_scaling_factor: 0.25}
  - {id: layer_2, path: layers.2/wide}
"""
    (tmp_path / "sae_lens" / "pretrained_saes.yaml").write_text(releases)
    monkeypatch.syspath_prepend(tmp_path)
    one = released("tiny-res//layer_1")
    assert str(one) == "hf:maker/saes/layers.1/wide"
    assert one.known == {"model_name": "tiny", "stated_l0": 71.5}
    assert one.said == {"dataset_path": "maker/texts", "norm_scaling_factor": 0.25}
    for name, message in (
        ("tiny-ress//layer_1", "SAELens has no release 'tiny-ress'; near it: tiny-res"),
        ("tiny-res//layer_3", "release 'tiny-res' has no SAE 'layer_3'; near it: layer_"),
    ):
        with pytest.raises(ValueError, match=message):
            local(name)
