"""A judge explains latents and is held to it: against a real server, which answers by what it reads in the prompt."""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, HOOK, WIDTH
from transformers import PreTrainedTokenizerFast

from saebench.cli import main
from saebench.files import read_json, write_json
from saebench.index import FeatureIndex, IndexConfig, build_index, open_feature_index
from saebench.index.explanations import (
    Explanation,
    Tally,
    explanations_path,
    read_explanations,
    read_neuronpedia,
)
from saebench.index.export import ExportConfig, export
from saebench.index.notes import Note, Notes
from saebench.judge import ExplainConfig, explain
from saebench.judge.chat import Answers, Local, Prompt
from saebench.judge.prompts import detect_prompt, explain_prompt, marked, read_explanation, read_verdicts
from saebench.judge.trials import tally
from saebench.judge.windows import HeldOut, Window, token_list
from saebench.sae import new_sae, save_sae
from saebench.store import Store

WORDS = (" cat", " dog", " house", " return")


# ------------------------------------------------------------------------------------- the server


def by_rule(prompt: str) -> str:
    """A judge that takes a latent to stand for the token that is marked most often, and a passage for active where it is."""
    passages = [json.loads(line.split(": ", 1)[1]) for line in prompt.splitlines() if re.match(r'\d+: "', line)]
    if "What is it active on?" in prompt:
        marks = [token for passage in passages for token in re.findall(r"<<( \w+)", passage)]
        return f"Explanation: **the word{max(sorted(set(marks)), key=marks.count)}**"
    word = re.findall(r"active on: the word( \w+)", prompt)[0]
    seen = [re.findall(r"<<(.*?)>>", each) if "<< and >>" in prompt else [each] for each in passages]
    return "\n".join(
        f"{n}: {'yes' if all(word in part for part in parts) else 'no'}" for n, parts in enumerate(seen, 1)
    )


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server on this machine. `say` makes an answer of a prompt, or an int of it: the status of a failure."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.say: Callable[[str], str | int] = by_rule
        self.prompts: list[str] = []
        self.keys: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.judge = f"oracle@http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers["Authorization"])
        self.server.bodies.append(body)
        said = self.server.say(body["messages"][0]["content"])
        if isinstance(said, int):
            reply: dict[str, Any] = {"error": {"message": "max_tokens is not known here" if said == 400 else "not now"}}
        else:
            self.server.prompts.append(body["messages"][0]["content"])
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        content = json.dumps(reply).encode()
        self.send_response(said if isinstance(said, int) else 200)
        self.send_header("retry-after-ms", "1")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield started
        started.shutdown()
        thread.join()


# --------------------------------------------------------------------------------------- the SAE


@pytest.fixture(scope="module")
def saved(store: Store, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed SAE with a latent for each of WORDS, fitted by least squares to fire on it; its last never fires."""
    sae = new_sae("relu", WIDTH, len(WORDS) + 1)
    shards = store.of_split("train")
    x_ND = torch.cat([shard.rows(HOOK) for shard in shards]).float()
    tokens = np.concatenate([shard.column("tokens") for shard in shards])
    ids = [tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS]
    is_word = torch.stack([torch.tensor(tokens == token).float() for token in ids], 1)
    centred = x_ND - x_ND.mean(0)
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_enc.zero_()
        sae.W_enc[:, :-1] = torch.linalg.lstsq(centred, is_word - is_word.mean(0)).solution
        projected = x_ND @ sae.W_enc
        for word, there in enumerate(is_word.T.bool()):
            sae.b_enc[word] = -projected[~there, word].quantile(0.999)
        sae.b_enc[-1] = -1e6
    folder = tmp_path_factory.mktemp("run") / "saes" / "words"
    metadata = {"model_name": "m", "hook_name": HOOK, "context_size": CONTEXT, "saebench": {"store": str(store.folder)}}
    save_sae(sae, folder, metadata)
    assert build_index(IndexConfig(sae=folder, sample=4_000, workers=1)) is not None
    return folder


@pytest.fixture
def index(saved: Path) -> Iterator[FeatureIndex]:
    """The index, with nothing beside it."""
    path = saved.parent.parent / "index" / "words.h5"
    with open_feature_index(path) as opened:
        yield opened
    for left in (
        explanations_path(path),
        path.with_suffix(".notes.json"),
        path.with_suffix(".judge") / "answers.jsonl",
    ):
        left.unlink(missing_ok=True)


# ------------------------------------------------------------------------- against the real server


def test_an_explanation_is_scored_by_what_it_says_and_so_are_its_controls(
    index: FeatureIndex, saved: Path, server: Server, capsys: pytest.CaptureFixture
) -> None:
    options = ["--windows", "8", "--judge", server.judge, "--yes"]
    assert main(["explain", "--sae", str(saved), *options]) == 0
    found, held_out = read_explanations(index), HeldOut(index)
    assert {latent: each.text for latent, each in found.items()} == {
        latent: f"the word{word}" for latent, word in enumerate(WORDS)
    }
    drawn = {latent: held_out.draw(latent, 8, 0) for latent in found}

    def by_word(text: str, windows: list[Window]) -> Tally:
        word = text.removeprefix("the word")
        return tally([(window.kind, word in "".join(window.pieces)) for window in windows])

    for latent, each in found.items():
        assert each.method == "saebench-judge"
        assert each.partners
        before, after = each.partners
        assert latent not in (before, after)
        for half in (0, 1):
            windows = drawn[latent][half]
            assert each.detection[half] == by_word(each.text, windows)
            assert each.other_explanation[half] == by_word(found[before].text, windows)
            assert each.other_windows[half] == by_word(each.text, drawn[after][half])
            assert each.tokens[half].hard > 0
            assert each.fuzzing[half].active == each.fuzzing[half].hard == sum(w.kind == "active" for w in windows)
    assert np.mean([each.detection[1].score for each in found.values()]) > 0.7
    assert np.mean([each.fuzzing[1].score for each in found.values()]) > 0.8
    assert np.mean([each.other_explanation[1].score for each in found.values()]) < 0.65
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["latent", "detection", "fuzzing"]
    assert "(0 of " in table[-2]


def asking(saved: Path, server: Server, **options: Any) -> ExplainConfig:
    """Few questions of few windows."""
    few: dict[str, Any] = {"judge": server.judge, "yes": True, "windows": 5, "per_call": 10, "examples": 6}
    return ExplainConfig(sae=saved, **{**few, **options})


def test_explanations_come_from_training_rows_and_scores_from_held_out_ones(
    index: FeatureIndex, saved: Path, server: Server
) -> None:
    explain(asking(saved, server, concurrency=1))
    texts = {
        split: "".join("".join(index.running(shard.column("tokens"))) for shard in index.store.of_split(split))
        .replace("<|endoftext|>", "")
        for split in ("train", "validation")
    }  # fmt: skip
    for prompt in server.prompts:
        split = "train" if "What is it active on?" in prompt else "validation"
        passages = [json.loads(line.split(": ", 1)[1]) for line in prompt.splitlines() if re.match(r'\d+: "', line)]
        assert passages
        for passage in passages:
            assert re.sub("<<|>>", "", passage) in texts[split]
    assert "<|endoftext|>" not in "".join(server.prompts)


def test_latents_are_drawn_or_the_densest_of_those_that_fire_often_enough(
    index: FeatureIndex, saved: Path, server: Server
) -> None:
    held_out = HeldOut(index)
    assert [held_out.often(latent) for latent in range(5)] == [True] * 4 + [False]
    found = explain(asking(saved, server, top=2, by="density"))
    assert found is not None
    assert list(found) == np.argsort(-index.columns["fires"], kind="stable")[:2].tolist()
    drawn = explain(asking(saved, server, top=2))
    assert drawn is not None
    assert list(drawn) == [latent for latent in np.random.default_rng(0).permutation(5) if latent != 4][:2]


def test_nothing_is_sent_without_yes_and_the_plan_says_what_would_be(
    index: FeatureIndex, saved: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(ValueError, match=r"nothing was sent to oracle at 127\.0\.0\.1:\d+ yet; .* give --yes"):
        explain(asking(saved, server, yes=False))
    assert server.bodies == []
    assert not explanations_path(index.path).exists()
    planned = re.search(r"texts of .* are sent there\n  calls   (\d+), and 0 are answered already", caplog.text)
    assert planned
    explain(asking(saved, server))
    assert len(server.prompts) == int(planned[1])


def test_the_key_goes_to_the_server_and_nowhere_else(
    index: FeatureIndex, saved: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    explain(asking(saved, server, latents=(1,)))
    assert server.keys == {"Bearer sk-secret"}
    written = [path for path in saved.parent.parent.rglob("*") if path.is_file()]
    assert explanations_path(index.path) in written
    assert not any(b"sk-secret" in path.read_bytes() for path in written)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(index: FeatureIndex, saved: Path, server: Server, status: int) -> None:
    busy = iter([True, True, True])
    server.say = lambda prompt: status if next(busy, False) else by_rule(prompt)
    found = explain(asking(saved, server, latents=(1,)))
    assert found is not None
    assert found[1].text == "the word dog"
    assert len(server.bodies) == len(server.prompts) + 3


def test_a_model_that_thinks_is_asked_without_what_it_refuses(index: FeatureIndex, saved: Path, server: Server) -> None:
    server.say = lambda prompt: 400 if "max_tokens" in server.bodies[-1] else by_rule(prompt)
    explain(asking(saved, server, latents=(1,), concurrency=1))
    assert [set(body) & {"max_tokens", "temperature"} for body in server.bodies[1:]] == [set()] * len(server.prompts)


def test_a_server_that_fails_ends_it_and_what_it_answered_is_not_asked_again(
    index: FeatureIndex, saved: Path, server: Server
) -> None:
    config = asking(saved, server)
    server.say = lambda prompt: 401 if len(server.prompts) >= 12 else by_rule(prompt)
    with pytest.raises(ValueError, match=r"judge oracle at 127.* does not answer: .*not now.*the same command goes on"):
        explain(config)
    answers = index.path.with_suffix(".judge") / "answers.jsonl"
    kept = answers.read_bytes()
    assert kept.count(b"\n") == len(server.prompts) >= 12
    answers.write_bytes(kept[:-9])  # kill -9 within a line
    server.say = by_rule
    assert explain(config) is not None
    assert len(server.prompts) - len(set(server.prompts)) == 1
    at_once = read_json(explanations_path(index.path))
    answers.unlink()
    explain(config)
    assert read_json(explanations_path(index.path)) == at_once


def test_ctrl_c_keeps_what_is_answered(index: FeatureIndex, saved: Path, server: Server) -> None:
    def interrupting(prompt: str) -> str:
        if len(server.prompts) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return by_rule(prompt)

    server.say = interrupting
    config = asking(saved, server)
    assert explain(config) is None
    assert 12 < len(server.prompts) < 28
    assert explain(config) is not None
    assert len(server.prompts) == len(set(server.prompts))


def test_an_answer_that_is_no_answer_counts_for_neither_side(index: FeatureIndex, saved: Path, server: Server) -> None:
    server.say = lambda prompt: "the word cat" if "What is it" in prompt else "1: perhaps\n2: yes\n2: no"
    found = explain(asking(saved, server, latents=(1,)))
    assert found is not None
    assert found[1].other_explanation is found[1].partners is None  # alone, it has no controls
    for told in (*found[1].detection, *found[1].fuzzing):
        assert told == Tally(unusable=10)
        assert told.score is None
    server.say = lambda prompt: "<think>the word cat"
    (index.path.with_suffix(".judge") / "answers.jsonl").unlink()
    assert explain(asking(saved, server, latents=(1,))) == {1: Explanation("", "saebench-judge")}


# ------------------------------------------------------------------------------------ the file


def test_a_file_is_added_to_and_refused_where_it_belongs_elsewhere(
    index: FeatureIndex, saved: Path, server: Server
) -> None:
    explain(asking(saved, server, latents=(1, 2)))
    explain(asking(saved, server, latents=(3,)))
    assert sorted(read_explanations(index)) == [1, 2, 3]
    with pytest.raises(ValueError, match=r"made otherwise: windows: 5 -> 7; give the"):
        explain(asking(saved, server, windows=7))
    with pytest.raises(ValueError, match="judge.model: 'oracle' -> 'another'"):
        explain(asking(saved, server, judge="another" + server.judge.removeprefix("oracle")))
    path = explanations_path(index.path)
    content = read_json(path)
    for change, message in [
        ({"of": content["of"] | {"sae": "123"}}, r"words\.explanations\.json was made from another sae: it says 123"),
        ({"of": content["of"] | {"index": "123"}}, "was made from another index: it says 123.*move it away"),
        ({"schema": "x"}, "is not a file of explanations"),
        ({"schema_version": 2}, "has version 2, this saebench reads 1"),
        ({"latents": {"1": {"text": "a"}}}, "is damaged"),
    ]:
        write_json(path, content | change)
        with pytest.raises(ValueError, match=message):
            read_explanations(index)


def test_labels_and_explanations_go_out_and_come_back(
    index: FeatureIndex, saved: Path, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    explain(asking(saved, server, latents=(0, 1)))
    notes_path = index.path.with_suffix(".notes.json")
    Notes(notes_path, index.identity["sae"], index.d_sae).write(2, Note("houses", ("mine",)))
    export(ExportConfig(sae=saved, format="neuronpedia", out=tmp_path / "out"))
    first = read_explanations(index)
    explanations_path(index.path).unlink()
    notes_path.unlink()
    Notes(notes_path, index.identity["sae"], index.d_sae).write(2, Note("", ("kept",)))

    taken = explain(ExplainConfig(sae=saved, imported=tmp_path / "out"))
    assert (
        taken == {n: Explanation(f"the word{WORDS[n]}", "saebench-judge") for n in (0, 1)} == read_explanations(index)
    )
    assert main(["explain", "--sae", str(saved), "--imported", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "2 explanations taken; with --judge, too, they are scored\n"
    note = Notes(notes_path, index.identity["sae"], index.d_sae)[2]
    assert note == Note("houses", ("kept",))

    asked = len(server.prompts)
    scored = explain(asking(saved, server, imported=tmp_path / "out", latents=(0, 1)))
    assert scored == first
    assert len(server.prompts) == asked  # nothing is explained, and what was scored is known

    with pytest.raises(ValueError, match=r"is of source '0-other' of model .*; .*--source"):
        body = read_json(tmp_path / "out" / "batch-0.json")
        write_json(tmp_path / "other.json", body | {"source": "0-other"})
        explain(ExplainConfig(sae=saved, imported=tmp_path / "other.json"))
    with pytest.raises(ValueError, match="has latent 1; the SAE has 0 to 0"):
        read_neuronpedia([tmp_path / "out" / "batch-0.json"], body["modelId"], body["source"], 1)
    labelled = {"index": 2, "explanations": [{"text": "homes", "methodName": "hand-written"}]}
    write_json(tmp_path / "other.json", body | {"features": [labelled]})
    assert explain(ExplainConfig(sae=saved, imported=tmp_path / "other.json")) == {}
    assert Notes(notes_path, index.identity["sae"], index.d_sae)[2].label == "houses"  # yours stays
    assert read_explanations(index) == first  # and so does what a judge has scored
    write_json(tmp_path / "other.json", [1])
    with pytest.raises(ValueError, match=r"other\.json is no upload body of Neuronpedia"):
        explain(ExplainConfig(sae=saved, imported=tmp_path / "other.json"))


# ------------------------------------------------------------------------------------- the parts


def test_windows_are_what_they_are_called_and_halves_have_their_own_documents(index: FeatureIndex) -> None:
    held_out, sample = HeldOut(index), index.sample("validation")
    fires_of = {
        row: set(sample.latents[a:b].tolist())
        for row, a, b in zip(sample.rows, sample.offsets, sample.offsets[1:], strict=False)
    }
    listed = token_list(index, 1)
    cut = [index.context_of(int(row)) for row in sample.rows[:: CONTEXT - 1]]
    contexts = {"".join(context.pieces).replace("<|endoftext|>", ""): context for context in cut}
    documents: list[set[int]] = []
    for half in held_out.draw(1, 10, 0):
        assert {window.kind for window in half} == {"active", "hard", "random"}
        assert sum(window.kind == "active" for window in half) == 10 == len(half) // 2
        found = set()
        for window in half:
            context = contexts["".join(window.pieces)]
            found.add(context.doc_id)
            fires = [1 in fires_of.get(row, ()) for row in context.rows]
            assert window.fires.tolist() == fires
            assert any(fires) == (window.kind == "active")
            if window.kind != "active":
                assert np.isin(context.tokens, listed).any() == (window.kind == "hard")
            assert not (window.fires & window.decoy).any()
            assert window.decoy.sum() == min(window.fires.sum(), CONTEXT - 1 - window.fires.sum())
        documents.append(found)
    assert not documents[0] & documents[1]


def test_marks_stand_around_stretches_and_those_of_the_text_are_drawn_apart() -> None:
    marks = np.array([True, True, False, True])
    assert marked([" a", "b", " c", " d"], marks) == "<< ab>> c<< d>>"
    assert marked(["1 <", "< 2"], np.array([False, False])) == "1 < < 2"
    assert marked([], np.zeros(0, bool)) == ""


def test_a_text_cannot_pass_for_the_next_passage() -> None:
    prompt = detect_prompt("x", ['a"\n2: "b', "c"])
    assert re.findall(r"^(\d): ", prompt, re.MULTILINE) == ["1", "2"]
    assert "{0}" in explain_prompt([("{0} {text}", 3)])


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("1: yes\n2: no\n3: Yes.", [True, False, True]),
        ("**1.** No\n- 2) yes, it is\n3 - NO", [False, True, False]),
        ('{"1": "yes", "2": "no", "3": "no"}', [True, False, False]),
        ("1: yes\n1: no\n2: maybe\n4: yes", [None, None, None]),
        ("<think>1: yes 2: yes</think>1: no 3: yes", [False, None, True]),
        ("12: yes\n3: nothing\n1: yesterday", [None, None, None]),
        ("", [None, None, None]),
    ],
)
def test_verdicts_are_read_or_not_there(answer: str, verdicts: list[bool | None]) -> None:
    assert read_verdicts(answer, 3) == verdicts


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("\n Explanation: **the word cat**\nmore", "the word cat"),
        ('"words of praise"', "words of praise"),
        ("<think>hm\nwell</think>\nnouns", "nouns"),
        ("<think>cut short", ""),
        ("x" * 600, "x" * 512),
    ],
)
def test_an_explanation_is_the_first_line(answer: str, text: str) -> None:
    assert read_explanation(answer) == text


def test_scores_are_balanced_and_need_windows_of_either_kind() -> None:
    verdicts = [("active", True)] * 6 + [("active", False)] * 2 + [("hard", True)] * 2 + [("random", False)] * 3
    told = tally([*verdicts, ("hard", None)])
    assert told == Tally(active=8, active_right=6, hard=2, hard_right=0, random=3, random_right=3, unusable=1)
    assert told.score == pytest.approx((6 / 8 + 3 / 5) / 2)
    assert told._replace(random=2, random_right=2).score is None


def test_a_line_in_the_middle_that_is_no_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a" / "answers.jsonl"
    Answers(path, {}).add(Prompt("q", 1), "yes")
    assert Answers(path, {})[Prompt("q", 1)] == "yes"
    assert Prompt("q", 1) not in Answers(path, {"model": "another"})
    path.write_bytes(b"{broken}\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"line 1 of .*answers\.jsonl is no answer: delete it, or the file"):
        Answers(path, {})


def test_a_chat_model_in_a_folder_answers_and_says_what_it_cannot(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        Local(str(checkpoints["llama"]), "cpu")
    folder = tmp_path / "chat"
    shutil.copytree(checkpoints["llama"], folder)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    judge = Local(str(folder), "cpu")
    assert judge(Prompt(" the cat", 5)) == judge(Prompt(" the cat", 5)) != ""
    assert judge.identity["model"] == "chat"
    with pytest.raises(ValueError, match=r"a prompt has \d+ tokens, and judge .* takes 64 with its answer"):
        judge(Prompt(" the cat" * 60, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is nobody to ask"),
        ({"judge": "m@http://me:secret@host/v1"}, "a URL that is no address alone"),
        ({"judge": "m@http://host/v1", "windows": 0}, "windows is 0; expected 1 or more"),
        ({"judge": "m@http://host/v1", "latents": (9,)}, "latent is 9; .* has 0 to 4"),
        ({"judge": "m@http://host/v1", "latents": (4,)}, "none of these latents can be explained"),
    ],
)
def test_what_cannot_be_asked_is_named(index: FeatureIndex, saved: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(ExplainConfig(sae=saved, **options))
