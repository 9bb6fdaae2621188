"""How taps' inputs are kept: what a step of training finds the same, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import DynamicCache, Trainer, TrainingArguments

import sidestep as ss
from dual_encoders import END, clip
from sidestep.fold import FoldError
from sidestep.fold.forms import FORMS, KeepWarning, fitting
from tiny import FAMILIES, randomize

READ = ss.ReadConfig(rank=4)


def attached(keep: Any, family: str = "bert", method: ss.MethodConfig = READ, **kwargs: Any) -> ss.SideModel:
    torch.manual_seed(0)
    model = ss.attach(FAMILIES[family].model(), method, head=ss.Classify(num_labels=3), keep=keep, **kwargs)
    randomize(model)
    return model.train()


def batch(family: str = "bert", rows: int = 4) -> dict[str, Tensor]:
    return {**FAMILIES[family].inputs(rows), "labels": torch.arange(rows) % 3}


def gradients(model: ss.SideModel) -> Tensor:
    return torch.cat([p.grad.flatten() for _, p in model.trained_parameters() if p.grad is not None])


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= 1e-6 * wanted.norm())


# --- the same training --------------------------------------------------------------------------------------------


def test_the_plain_trainer_trains_the_same_with_accumulation_and_clipping(tmp_path: Path) -> None:
    rows = Dataset.from_dict({name: value.tolist() for name, value in batch(rows=16).items()})
    losses: dict[str, list[float]] = {}
    for keep in ("full", "replay"):
        model = attached(keep)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=0.1,
            num_train_epochs=3,
            learning_rate=0.01,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses[keep] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses["full"]) == 6
    assert losses["replay"] == pytest.approx(losses["full"], rel=1e-5)


def test_hooks_of_parameters_see_one_whole_gradient() -> None:
    """A tap's weight is read at every block, and a hook (DDP's, a scaler's) sees one gradient."""
    model, seen = attached("replay"), []
    tap = model.side.stacks["encoder"].taps[0].weight
    tap.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    model(**batch()).loss.backward()
    assert len(seen) == 1
    wanted = attached("full")
    wanted(**batch()).loss.backward()
    assert close(seen[0], wanted.side.stacks["encoder"].taps[0].weight.grad)


@pytest.mark.parametrize("keep", ["replay", "int8"])
def test_under_autocast_gradients_are_those_of_autocast(keep: str) -> None:
    found = []
    for way in ("full", keep):
        model = attached(way)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()  # outside of the context, as trainers do it
        found.append(gradients(model))
    assert torch.cosine_similarity(*found, dim=0) > 0.9999


def test_several_passes_may_wait_for_one_backward() -> None:
    found = []
    for keep in ("full", "replay"):
        model = attached(keep)
        first, second = model(**batch(rows=4)).loss, model(**batch(rows=3)).loss
        (first + 2 * second).backward()
        found.append(gradients(model))
    assert close(found[1], found[0])


def test_a_graph_that_is_retained_gives_its_gradients_twice() -> None:
    model = attached("replay")
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    once = gradients(model).clone()
    loss.backward()
    assert close(gradients(model), 2 * once)


@pytest.mark.filterwarnings("ignore:keep='offload' on the CPU")
@pytest.mark.parametrize(
    "method", [ss.LSTConfig(reduction=2, heads=2, dropout=0.5), ss.SherlConfig(reduction=4, dropout=0.5)]
)
def test_what_a_method_draws_it_draws_again(method: ss.MethodConfig) -> None:
    found = []
    for keep in ("full", "replay", "offload"):
        model = attached(keep, method=method)
        torch.manual_seed(5)
        loss = model(**batch()).loss
        torch.rand(7)  # somebody else draws in between
        loss.backward()
        found.append((loss.detach(), gradients(model), torch.rand(1)))
    for loss, grads, _ in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert close(grads, found[0][1])
    assert torch.equal(found[1][2], found[0][2])  # backward leaves the generator as it was


def test_a_task_stores_how_it_keeps_and_is_loaded_so(tmp_path: Path) -> None:
    model = attached("replay")
    model.save_pretrained(tmp_path / "task")
    loaded = ss.load(tmp_path / "task", backbone=FAMILIES["bert"].model())
    assert loaded.settings.keep == "replay"
    with torch.no_grad():
        rows = FAMILIES["bert"].inputs()
        assert torch.equal(loaded.eval()(**rows).logits, model.eval()(**rows).logits)


def test_two_towers_replay_each_its_own_pass() -> None:
    found = []
    for keep in ("full", "replay"):
        torch.manual_seed(0)
        model = ss.attach(clip(), READ, head=ss.Retrieve(), keep=keep)
        randomize(model)
        texts = torch.tensor([[38, 5, END], [38, 6, END]])
        images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        inputs = {"input_ids": texts, "attention_mask": torch.ones_like(texts)}
        model.train()(pixel_values=images, **inputs, labels=torch.arange(2)).loss.backward()
        found.append(gradients(model))
    assert close(found[1], found[0])


def test_a_copy_of_a_model_replays_on_its_own() -> None:
    model = attached("replay")
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one(**batch()).loss.backward()
    assert torch.equal(gradients(twin), gradients(model))


@pytest.mark.parametrize("keep", ["replay", "int8"])
def test_a_side_network_that_is_frozen_itself_is_not_read_again(keep: str) -> None:
    model = attached(keep)
    model.side.requires_grad_(False)
    model(**batch()).loss.backward()
    assert all(parameter.grad is None for parameter in model.side.parameters())
    assert model.head is not None
    assert all(parameter.grad is not None for parameter in model.head.parameters())


# --- auto ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("free", "way"), [(10**9, "full"), (100, "replay")])
def test_auto_takes_what_fits(free: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestep.fold.forms.psutil.virtual_memory", lambda: type("Memory", (), {"available": free}))
    model = attached("auto")
    for _ in range(2):
        model(**batch()).loss.backward()
    assert model.fold.keeping.way == way
    assert fitting(1000, torch.device("cpu")) == way


# --- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_within_half_a_step_of_each_groups_largest(width: int, dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden[0, 0] = 0
    packed = FORMS["int8"].pack(hidden)
    back = FORMS["int8"].unpack(*packed, shape=hidden.shape, dtype=dtype, device=hidden.device)
    assert back.dtype == dtype
    assert back.shape == hidden.shape
    steps = packed[1].repeat_interleave(64, dim=-1)[..., :width]
    assert bool(((back.float() - hidden.float()).abs() <= steps * (0.51 if dtype == torch.float32 else 1.1)).all())


def test_offload_without_a_gpu_says_what_it_does() -> None:
    model = attached("offload")
    with pytest.warns(KeepWarning, match="on the CPU"):
        model(**batch())


# --- refusals -----------------------------------------------------------------------------------------------------


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep='fuzzy': choose one of full, bf16, int8, offload, replay, auto"):
        attached("fuzzy")


def test_noise_of_the_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep='replay' with backbone_noise='dropout'.*other noise"):
        attached("replay", backbone_noise="dropout")
    attached("int8", backbone_noise="dropout")


class Jitter(nn.Module):
    """A part that is random whatever the mode, as views of images made inside of a model are."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0.1 * torch.randn_like(hidden)


def test_a_model_that_is_random_inside_is_refused_in_its_first_step() -> None:
    backbone: Any = FAMILIES["bert"].model()
    torch.manual_seed(0)
    model = ss.attach(backbone, READ, head=ss.Classify(num_labels=3), keep="replay").train()
    backbone.bert.embeddings.dropout = Jitter()
    loss = model(**batch()).loss
    with pytest.raises(FoldError, match=r"something else than the first.*in the model is random"):
        loss.backward()


def test_a_model_whose_second_pass_runs_other_blocks_is_refused() -> None:
    model = attached("replay")
    loss = model(**batch()).loss
    layers = model.trunk.encoder.layer
    model.trunk.encoder.layer = layers[:1]
    with pytest.raises(FoldError, match="ended its pass after"):
        loss.backward()
    model.trunk.encoder.layer = layers


def test_a_batch_that_was_changed_in_between_is_refused() -> None:
    model, rows = attached("replay"), batch()
    loss = model(**rows).loss
    rows["input_ids"].zero_()
    with pytest.raises(FoldError, match="changed in place between"):
        loss.backward()


def test_another_mode_in_between_is_refused() -> None:
    model = attached("replay")
    loss = model(**batch()).loss
    model.eval()
    with pytest.raises(FoldError, match="switched between training and eval"):
        loss.backward()


def test_a_weight_that_was_stepped_in_between_is_refused() -> None:
    model = attached("replay")
    loss = model(**batch()).loss
    with torch.no_grad():
        model.side.out.weight.add_(1)
        model.side.stacks["encoder"].taps[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_detached_model_is_refused_in_backward() -> None:
    model = attached("replay")
    loss = model(**batch()).loss
    ss.detach(model)
    with pytest.raises(FoldError, match="was detached"):
        loss.backward()


def test_a_cache_in_a_pass_with_gradients_is_refused() -> None:
    rows = FAMILIES["llama"].inputs()
    model = ss.attach(FAMILIES["llama"].model(), READ, keep="replay")
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**rows, past_key_values=DynamicCache())
    with torch.no_grad():
        model(**rows, past_key_values=DynamicCache())
    rounded = ss.attach(FAMILIES["llama"].model(), READ, keep="int8")
    rounded(**rows, past_key_values=DynamicCache())  # no second pass is given it again
    ladder = ss.attach(FAMILIES["llama"].model(), ss.LSTConfig(reduction=2, heads=2), keep="replay")
    with pytest.raises(ValueError, match="use_cache=False"):
        ladder(**rows, use_cache=True)


def test_a_cache_that_the_model_makes_for_itself_is_made_in_each_pass() -> None:
    """Some models make one in training too, and take no `use_cache`."""
    found = []
    for keep in ("full", "replay"):
        model = ss.attach(FAMILIES["llama"].model(), READ, keep=keep)
        randomize(model)
        model(**FAMILIES["llama"].inputs(), use_cache=True).logits.sum().backward()
        found.append(gradients(model))
    assert close(found[1], found[0])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_refused() -> None:
    model = torch.compile(attached("replay"), backend="eager")
    with pytest.raises(ValueError, match="keep='replay' in a compiled model"):
        model(**batch())
    with torch.no_grad():
        model(**batch())
