"""A backbone whose weights are on disk is the plain one: outputs, losses, gradients and names, to the bit."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import sidestep as ss
from sidestep.backbone import facts_of, new_parameters, without_values
from sidestep.backbone.load import load_backbone
from sidestep.backbone.placement import Placement
from sidestep.backbone.source import LoadError
from sidestep.disk.task_folder import read_config
from sidestep.interface.offload import is_dispatched, is_offloaded, offloaded_size
from sidestep.measure.plan import plan, plan_for
from sidestep.measure.rows import ROWS, rows_at_once
from small_gguf import llama as small_gguf_llama
from small_gguf import write_gguf
from tiny import SIZES, VOCABULARY, bert, llama, t5

LST_COPY = ss.LSTConfig(init="magnitude", reduction=2, heads=2, head_width=8, inner_width=32, buckets=32)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "read": (llama, ss.ReadConfig(rank=4), {}),
    "read, replayed": (llama, ss.ReadConfig(rank=4), {"keep": "replay"}),
    "read, two stacks": (t5, ss.ReadConfig(rank=4), {}),
    "sherl": (llama, ss.SherlConfig(reduction=2), {}),
    "dtl": (llama, ss.DTLConfig(rank=4), {}),
    "dtl, recomputed": (llama, ss.DTLConfig(rank=4), {"checkpoint": "late"}),
    "lst": (llama, ss.LSTConfig(reduction=2), {}),
    "lst, from pruned blocks": (t5, LST_COPY, {}),
    "side attention": (llama, ss.SideAttentionConfig(rank=8, heads=2), {}),
    "synqt": (bert, ss.SynQTConfig(queries=2, hidden=4, attention_hidden=4), {}),
    "readout": (llama, ss.ReadoutConfig(), {}),
}
IDS = torch.randint(3, 16, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 5 + [0] * 2, [1] * 7, [1] * 7])
BATCH = {"input_ids": IDS, "attention_mask": MASK}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[], nn.Module]], str]:
    """The folder that a tiny model of a family is saved in."""

    def folder_of(make: Callable[[], nn.Module]) -> str:
        folder = tmp_path_factory.getbasetemp() / f"offloaded-{make.__name__}"
        if not folder.exists():
            torch.manual_seed(0)
            model: Any = make()
            model.save_pretrained(folder)
        return str(folder)

    return folder_of


def backbone(folder: str, device_map: Any = None) -> nn.Module:
    return load_backbone(folder, device_map=device_map)


def attached(folder: str, method: Any, device_map: Any = None, **how: Any) -> Any:
    """A model with a Sidestep head. What is trained starts at random, not as nothing."""
    torch.manual_seed(1)
    model = ss.attach(backbone(folder, device_map), method, head=ss.Classify(num_labels=2), **how)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def stepped(model: Any) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    """Logits of a pass in eval mode, and the loss and the gradients of a step."""
    with torch.no_grad():
        logits = model.eval()(**BATCH).logits
    torch.manual_seed(2)
    loss = model.train()(**BATCH, labels=torch.tensor([0, 1, 1])).loss
    loss.backward()
    return logits, loss.detach(), {name: parameter.grad for name, parameter in model.trained_parameters()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_from_disk_is_the_plain_one_to_the_bit(name: str, saved: Any) -> None:
    make, method, how = CASES[name]
    folder = saved(make)
    plain, disk = attached(folder, method, **how), attached(folder, method, "disk", **how)
    assert is_offloaded(disk.backbone)
    assert next(disk.backbone.parameters()).is_meta
    (logits, loss, gradients), (own_logits, own_loss, own_gradients) = stepped(plain), stepped(disk)
    assert torch.equal(own_logits, logits)
    assert torch.equal(own_loss, loss)
    assert any(gradient is not None for gradient in gradients.values())
    for key, gradient in gradients.items():
        own = own_gradients[key]
        assert own is gradient is None or torch.equal(own, gradient), key
    assert disk.digest == plain.digest
    assert disk.head_digest == plain.head_digest
    assert offloaded_size(disk.trunk) == sum(parameter.nbytes for parameter in disk.trunk.parameters())


def test_a_task_goes_from_disk_to_memory_and_back(saved: Any, tmp_path: Path) -> None:
    folder = saved(llama)
    disk = attached(folder, ss.ReadConfig(rank=4), "disk").eval()
    disk.save_pretrained(tmp_path / "a")
    plain = ss.load(tmp_path / "a")
    assert not is_dispatched(plain.backbone)
    assert torch.equal(plain(**BATCH).logits, disk(**BATCH).logits)
    plain.save_pretrained(tmp_path / "b")
    again = ss.load(tmp_path / "b", device_map="disk")
    assert is_offloaded(again.backbone)
    assert torch.equal(again(**BATCH).logits, disk(**BATCH).logits)
    assert "device_map" not in str(read_config(tmp_path / "a"))


def test_a_map_may_leave_a_part_in_memory(saved: Any) -> None:
    folder = saved(llama)
    plain, part = backbone(folder), load_backbone(folder, device_map="auto", max_memory={"cpu": "20KiB"})
    assert 0 < offloaded_size(part) < sum(parameter.nbytes for parameter in part.parameters())
    assert new_parameters(part) == new_parameters(without_values(part)) == set()
    method = ss.ReadConfig(rank=4)
    assert ss.attach(part, method).digest == ss.attach(plain, method).digest


def test_tied_weights_are_one_weight_from_disk_too(saved: Any) -> None:
    folder = saved(t5)
    plain, disk = (load_backbone(folder, writes="text2text", device_map=where) for where in (None, "disk"))
    models = [ss.attach(model, ss.ReadConfig(rank=4)) for model in (plain, disk)]
    with torch.no_grad():
        plain_out, disk_out = (model(input_ids=IDS, labels=IDS).logits for model in models)
    assert torch.equal(plain_out, disk_out)
    assert models[0].digest == models[1].digest
    assert models[0].head_digest == models[1].head_digest


def test_the_loss_of_a_language_model_from_disk_is_the_plain_one(saved: Any) -> None:
    losses = []
    for where in (None, "disk"):
        torch.manual_seed(1)
        model = ss.attach(
            load_backbone(saved(llama), writes="lm", device_map=where), ss.ReadConfig(rank=4), lm_loss="chunked"
        )
        losses.append([model.train()(**BATCH, labels=IDS).loss for _ in range(2)])
    assert losses[0] == losses[1]


def test_detach_gives_back_the_offloaded_backbone(saved: Any) -> None:
    model = attached(saved(llama), ss.DTLConfig(rank=4), "disk", checkpoint="late")
    stepped(model)
    bare: Any = ss.detach(model)
    assert torch.equal(bare(IDS).last_hidden_state, backbone(saved(llama))(IDS).last_hidden_state)


def test_after_a_pass_under_inference_mode_it_is_detached_and_attached_again(saved: Any) -> None:
    """accelerate makes the placeholders of offloaded weights anew in each pass, here as inference tensors."""
    model = attached(saved(llama), ss.ReadConfig(rank=4), "disk")
    with torch.inference_mode():
        first = model.eval()(**BATCH).logits
    kept = model.state_dict()
    bare = ss.detach(model)
    assert all(parameter.requires_grad for parameter in bare.parameters())
    again = ss.attach(bare, ss.ReadConfig(rank=4), head=ss.Classify(num_labels=2))
    again.load_state_dict(kept)
    logits, loss, grads = stepped(again)
    assert torch.equal(logits, first)
    assert loss.isfinite()
    assert all(grad is not None for grad in grads.values())


def test_a_copy_of_a_dispatched_model_is_refused(saved: Any) -> None:
    model = attached(saved(llama), ss.ReadConfig(rank=4), "disk")
    with pytest.raises(ValueError, match="placed by accelerate"):
        copy.deepcopy(model)
    assert copy.deepcopy(attached(saved(llama), ss.ReadConfig(rank=4))) is not None


@pytest.mark.parametrize("method", [ss.LoraConfig(rank=2), ss.FullConfig(), ss.SparseConfig()])
def test_methods_that_change_weights_are_refused_by_name(method: Any, saved: Any) -> None:
    with pytest.raises(ss.UnsupportedBackbone, match=r"offloaded.*side network"):
        ss.attach(backbone(saved(llama), "disk"), method, head=ss.Classify(num_labels=2))


def test_a_head_of_the_backbones_own_that_is_trained_stays_in_memory(saved: Any) -> None:
    model: Any = load_backbone(saved(bert), head=True, device_map="disk")
    assert not model.classifier.weight.is_meta
    assert model.bert.encoder.layer[0].output.dense.weight.is_meta
    trained = ss.attach(model, ss.ReadConfig(rank=4))
    assert any(name.startswith("backbone.classifier") for name, _ in trained.trained_parameters())


def test_a_fisher_start_is_refused(saved: Any) -> None:
    method = ss.LSTConfig(init="fisher", reduction=2, heads=2, head_width=8, inner_width=32, buckets=32)
    model = ss.attach(load_backbone(saved(t5), writes="text2text", device_map="disk"), method)
    with pytest.raises(ValueError, match="offloaded"):
        ss.initialise(model, [{"input_ids": IDS, "labels": IDS}])


def test_a_plan_counts_what_stays_and_the_largest_module(saved: Any) -> None:
    config = (Path(saved(llama)) / "config.json").as_posix()
    how: dict[str, Any] = {"batch": 3, "length": 7}
    whole = plan(config, ss.ReadConfig(rank=4), **how)
    disk = plan(config, ss.ReadConfig(rank=4), placement=Placement(device_map="disk"), **how)
    assert disk.peak_bytes == whole.peak_bytes
    parts = backbone(saved(llama)).modules()
    largest = max(sum(parameter.nbytes for parameter in part.parameters(recurse=False)) for part in parts)
    weights = sum(parameter.nbytes for parameter in backbone(saved(llama)).parameters())
    assert whole.weights_bytes - disk.weights_bytes == weights - largest
    live = plan_for(attached(saved(llama), ss.ReadConfig(rank=4), "disk"), {**BATCH, "labels": torch.tensor([0, 1, 1])})
    assert live.weights_bytes == disk.weights_bytes


def test_an_evaluation_from_disk_has_large_batches(saved: Any) -> None:
    assert rows_at_once(attached(saved(llama), ss.ReadConfig(rank=4))) == ROWS
    assert rows_at_once(attached(saved(llama), ss.ReadConfig(rank=4), "disk"), 8) > ROWS


def test_facts_of_a_dispatched_model_are_found_without_its_weights(saved: Any) -> None:
    disk, plain = facts_of(backbone(saved(llama), "disk")), facts_of(backbone(saved(llama)))
    assert disk.source == "shapes"
    assert disk.stacks["decoder"].stages == plain.stacks["decoder"].stages


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device_map": "diskk"}, "choose auto"),
        ({"max_memory": {"cpu": 1}}, "without a device map"),
        ({"offload_folder": "there"}, "without a device map"),
        ({"device_map": "disk", "max_memory": {"cpu": 1}}, "computed"),
        ({"device_map": "auto", "max_memory": {"cpu": "1XB"}}, "10GiB"),
        ({"device_map": '{"layers": "disk"}'}, "does not place embed_tokens"),
        ({"device_map": {"layer": "disk"}}, "does not have"),
        ({"device_map": "absent.json"}, "cannot be read"),
        ({"device_map": '["disk"]'}, "choose auto"),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(asked: dict[str, Any], message: str, saved: Any) -> None:
    with pytest.raises(LoadError, match=message):
        load_backbone(saved(llama), **asked)


def test_weights_that_have_to_be_written_need_a_folder_with_space(
    saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> nn.Module:
        return llama()

    with pytest.raises(LoadError, match="--offload-folder"):
        Placement(device_map="disk").options("a", make, packed=True)
    told = Placement(device_map="disk", offload_folder=tmp_path / "new").options("a", make, packed=True)
    assert set(told["device_map"].values()) == {"disk"}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(LoadError, match=r"0\.00 GiB left"):
        Placement(device_map="disk", offload_folder=tmp_path / "new").options("a", make, packed=True)
    # what a safetensors file holds as it is, is read from there
    Placement(device_map="disk", offload_folder=tmp_path / "new").options("a", make, packed=False)


def mixtral() -> nn.Module:
    config = MixtralConfig(
        **{**SIZES, "vocab_size": VOCABULARY}, num_key_value_heads=1, num_local_experts=2, pad_token_id=0
    )
    return MixtralForCausalLM(config)


def test_experts_that_are_put_together_are_written_to_the_folder(saved: Any, tmp_path: Path) -> None:
    folder = saved(mixtral)
    disk, plain = load_backbone(folder, device_map="disk", offload_folder=tmp_path), load_backbone(folder)
    written = {path.name.removesuffix(".safetensors") for path in tmp_path.iterdir()}
    assert written
    assert all("experts" in name for name in written)
    assert torch.equal(disk(**BATCH).last_hidden_state, plain(**BATCH).last_hidden_state)
    assert ss.attach(disk, ss.ReadConfig(rank=4)).digest == ss.attach(plain, ss.ReadConfig(rank=4)).digest


def test_a_gguf_file_is_refused_on_disk(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", small_gguf_llama())
    with pytest.raises(LoadError, match="Take safetensors"):
        load_backbone(path, device_map="disk")


def test_an_offload_folder_that_is_a_file_is_refused(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="cannot be made"):
        load_backbone(saved(llama), device_map="disk", offload_folder=tmp_path / "file")


def test_a_safetensors_checkpoint_is_read_where_it_is(saved: Any, tmp_path: Path) -> None:
    model: Any = load_backbone(saved(llama), device_map="disk", offload_folder=tmp_path / "offload")
    assert isinstance(model, PreTrainedModel)
    assert list((tmp_path / "offload").iterdir()) == []
