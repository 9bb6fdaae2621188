"""`sidestep plan`, and the warning of `sidestep train`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import BertConfig, LlamaConfig
from typer.testing import CliRunner, Result

from sidestep.cli import app
from sidestep.measure.plan import Plan, best_device, fit
from sidestep.measure.plan import plan as planned
from sidestep.methods import methods
from small_tasks import reviews, text_backbone, write


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and no weights."""
    folder = tmp_path_factory.mktemp("bert-config")
    BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    ).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def planned_once() -> Iterator[None]:
    """The same settings have the same plan, also in the next command."""
    known: dict[str, Plan] = {}

    def once(*given: Any, **how: Any) -> Plan:
        settings = repr((given, sorted(how.items())))
        if settings not in known:
            known[settings] = planned(*given, **how)
        return known[settings]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sidestep.measure.plan.plan", once)
        yield


@pytest.fixture
def few_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """To plan every method at every batch takes minutes, and is tested elsewhere."""
    chosen = {name: method for name, method in methods().items() if name in ("read", "probe", "bitfit", "lora", "full")}
    monkeypatch.setattr(fit, "methods", lambda: chosen)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def as_json(*arguments: object) -> dict[str, Any]:
    result = run("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_plan_for_the_cpu(bert: Path) -> None:
    settings = ("--backbone", bert, "--method", "read", "--set", "rank=8", "--batch", 4, "--length", 16)
    about = as_json(*settings)
    planned = about["plan"]
    assert (planned["method"], planned["config"]["rank"], planned["batch"], planned["length"]) == ("read", 8, 4, 16)
    assert planned["device"] == "cpu"
    assert about["largest_batch"] is None
    shown = run("plan", *settings).output
    for text in ("kept for backward at the peak", "peak of a step", "flash (CPU)", "backbone.encoder.layer.*"):
        assert text in shown


@pytest.mark.usefixtures("few_methods")
def test_a_plan_for_a_card(bert: Path) -> None:
    settings = ("--backbone", bert, "--method", "full", "--batch", 8, "--length", 32, "--gpu", "4MB")
    about = as_json(*settings)
    rows = {row["label"]: row for row in about["alternatives"]}
    assert about["limit_bytes"] == 4 * 2**20
    assert about["fits"] is (about["plan"]["total_bytes"] <= about["limit_bytes"])
    assert about["plan"]["total_bytes"] == rows["full"]["total_bytes"]
    assert {"read", "probe", "bitfit", "lora", "lora+checkpoint"} <= set(rows)
    again = as_json(*settings[:4], "--batch", about["largest_batch"] + 1, *settings[6:])
    assert not again["fits"]
    assert again["largest_batch"] == about["largest_batch"]
    shown = run("plan", *settings).output
    assert f"largest batch {about['largest_batch']}" in shown
    assert "Methods on 4.0 MiB" in shown
    assert "note: a GPU needs more than a plan counts" in shown


def test_auto_takes_what_fits_on_a_card_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestep.measure.plan.largest_batch", lambda *args, **how: 1)
    monkeypatch.setattr(fit, "methods", lambda: {"read": methods()["read"]})
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(**sizes, num_hidden_layers=6).save_pretrained(tmp_path)
    settings = ("--backbone", tmp_path, "--pool", "mean", "--batch", 64, "--length", 64, "--set", "rank=2", "--keep")
    full, least = (as_json(*settings, keep, "--gpu", "1GB")["plan"]["total_bytes"] for keep in ("full", "replay"))
    assert least < full
    chosen = as_json(*settings, "auto", "--gpu", f"{(full + least) / 2 / 2**20}MB")
    assert chosen["plan"]["keep"] in ("offload", "replay")
    assert chosen["keep_because"].startswith("full needs")
    assert as_json(*settings, "auto", "--gpu", "1GB")["plan"]["keep"] == "full"
    assert "rule: what fits in full is fastest" in run("plan", *settings, "replay", "--gpu", "1GB").output


def test_plan_speaks_the_language_of_train(bert: Path, tmp_path: Path) -> None:
    assert as_json("--backbone", bert, "--bf16")["plan"]["precision"] == "bf16 autocast"
    assert as_json("--backbone", bert, "--dtype", "bfloat16")["plan"]["precision"] == "bfloat16"
    assert as_json("--backbone", bert, "--kind", "regress")["plan"]["head"]["targets"] == 1
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=64).save_pretrained(tmp_path)
    decoder = ("--backbone", tmp_path, "--batch", 4, "--length", 16)
    written = as_json(*decoder, "--kind", "lm")["plan"]
    assert written["head"] is None
    assert written["saved_bytes"] < as_json(*decoder, "--kind", "lm", "--lm-loss", "own")["plan"]["saved_bytes"]
    assert as_json(*decoder, "--own-head")["plan"]["saved_bytes"] > 0  # though its config names no padding


def test_a_measured_step(bert: Path) -> None:
    planned = as_json("--backbone", bert, "--measure", "--batch", 4)["plan"]
    assert planned["source"] == "measured"
    assert planned["peak_bytes"] > 0
    limited = as_json("--backbone", bert, "--measure", "--batch", 4, "--gpu", "1GB")
    assert limited["plan"]["device"] == best_device()
    assert limited["fits"]
    assert limited["alternatives"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "rad"), "unknown method 'rad'"),
        (("--set", "rank=0"), "rank=0"),
        (("--gpu", "big"), "'big' is no size of memory"),
        (("--length", "1000"), "length=1000, but BertModel takes 1 to 512 tokens"),
        (("--precision", "half"), "precision='half'"),
        (("--image-size", "32"), "BertModel reads texts"),
        (("--own-head", "--pool", "mean"), "--pool mean with --own-head"),
        (("--keep", "fuzzy"), "keep='fuzzy': choose one of full, bf16, int8, offload, replay, auto"),
        (("--keep", "auto"), "--keep auto takes what fits: say in how much memory"),
        (("--keep", "replay", "--method", "lora"), "lora does not go with keep='replay'"),
        (("--precision", "float32", "--bf16"), "--precision with --bf16"),
        (("--dtype", "int4"), "--dtype int4"),
        (("--kind", "retrieval"), "no dual encoder (clip, "),
        (("--frames", "3"), "--frames and --text-backbone are for pairs: say --kind retrieval"),
        (("--kind", "lm", "--own-head"), "leave --own-head out"),
    ],
)
def test_mistakes_are_answered_in_one_line(bert: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("plan", "--backbone", bert, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_training_warns_of_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text_backbone(tmp_path / "bert")
    write(tmp_path / "train.tsv", reviews(32))
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    given = ("--backbone", tmp_path / "bert", "--train", tmp_path / "train.tsv", "--output", tmp_path / "task")
    with warnings.catch_warnings(action="always"):
        result = run("train", *given, "--text", "text", "--epochs", 1, "--batch-size", 8, "--set", "rank=4", "--quiet")
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    assert "Warning: a training step with batches of 8 will need about" in result.stderr
    assert "but the machine has free 1000 B" in result.stderr
