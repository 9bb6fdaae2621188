"""Backbones in GGUF files: the model that was written, with its tokenizer, or a message that says what to do."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

import sidestep as ss
from sidestep.backbone import digest_of, pretrained_tensors
from sidestep.backbone.gguf import gguf_name, gguf_parts, is_gguf
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.backbone.source import LoadError, LoadWarning, source_of
from sidestep.cli import app
from small_gguf import CHAT, CONFIG, SPECIAL, llama, smollm2, write_gguf

FILE = "small-F32.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    place = tmp_path_factory.mktemp("models")
    write_gguf(place / FILE, llama())
    return place


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "a good day,good\nso bad a day,bad\n" * 6, encoding="utf-8")
    return table


def digest(model: torch.nn.Module) -> Any:
    return digest_of(pretrained_tensors(model))


def run(*words: object) -> str:
    """What a command prints; it has to succeed."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*words: object) -> str:
    """What a command says that has to fail with exit code 2; in one line, since the message is wrapped."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 2, done.output
    return " ".join(done.output.replace("│", " ").split())


# --- names -------------------------------------------------------------------------------------------------


@given(folder=st.text(min_size=1).filter(lambda text: "\0" not in text), file=st.from_regex(r"[\w.-]+", fullmatch=True))
def test_a_name_has_the_parts_that_it_was_made_of(folder: str, file: str) -> None:
    name = gguf_name(folder, file)
    assert is_gguf(name)
    assert gguf_parts(name) == (folder, file)


def test_the_path_of_a_file_is_a_name_too(folder: Path) -> None:
    assert gguf_parts(folder / FILE) == (str(folder), FILE)
    assert not is_gguf(folder / "other.gguf")


# --- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["name", "path"])
def test_the_model_is_the_one_that_was_written(folder: Path, spelling: str) -> None:
    name = gguf_name(folder, FILE) if spelling == "name" else str(folder / FILE)
    backbone, ids = load_backbone(name, writes="lm"), torch.arange(12)[None]
    assert torch.equal(backbone(input_ids=ids).logits, llama()(input_ids=ids).logits)
    assert source_of(backbone).id == name


@pytest.mark.parametrize(("kind", "error"), [("F16", 1e-3), ("Q8_0", 0.01), ("Q4_0", 0.2)])
def test_quantised_weights_are_unpacked(tmp_path: Path, kind: str, error: float) -> None:
    write_gguf(tmp_path / "small.gguf", llama(), kind)
    backbone = load_backbone(gguf_name(tmp_path, "small.gguf"), dtype="float32")
    for name, parameter in llama().model.named_parameters():
        found = backbone.get_parameter(name)
        assert type(found) is torch.nn.Parameter
        assert found.dtype == torch.float32
        # a step of the code, of the largest weight
        assert (found - parameter).abs().max() <= error * parameter.abs().max()


def test_nothing_is_left_that_marks_a_model_as_quantised(folder: Path) -> None:
    """The Trainer refuses to train what is marked so, and a diff to be added to it."""
    backbone: Any = load_backbone(gguf_name(folder, FILE), writes="lm")
    assert getattr(backbone.config, "quantization_config", None) is None
    assert not getattr(backbone, "is_quantized", False)


def test_a_precision_can_be_chosen(folder: Path) -> None:
    backbone = load_backbone(gguf_name(folder, FILE), dtype="bfloat16")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}


def test_the_digest_is_that_of_the_weights_and_not_of_the_file(folder: Path) -> None:
    assert digest(load_backbone(gguf_name(folder, FILE))) == digest(llama().model)


def test_the_tokenizer_comes_with_the_file(folder: Path) -> None:
    tokenizer = load_processor(gguf_name(folder, FILE))
    text = "a bad day"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(text) - 1  # "ad" is a token
    assert tokenizer.pad_token == SPECIAL[2]
    assert tokenizer.chat_template == CHAT
    # the header says what the model takes, and not what its tokenizer may give
    assert tokenizer.model_max_length == CONFIG.max_position_embeddings


def test_a_file_of_the_same_name_in_the_working_folder_is_not_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILE).write_bytes(b"another file")
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(12)[None]
    found = load_backbone(gguf_name(folder, FILE), writes="lm")(input_ids=ids).logits
    assert torch.equal(found, llama()(input_ids=ids).logits)
    assert len(load_processor(gguf_name(folder, FILE))) == CONFIG.vocab_size


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf", llama())
    load_backbone(path)
    other = llama()
    other.config.rms_norm_eps = 0.5
    write_gguf(path, other)
    os.utime(path, ns=(1, 1))
    assert load_backbone(path).config.rms_norm_eps == 0.5


# --- messages ----------------------------------------------------------------------------------------------


def test_a_folder_of_a_gguf_file_alone_says_how_it_is_named(folder: Path, rows: Path, tmp_path: Path) -> None:
    for load in (load_backbone, load_processor):
        with pytest.raises(LoadError, match=f"--gguf {FILE}.*gguf:.*@{FILE}"):
            load(folder)
    said = refused("train", "--backbone", folder, "--train", rows, "--text", "text", "--output", tmp_path / "out")
    assert f"--gguf {FILE}" in said


def test_a_file_that_is_not_there_lists_those_that_are(folder: Path) -> None:
    with pytest.raises(LoadError, match=f"no file other.gguf in .*: it holds {FILE}"):
        load_backbone(gguf_name(folder, "other.gguf"))


@pytest.mark.parametrize("name", ["gguf:", "gguf:folder", "gguf:@file.gguf", "gguf:folder@"])
def test_half_a_name_says_how_to_write_one(name: str) -> None:
    with pytest.raises(LoadError, match=r"write gguf:FOLDER@FILE\.gguf"):
        load_backbone(name)


def test_a_part_of_a_split_file_is_refused(folder: Path) -> None:
    with pytest.raises(LoadError, match="one part of a split GGUF file"):
        load_backbone(gguf_name(folder, "small-00001-of-00002.gguf"))


def test_without_the_extra_the_message_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LoadError, match=r"pip install 'sidestep\[gguf\]'"):
        load_backbone(gguf_name(folder, FILE))


def test_an_architecture_that_transformers_does_not_read_is_named(folder: Path, tmp_path: Path) -> None:
    # one letter: the lengths in the header stay
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(LoadError, match="lxama"):
        load_backbone(gguf_name(tmp_path, FILE))


def test_gguf_alone_asks_for_the_folder(tmp_path: Path) -> None:
    said = refused("predict", tmp_path, "--data", "x.csv", "--output", tmp_path / "o.csv", "--gguf", FILE)
    assert "without --backbone" in said


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_read(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    """In its header or by its length; a GGUF file has no checksum, so a changed weight cannot be told."""
    whole = (folder / FILE).read_bytes()
    if data.draw(st.booleans(), label="cut"):
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1), label="length")]
    else:
        place = data.draw(st.integers(0, 2000), label="place")
        damaged = whole[:place] + data.draw(st.binary(min_size=1, max_size=4), label="bytes") + whole[place + 4 :]
    (tmp_path / FILE).write_bytes(damaged)
    for load in (load_backbone, load_processor):
        try:
            load(gguf_name(tmp_path, FILE))
        except LoadError:
            pass
        except LoadWarning:  # weights are missing: an error in these tests
            pass


# --- tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["single", "lm"])
def test_a_task_is_trained_used_and_loaded_again(folder: Path, rows: Path, tmp_path: Path, task: str) -> None:
    out, table = tmp_path / "task", tmp_path / "out.csv"
    where = ("--backbone", folder, "--gguf", FILE)
    asked = ("--train", rows, "--text", "text", "--label", "label", "--task", task, "--max-length", 16, "--epochs", 1)
    written = () if task == "single" else ("--max-new-tokens", 4, "--separator", " ")
    run("train", *where, *asked, *written, "--set", "rank=4", "--output", out, "--quiet")
    run("predict", out, "--data", rows, "--output", table, "--quiet")
    assert len(table.read_text(encoding="utf-8").splitlines()) == 13
    assert ss.load(out).digest == digest(llama().model)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "renamed.gguf").write_bytes((folder / FILE).read_bytes())
    again = tmp_path / "again.csv"
    where = ("--backbone", moved, "--gguf", "renamed.gguf")
    run("predict", out, "--data", rows, "--output", again, *where, "--quiet")
    assert again.read_bytes() == table.read_bytes()


def test_the_weights_can_be_changed_too(folder: Path) -> None:
    """A diff is refused on quantised weights, and these are plain."""
    backbone = load_backbone(gguf_name(folder, FILE))
    ss.attach(backbone, ss.SparseConfig(density=0.1, select="random"), head=ss.Classify(num_labels=2))


def test_a_model_that_the_user_unpacked_is_trained_by_the_plain_trainer(folder: Path, tmp_path: Path) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE)
    model = ss.attach(backbone, ss.ReadConfig(rank=4))
    ids = list(range(8))
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8).train()


def test_a_plan_reads_the_header_alone(folder: Path) -> None:
    asked = ("--batch", 2, "--length", 8, "--set", "rank=4", "--json")
    assert "total_bytes" in run("plan", "--backbone", folder, "--gguf", FILE, *asked)


def test_a_comparison_takes_it(folder: Path, rows: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(
        f"""seeds = [0]
epochs = 1
methods = ["probe"]
backbone = [{{ model = "gguf:{os.path.relpath(folder, tmp_path)}@{FILE}" }}]
task = [{{ train = "{rows}", dev = "{rows}", text = "text" }}]
""",
        encoding="utf-8",
    )
    assert "small-F32" in run("compare", file, "--dry-run")


# --- a real model ------------------------------------------------------------------------------------------


def test_smollm2_knows_how_a_sentence_goes_on() -> None:
    name = smollm2()
    model: Any = ss.attach(load_backbone(name, writes="lm"), ss.ReadConfig(rank=4))
    tokenizer = load_processor(name)
    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        after = model(**batch).logits[0, -1].argmax()
    assert tokenizer.decode(after) == " Paris"
