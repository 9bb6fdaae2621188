"""TRL's SFTTrainer on attached causal models: it trains the task, by the loss of the bare model's own trainer."""

from __future__ import annotations

import gc
import inspect
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

import sidestep as ss
from causal_models import APART, METHODS, TOGETHER, attached, bare
from sidestep.training.callbacks import SaveTask

trl = pytest.importorskip("trl")

WORDS = ("<pad>", "</s>", "<unk>", "<user>", "<assistant>", *(f"w{number}" for number in range(35)))
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '> ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' </s>' }}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
ALL = {**METHODS, "lst": ss.LSTConfig(reduction=4), "probe": ss.ProbeConfig()}


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainers tell the Hub of their use, but not under CI."""
    monkeypatch.setenv("CI", "1")


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    """A Trainer collects garbage before it trains, which takes ten times longer than these runs."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def tokenizer() -> t.PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return t.PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)


def said(draw: random.Random) -> str:
    return " ".join(f"w{draw.randrange(35)}" for _ in range(draw.randrange(2, 6)))


def chats(count: int = 8) -> Dataset:
    """Conversations of one or two turns."""
    draw = random.Random(0)
    turns = [[said(draw) for _ in range(draw.choice((2, 4)))] for _ in range(count)]
    roles = ("user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turn)]} for turn in turns]
    )


def answers(count: int = 8) -> Dataset:
    """Prompts with completions, as conversations."""
    rows = [row["messages"] for row in chats(count)]
    return Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])


def trainer(folder: Path, model: Any, tokenizer: Any, data: Dataset | None = None, **changes: Any) -> Any:
    data = chats() if data is None else data
    beside = {name: changes.pop(name) for name in ("callbacks", "peft_config") if name in changes}
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **changes,
    }
    args = trl.SFTConfig(output_dir=str(folder), **settings)
    rows = {"train_dataset": data, "eval_dataset": data}
    return trl.SFTTrainer(model=model, args=args, processing_class=tokenizer, **rows, **beside)


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def measured(run: Any) -> dict[str, float]:
    """What evaluation says of the model, without its times."""
    found = run.evaluate()
    return {name: found[name] for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")}


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "settings"),
    [
        ("llama", {}),
        ("llama", {"loss_type": "dft"}),
        ("qwen2", {"gradient_accumulation_steps": 4}),
        ("gpt2", {"gradient_accumulation_steps": 2}),
    ],
)
def test_before_training_every_number_is_the_bare_models(
    backbone: str, settings: dict[str, Any], tmp_path: Path, tokenizer: Any
) -> None:
    found = []
    for model in (bare(APART[backbone]), ss.attach(bare(APART[backbone]), ss.ReadConfig(rank=4))):
        # what dropout draws in the backbone would be drawn for the bare model alone
        run = trainer(tmp_path, model, tokenizer, per_device_train_batch_size=2, max_steps=1, **settings)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        numbers = measured(run)
        run.train()
        found.append({**numbers, "loss": losses(run)[0]})
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # PEFT's, of GPT-2's Conv1D
@pytest.mark.parametrize(
    ("method", "backbone"),
    [*((method, "qwen2") for method in ALL), ("read", "gpt2"), ("lora", "gpt2"), ("full", "gpt2")],
)
def test_loss_and_gradients_are_those_of_the_models_own_forward(
    method: str, backbone: str, tmp_path: Path, tokenizer: Any
) -> None:
    if method == "probe":
        backbone = "llama"  # whose head is no table of embeddings, so that it can be trained
    # in eval mode, so that both passes are without dropout
    model = attached(APART[backbone], ALL[method], train_head=True if method == "probe" else None).eval()
    run = trainer(tmp_path, model, tokenizer)
    batch, found = next(iter(run.get_train_dataloader())), []
    count = (batch["labels"][:, 1:] >= 0).sum()
    for loss in (run.compute_loss(model, dict(batch), num_items_in_batch=count), model(**batch).loss):
        model.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.trained_parameters() if p.grad is not None}
        found.append({"loss": loss.detach(), **gradients})
    assert len(found[0]) > 1
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("data", "settings", "counted"),
    [
        (chats, {}, "all"),
        (chats, {"assistant_only_loss": True}, "assistant"),
        (answers, {}, "completion"),
        (answers, {"completion_only_loss": False}, "all"),
    ],
    ids=["chat", "assistant only", "completion", "prompt and completion"],
)
def test_the_loss_is_that_of_the_tokens_that_the_settings_name(
    data: Callable[[], Dataset], settings: dict[str, Any], counted: str, tmp_path: Path, tokenizer: Any
) -> None:
    model = attached(APART["llama"], ss.ReadConfig(rank=4)).eval()
    run = trainer(tmp_path, model, tokenizer, data(), **settings)
    sums = []
    for row in chats():
        ids, own = conversation(row["messages"])
        if counted == "completion":
            own[: conversation(row["messages"][:-1])[0].shape[1] + 1] = False  # and the assistant's name
        with torch.no_grad():
            scores = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(scores[own[1:]] if counted != "all" else scores)
    assert measured(run)["eval_loss"] == pytest.approx(-float(torch.cat(sums).mean()), rel=1e-5)


def conversation(messages: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
    """(1, tokens) ids of a conversation, and (tokens,) which of them the assistant wrote."""
    ids, own = [], []
    for message in messages:
        content = [WORDS.index(word) for word in (*message["content"].split(), "</s>")]
        ids += [WORDS.index(f"<{message['role']}>"), *content]
        own += [False, *[message["role"] == "assistant"] * len(content)]
    return torch.tensor([ids]), torch.tensor(own)


def test_training_lowers_the_loss(tmp_path: Path, tokenizer: Any) -> None:
    model = ss.attach(bare(APART["llama"]), ss.ReadConfig(rank=8))
    run = trainer(tmp_path, model, tokenizer, max_steps=8, learning_rate=3e-2)
    before = measured(run)["eval_loss"]
    run.train()
    assert measured(run)["eval_loss"] < before


def test_autocast_trains_what_is_trained_in_float32(tmp_path: Path, tokenizer: Any) -> None:
    # the default of SFTConfig
    model = attached(APART["llama"], ss.ReadConfig(rank=4))
    run = trainer(tmp_path, model, tokenizer, bf16=True)
    run.train()
    assert all(parameter.dtype == torch.float32 for _, parameter in model.trained_parameters())
    assert losses(run) == pytest.approx(losses_in_float32(tmp_path, tokenizer), abs=0.05)  # bfloat16 has 8 bits


def losses_in_float32(folder: Path, tokenizer: Any) -> list[float]:
    torch.manual_seed(0)
    run = trainer(folder, attached(APART["llama"], ss.ReadConfig(rank=4)), tokenizer)
    run.train()
    return losses(run)


# --- packing ----------------------------------------------------------------------------------------------------------

PACKED: dict[str, dict[str, Any]] = {
    "bfd": {"packing": True, "max_length": 48},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 48},
    "padding_free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize(
    ("method", "packing"),
    [*(("read", packing) for packing in PACKED), ("sherl", "bfd"), ("dtl", "bfd"), ("lora", "bfd")],
)
def test_packed_rows_have_the_loss_of_the_texts_alone(
    method: str, packing: str, tmp_path: Path, tokenizer: Any
) -> None:
    found = []
    for settings in ({}, PACKED[packing]):
        torch.manual_seed(0)
        model = attached(APART["llama"], METHODS[method])
        run = trainer(tmp_path, model, tokenizer, **settings)
        batch = next(iter(run.get_eval_dataloader()))
        assert ("attention_mask" in batch) is (settings == {})
        found.append(measured(run)["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_wrapped_rows_are_one_text_for_the_task_as_for_the_bare_model(tmp_path: Path, tokenizer: Any) -> None:
    settings = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
    found = [
        measured(trainer(tmp_path, model, tokenizer, **settings))
        for model in (bare(APART["llama"]), ss.attach(bare(APART["llama"]), ss.ReadConfig(rank=4)))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("packing", PACKED)
def test_packing_is_refused_where_texts_would_read_each_other(packing: str, tmp_path: Path, tokenizer: Any) -> None:
    mixes = trainer(tmp_path, attached(APART["llama"], ALL["lst"]), tokenizer, **PACKED[packing])
    together = trainer(tmp_path, attached(TOGETHER["opt"], METHODS["read"]), tokenizer, **PACKED[packing])
    for run in (mixes, together):
        with pytest.raises(ValueError, match="in TRL's SFTConfig: packing=False and padding_free=False"):
            run.train()
        with pytest.raises(ValueError, match="in TRL's SFTConfig: packing=False and padding_free=False"):
            run.evaluate()


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [{}, PACKED["bfd"]], ids=["plain", "packed"])
def test_checkpoints_hold_the_task_and_resume_exactly(packing: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **packing}
    runs = []
    for start in (None, str(tmp_path / "checkpoint-2")):
        torch.manual_seed(0)
        model = attached(APART["llama"], ss.SherlConfig(reduction=4))
        run = trainer(tmp_path, model, tokenizer, **settings)
        run.train(resume_from_checkpoint=start)
        runs.append((losses(run), model.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == runs[0][1].keys()
    assert not any(name.startswith("backbone.") for name in saved)


def test_a_checkpoint_is_a_task_where_the_trainer_is_told_to_save_one(tmp_path: Path, tokenizer: Any) -> None:
    bare(APART["llama"]).save_pretrained(tmp_path / "backbone")
    model = ss.attach(t.AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), ss.ReadConfig(rank=4))
    run = trainer(tmp_path / "run", model, tokenizer, save_strategy="steps", save_steps=1, callbacks=[SaveTask()])
    run.train()
    loaded, ids = ss.load(tmp_path / "run" / "checkpoint-2"), torch.tensor([[7, 8, 9]])
    assert isinstance(loaded, ss.SideModel)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert loaded.extras["processor"].chat_template == TEMPLATE
    assert t.AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-2").chat_template == TEMPLATE
    assert torch.equal(loaded.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    first = ss.load(tmp_path / "run" / "checkpoint-1")
    assert not torch.equal(first.state_dict()["side.out.weight"], loaded.state_dict()["side.out.weight"])
    assert "sft" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert run.model.model_tags == ["trl", "sft"]


def test_what_the_trainer_saves_by_itself_is_told_from_a_task(tmp_path: Path, tokenizer: Any) -> None:
    model = attached(APART["llama"], ss.ReadConfig(rank=4))
    run = trainer(tmp_path / "run", model, tokenizer)
    run.save_model(str(tmp_path / "saved"))
    with pytest.raises(ss.TaskError, match=r"what a Trainer writes, .*model.load_state_dict .*callbacks.SaveTask"):
        ss.load(tmp_path / "saved")
    twin = attached(APART["llama"], ss.ReadConfig(rank=4))
    twin.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


# --- what it does to the model ----------------------------------------------------------------------------------------


def test_the_backbone_is_as_before_once_it_is_detached(tmp_path: Path, tokenizer: Any) -> None:
    backbone = bare(APART["llama"])
    before = backbone.config.to_dict(), backbone.generation_config.to_dict()
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = ss.attach(backbone, ss.ReadConfig(rank=4))
    trainer(tmp_path, model, tokenizer, eos_token="w3").train()
    assert (backbone.config.to_dict(), backbone.generation_config.to_dict()) != before
    ss.detach(model)
    assert (backbone.config.to_dict(), backbone.generation_config.to_dict()) == before
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    assert "forward" not in vars(backbone)


def test_recomputation_is_that_of_late_blocks(tmp_path: Path, tokenizer: Any) -> None:
    # SFTConfig asks for it by default
    for config in (METHODS["read"], METHODS["sherl"], METHODS["lora"]):
        model = attached(APART["llama"], config)
        trainer(tmp_path, model, tokenizer, max_steps=1).train()
        blocks = [place.module for place in model.places if place.site.kind == "block"]
        assert [block for block in blocks if "forward" in vars(block)] == model.late_blocks()


def test_columns_are_those_that_the_bare_model_takes(tmp_path: Path, tokenizer: Any) -> None:
    run = trainer(tmp_path, attached(APART["llama"], ss.ReadConfig(rank=4)), tokenizer)
    assert "input_ids" in inspect.signature(run.model.forward).parameters
    assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_write_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = ss.attach(bare(APART["llama"]), ss.ReadConfig(rank=4), head=ss.Classify(num_labels=2))
    with pytest.raises(ValueError, match=r"own language model head, .* leave head= out"):
        trainer(tmp_path, model, tokenizer).train()


def test_a_task_of_which_nothing_is_trained_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="nothing is trained: probe leaves it to the head"):
        trainer(tmp_path, ss.attach(bare(APART["llama"]), ss.ProbeConfig()), tokenizer).train()
    idle = ss.attach(bare(APART["llama"]), ss.DiffPruningConfig())
    with pytest.raises(ValueError, match="has not chosen yet which weights it trains"):
        trainer(tmp_path, idle, tokenizer).train()


@pytest.mark.parametrize(
    ("method", "checkpointing", "task_type"),
    [("read", True, "CAUSAL_LM"), ("read", False, None), ("full", False, None)],
)
def test_pefts_adapters_beside_a_task_are_refused(
    method: str, checkpointing: bool, task_type: str | None, tmp_path: Path, tokenizer: Any
) -> None:
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type)
    model = attached(APART["llama"], METHODS[method])
    with pytest.raises(ValueError, match=r"a task attached already, .* Leave peft_config out"):
        trainer(tmp_path, model, tokenizer, peft_config=adapter, gradient_checkpointing=checkpointing)


def test_noise_on_frozen_embeddings_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="neftune_noise_alpha"):
        trainer(tmp_path, attached(APART["llama"], METHODS["read"]), tokenizer, neftune_noise_alpha=5.0).train()
    trainer(tmp_path, attached(APART["llama"], METHODS["lora"]), tokenizer, neftune_noise_alpha=5.0).train()


def test_new_tokens_are_refused_and_a_template_alone_is_not(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "other")
    model = attached(APART["llama"], METHODS["read"])
    with pytest.raises(ValueError, match=r"keep their size\. .* before ss.attach .* with a .jinja file"):
        trainer(tmp_path, model, tokenizer, chat_template_path=str(tmp_path / "other"))
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("</s>", "w1"), encoding="utf-8")
    trainer(tmp_path, model, tokenizer, chat_template_path=str(tmp_path / "template.jinja")).train()
