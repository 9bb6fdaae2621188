from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest
import sample
from typer.testing import CliRunner, Result

from sidestep.cli import app

FEW = ("read", "lora", "full")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return sample.write(tmp_path / "results.jsonl", sample.study("b", FEW, tasks=("rte",), seeds=2), broken=True)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_a_page_and_markdown(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "deep" / "report.html"
    result = run(results, "--output", page, "--markdown")
    assert result.exit_code == 0, result.output
    assert "1 broken line was skipped" in result.stderr
    assert f"{page} written" in result.stderr
    assert "| read |" in result.stdout
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.jsonl", "--markdown"], "Error: none.jsonl: there is no such file"),
        (["{results}"], "nothing to write: give --output report.html, --figures FOLDER or --markdown"),
        (["{results}", "--output", "{folder}"], "is a folder: name a file"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], said: str, results: Path, tmp_path: Path) -> None:
    result = run(*(argument.format(results=results, folder=tmp_path) for argument in arguments))
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_a_missing_extra_is_named(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_altair(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "sidestep.report" and "files" in (arguments[2] or ()):
            raise ModuleNotFoundError("No module named 'altair'", name="altair")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_altair)
    result = run(results, "--output", tmp_path / "report.html")
    assert result.exit_code == 2
    assert 'pip install "sidestep[compare]"' in result.stderr
    assert run(results, "--markdown").exit_code == 0


def test_a_figure_does_not_replace_results(results: Path, tmp_path: Path) -> None:
    run(results, "--figures", tmp_path / "figures")
    drawn = next((tmp_path / "figures").glob("*.csv"))
    drawn.write_bytes(results.read_bytes())
    result = run(drawn, "--figures", tmp_path / "figures")
    assert result.exit_code == 2
    assert f"{drawn} is read as an input" in " ".join(result.stderr.split())
    assert drawn.read_bytes() == results.read_bytes()


def test_a_file_that_is_named_twice_counts_once(results: Path, tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(results)
    once, twice = run(results, "--markdown"), run(results, tmp_path / "link.jsonl", results, "--markdown")
    assert "1 broken line was skipped" in twice.stderr
    assert once.stdout.splitlines()[1:] == twice.stdout.splitlines()[1:]


def test_a_byte_order_mark_and_odd_bytes_of_a_path_are_no_error(results: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.jsonl"))
    try:
        odd.write_bytes(b"\xef\xbb\xbf" + results.read_bytes())
    except OSError:
        pytest.skip("this disk takes no such name")
    result = run(odd, "--output", tmp_path / "page.html", "--markdown")
    assert result.exit_code == 0, result.output
    assert "1 broken line was skipped" in result.stderr  # the one at the end, not the first
