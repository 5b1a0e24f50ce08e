"""What the app is made of, without the app: the table, recipes, runs, commands begun from it, generation in a thread."""

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from saebench.browse.jobs import Jobs
from saebench.browse.recipes import Recipe, load_recipe, recipes_of, save_recipe
from saebench.browse.runs import Trained, runs_under, saes_of
from saebench.browse.serve import AppConfig, command, serve
from saebench.browse.table import LatentTable, Query
from saebench.cli import main
from saebench.files import read_json, write_json
from saebench.index import open_feature_index
from saebench.index.layout import MapConfig, make_map, read_map
from saebench.index.notes import Note, Notes
from saebench.steer import Bench, Turn, arms_of, generate, interventions, open_bench, parse_turns
from saebench.steer.live import Live
from saebench.steer.run import SteerConfig, rank, steer
from saebench.steer.scores import Scores
from saebench.steer.turns import belonging_of, format_turns

SAE = "topk-k4"


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return Trained(run, run / "saes" / SAE)


@pytest.fixture
def table(trained: Trained, tmp_path: Path) -> Iterator[LatentTable]:
    with open_feature_index(trained.index_path) as index:
        rng = np.random.default_rng(0)
        scores = Scores(
            *(rng.random(index.d_sae) for _ in range(3)),
            np.ones(index.d_sae, bool),
            np.full(index.d_sae, np.nan),
        )
        scores.output[5] = np.nan
        yield LatentTable(index, Notes(tmp_path / "notes.json", index.identity["sae"], index.d_sae), scores)


@pytest.fixture(scope="module")
def bench(trained: Trained) -> Bench:
    return open_bench(trained.folder, device="cpu")


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


# ------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("column", ["density", "max", "name_f1", "name_detection", "output"])
def test_a_sort_is_numpys_with_missing_figures_last(table: LatentTable, column: str, descending: bool) -> None:
    order = table.order(Query(sort=column, descending=descending))
    values = table.columns[column][order]
    known = values[~np.isnan(values)]
    assert np.array_equal(known, np.sort(known)[::-1] if descending else np.sort(known))
    assert np.isnan(values[len(known) :]).all()
    assert sorted(order.tolist()) == list(range(table.index.d_sae))


def test_pages_hold_every_latent_once_and_the_last_one_ends(table: LatentTable) -> None:
    query = Query(sort="max", size=10)
    pages = [table.find(Query(sort="max", size=10, page=page)) for page in range(5)]
    assert np.concatenate([page.latents for page in pages]).tolist() == table.order(query).tolist()
    assert table.find(Query(size=10, page=99)).page == 4
    assert {page.total for page in pages} == {48}


def test_words_are_looked_for_in_labels_rules_and_tokens(table: LatentTable) -> None:
    table.notes.write(11, Note("A Cat", ("animal",), "fires on pets"))
    assert table.order(Query(text="CAT pets")).tolist() == [11]
    assert table.order(Query(having=("labelled",))).tolist() == [11]
    assert 11 not in table.order(Query(without=("labelled",)))
    assert table.names[11].text == "A Cat"
    token = next(int(i) for i in table.index.top_tokens[7] if i >= 0 and table.index.pieces(np.array([i]))[0].strip())
    word = table.index.pieces(np.array([token]))[0].strip().lower()
    assert 7 in table.order(Query(text=word))
    assert not len(table.order(Query(text="no such word anywhere")))


def test_a_number_finds_its_latent_and_names_of_which_it_is_a_word(table: LatentTable) -> None:
    """Not every id, label and token in which its digits occur."""
    rules = [""] * 48
    rules[5] = 'token "3"; not position < 32'
    table.names._texts = {"rule": rules, "tokens": [""] * 48}
    table.notes.write(7, Note("version 0.3", ("py3", "33")))
    table.notes.write(9, Note("the top 3, say", ()))
    assert table.order(Query(text="3")).tolist() == [3, 5, 9]
    assert table.order(Query(text="3 top")).tolist() == [9]
    assert table.order(Query(text="48")).tolist() == []


def test_filters_are_on_density_rule_and_flags(table: LatentTable) -> None:
    density, detection = table.columns["density"], table.columns["name_detection"]
    found = table.order(Query(most_density=0.05, least_detection=0.6))
    assert found.tolist() == np.flatnonzero((density <= 0.05) & (detection >= 0.6)).tolist()
    dead = table.index.flagged("dead")
    assert table.order(Query(without=("dead",))).tolist() == np.flatnonzero(~dead).tolist()


def test_neighbours_in_a_query_are_those_of_its_order(table: LatentTable) -> None:
    query = Query(sort="max", descending=True)
    order = table.order(query).tolist()
    assert table.beside(query, order[0]) == (None, order[1])
    assert table.beside(query, order[10]) == (order[9], order[11])
    assert table.beside(query, order[-1]) == (order[-2], None)
    assert table.beside(Query(text="no such word anywhere"), 7) == (6, 8)


def test_columns_flags_and_sizes_that_are_not_there_are_named(table: LatentTable) -> None:
    with pytest.raises(ValueError, match="sort is 'colour'; expected latent, density"):
        table.order(Query(sort="colour"))
    with pytest.raises(ValueError, match="flag is 'red'; expected labelled, explained, dead"):
        table.order(Query(having=("red",)))
    with pytest.raises(ValueError, match="size is 5000; expected 1 to 1000 rows"):
        Query(size=5000)


# ------------------------------------------------------------------------------------------ recipes


def test_turns_are_read_as_they_are_written() -> None:
    turns = (Turn(latent=3), Turn(latent=40, mode="ablate"), Turn(latent=1, mode="scale", strength="-1.5"))
    assert format_turns(turns) == "3:add:0.5n,40:ablate,1:scale:-1.5"
    assert parse_turns(format_turns(turns)) == (turns[0], Turn(latent=40, mode="ablate"), turns[2])
    assert parse_turns("7") == (Turn(latent=7),)
    assert parse_turns("7@topk-k2:add:2x,8@a b") == (
        Turn(latent=7, sae="topk-k2", strength="2x"),
        Turn(latent=8, sae="a b"),
    )
    assert format_turns(parse_turns("7@topk-k2:add:2x,8@a b:ablate")) == "7@topk-k2:add:2x,8@a b:ablate"
    with pytest.raises(
        ValueError, match="'x:y' is no intervention; expected LATENT:MODE:STRENGTH such as 12:add:0.5n, or "
    ):
        parse_turns("3:add:1,x:y")
    with pytest.raises(ValueError, match="'3@:add:1' is no intervention"):
        parse_turns("3@:add:1")


def test_saes_of_one_model_are_turned_together(run: Path, trained: Trained, bench: Bench) -> None:
    turns = parse_turns("3:add:2,5@topk-k2:scale:3,7@relu-l0-4:add:1,4@topk-k4:add:1")
    others = [bench, bench.beside("topk-k2"), bench.beside("relu-l0-4"), bench]
    made = interventions(bench, turns, "generated")
    assert [one.sae for one in made] == [other.sae for other in others]
    assert [(one.latent, one.strength, one.positions) for one in made] == [
        (latent, strength, "generated") for latent, strength in ((3, 2.0), (5, 3.0), (7, 1.0), (4, 1.0))
    ]
    assert all(other.model is bench.model for other in others)
    assert [other.index is None for other in others] == [False, False, True, False]
    words = "no SAE 'x' lies beside .*topk-k4; expected one of relu-l0-4, topk-k2, topk-k4"
    with pytest.raises(ValueError, match=words):
        bench.beside("x")
    with pytest.raises(ValueError, match="latent is 48; the SAE has 0 to 47"):
        interventions(bench, parse_turns("48@topk-k2:add:1"))
    config = SteerConfig(
        sae=trained.folder, turns="3:add:2,5@topk-k2:scale:3", prompt="the cat", n=1, max_new_tokens=6, device="cpu"
    )
    wanted = generate(
        bench.model, "the cat", arms_of(interventions(bench, turns[:2])), Recipe(n=1, max_new_tokens=6).sampling()
    )
    assert [text.text for text in steer(config).texts] == [text.text for text in wanted.texts]
    with pytest.raises(ValueError, match="turns say latents, strengths and modes; leave out --latent"):
        SteerConfig(sae=trained.folder, turns="3", latent=(3,))
    with pytest.raises(ValueError, match="rank turns nothing"):
        rank(config)


def test_an_sae_of_another_model_is_refused_by_name(copied: Path) -> None:
    folder = copied / "saes" / "relu-l0-4"
    config = read_json(folder / "cfg.json")
    config["metadata"] |= {"model_name": "someone/else", "saebench": {}}
    write_json(folder / "cfg.json", config)
    bench = open_bench(copied / "saes" / SAE, device="cpu")
    with pytest.raises(ValueError, match="SAE 'relu-l0-4' is not of the model of 'topk-k4': .* names 'someone/else'"):
        interventions(bench, parse_turns("7@relu-l0-4:add:1"))
    del config["metadata"]["model_name"]
    write_json(folder / "cfg.json", config)
    with pytest.raises(ValueError, match="is not of the model of 'topk-k4': .*relu-l0-4 does not say which it is of"):
        open_bench(copied / "saes" / SAE, device="cpu").beside("relu-l0-4")


def test_a_recipe_is_kept_with_its_run_and_sae(tmp_path: Path) -> None:
    recipe = Recipe(turns=(Turn(latent=3, strength="2x"),), prompt="<b>", n=2, temperature=0.5, seed=9)
    of = {"sae": "a", "index": "b"}
    save_recipe(tmp_path, "loud cats", SAE, recipe, of)
    assert load_recipe(tmp_path, "loud cats", lambda turns: of) == (recipe, True)
    assert load_recipe(tmp_path, "loud cats", lambda turns: {"sae": "a"}) == (recipe, True)  # the index is gone
    assert recipes_of(tmp_path, SAE) == ["loud cats"]
    assert recipes_of(tmp_path, "another") == []


def test_a_recipe_of_another_sae_or_index_is_refused_and_an_older_one_opens_with_a_word(tmp_path: Path) -> None:
    path = save_recipe(tmp_path, "mine", SAE, Recipe(turns=(Turn(latent=3),)), {"sae": "a", "index": "b"})
    with pytest.raises(
        ValueError, match=r"mine.json was made from another sae: it says a, this one is c; .* 3:add:0.5n"
    ):
        load_recipe(tmp_path, "mine", lambda turns: {"sae": "c", "index": "b"})
    with pytest.raises(ValueError, match="was made from another index: it says b, this one is c"):
        load_recipe(tmp_path, "mine", lambda turns: {"sae": "a", "index": "c"})
    write_json(path, {name: value for name, value in read_json(path).items() if name != "of"})
    assert load_recipe(tmp_path, "mine", lambda turns: {"sae": "c"})[1] is False


def test_a_recipe_says_of_which_other_saes_it_is(copied: Path) -> None:
    bench = open_bench(copied / "saes" / SAE, device="cpu")
    recipe = Recipe(turns=parse_turns("3:add:2x,5@topk-k2:add:2x,7@relu-l0-4:add:1"))
    of = belonging_of(bench, recipe.turns)
    assert of["sae of topk-k2"] == bench.beside("topk-k2").belonging["sae"] != of["sae"] == bench.belonging["sae"]
    assert {"index", "index of topk-k2"} <= set(of)
    assert "index of relu-l0-4" not in of
    save_recipe(copied, "mine", SAE, recipe, of)
    assert load_recipe(copied, "mine", lambda turns: belonging_of(bench, turns)) == (recipe, True)
    other = of | {"sae of topk-k2": "other"}
    with pytest.raises(ValueError, match="was made from another sae of topk-k2: it says .*, this one is other"):
        load_recipe(copied, "mine", lambda turns: other)
    shutil.rmtree(copied / "saes" / "relu-l0-4")
    again = open_bench(copied / "saes" / SAE, device="cpu")
    with pytest.raises(ValueError, match="no SAE 'relu-l0-4' lies beside"):
        load_recipe(copied, "mine", lambda turns: belonging_of(again, turns))


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "x" * 61])
def test_a_recipe_never_leaves_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file; use letters"):
        save_recipe(tmp_path, name, SAE, Recipe(), {})


@pytest.mark.parametrize(
    ("content", "message"), [("[]", "is no recipe"), ("{", "is not valid JSON"), ("{}", "is no recipe")]
)
def test_a_recipe_edited_into_nonsense_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=f"mine.json {message}"):
        load_recipe(tmp_path, "mine", lambda turns: {})


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", "hot"), ("prompt", 7), ("n", 100), ("positions", "nowhere"), ("n", True), ("turns", 3)],
)
def test_a_recipe_with_a_value_of_another_kind_is_named(tmp_path: Path, field: str, value: object) -> None:
    path = save_recipe(tmp_path, "mine", SAE, Recipe(), {})
    write_json(path, read_json(path) | {field: value})
    with pytest.raises(ValueError, match=r"mine\.json"):
        load_recipe(tmp_path, "mine", lambda turns: {})


def test_what_is_copied_as_python_runs_and_says_the_same(trained: Trained, bench: Bench) -> None:
    turns = (Turn(latent=3, strength="1n"), Turn(latent=5, mode="ablate"), Turn(latent=9, sae="topk-k2", strength="2x"))
    recipe = Recipe(turns=turns, prompt="the 'red'\ncat", max_new_tokens=6, positions="generated")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(recipe.python(trained.folder), {})
        exec(trained.python(3), {})
    arms = arms_of(recipe.interventions(bench), seed=0)
    for text in generate(bench.model, recipe.prompt, arms, recipe.sampling()).texts:
        assert f"--- {text.arm}: {text.text}" in printed.getvalue()
    assert bench.index is not None
    assert str(np.float32(bench.index[3].top[0].value)) in printed.getvalue()


# ------------------------------------------------------------------------------------------ runs


def test_runs_and_saes_are_found_where_they_are(run: Path, tmp_path: Path) -> None:
    assert runs_under(run) == {"tiny": run} == runs_under(run.parent)
    assert runs_under(tmp_path / "nothing") == {}
    found, broken = saes_of(run)
    assert (sorted(found), broken) == (["relu-l0-4", "topk-k2", SAE], {})
    assert found[SAE].evaluated
    assert found[SAE].figures["l0"] == 4.0
    assert list(found["relu-l0-4"].next_commands()) == ["Index"]
    assert list(found[SAE].next_commands()) == ["Score for steering"]


# ------------------------------------------------------------------------------------------ long work


def test_each_job_has_a_log_of_its_own_whichever_server_begins_it(tmp_path: Path) -> None:
    arguments = [["store", "info", name] for name in "ab"]
    with ThreadPoolExecutor(2) as pool:  # two servers at once
        jobs = list(pool.map(lambda one: Jobs(tmp_path).start(one, tmp_path), arguments))
    assert [job.wait(60.0) for job in jobs] == [2, 2]
    assert sorted(job.log.name for job in jobs) == ["000-store.log", "001-store.log"]
    assert sorted(job.arguments for job in Jobs(tmp_path).all()) == arguments
    assert "saebench: error: " in jobs[0].ending
    again = Jobs(tmp_path).start(arguments[0], tmp_path)
    again.stop()  # while it still imports
    assert again.wait(60.0) == 130
    assert again.ending == "stopped"
    assert len(Jobs(tmp_path).all()) == 2  # the new one is in the place of the old
    assert jobs[0].log.exists()


_SERVER = """
import sys
from pathlib import Path
from saebench.browse.jobs import Jobs
root = Path(sys.argv[1])
Jobs(root).start(["harvest", "--model", "embedded", "--layers", "0", "--tokens", "2M", "--out", str(root / "store")], root / "run")
"""


def test_a_job_outlives_its_server_and_is_found_and_stopped_by_another(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _SERVER, str(tmp_path)], check=True)  # which has ended
    (job,) = Jobs(tmp_path).all()
    assert (job.running, job.status, job.name, job.resumes) == (True, None, "harvest embedded", True)
    assert Jobs(tmp_path).start(job.arguments, tmp_path / "run").record == job.record  # it is not begun twice
    deadline = time.monotonic() + 100
    while (job.progress or ("",))[0] != "harvest store" and time.monotonic() < deadline:
        time.sleep(0.05)
    Jobs(tmp_path).forget(job)  # which is nothing to one that runs
    job.stop()
    assert job.wait(60.0) == 130
    assert (job.stopped, job.succeeded, job.ending) == (True, False, "stopped")
    Jobs(tmp_path).forget(job)
    assert Jobs(tmp_path).all() == []


def test_a_job_that_died_is_told_from_one_that_runs(tmp_path: Path) -> None:
    job = Jobs(tmp_path).start(["store", "info", "a"], tmp_path)
    while "pid" not in read_json(job.record):
        time.sleep(0.01)
    os.killpg(read_json(job.record)["pid"], signal.SIGKILL)
    assert job.wait(10.0) is None
    assert "killed, or the machine went down: the same command goes on" in job.ending
    write_json(job.record, read_json(job.record) | {"pid": os.getpid()})  # its number is another process' now
    job.stop()
    assert not job.running
    (tmp_path / "jobs" / "7-x.json").write_text("[]")
    assert [one.record for one in Jobs(tmp_path).all()] == [job.record]


def test_a_store_is_found_from_the_run_wherever_one_stands(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(run.parent.parent, tmp_path / "moved")) / "runs" / "tiny"
    path = copied / "saes" / "topk-k4" / "cfg.json"
    config = read_json(path)
    config["metadata"]["saebench"]["store"] = "store"
    write_json(path, config)
    monkeypatch.chdir(tmp_path)
    assert Trained(copied, path.parent).store == tmp_path / "moved" / "store"


def test_an_index_is_made_by_a_command_that_is_watched(copied: Path) -> None:
    jobs, arguments = Jobs(copied), ["index", "--sae", str(copied / "saes" / "relu-l0-4")]
    job = jobs.start(arguments, copied)
    assert jobs.start(arguments, copied).record == job.record  # the same work is not begun twice
    assert job.wait(120.0) == 0
    assert (job.running, job.succeeded) == (False, True)
    assert job.progress is not None
    assert job.progress[:2] == ("label validation rows", 1.0)
    assert job.message == str(copied / "index" / "relu-l0-4.h5")
    assert Trained(copied, copied / "saes" / "relu-l0-4").share_indexed == 1
    jobs.forget(job)
    assert jobs.all() == []


# ------------------------------------------------------------------------------------------ the map


def test_a_map_keeps_neighbours_near_says_how_many_and_is_the_same_again(copied: Path) -> None:
    pytest.importorskip("openTSNE")
    config = MapConfig(sae=copied / "saes" / SAE)
    with open_feature_index(copied / "index" / f"{SAE}.h5") as index:
        assert read_map(index) is None
        path = make_map(config)
        assert path == copied / "index" / f"{SAE}.map.json"
        made, (ids, cosines) = read_map(index), index.neighbours
        assert made is not None
        assert ids.shape == cosines.shape == (48, 20)
        apart = np.linalg.norm(made.places[:, None] - made.places[None], axis=-1)
        np.fill_diagonal(apart, np.inf)
        near = np.argsort(apart, 1)[:, :20]
        assert made.recall == pytest.approx(np.mean([len({*a} & {*b}) / 20 for a, b in zip(near, ids, strict=True)]))
        assert made.recall > 0.5  # by chance 20 of 47
    before = path.read_bytes()
    make_map(config)
    assert path.read_bytes() == before


def test_a_map_wants_its_library_and_an_index(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("openTSNE"):
        with pytest.raises(ValueError, match="relu-l0-4.h5"):
            make_map(MapConfig(sae=copied / "saes" / "relu-l0-4"))
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(ValueError, match=r"openTSNE: pip install 'saebench\[map\]'"):
        make_map(MapConfig(sae=copied / "saes" / SAE))


# ------------------------------------------------------------------------------------------ generation in a thread


def test_a_generation_in_a_thread_is_the_one_that_is_called(bench: Bench) -> None:
    recipe = Recipe(turns=(Turn(latent=3, strength="1n"),), prompt="the cat", max_new_tokens=8, n=2)
    arms, lock = arms_of(recipe.interventions(bench)), threading.Lock()
    live = Live(bench.model, recipe.prompt, arms, recipe.sampling(), lock)
    assert live.wait(60.0)
    assert live.result is not None
    want = generate(bench.model, recipe.prompt, arms, recipe.sampling())
    assert [text.text for text in live.result.texts] == [text.text for text in want.texts]
    shown = "".join(live.pieces("steered", 1))
    assert shown.removesuffix("<|endoftext|>") == want.of("steered")[1].text
    assert not lock.locked()
    broken = Live(bench.model, "cat " * 100, arms, recipe.sampling(), lock)
    assert broken.wait(60.0)
    assert "a prompt has 102 tokens; with 8 new ones at most 56 fit" in (broken.error or "")
    assert not lock.locked()


def test_a_generation_waits_for_the_model_and_stops_when_told(bench: Bench) -> None:
    recipe = Recipe(turns=(Turn(latent=3, strength="1n"),), prompt="a", max_new_tokens=50)
    lock = threading.Lock()
    with lock:
        live = Live(bench.model, recipe.prompt, arms_of(recipe.interventions(bench)), recipe.sampling(), lock)
        live.stop()
        assert not live.wait(0.2)
        assert live.pieces("steered", 0) == []
    assert live.wait(60.0)
    assert live.result is not None
    assert len(live.pieces("steered", 0)) == 1


# ------------------------------------------------------------------------------------------ the server


def test_the_server_listens_to_this_machine_and_imports_nothing_from_where_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = command(AppConfig(port=8765, browser=False))
    assert line[:4] == [sys.executable, "-P", "-m", "streamlit"]
    assert "--server.address=localhost" in line
    assert "--server.port=8765" in line
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; expected a run, or a folder of runs"):
        serve(AppConfig(), tmp_path / "file")
    with pytest.raises(ValueError, match="port is 0; expected 1 to 65535"):
        AppConfig(port=0)
    with pytest.raises(SystemExit):
        main(["app", "--help"])
    assert "--port" in capsys.readouterr().out


def test_the_server_just_starts_and_ends_with_the_command(run: Path, tmp_path: Path) -> None:
    """With a browser and without; on an account that never ran it, too, where Streamlit would ask for an email address."""

    def answers(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("localhost", port)) == 0

    servers: dict[int, subprocess.Popen] = {}
    for options in ([], ["--no-browser"]):  # both at once
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        servers[port] = subprocess.Popen(
            [sys.executable, "-m", "saebench.cli", "app", str(run), "--port", str(port), *options],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(tmp_path), "BROWSER": "true"},
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while not all(map(answers, servers)):
        assert [server.poll() for server in servers.values()] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for port, server in servers.items():
        server.terminate()
        server.wait(30)
        assert server.stdin
        server.stdin.close()
        assert not answers(port)
