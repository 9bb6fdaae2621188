"""Keys, hosts, limits and uploads: what must not come in."""

from __future__ import annotations

import gzip
import io
import logging
import socket
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from served import make_bank, serving
from sidestep.serve.keys import Keys
from sidestep.serve.problems import Problem
from sidestep.serve.settings import ServeSettings
from sidestep.serve.uploads import task_at, unpack

USE, CHANGE = "use-" + "a" * 30, "change-" + "b" * 30
SMALL = ServeSettings(body_bytes=2000, upload_bytes=200_000, upload_files=30, seconds=1.0)


@pytest.fixture(scope="module")
def locked(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with keys and small limits."""
    bank = make_bank(tasks, tmp_path_factory.mktemp("locked") / "bank", ["read"])
    with serving(bank, tasks / "bert", SMALL, Keys.of([USE], [CHANGE])) as url:
        yield url


def called(url: str, key: str | None, method: str, path: str, **how: Any) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.request(method, url + path, headers={**headers, **how.pop("headers", {})}, timeout=30, **how)


def name_of(response: httpx.Response) -> str:
    assert response.headers["content-type"] == "application/problem+json"
    return response.json()["type"].rpartition(":")[2]


BODY = {"task": "read", "inputs": "good"}


# --- keys ---


def test_a_key_is_needed_to_use_and_another_to_change(locked: str) -> None:
    without = called(locked, None, "POST", "/v1/predict", json=BODY)
    assert (name_of(without), without.status_code) == ("no-key", 401)
    assert without.headers["www-authenticate"] == "Bearer"
    for key in ("wrong", USE[:-1], USE.upper()):
        assert called(locked, key, "POST", "/v1/predict", json=BODY).status_code == 401
    for key in (USE, CHANGE):
        assert called(locked, key, "POST", "/v1/predict", json=BODY).status_code == 200
        assert called(locked, key, "GET", "/v1/tasks").status_code == 200
    path = {"path": "read"}
    assert called(locked, None, "PUT", "/v1/tasks/new", json=path).status_code == 401
    assert name_of(called(locked, USE, "PUT", "/v1/tasks/new", json=path)) == "not-allowed"
    assert name_of(called(locked, USE, "DELETE", "/v1/tasks/read")) == "not-allowed"
    assert called(locked, CHANGE, "PUT", "/v1/tasks/new", json=path).status_code == 201
    assert called(locked, CHANGE, "DELETE", "/v1/tasks/new").status_code == 204


def test_what_needs_no_key_tells_nothing(locked: str) -> None:
    for path in ("/health", "/ready", "/openapi.json"):
        assert called(locked, None, "GET", path).status_code == 200
    for path in ("/info", "/metrics", "/v1/tasks", "/v1/nothing"):
        assert called(locked, None, "GET", path).status_code == 401


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nuse {USE}\n\nchange {CHANGE}\n")
    keys = Keys.found(file, {"SIDESTEP_KEYS": "c" * 20})
    assert keys is not None
    keys.check(f"Bearer {'c' * 20}", change=False)
    keys.check(f"bearer {CHANGE}", change=True)
    with pytest.raises(Problem, match="allows to use tasks alone"):
        keys.check(f"Bearer {USE}", change=True)
    assert USE not in repr(keys)
    assert Keys.found(None, {}) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("use short", "fewer than 16"), (USE, "line 1"), ("", "holds no key"), (f"admin {USE}", "write 'use KEY'")],
)
def test_a_file_without_good_keys(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        Keys.found(file, {})
    assert USE not in str(refused.value)


def test_a_page_elsewhere_cannot_call_a_server_without_keys(http: httpx.Client) -> None:
    """A name that leads to this machine is another host's to a browser, and not one of this machine to the server."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        assert name_of(http.get("/v1/tasks", headers={"host": host})) == "other-host"
    for host in ("localhost:1", "[::1]:8000", "127.0.0.1"):
        assert http.get("/v1/tasks", headers={"host": host}).status_code == 200


# --- limits ---


def test_a_body_that_is_too_large_is_not_read(locked: str) -> None:
    large = {"task": "read", "inputs": "a" * 3000}
    assert name_of(called(locked, USE, "POST", "/v1/predict", json=large)) == "body-too-large"

    def pieces() -> Iterator[bytes]:
        for _ in range(5):
            yield b"a" * 1000

    how = {"headers": {"content-type": "application/json"}, "content": pieces()}
    assert name_of(called(locked, USE, "POST", "/v1/predict", **how)) == "body-too-large"
    how = {"headers": {"content-type": "application/zip"}, "content": b"a" * 200_001}
    assert name_of(called(locked, CHANGE, "PUT", "/v1/tasks/new", **how)) == "body-too-large"


def test_a_caller_that_stalls_is_let_go(locked: str) -> None:
    place = httpx.URL(locked)
    with socket.create_connection((place.host, place.port), timeout=30) as calling:
        head = f"POST /v1/predict HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {USE}\r\ncontent-length: 100\r\n"
        head += "content-type: application/json\r\n\r\n"
        calling.sendall(head.encode() + b'{"task"')
        with calling.makefile("rb") as answered:
            answer = answered.read()  # head and body come apart, and the server hangs up behind them
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"urn:sidestep:problem:stalled" in answer


def test_a_log_holds_no_text_and_no_key(locked: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = "confidential"
    with caplog.at_level(logging.DEBUG, "sidestep.serve"):
        for body in ({"task": "read", "inputs": secret}, {"task": secret, "inputs": "a"}, {secret: 1}):
            called(locked, USE, "POST", "/v1/predict", json=body)
        called(locked, USE, "GET", f"/v1/tasks/{secret}")
        deadline = time.monotonic() + 600
        while "GET /v1/tasks/{name} 404" not in caplog.text:  # it is written once the answer has been sent
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.01)
    assert "POST /v1/predict 200" in caplog.text
    assert secret not in caplog.text
    assert USE not in caplog.text


# --- uploads ---


def zipped(*files: tuple[str, bytes], mode: int = 0) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            packed.writestr(info, content)
    return made.getvalue()


def tarred(name: str, *, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as packed:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, len(content)
        packed.addfile(info, io.BytesIO(content))
    return made.getvalue()


def truncated(made: bytes) -> bytes:
    return made[: len(made) // 2]


BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "cannot be read|no sidestep.json"),
    "no archive": (lambda: b"not an archive" * 100, "cannot be read"),
    "damaged zip": (lambda: zipped(("sidestep.json", b"{}" * 999))[:-40], "cannot be read"),
    "damaged gzip": (lambda: truncated(gzip.compress(tarred("sidestep.json", content=b"{}"))), "cannot be read"),
    "no task": (lambda: zipped(("readme", b"hello")), "no sidestep.json"),
    "out by dots": (lambda: zipped(("../sidestep.json", b"{}")), "leads out"),
    "out by dots within": (lambda: zipped(("a/../../sidestep.json", b"{}")), "leads out"),
    "absolute": (lambda: zipped(("/tmp/sidestep.json", b"{}")), "leads out"),
    "of windows": (lambda: zipped(("..\\sidestep.json", b"{}")), "leads out"),
    "drive": (lambda: zipped(("C:sidestep.json", b"{}")), "leads out"),
    "deep": (lambda: zipped(("a/" * 20 + "sidestep.json", b"{}")), "leads out"),
    "link in zip": (lambda: zipped(("sidestep.json", b"/etc/passwd"), mode=stat.S_IFLNK | 0o777), "link"),
    "link in tar": (lambda: tarred("sidestep.json", kind=tarfile.SYMTYPE, link="/etc/passwd"), "link"),
    "hard link": (lambda: tarred("sidestep.json", kind=tarfile.LNKTYPE, link="/etc/passwd"), "link"),
    "device": (lambda: tarred("sidestep.json", kind=tarfile.CHRTYPE), "device"),
    "tar out": (lambda: tarred("../sidestep.json", content=b"{}"), "leads out"),
    "bomb": (lambda: zipped(("sidestep.json", b"\0" * 300_000)), "larger than 200000 bytes"),
    "gzip bomb": (lambda: gzip.compress(tarred("sidestep.json", content=b"\0" * 300_000)), "larger than 200000 bytes"),
    "many": (lambda: zipped(*((f"{n}", b"") for n in range(40))), "more than 30 files"),
    "twice": (lambda: tarred("sidestep.json", content=b"{}")[:1024] * 2 + b"\0" * 1024, "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_archive_that_is_refused(tmp_path: Path, case: str) -> None:
    content, message = BAD[case]
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "archive").write_bytes(content())
    with pytest.raises(Problem, match=message) as refused:
        unpack(tmp_path / "archive", target, SMALL)
    assert refused.value.name == "bad-upload"
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "target"}
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_a_header_of_any_size_is_not_read(tmp_path: Path) -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as packed:
        info = tarfile.TarInfo("sidestep.json")
        info.pax_headers = {"comment": "a" * 20 * 1024**2}
        packed.addfile(info)
    (tmp_path / "archive").write_bytes(gzip.compress(made.getvalue()))
    with pytest.raises(Problem, match="too large"):
        unpack(tmp_path / "archive", tmp_path, SMALL)


def test_uploads_that_are_no_task_change_nothing(locked: str, tasks: Path) -> None:
    config = (tasks / "read" / "sidestep.json").read_bytes()
    for content in (zipped(("sidestep.json", b"{}")), zipped(("sidestep.json", config)), BAD["link in zip"][0]()):
        how = {"headers": {"content-type": "application/zip"}, "content": content}
        told = called(locked, CHANGE, "PUT", "/v1/tasks/new", **how)
        assert name_of(told) == "bad-upload"
        assert "/tmp" not in told.text
    assert [task["name"] for task in called(locked, USE, "GET", "/v1/tasks").json()["tasks"]] == ["read"]


def test_a_task_of_another_backbone_is_refused(locked: str, tasks: Path, tmp_path: Path) -> None:
    import shutil

    import sidestep as ss
    from served import LABELS, SINGLE, save_task
    from sidestep.backbone.load import load_backbone
    from small_tasks import text_backbone

    other = load_backbone(text_backbone(tmp_path / "other", seed=1))
    save_task(tmp_path / "task", other, ss.ProbeConfig(), SINGLE, "single", LABELS, {}, seed=1)
    archive = Path(shutil.make_archive(str(tmp_path / "task"), "zip", tmp_path / "task"))
    how = {"headers": {"content-type": "application/zip"}, "content": archive.read_bytes()}
    told = called(locked, CHANGE, "PUT", "/v1/tasks/new", **how)
    assert (name_of(told), told.status_code) == ("other-backbone", 409)


def test_paths_stay_within_their_root(tasks: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tasks / "read")
    (root / "loop").symlink_to(root / "loop")
    for path in ("link", "..", str(tasks / "read"), "", ".", "loop/a"):
        with pytest.raises(Problem):
            task_at(path, root)
    assert task_at("read", tasks) == (tasks / "read").resolve()
