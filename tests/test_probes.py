"""Probes: the protocol against numbers worked by hand and a plain reference, where tasks come from, and the command."""

import csv
import gzip
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HOOK, sentences
from joblib import Parallel, delayed
from scipy import sparse, stats

from saebench.bench import protocol
from saebench.bench.paired import marked
from saebench.bench.probes import ProbesConfig, prepared, probe, probes, summary
from saebench.bench.protocol import auc, order_of, split
from saebench.bench.readings import Reading, _names, called, dictionaries_of, l0_of
from saebench.bench.results import Figure, interval
from saebench.bench.tasks import Reader, Source, Task, column_tasks, neurons_hook, text_tasks
from saebench.cli import main
from saebench.files import read_json
from saebench.labels import LABELLERS
from saebench.models import capture, hook_name, load_model
from saebench.models.places import place_of
from saebench.sae import ends_of, load_sae, new_sae, read_config, save_sae
from saebench.store import Store, open_store

CONFIG = ProbesConfig(run=Path("r"), seeds=2, ks=(1, 4))


def some_task(n: int, documents: int, seed: int = 0) -> Task:
    generator = np.random.default_rng(seed)
    holds = generator.permutation(n) < n // 2
    source = Source(np.arange(n), lambda rows, hooks: {})
    return Task("t", holds, np.arange(n) % documents, source, np.arange(n))


def reading(name: str = "a", *, baseline: bool = False, dense: bool = False) -> Reading:
    return Reading(name, (HOOK,), (HOOK,), lambda vectors: None, {}, baseline, dense)


def telling(task: Task, n_features: int = 30, seed: int = 0) -> sparse.csr_array:
    """Sparse features of which the first is more often active where the task holds, the second less so."""
    generator = np.random.default_rng(seed)
    share = np.full((len(task.holds), n_features), 0.2)
    share[:, 0] += 0.6 * task.holds
    share[:, 1] += 0.3 * task.holds
    return sparse.csr_array(generator.exponential(size=share.shape) * (generator.random(share.shape) < share))


def figures(task: Task, X: sparse.csr_array, config: ProbesConfig = CONFIG) -> list[Figure]:
    (found,) = probe([prepared(reading(), task, X, 32, config, task.rows)], "l2", Parallel(1, return_as="generator"))
    return found


# ---------------------------------------------------------------------------------- protocol


def test_the_worked_example_of_the_docs() -> None:
    X = np.array([[2.0, 3, 10, 0], [2, 1, 0, 0], [0, 1, 10, 0], [0, 1, 0, 0]])
    # means where not 0: 2, 1.5, 10; classes 2 apart, 1 apart, not apart: 1, 0.67 and 0 of them
    assert order_of(sparse.csr_array(X), np.array([True, True, False, False])).tolist() == [0, 1, 2, 3]
    train, holds = np.array([[3.0], [2], [1], [0]]), np.array([True, True, False, False])
    assert auc(train, holds, np.array([[3.0], [1], [2], [0]]), holds) == 0.75
    low, high = interval([0.7, 0.8, 0.9])
    assert (low, high) == (pytest.approx(0.8 - 0.2484, abs=1e-4), pytest.approx(0.8 + 0.2484, abs=1e-4))
    low, high = interval([0.7, 0.8, 0.9], 0.5)
    assert (low, high) == (pytest.approx(0.8 - 0.3928, abs=1e-4), pytest.approx(0.8 + 0.3928, abs=1e-4))


def plain_auc(train: np.ndarray, holds: np.ndarray, test: np.ndarray, truth: np.ndarray) -> float:
    """By Newton's method in float64, C by hand, AUC pair by pair."""

    def fitted(X: np.ndarray, y: np.ndarray, C: float) -> np.ndarray:
        A, w = np.column_stack([X, np.ones(len(X))]), np.zeros(X.shape[1] + 1)
        ridge = np.diag([1.0] * X.shape[1] + [0.0])

        def loss(w: np.ndarray) -> float:
            return C * np.logaddexp(0, -np.where(y, 1, -1) * (A @ w)).sum() + w @ ridge @ w / 2

        for _ in range(100):
            p = 1 / (1 + np.exp(-A @ w))
            step = np.linalg.solve(C * A.T @ (A * (p * (1 - p))[:, None]) + ridge, C * A.T @ (p - y) + ridge @ w)
            size = 1.0
            while size > 1e-8 and loss(w - size * step) > loss(w):
                size /= 2
            w = w - size * step
        return w

    def score(w: np.ndarray, X: np.ndarray, y: np.ndarray) -> float:
        z = X @ w[:-1]
        return float(np.mean([(a > b) + 0.5 * (a == b) for a in z[y] for b in z[~y]]))

    cut = len(train) - min(len(train) // 5, 100)
    grid = [10.0 ** (5 - 10 * step / 9) for step in range(10)]
    scores = [score(fitted(train[:cut], holds[:cut], C), train[cut:], holds[cut:]) for C in grid]
    return score(fitted(train, holds, grid[int(np.argmax(scores))]), test, truth)


def test_a_probe_is_the_plain_one() -> None:
    task = some_task(400, 400)
    X = telling(task).toarray()[:, :4]
    train, test = np.arange(300), np.arange(300, 400)
    ours = auc(X[train], task.holds[train], X[test], task.holds[test])
    assert ours == pytest.approx(plain_auc(X[train], task.holds[train], X[test], task.holds[test]), abs=2e-3)
    assert ours > 0.75
    assert auc(X[train], task.holds[train], X[test], task.holds[test], "l1") == pytest.approx(ours, abs=0.02)


def test_the_few_rows_of_small_tasks_are_validated_in_folds() -> None:
    for n in (3, 6, 40):
        X = np.arange(n + 4.0)[:, None]
        holds = np.arange(n + 4) % 2 == 0
        X[holds] += 1000
        assert auc(X[:n], holds[:n], X[n:], holds[n:]) == 1.0


def test_permuted_labels_give_chance() -> None:
    task = some_task(600, 300)
    X, found = telling(task), []
    for seed in range(8):
        permuted = task._replace(holds=np.random.default_rng(seed).permutation(task.holds))
        found += figures(permuted, X, replace(CONFIG, ks=(1,)))
    assert np.mean([figure.value for figure in found]) == pytest.approx(0.5, abs=0.02)
    (real,) = figures(task, X, replace(CONFIG, ks=(1,)))
    assert real.value is not None
    assert real.value > 0.75


def test_figures_do_not_depend_on_the_scale_of_activations_and_equal_seeds_are_equal() -> None:
    task = some_task(400, 200)  # more rows, and so one fold instead of six
    X = telling(task)
    found = [figures(task, X * scale) for scale in (1, 1, 2.0**20)]
    assert found[0] == found[1] == found[2]
    assert figures(task, X, replace(CONFIG, seed=9)) != found[0]


def test_several_processes_find_what_one_finds() -> None:
    task = some_task(400, 200)
    every = [prepared(reading(name), task, telling(task, seed=n), 32, CONFIG, task.rows) for n, name in enumerate("ab")]
    one = list(probe(every, "l2", Parallel(1, return_as="generator")))
    with Parallel(2, return_as="generator") as workers:
        assert os.getpid() not in set(workers(delayed(os.getpid)() for _ in range(4)))
        assert list(probe(every, "l2", workers)) == one
        (again,) = probe(every[1:], "l2", workers)  # by the same processes
    assert again == one[1]
    assert [figure.sae for figures in one for figure in figures] == ["a", "a", "b", "b"]


def test_what_does_not_vary_is_undefined() -> None:
    task = some_task(200, 50)
    for constant in (0.0, 3.0):
        found = figures(task, sparse.csr_array(np.full((200, 5), constant)))
        assert [(figure.at, figure.value, figure.low) for figure in found] == [(1.0, None, None), (4.0, None, None)]


def test_splits_share_no_document_and_are_balanced() -> None:
    task = some_task(3000, 200)
    lumpy = task.documents // 3 * (task.documents % 5 > 0)  # one holds a fifth of all
    for documents in (task.documents, lumpy):
        for seed in range(5):
            parts = split(task.holds, documents, np.random.default_rng(seed))
            assert parts is not None
            train, test = parts
            assert not set(documents[train]) & set(documents[test])
            assert len(train) == 1024
            assert len(test) >= 100
            for part in parts:
                assert task.holds[part].sum() * 2 == len(part) == len(set(part))
    holds = np.array([True, True, False, False])
    assert split(holds, np.array([0, 0, 1, 2]), np.random.default_rng(0)) is None
    parts = split(holds, np.array([0, 1, 2, 3]), np.random.default_rng(0))
    assert parts is not None
    assert [len(part) for part in parts] == [2, 2]


def test_intervals_hold_the_truth() -> None:
    """Of 100 documents with a feature one standard deviation apart: a probe of it has the AUC Φ(1/√2), whatever it is trained on."""
    held, truth = 0, stats.norm.cdf(1 / np.sqrt(2))
    for draw in range(400):
        generator = np.random.default_rng(draw)
        holds = generator.permutation(100) < 50
        x = generator.normal(size=100) + holds
        values = []
        for seed in range(5):
            parts = split(holds, np.arange(100), np.random.default_rng(seed))
            assert parts is not None
            scores = x[parts[1]]
            values.append(float((scores[holds[parts[1]], None] > scores[~holds[parts[1]]]).mean()))
        low, high = interval(values, 1.0)  # 50 test documents, 50 training documents
        held += low <= truth <= high
    assert 0.93 * 400 <= held <= 0.97 * 400


def test_means_over_tasks_and_the_excess_over_the_best_baseline() -> None:
    def row(name: str, values: list[float | None], at: float | None = 1.0) -> list[Figure]:
        return [Figure(name, f"t{place}", "auc", at, value) for place, value in enumerate(values)]

    readings = [
        reading("s"),
        reading("p", baseline=True),
        reading("q", baseline=True),
        reading("d", baseline=True, dense=True),
    ]
    figures = {
        "s": row("s", [0.9, 0.8, 0.7, 0.6, 0.5, None]),
        "p": row("p", [0.8, 0.8, 0.6, 0.6, 0.4, 0.9]),
        "q": row("q", [0.5] * 6),
        "d": row("d", [1.0] * 6, None),
    }
    found = {(figure.sae, figure.of, figure.at): figure for figure in summary(readings, figures)}
    assert found["s", "all", 1.0].value == pytest.approx(0.7)
    assert found["s", "all", 1.0].n == 5
    excess = found["s", "excess", 1.0]
    assert excess.value == pytest.approx(0.06)  # of 0.1, 0, 0.1, 0, 0.1
    assert (excess.low, excess.high) == (pytest.approx(-0.008, abs=1e-3), pytest.approx(0.128, abs=1e-3))
    assert ("p", "excess", 1.0) not in found
    assert found["d", "all", None].value == 1.0
    # A baseline that is undefined for what is hard is no better for it: the best is that of the tasks that all have.
    figures["p"], figures["q"] = row("p", [0.8, 0.8, 0.6, 0.6, 0.4, None]), row("q", [0.7, 0.8, None, None, None, None])
    assert next(each for each in summary(readings, figures) if each.of == "excess").value == pytest.approx(0.06)
    few = summary(readings, {name: each[:2] for name, each in figures.items()})
    assert all(figure.low is None for figure in few)


def test_saes_are_held_against_the_best_of_them_task_by_task() -> None:
    def row(name: str, values: Sequence[float | None], k: float = 1.0) -> list[Figure]:
        return [Figure(name, f"t{place}", "auc", k, value) for place, value in enumerate(values)]

    easy_and_hard = [0.95, 0.9, 0.7, 0.6, 0.5]
    elsewhere = reading("e")._replace(of=("other",))
    readings = [*map(reading, "abcd"), elsewhere, reading("p", baseline=True)]
    figures: dict[str, list[Figure]] = {
        "a": row("a", easy_and_hard) + row("a", easy_and_hard, 4.0),
        "b": row("b", [value - 0.02 - 0.001 * (n % 2) for n, value in enumerate(easy_and_hard)])
        + row("b", easy_and_hard, 4.0),
        "c": row("c", [0.85, 0.95, 0.6, 0.65, 0.45]),  # now ahead, now behind
        "d": row("d", [None, None, 0.75, 0.65, 0.4]),  # above c on what both have, and the best is of what all have
        "e": row("e", [0.99] * 5),
        "p": row("p", [0.4] * 5),
    }
    every = summary(readings, figures)
    found = {(each.sae, each.at): each for each in every if each.of == "less_best"}
    assert set(found) == {("b", 1.0), ("c", 1.0), ("d", 1.0), ("b", 4.0)}  # neither a, nor the only one of its hooks
    half = 2.776 * 0.000548 / 5**0.5  # while the intervals of both AUC, 0.5 wide, lie over each other
    low, high = (pytest.approx(-0.0204 + end, abs=1e-5) for end in (-half, half))
    assert found["b", 1.0][4:7] == (pytest.approx(-0.0204), low, high)
    assert (found["d", 1.0].value, found["d", 1.0].n, found["d", 1.0].low) == (pytest.approx(0.0), 3, None)
    table = [each for each in marked(every) if each.of.startswith("less_best")]
    assert {each.sae: each.of for each in table} == {
        "b": "less_best ≈ at 4", "c": "less_best ≈", "d": "less_best", "least difference": "less_best",
    }  # fmt: skip
    ends = found["c", 1.0].low, found["c", 1.0].high
    assert ends[0] is not None
    assert ends[1] is not None
    halves = (ends[1] - ends[0]) / 2, half
    least = {each.at: (each.value, each.n) for each in table if each.sae == "least difference"}
    assert least == {1.0: (pytest.approx(sum(halves) / 2, abs=1e-5), 2), 4.0: (0.0, 1)}


# ---------------------------------------------------------------------------------- tasks


@pytest.fixture
def few_cs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two C instead of ten, for tests of what lies around the regression, which is most of the time."""
    monkeypatch.setattr(protocol, "_CS", protocol._CS[[3, 6]])


@pytest.fixture(scope="module")
def reader(checkpoints: dict[str, Path]) -> Reader:
    return Reader(load_model(str(checkpoints["llama"]), device="cpu", dtype="float32"), 16, 4)


def write_csv(path: Path, rows: list[tuple[object, ...]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_text_is_known_by_its_last_token(reader: Reader) -> None:
    texts = ["the cat", "a red dog runs over the house and the cat sees it", "x"]
    found = reader(texts, (HOOK,))[HOOK]
    for text, vector in zip(texts, found, strict=True):
        ids = reader.model.encoder.opened(reader.model.encoder.encode([text])[0][-15:])
        torch.testing.assert_close(vector, capture(reader.model, torch.tensor([ids]), [HOOK])[HOOK][0, -1])


def test_neurons_are_what_the_last_map_of_an_mlp_reads(reader: Reader) -> None:
    hook = hook_name(1, "mlp_out")
    neurons = neurons_hook(hook)
    assert neurons is not None
    assert neurons == neurons_hook(hook_name(1, "mlp_in"))
    assert neurons_hook(HOOK) is None
    assert reader.has(neurons)
    found = reader.capture(torch.arange(5, 25).view(2, 10), (neurons, hook))
    down = place_of(reader.model, hook).module.get_submodule("down_proj")
    torch.testing.assert_close(found[neurons] @ down.weight.T, found[hook])  # type: ignore[operator]
    assert reader(["the cat"], (neurons,))[neurons].shape == (1, 64)


def test_tasks_of_labelled_texts(tmp_path: Path, reader: Reader) -> None:
    rows = [(sentences(seed, 5), "yes" if seed % 3 else "no") for seed in range(9)]
    (task,) = text_tasks(write_csv(tmp_path / "a.csv", [("text", "label"), *rows]), reader)
    assert (task.name, task.holds.sum(), len(task.holds)) == ("a", 6, 9)  # `yes` sorts behind `no`
    (turned,) = text_tasks(write_csv(tmp_path / "b.csv", [("text", "label"), *rows[::-1]]), reader)
    assert turned.hash == task.hash
    vectors = [each.source.vectors(each, (HOOK,))[HOOK] for each in (task, turned)]
    torch.testing.assert_close(vectors[0], vectors[1])
    three = [("a, b\nc", 10), ("a, b\nc", 9), ("d", 9), ("e", 10), ("f", 2), ("g", 2)]
    found = text_tasks(write_csv(tmp_path / "c.csv", [("prompt", "target"), *three]), reader)
    assert [task.name for task in found] == ["c: 2", "c: 9", "c: 10"]
    assert len(np.unique(found[0].documents)) == 5  # equal texts are of one


def test_a_folder_as_that_of_sae_probes(tmp_path: Path, reader: Reader) -> None:
    write_csv(tmp_path / "1_b.csv", [("prompt", "prompt_len", "target"), *((f"t {n}", 3, n % 2) for n in range(8))])
    write_csv(tmp_path / "2_many.csv", [("prompt", "target"), *((f"t {n}", n) for n in range(9))])
    (tmp_path / "0_a.csv.gz").write_bytes(gzip.compress((tmp_path / "1_b.csv").read_bytes()))
    assert [task.name for task in text_tasks(tmp_path, reader)] == ["0_a", "1_b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("text", "class"), ("a", 1)],
            r"row 0 of .*x.csv has text, class; expected text and label, or prompt and target",
        ),
        (
            [("text", "label"), ("a", 1), ("b", 1), ("c", 2)],
            r"label '2' of .*x.csv has one example; expected 2 at least",
        ),
        ([("text", "label"), ("a", 1), ("b", 1)], r"x.csv has 1 labels in 2 rows; expected 2 to 50"),
        ([("text", "label"), ("a", 1), ("", 2)], r"row 1 of .*x.csv has text '' and label '2'; expected both"),
        ([("text", "label"), ("a",)], r"row 0 of .*x.csv has text 'a' and label None; expected both"),
    ],
)
def test_bad_files(tmp_path: Path, reader: Reader, rows: list[tuple[object, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_tasks(write_csv(tmp_path / "x.csv", rows), reader)


def test_files_that_are_none(tmp_path: Path, reader: Reader) -> None:
    for path in (tmp_path, tmp_path / "x.csv", Path(__file__)):
        with pytest.raises(ValueError, match="has no labelled texts; expected a file of .arrow or .csv or"):
            text_tasks(path, reader)


def test_columns_of_labellers_are_of_the_rows_they_say(store: Store, reader: Reader) -> None:
    tasks = column_tasks(store, LABELLERS[1:2], (), 4, 100_000, lambda: reader)
    assert len(tasks) == 4
    lesser = [min(task.holds.sum(), (~task.holds).sum()) for task in tasks]
    assert min(lesser) >= 50
    (named,) = column_tasks(store, LABELLERS[1:2], ('token " cat"',), 4, 100_000, lambda: reader)
    tokens = np.concatenate([shard.column("tokens") for shard in store.shards])
    docs = np.concatenate([shard.column("doc_id") for shard in store.shards])
    rows = named.source.ids[named.rows]
    assert (docs[rows] == named.documents).all()
    text = [reader.model.tokenizer.decode([token]) for token in tokens[rows][named.holds].tolist()]
    assert set(text) == {" cat"}
    vectors = named.source.vectors(named, (HOOK,))[HOOK]
    whole = torch.cat([shard.rows(HOOK) for shard in store.shards]).float()
    assert torch.equal(vectors, whole[torch.from_numpy(rows)])
    hook = neurons_hook(hook_name(0, "mlp_out"))
    assert hook is not None
    some = named.source.vectors(named, (hook,))[hook]
    context = rows[3] // store.context
    tokens_L = torch.from_numpy(tokens[context * store.context :][: store.context].astype(np.int64))
    there = reader.capture(tokens_L[None], (hook,))[hook][0, rows[3] % store.context]
    torch.testing.assert_close(some[3], there)


def test_labels_that_never_occur(store: Store, reader: Reader) -> None:
    with pytest.raises(
        ValueError, match=r"'token \"zebra\"' holds on 0 of \d+ held-out rows of .*, in 0 of \d+ documents"
    ):
        column_tasks(store, LABELLERS[1:2], ('token "zebra"',), 4, 100_000, lambda: reader)
    with pytest.raises(ValueError, match="nothing that python says holds, and does not, on 100 of"):
        column_tasks(store, LABELLERS[:1], (), 4, 100_000, lambda: reader)


# ---------------------------------------------------------------------------------- command


@pytest.mark.usefixtures("few_cs")
def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made, at = tmp_path / "run", run.parent.parent / "store"
    shutil.copytree(run / "saes/topk-k4", made / "saes/topk-k4")
    texts = write_csv(tmp_path / "mine.csv", [("text", "label"), *((sentences(n, 6), n % 2) for n in range(240))])
    command = ["bench", "probes", "--run", str(made), "--store", str(at), "--texts", str(texts), "--labeller", "tokens"]
    command += ["--labels", 'token " cat"', "--ks", "1", "--seeds", "2", "--device", "cpu"]
    assert main(command) == 0
    shown, said = capsys.readouterr()
    table = [line.split() for line in shown.splitlines()]
    assert {"topk-k4", "dense", "PCA", "untrained,"} <= {line[0] for line in table}
    assert [line[1] for line in table if line[0] == "topk-k4"] == ["all", "excess"]
    assert "means over 2 tasks have no interval; expected 5 at least" in said
    path = made / "bench/probes.json"
    units = read_json(path)["units"]
    readings = {unit.split(" · ")[1] for unit in units} - {"all"}
    assert len(readings) == 4
    assert len(units) == 2 * len(readings) + 1
    values = {tuple(row[:4]): row[4] for unit in units.values() for row in unit["figures"]}
    assert values["dense", 'token " cat"', "auc", None] > 0.5

    # What is done is not done again.
    before = path.read_bytes()
    assert main(command) == 0
    assert (path.read_bytes(), capsys.readouterr().out) == (before, shown)


def test_an_untrained_sae_is_as_sparse_as_the_one_that_it_stands_beside(run: Path, tmp_path: Path) -> None:
    store = open_store(run.parent.parent / "store")
    trained = load_sae(run / "saes/topk-k4")
    sae = new_sae("topk", trained.d_in, trained.d_sae, k=3)  # no power of two
    sae.load_state_dict(trained.state_dict())
    save_sae(sae, tmp_path / "saes/topk-k3", read_config(run / "saes/topk-k4")["metadata"])
    folder = tmp_path / "saes/topk-k3"
    ours, untrained = dictionaries_of(store, [(folder, ends_of(folder, read_config(folder)))], 0, "cpu")
    assert untrained.name == f"untrained, {sae.d_sae} latents, k 3"
    both = [(one, ends_of(one, read_config(one))) for one in (folder, run / "saes/topk-k4", run / "saes/relu-l0-4")]
    beside = [reading.name for reading in dictionaries_of(store, both, 0, "cpu") if reading.baseline]
    assert [name.partition(", k ")[2] for name in beside[:2]] == ["3", "4"]
    assert l0_of(load_sae(run / "saes/topk-k4"), ours.hooks, store, [2, 5]) == 4
    assert l0_of(sae, ours.hooks, store, [9, 3]) == 3
    vectors = next(store.joint_rows(ours.hooks, "validation", first=64))
    assert ours.encode(vectors).nnz == untrained.encode(vectors).nnz == 3 * len(vectors[HOOK])


@pytest.mark.usefixtures("few_cs")
def test_what_is_done_outlives_an_interruption(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saebench.bench import results

    config = ProbesConfig(
        run=tmp_path, sae=(run / "saes/topk-k4",), store=run.parent.parent / "store", labels=('token " cat"',), labeller="tokens", ks=(1,), seeds=1, device="cpu",
    )  # fmt: skip
    put, calls = results.Results.put, []

    def stopped(self: results.Results, *arguments: object) -> list[Figure]:
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return put(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(results.Results, "put", stopped)
    with pytest.raises(KeyboardInterrupt):
        probes(config)
    assert list(read_json(tmp_path / "bench/probes.json")["units"]) == calls[:1]
    probes(config)
    assert calls.count(calls[0]) == 1  # not done again


def test_saes_of_one_name_are_told_apart_by_their_runs() -> None:
    assert _names([Path("/a/saes/x"), Path("/a/saes/y")]) == ["x", "y"]
    assert _names([Path("/a/saes/x"), Path("/b/saes/x")]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="two SAEs are called 'a/x'; expected names of their own"):
        _names([Path("/a/saes/x"), Path("/a/saes/x")])


def test_what_is_read_of_several_stores_is_told_apart_by_them() -> None:
    one, two, other = Path("/x/one"), Path("/x/two"), Path("/y/one")
    assert called([one]) == {one: ("one", "")}
    assert called([one, two]) == {one: ("one", "one: "), two: ("two", "two: ")}
    assert called([one, other]) == {one: ("/x/one", "/x/one: "), other: ("/y/one", "/y/one: ")}


def test_settings_and_runs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ks are \(0,\); expected numbers of latents of 1 or more"):
        ProbesConfig(run=tmp_path, ks=(0,))
    with pytest.raises(ValueError, match="seeds is 0; expected 1 or more"):
        ProbesConfig(run=tmp_path, seeds=0)
    with pytest.raises(ValueError, match=r"has no SAEs in saes/ that can be read here; train some, or give --sae"):
        probes(ProbesConfig(run=tmp_path))
