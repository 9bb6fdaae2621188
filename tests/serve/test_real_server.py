"""A real server, asked by the client, by `sidestep predict --url` and by the page: each gives what the bank gives."""

from __future__ import annotations

import asyncio
import json
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

import sidestep as ss
from commands import refusal, run, succeed, table
from served import KINDS, LABELS, METHODS, SINGLE, make_bank, save_task, serving
from sidestep.backbone.load import load_backbone
from sidestep.serve.keys import Keys
from sidestep.serve.settings import ServeSettings
from sidestep.serve.uploads import unpack
from small_tasks import text_backbone, write

USE, CHANGE = "use-" + 20 * "u", "change-" + 20 * "c"
SERVED = ("read", "sherl", "pair", "named")
TEXTS = ("good film", "the book was bad", "a very fine film")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, its tasks and a bank of some of them."""
    folder = tmp_path_factory.mktemp("served")
    backbone = load_backbone(text_backbone(folder / "bert"))
    for seed, name in enumerate(("read", "sherl", "readout")):
        save_task(folder / name, backbone, METHODS[name], SINGLE, "single", LABELS, {}, seed=seed)
    for seed, name in enumerate(("pair", "named"), start=10):
        head, kind, names, columns = KINDS[name]
        save_task(folder / name, backbone, METHODS["read"], head, kind, names, columns, seed=seed)
    make_bank(folder, folder / "bank", SERVED)
    return folder


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    bank = make_bank(place, place / "own", SERVED)
    with serving(bank, place / "bert", keys=Keys.of([USE], [CHANGE])) as address:
        with ss.Client(address, USE) as client:
            while not client.ready():
                pass
        yield address


def test_the_client_gives_what_the_bank_gives(place: Path, url: str) -> None:
    with ss.TaskBank(load_backbone(place / "bert"), place / "bank") as bank, ss.Client(url, USE) as client:
        expected = bank.predict([(["read", "sherl"], {"text": text}) for text in TEXTS]).rows
        found = client.predict(TEXTS, ["read", "sherl"])
    for row, known in zip(found.rows, expected, strict=True):
        assert {name: answer["prediction"] for name, answer in row.items()} == {
            name: answer["prediction"] for name, answer in known.items()
        }
        for name in row:
            assert row[name]["probability"] == pytest.approx(known[name]["probability"], abs=1e-5)
    assert found.tokens > 0
    assert set(found.milliseconds) == {"read", "wait", "run", "total"}


def test_a_task_comes_and_goes(place: Path, url: str) -> None:
    with ss.Client(url, CHANGE) as client:
        assert {task["name"] for task in client.tasks()} == set(SERVED)
        assert client.add("new", place / "readout")["method"] == "readout"
        answer = client.predict("good film", "new", probabilities="all").rows[0]["new"]
        assert answer["probabilities"].keys() == {*LABELS}
        client.remove("new")
        with pytest.raises(ss.ServerError, match=r"new.*\(404\)"):
            client.predict("good film", "new")
        assert client.info()["tasks"] == len(SERVED)
    with ss.Client(url, USE) as client, pytest.raises(ss.ServerError, match="use tasks alone") as refused:
        client.remove("read")
    assert refused.value.status == 403


def test_awaited_calls_give_the_same(place: Path, url: str) -> None:
    async def ask() -> list[Any]:
        async with ss.AsyncClient(url, USE) as client:
            return list(await asyncio.gather(*(client.predict(text, "read") for text in TEXTS)))

    with ss.Client(url, USE) as client:
        known = client.predict(TEXTS, "read").rows
    for found, row in zip(asyncio.run(ask()), known, strict=True):
        assert found.rows[0]["read"]["prediction"] == row["read"]["prediction"]


def test_the_command_writes_the_table_of_a_bank(
    place: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "rows.csv", [{"id": n, "text": text, "other": "a film"} for n, text in enumerate(TEXTS)])
    data = ["--data", tmp_path / "rows.csv", "--tasks", "read,pair"]
    monkeypatch.setenv("SIDESTEP_KEY", USE)
    succeed("predict", "--url", url, *data, "--output", tmp_path / "served.csv", "--batch-size", "2")
    succeed("predict", place / "bank", "--backbone", place / "bert", *data, "--output", tmp_path / "own.csv")
    served, own = table(tmp_path / "served.csv"), table(tmp_path / "own.csv")
    assert list(served[0]) == list(own[0])
    for row, known in zip(served, own, strict=True):
        assert {key: value for key, value in row.items() if not key.startswith("probability")} == {
            key: value for key, value in known.items() if not key.startswith("probability")
        }
        for name in ("read", "pair"):
            # other batches, and four digits
            assert float(row[f"probability_{name}"]) == pytest.approx(float(known[f"probability_{name}"]), abs=2e-4)


def test_columns_of_other_names_are_sent(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIDESTEP_KEY", USE)
    write(tmp_path / "rows.csv", [{"review": text} for text in TEXTS])
    data = ["--url", url, "--data", tmp_path / "rows.csv", "--tasks", "read,named", "--output", tmp_path / "out.jsonl"]
    assert "there is no column 'text' (read by read)" in refusal("predict", *data)
    succeed("predict", *data, "--text", "review")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == 3 * [
        {"review", "prediction_read", "probability_read", "prediction_named", "probability_named"}
    ]


def test_what_the_command_refuses(place: Path, url: str, tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", [{"text": "good"}])
    data = ["--data", tmp_path / "rows.csv", "--output", tmp_path / "out.csv"]
    assert "(401)" in refusal("predict", "--url", url, "--tasks", "read", *data)
    assert "name the server's tasks" in refusal("predict", "--url", url, *data)
    assert "name the folder of a task" in run("predict", *data).output
    wrong = refusal("predict", "--url", url, "--key", USE, "--tasks", "reed", *data)
    assert "reed" in wrong
    assert "read" in wrong.replace("reed", "")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_the_page_shows_the_answers_of_a_real_server(url: str) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as runner:
        page = runner.chromium.launch(executable_path=CHROMIUM, args=flags).new_page()
        page.set_default_timeout(240_000)
        page.goto(url)
        page.wait_for_selector("#key-part:not([hidden])")
        page.fill("#key", USE)
        page.press("#key", "Enter")
        page.wait_for_selector("html[data-ready]")
        page.fill("#in-text", TEXTS[0])
        page.fill("#in-text2", TEXTS[1])
        page.click("#send")
        page.wait_for_selector("#found > li")
        assert page.locator("#found h3").all_inner_texts() == sorted(SERVED)
        assert set(page.locator("#found .said").all_inner_texts()) <= {*LABELS}
        assert page.inner_text("#status").startswith("4 tasks, ")


def test_a_tar_file_that_ends_as_a_zip_file_does_is_a_tar_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as packed:
        packed.writestr("data", "0")
    (tmp_path / "sidestep.json").write_text("{}")
    with tarfile.open(tmp_path / "task.tar", "w") as archive:
        for name in ("sidestep.json", "weights.pth"):
            archive.add(tmp_path / name, name)
    assert zipfile.is_zipfile(tmp_path / "task.tar"), "or the case is none"
    (target := tmp_path / "target").mkdir()
    assert unpack(tmp_path / "task.tar", target, ServeSettings()) == target
    assert sorted(path.name for path in target.iterdir()) == ["sidestep.json", "weights.pth"]
