"""What any server of a bank gives over HTTP. The fixture `server` says where it is."""

from __future__ import annotations

import base64
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from datasets import Dataset

import sidestep as ss
from served import CLOSE, KINDS, LABELS, METHODS, same
from sidestep.data import DataWarning
from sidestep.tasks.predict import predict
from small_tasks import reviews

ROW = {
    "text": "a good film was very bad",
    "other": "the book",
    "sentence": "the good book",
    "question": "a film is",
    "context": "the good book was bad",
}
ROWS = [{**ROW, "text": row["text"], "sentence": row["text"]} for row in reviews(6, 3)]


def asked(http: httpx.Client, names: Any, rows: Any, **options: Any) -> list[dict[str, Any]]:
    response = http.post("/v1/predict", json={"tasks": names, "inputs": rows, **options})
    assert response.status_code == 200, response.text
    return response.json()["results"]


def problem(response: httpx.Response, name: str, status: int) -> dict[str, Any]:
    """A response that is this problem, and says what to do."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    told = response.json()
    assert (told["type"], told["status"]) == (f"urn:sidestep:problem:{name}", status), told
    assert response.status_code == status
    assert told["detail"]
    assert told["advice"]
    assert told["request_id"] == response.headers["x-request-id"]
    return told


def said(answer: dict[str, Any]) -> Any:
    """What is predicted. Of tags without their probabilities, and a number within rounding."""
    found = answer["prediction"]
    if isinstance(found, list):
        return [(part["type"], part["start"], part["end"]) for part in found]
    return pytest.approx(found, abs=CLOSE) if isinstance(found, float) else found


def alone(server: Any, name: str, rows: list[dict[str, Any]]) -> Dataset:
    """As `sidestep predict` answers."""
    return predict(ss.load(server.tasks / name), rows)


# --- answers ---


@pytest.mark.parametrize("name", [*METHODS, "several", "number", "pair", "named", "tags"])
def test_a_task_answers_as_predict_does(server: Any, http: httpx.Client, name: str) -> None:
    found, table = asked(http, [name], ROWS), alone(server, name, ROWS)
    for place, row in enumerate(found):
        assert [*row] == [name]
        same(row[name], table, place, ROW)


def test_one_row_has_the_bits_of_predict(server: Any, http: httpx.Client) -> None:
    [row] = asked(http, ["read"], ROWS[:1])
    table = alone(server, "read", ROWS[:1])
    assert row["read"]["probabilities"] == {name: table[f"p_{name}"][0] for name in LABELS}


def test_heads_of_all_kinds_answer_one_call(server: Any, http: httpx.Client) -> None:
    names = [*METHODS, *KINDS, "short"]
    [row] = asked(http, names, ROW)
    assert [*row] == names
    for name in names:
        [own] = asked(http, [name], ROW)
        assert said(own[name]) == said(row[name]), name
    assert {part["type"] for part in row["tags"]["prediction"]} <= {"PER"}
    assert row["spans"]["prediction"] == ROW["context"][row["spans"]["start"] : row["spans"]["end"]]


def test_each_row_has_tasks_of_its_own(http: httpx.Client) -> None:
    rows = [{"text": "good", "tasks": ["read", "number"]}, "bad", {"text": "a film", "tasks": ["tags"]}]
    found = asked(http, ["lora"], rows)
    assert [[*row] for row in found] == [["read", "number"], ["lora"], ["tags"]]


@pytest.mark.parametrize("names", [("read", "sherl", "readout"), ("tags", "tags_too"), ("spans",)])
def test_tasks_run_on_the_rows_that_ask_for_them(http: httpx.Client, names: tuple[str, ...]) -> None:
    """A long text has many windows, and tasks of tags share their passes."""
    texts = ["good film", "a bad film " * 60, "a film", "a good one"]
    rows = [{**ROW, "text": text, "tasks": [names[place % len(names)]]} for place, text in enumerate(texts)]
    rows[2]["tasks"] = [*names]
    found = asked(http, [*names], rows)
    assert [[*row] for row in found] == [row["tasks"] for row in rows]
    for row, answers in zip(rows, found, strict=True):
        for name, answer in answers.items():
            [own] = asked(http, [name], {**row, "tasks": [name]})
            assert said(own[name]) == said(answer), name


def test_a_row_may_use_the_names_of_fields(http: httpx.Client) -> None:
    told = [asked(http, ["named"], row) for row in ("good", {"text": "good"}, {"sentence": "good"})]
    assert told[0] == told[1] == told[2]


@pytest.mark.parametrize("text", ["42", "", "\ud83d half of a pair", "\x00", "très 好"])
def test_odd_texts_are_answered(http: httpx.Client, text: str) -> None:
    body = b'{"tasks": ["read", "tags"], "inputs": ["half \\ud83d"]}' if "\ud83d" in text else None
    if body is not None:
        response = http.post("/v1/predict", content=body, headers={"content-type": "application/json"})
        assert "prediction" in response.json()["results"][0]["read"]
        return
    assert all("prediction" in answer for answer in asked(http, ["read", "tags"], text)[0].values())


@pytest.mark.parametrize(
    ("mode", "members"),
    [
        ("all", {"prediction", "probability", "probabilities"}),
        ("one", {"prediction", "probability"}),
        ("none", {"prediction"}),
    ],
)
def test_probabilities_are_told_as_asked(http: httpx.Client, mode: str, members: set[str]) -> None:
    [row] = asked(http, ["read"], "good", probabilities=mode)
    assert {*row["read"]} == members


def test_long_rows_are_cut_with_a_flag_or_refused(server: Any, http: httpx.Client) -> None:
    rows = ["very " * 9 + "good", "bad"]
    cut = asked(http, ["short", "read"], rows)
    assert [row["short"].pop("cut", None) for row in cut] == [True, None]
    assert "cut" not in cut[0]["read"]
    with pytest.warns(DataWarning, match="were truncated"):
        same(cut[0]["short"], alone(server, "short", [{"text": rows[0]}]), 0, ROW)
    refused = asked(http, ["short"], rows, too_long="refuse")
    assert refused[0]["short"]["error"]["type"].endswith("too-long")
    assert "prediction" in refused[1]["short"]
    one = http.post("/v1/predict", json={"task": "short", "inputs": rows[0], "too_long": "refuse"})
    problem(one, "too-long", 422)


def test_a_bad_row_leaves_the_others_alone(http: httpx.Client) -> None:
    rows = ["good", {"other": "no text"}, {"text": ["a", "list"]}, "bad"]
    found = asked(http, ["read", "tags"], rows)
    assert ["error" in row["read"] for row in found] == [False, True, True, False]
    assert ["error" in row["tags"] for row in found] == [False, True, False, False]
    assert "the row has 'other'" in found[1]["read"]["error"]["detail"]


def test_usage_and_times_are_told(http: httpx.Client) -> None:
    told = http.post("/v1/predict", json={"task": "read", "inputs": ["a good film", "bad"]}).json()
    assert told["usage"] == {"rows": 2, "tokens": 8}
    assert set(told["timings"]) == {"read_ms", "wait_ms", "run_ms", "total_ms"}
    assert told["timings"]["total_ms"] >= told["timings"]["run_ms"]


def test_embeddings_as_openai_gives_them(http: httpx.Client) -> None:
    texts = ["a good film", "bad"]
    plain = http.post("/v1/embeddings", json={"model": "bert", "input": texts}).json()
    assert (plain["object"], plain["model"]) == ("list", "bert")
    assert plain["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    values = np.array([row["embedding"] for row in plain["data"]])
    assert np.linalg.norm(values, axis=1) == pytest.approx(1.0, abs=1e-5)
    coded = http.post("/v1/embeddings", json={"model": "bert", "input": texts, "encoding_format": "base64"}).json()
    unpacked = [np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in coded["data"]]
    assert np.stack(unpacked) == pytest.approx(values, abs=1e-6)
    problem(http.post("/v1/embeddings", json={"model": "read", "input": "a"}), "wrong-endpoint", 422)
    problem(http.post("/v1/embeddings", json={"model": "bert", "input": {"image": "AAAA"}}), "bad-row", 422)


def test_classes_as_text_embeddings_inference_gives_them(http: httpx.Client) -> None:
    one = http.post("/classify", json={"inputs": "good", "task": "read"}).json()
    assert [*one[0]] == ["label", "score"]
    assert [each["score"] for each in one] == sorted((each["score"] for each in one), reverse=True)
    assert {each["label"] for each in one} == set(LABELS)
    several = http.post("/classify", json={"inputs": [["good"], ["bad"]], "task": "read"}).json()
    assert several[0] == [{**each, "score": pytest.approx(each["score"], abs=CLOSE)} for each in one]
    pair = http.post("/classify", json={"inputs": ["good", "book"], "task": "pair"})
    assert pair.status_code == 200
    told = problem(http.post("/classify", json={"inputs": "good"}), "invalid-request", 422)
    assert "no task is named" in told["detail"]
    problem(http.post("/classify", json={"inputs": "good", "task": "number"}), "wrong-endpoint", 422)
    problem(http.post("/classify", json={"inputs": "very " * 9, "task": "short"}), "too-long", 422)


def test_a_form_has_rows_in_its_parts(http: httpx.Client) -> None:
    form = {"text": ["good", "bad"], "tasks": "read,number"}
    response = http.post("/v1/predict", data=form, files={"other": ("other.txt", b"")})
    problem(response, "invalid-request", 422)  # one part of "other", and two of "text"
    files = [("text", (None, "good")), ("text", (None, "bad")), ("tasks", (None, "read, number"))]
    found = http.post("/v1/predict", files=files).json()["results"]
    assert found == asked(http, ["read", "number"], ["good", "bad"])


# --- the bank ---


def test_what_is_served_is_told(server: Any, http: httpx.Client) -> None:
    assert http.get("/health").json() == http.get("/ready").json() == {"status": "ok"}
    info, told = http.get("/info").json(), http.get("/v1/tasks").json()
    names = [task["name"] for task in told["tasks"]]
    assert {*METHODS, *KINDS, "short"} <= {*names}
    assert told["unreadable"] == []
    assert info["tasks"] == len(names)
    assert info["backbone"]["name"] == "bert"
    assert len(info["backbone"]["digest"]) == 64
    assert "read" in info["methods"]
    assert str(server.bank) not in http.get("/info").text
    one = http.get("/v1/tasks/pair").json()
    assert one in told["tasks"]
    assert one["reads"] == {"text": "text", "text2": "other"}
    assert one["labels"] == list(LABELS)


def test_a_task_is_added_and_removed_while_the_server_runs(server: Any, http: httpx.Client, tmp_path: Path) -> None:
    source = server.tasks / "read"
    for number, (form, kind) in enumerate(
        [("zip", "application/zip"), ("tar", "application/x-tar"), ("gztar", "application/gzip")]
    ):
        name = f"new-{number}"
        archive = shutil.make_archive(str(tmp_path / name), form, source.parent, "read")
        content, how = Path(archive).read_bytes(), {"content-type": kind}
        added = http.put(f"/v1/tasks/{name}", content=content, headers=how)
        assert added.status_code == 201, added.text
        assert added.json() == http.get(f"/v1/tasks/{name}").json()
        [row] = asked(http, [name, "read"], "a good film")
        assert row[name] == row["read"]
        assert http.put(f"/v1/tasks/{name}", content=content, headers=how).status_code == 200  # sent again
        assert http.delete(f"/v1/tasks/{name}").status_code == 204
        problem(http.post("/v1/predict", json={"task": name, "inputs": "a"}), "unknown-task", 404)
        problem(http.delete(f"/v1/tasks/{name}"), "unknown-task", 404)


def test_a_task_is_added_by_its_path(http: httpx.Client) -> None:
    assert http.put("/v1/tasks/copy", json={"path": "read"}).status_code == 201
    problem(http.put("/v1/tasks/copy", json={"path": "number"}), "task-exists", 409)
    assert http.delete("/v1/tasks/copy").status_code == 204
    for path in ("..", "../served", "/etc", ".", "read/../..", "\0"):
        problem(http.put("/v1/tasks/copy", json={"path": path}), "outside-root", 403)
    problem(http.put("/v1/tasks/copy", json={"path": "nothing"}), "bad-upload", 422)


def test_other_processes_change_the_bank(server: Any, http: httpx.Client) -> None:
    from sidestep.tasks.bank_folder import LOCK, BankFolder

    bank = BankFolder(server.bank)
    bank.add("theirs", server.tasks / "number")
    assert isinstance(asked(http, ["theirs"], "good")[0]["theirs"]["prediction"], float)
    bank.remove("theirs")
    bank.add("theirs", server.tasks / "tags")
    assert asked(http, ["theirs"], "good")[0]["theirs"]["predicted_tags"]
    bank.remove("theirs")
    problem(http.post("/v1/predict", json={"task": "theirs", "inputs": "a"}), "unknown-task", 404)
    from filelock import FileLock

    with FileLock(server.bank / LOCK):
        busy = http.put("/v1/tasks/busy", json={"path": "read"})
        problem(busy, "bank-busy", 409)
        assert busy.headers["retry-after"] == "1"
    assert http.put("/v1/tasks/busy", json={"path": "read"}).status_code == 201
    assert http.delete("/v1/tasks/busy").status_code == 204


def test_tasks_come_and_go_under_load(server: Any, http: httpx.Client) -> None:
    """Answers of tasks that stay are right, and one that goes is an error and never another task's answer."""
    names = ["read", "number", "lora", "tags"]
    expected = {text: asked(http, names, text)[0] for text in ("a good film", "bad")}
    wrong: list[Any] = []
    done = threading.Event()

    def load(text: str) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not done.is_set():
                [row] = asked(client, names, text)
                if any(said(row[name]) != said(expected[text][name]) for name in names):
                    wrong.append(row)
                told = client.post("/v1/predict", json={"task": "guest", "inputs": text}).json()
                answer = told["results"][0]["guest"] if "results" in told else told
                kind = answer.get("type", "")
                if not (isinstance(answer.get("prediction"), str | float) or kind.endswith(("-task", "task-removed"))):
                    wrong.append(answer)

    threads = [threading.Thread(target=load, args=(text,)) for text in expected]
    for thread in threads:
        thread.start()
    for round_ in range(6):
        path = ("read", "number", "lora")[round_ % 3]
        assert http.put("/v1/tasks/guest", json={"path": path}).status_code == 201
        found = asked(http, ["guest", path], "a good film")[0]
        assert said(found["guest"]) == said(found[path])
        assert http.delete("/v1/tasks/guest").status_code == 204
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_counts_are_told(http: httpx.Client) -> None:
    asked(http, ["read"], ["good", "bad"])
    text = http.get("/metrics").text
    for name in ("rows_total", "tokens_total", "batch_rows_count", "queue_rows", "request_seconds_count", "tasks"):
        assert f"sidestep_{name}" in text
    assert 'sidestep_rows_total{task="read"}' in text
    assert "sidestep_switches_total" in text


# --- what is refused ---


@pytest.mark.parametrize(
    ("body", "name", "status"),
    [
        ({"task": "reed", "inputs": "a"}, "unknown-task", 404),
        ({"inputs": [{"text": "a", "tasks": ["read", "nonesuch"]}]}, "unknown-task", 404),
        ({"task": "../bank", "inputs": "a"}, "unknown-task", 404),
        ({"inputs": "a"}, "invalid-request", 422),
        ({"task": "read", "tasks": ["read"], "inputs": "a"}, "invalid-request", 422),
        ({"tasks": ["read", "read"], "inputs": "a"}, "invalid-request", 422),
        ({"task": "read", "inputs": []}, "invalid-request", 422),
        ({"task": "read", "inputs": 3}, "invalid-request", 422),
        ({"task": "read", "inputs": "a", "more": 1}, "invalid-request", 422),
        ({"task": "read", "inputs": "a", "probabilities": "some"}, "invalid-request", 422),
        ({"task": "read", "inputs": ["a"] * 257}, "too-many-rows", 413),
        ({"task": "pair", "inputs": "a"}, "bad-row", 422),
    ],
)
def test_a_request_that_cannot_be_answered(http: httpx.Client, body: Any, name: str, status: int) -> None:
    problem(http.post("/v1/predict", json=body), name, status)


def test_an_unknown_task_names_the_nearest(http: httpx.Client) -> None:
    told = problem(http.post("/v1/predict", json={"task": "reed", "inputs": "a"}), "unknown-task", 404)
    assert "'read'" in told["detail"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1", b'{"task": "read", "inputs": NaN}', b"\xff\xfe", b"[" * 100_000, b'{"inputs": 1e999}']
)
def test_what_is_no_json(http: httpx.Client, body: bytes) -> None:
    problem(http.post("/v1/predict", content=body, headers={"content-type": "application/json"}), "bad-json", 400)


def test_other_addresses_methods_and_types(http: httpx.Client) -> None:
    problem(http.get("/v1/nothing"), "not-found", 404)
    problem(http.get("/v1/predict"), "wrong-method", 405)
    problem(http.post("/v1/predict", content=b"a", headers={"content-type": "text/plain"}), "wrong-media-type", 415)
    problem(http.put("/v1/tasks/new", content=b"a", headers={"content-type": "text/plain"}), "wrong-media-type", 415)
    problem(http.put("/v1/tasks/.hidden", json={"path": "read"}), "bad-name", 422)


def test_an_id_is_taken_on(http: httpx.Client, pytestconfig: pytest.Config) -> None:
    given = http.get("/v1/nothing", headers={"x-request-id": "mine-1"})
    assert problem(given, "not-found", 404)["request_id"] == "mine-1"
    if pytestconfig.getoption("--engine") == "ray":
        return  # its proxy sends back whatever id it was given
    odd = http.get("/v1/nothing", headers={"x-request-id": "no id" * 9})
    assert len(problem(odd, "not-found", 404)["request_id"]) == 32
