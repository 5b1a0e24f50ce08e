"""What the documentation shows can be typed: its commands parse, its Python runs, its links lead somewhere."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from saebench.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "activations/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
GUIDES = [page for page in PAGES if page.parent == ROOT / "docs"]


def commands(page: Path) -> list[str]:
    """The saebench commands of a page. What follows ` -- ` in a rolling training are options of `harvest`."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    found = [line.split("#")[0].split(" -- ") for line in re.findall(r"^    saebench (.*)$", text, re.MULTILINE)]
    return [part for first, *behind in found for part in (first, *("harvest " + options for options in behind))]


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_parse(page: Path, capsys: pytest.CaptureFixture) -> None:
    for command in commands(page):
        with pytest.raises(SystemExit) as stopped:
            main([*shlex.split(command), "--help"])
        assert stopped.value.code == 0
        options = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z0-9-]+", command)) <= options


def test_each_stage_has_commands() -> None:
    every = " ".join(command for page in PAGES for command in commands(page))
    assert {"run", "harvest", "train", "eval", "index", "explain", "export", "steer", "app", "store"} <= set(
        every.split()
    )


def test_scripts_and_benchmarks_that_are_named_are_there() -> None:
    named = {
        path for page in PAGES for path in re.findall(r"(?:scripts|benchmarks|tests)/[a-z_]+\.py", page.read_text())
    }
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def test_the_guides_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [code for page in GUIDES for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    assert blocks
    for code in blocks:
        exec(compile(code, "docs", "exec"), {})
    l0, fvu, recovered = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert l0 <= 16.0
    assert 0 < fvu < 0.5
    assert 0.5 < recovered < 1


def test_the_arithmetic_of_scaling_is_what_its_script_prints() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    script = runpy.run_path(str(ROOT / "scripts/scaling.py"))
    assert [table for table in script["tables"]() if table not in page] == []
