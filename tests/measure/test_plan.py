"""Plans: predicted memory against measured memory, without allocating anything."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as t
from torch import Tensor, nn

import sidestep as ss
from sidestep.backbone.source import LoadError
from sidestep.interface.keep import Keep
from sidestep.measure.plan import (
    PlanError,
    PlanWarning,
    alternatives,
    check_fits,
    fastest,
    fit,
    largest_batch,
    memory_of,
    plan,
    plan_for,
    settle_keep,
)
from sidestep.measure.step import announced, measure_step
from sidestep.methods import MethodConfig, methods
from sidestep.model.heads import HeadConfig
from tiny import FAMILIES, TinyFamily

HEAD = ss.Classify(num_labels=3)
BERT = t.BertConfig(vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)
CONTENDERS: dict[str, tuple[MethodConfig, Any]] = {
    "read": (ss.ReadConfig(rank=16), None),
    "probe": (ss.ProbeConfig(), None),
    "full": (ss.FullConfig(), None),
    "full+checkpoint": (ss.FullConfig(), "late"),
    "lora": (ss.LoraConfig(rank=4), None),
    "lora+checkpoint": (ss.LoraConfig(rank=4), "late"),
}


def attached(method: MethodConfig = ss.FullConfig(), **how: Any) -> ss.SideModel:  # noqa: B008 - frozen
    torch.manual_seed(0)
    return ss.attach(t.BertModel(BERT), method, head=HEAD, **how).train()


def batch(rows: int = 4, tokens: int = 32) -> dict[str, Tensor]:
    """The last row is padded."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, -5:] = 0
    return {"input_ids": mask.clone(), "attention_mask": mask, "labels": torch.arange(rows) % 3}


def measured(model: ss.SideModel, inputs: dict[str, Tensor]) -> int:
    """Rise of the allocator's count in a step that finds the optimizer's state in place."""
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.trained_parameters()])

    def step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with announced(model, optimizer):
        step()
        return ss.peak_memory(step).allocated


TRANSFORMERS = [family for family in FAMILIES.values() if "resnet" not in family.name]
RESNETS = [family for family in FAMILIES.values() if "resnet" in family.name]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "read") for family in FAMILIES.values()),
        *(
            pytest.param(family, name, marks=() if family.name in ("bert", "t5", "swin") else pytest.mark.all_laws)
            for family in TRANSFORMERS
            for name in ("full", "lora+checkpoint")
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(family: TinyFamily, name: str) -> None:
    method, checkpoint = CONTENDERS[name]
    model = ss.attach(family.model(), method, head=HEAD, checkpoint=checkpoint).train()
    inputs = {**family.inputs(rows=16, tokens=24), "labels": family.labels(16)}
    assert plan_for(model, inputs).peak_bytes == pytest.approx(measured(model, inputs), rel=0.1)


@pytest.mark.parametrize("family", RESNETS, ids=lambda family: family.name)
def test_a_plan_says_that_it_does_not_see_what_convolutions_work_in(family: TinyFamily) -> None:
    inputs = {**family.inputs(rows=16, tokens=24), "labels": family.labels(16)}
    frozen, tuned = (
        plan_for(ss.attach(family.model(), CONTENDERS[name][0], head=HEAD), inputs) for name in ("read", "full")
    )
    assert not frozen.notes
    assert len(tuned.notes) == 1
    assert "convolutions" in tuned.notes[0]


@pytest.mark.parametrize(
    ("family", "keep"),
    [
        pytest.param(family, keep, marks=() if keep == "replay" or family.name == "bert" else pytest.mark.all_laws)
        for family in TRANSFORMERS
        for keep in ("replay", "int8", "bf16")
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_way_of_keeping_is_planned(family: TinyFamily, keep: Any) -> None:
    model = ss.attach(family.model(), ss.ReadConfig(rank=16), head=HEAD, keep=keep).train()
    inputs = {**family.inputs(rows=16, tokens=24), "labels": family.labels(16)}
    planned = plan_for(model, inputs)
    assert planned.keep == keep
    assert planned.peak_bytes == pytest.approx(measured(model, inputs), rel=0.1)
    with ss.saved_bytes(model) as kept:
        model(**inputs)
    assert planned.saved_bytes == kept.total


def test_what_waits_in_the_hosts_memory_is_not_on_a_planned_gpu() -> None:
    plans = {
        keep: plan(
            BERT,
            ss.ReadConfig(rank=16),
            head=ss.Classify(num_labels=3, pool="mean"),
            batch=4,
            length=32,
            keep=keep,
            device="cuda",
        )
        for keep in ("full", "offload", "replay")
    }
    assert plans["offload"].saved_bytes < plans["full"].saved_bytes
    assert plans["replay"].saved_bytes == plans["offload"].saved_bytes


def test_a_language_model_is_planned_with_all_tokens_labelled() -> None:
    config = t.LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    how: dict[str, Any] = {"writes": "lm", "batch": 4, "length": 16}
    own, chunked = (plan(config, ss.ReadConfig(rank=4), **how, lm_loss=loss) for loss in ("own", "chunked"))
    logits = 4 * 16 * 500 * 4
    assert own.saved_bytes - chunked.saved_bytes > logits / 2
    assert chunked.saved_bytes < logits
    with pytest.raises(LoadError, match="writes text as --kind text2text"):
        plan(config, ss.ReadConfig(rank=4), writes="text2text")


@pytest.mark.parametrize(
    ("limit", "way", "said"),
    [
        (10, "full", "full fits with 9 B of 10 B"),
        (8, "replay", "full needs 9 B, replay fits with 3 B of 8 B"),
        (2, "replay", "none fits in 2 B: full needs 9 B, replay needs 3 B. Take a smaller batch"),
    ],
)
def test_the_fastest_way_that_fits_is_taken_and_the_reason_said(limit: int, way: str, said: str) -> None:
    assert fastest({"full": 9, "replay": 3}, limit) == (way, said)


def test_where_nothing_fits_the_smallest_is_taken() -> None:
    assert fastest({"full": 3, "replay": 4}, 2)[0] == "full"  # codes as wide as the backbone


@pytest.mark.parametrize("way", ["full", "replay"])
def test_auto_is_settled_by_plans(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, inputs, needs = ss.Classify(num_labels=3, pool="mean"), batch(rows=32, tokens=64), {}
    for keep in ("full", "replay", "auto"):
        torch.manual_seed(0)
        model = ss.attach(t.BertModel(BERT), ss.ReadConfig(rank=2), head=head, keep=keep)
        if keep != "auto":
            planned = plan_for(model, inputs)
            needs[keep] = planned.peak_bytes + planned.optimizer_bytes
    assert needs["replay"] < needs["full"]
    free(monkeypatch, needs[way])
    said = settle_keep(model, inputs)
    assert said is not None
    assert said.startswith(f"keep: {way}, because ")
    assert model.fold.keeping.way == way
    assert settle_keep(model, inputs) is None


@pytest.mark.parametrize("name", ["probe", "full+checkpoint", "lora"])
def test_a_plan_from_the_config_is_that_of_the_model(name: str) -> None:
    method, checkpoint = CONTENDERS[name]
    from_config = plan(BERT, method, head=HEAD, batch=4, length=32, checkpoint=checkpoint)
    assert from_config == plan_for(attached(method, checkpoint=checkpoint), batch())


@pytest.mark.parametrize("name", ["read", "probe", "full", "lora"])
def test_kept_bytes_are_those_that_saved_bytes_counts(name: str) -> None:
    model = attached(CONTENDERS[name][0])
    with ss.saved_bytes(model) as kept:
        model(**batch())
    planned = plan_for(model, batch())
    assert planned.saved_bytes == sum(planned.saved_by_module.values()) == kept.total


def test_a_backbone_that_takes_images_of_any_size_is_planned_at_the_usual_one() -> None:
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], num_channels=1)
    usual, same, smaller = (plan(config, ss.ReadConfig(), head=HEAD, batch=2, image_size=n) for n in (None, 224, 64))
    assert usual == same
    assert smaller.batch_bytes < usual.batch_bytes


TWO_STAGES = {  # with the words of the optimizer for each weight
    "structured": (ss.DiffPruningConfig(), 7),
    "unstructured": (ss.DiffPruningConfig(structured=False), 7),
    "8 bits": (ss.DiffPruningConfig(state_bits=8), 4),
    "magnitude": (ss.SparseConfig(select="magnitude"), 3),
}


@pytest.mark.parametrize(("method", "words"), TWO_STAGES.values(), ids=TWO_STAGES)
def test_the_stage_in_which_all_weights_are_free_is_planned(method: MethodConfig, words: int) -> None:
    config = t.BertConfig(**{**BERT.to_dict(), "vocab_size": 9000, "hidden_size": 128})  # several chunks of the largest
    torch.manual_seed(0)
    model = ss.attach(t.BertModel(config), method, head=HEAD).train()
    inputs = batch(rows=2)
    planned = plan_for(model, inputs)
    cost = measure_step(model, inputs)
    assert planned.peak_bytes == pytest.approx(cost.peak_bytes, rel=0.02)
    assert planned.optimizer_bytes == pytest.approx(cost.optimizer_bytes, rel=0.001)
    assert planned == plan(config, method, head=HEAD, batch=2, length=32)
    assert words <= planned.optimizer_bytes / (4 * model.sparse.total) < words + 0.2
    assert "first stage" in planned.notes[0]


@pytest.mark.parametrize("method", [ss.SparseConfig(), ss.SparseConfig(select="grow")], ids=["fisher", "grow"])
def test_a_sparse_diff_is_planned_before_its_positions_are_chosen(method: MethodConfig) -> None:
    model = attached(method)
    planned = plan_for(model, batch())
    assert planned == plan(BERT, method, head=HEAD, batch=4, length=32)
    model.place_anywhere()
    assert planned.peak_bytes == pytest.approx(measured(model, batch()), rel=0.02)


def test_grouped_keys_are_copied_where_there_is_padding() -> None:
    config = t.LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=1,
    )
    model = ss.attach(t.LlamaModel(config), ss.LoraConfig(), head=HEAD).train()
    assert plan_for(model, batch(rows=8)).peak_bytes == pytest.approx(measured(model, batch(rows=8)), rel=0.02)


def test_the_parts_sum_to_the_peak_and_the_total() -> None:
    model = attached()
    planned = plan_for(model, batch())
    parts = (planned.gradient_bytes, planned.kept_bytes, planned.temporary_bytes)
    assert planned.peak_bytes == sum(part or 0 for part in parts)
    sizes = [tensor.nbytes for tensor in (*model.parameters(), *model.buffers())]
    assert planned.weights_bytes == sum(sizes)
    trained = [parameter.nbytes for _, parameter in model.trained_parameters()]
    # two moments and one counter for each tensor
    assert planned.optimizer_bytes == 2 * sum(trained) + 4 * len(trained)
    assert planned.total_bytes - planned.peak_bytes == (
        planned.weights_bytes + planned.optimizer_bytes + planned.batch_bytes
    )
    assert planned.to_dict()["total_bytes"] == planned.total_bytes


def test_planning_leaves_the_model_and_the_random_numbers_alone() -> None:
    model = attached(checkpoint="late").eval()
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    plan_for(model, batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
        assert type(parameter) is nn.Parameter
    assert model(**batch()).logits.isfinite().all()


def test_a_model_larger_than_any_memory_can_be_planned() -> None:
    huge = t.LlamaConfig(
        vocab_size=1000,
        hidden_size=2**17,
        intermediate_size=2**18,
        num_hidden_layers=2,
        num_attention_heads=64,
    )
    planned = plan(huge, ss.LoraConfig(), batch=2, length=64)
    assert planned.weights_bytes > psutil.virtual_memory().total
    assert planned.length == 64


def test_recomputation_and_half_precision_need_less() -> None:
    plain = plan(BERT, ss.LoraConfig(), batch=32, length=64)
    assert plan(BERT, ss.LoraConfig(), batch=32, length=64, checkpoint="late").peak_bytes < 0.5 * plain.peak_bytes
    wide, half = (plan(BERT, ss.ProbeConfig(), batch=32, precision=name) for name in ("float32", "bfloat16"))
    assert half.weights_bytes < 0.55 * wide.weights_bytes
    assert half.peak_bytes < 0.6 * wide.peak_bytes
    assert plan(BERT, ss.FullConfig(), batch=2, optimizer="SGD").optimizer_bytes == 0


@pytest.mark.parametrize(
    ("precision", "checkpoint"),
    [("float32", None), ("float32", "late"), ("bf16 autocast", "late"), ("bfloat16", None)],
)
def test_a_gpu_is_planned_without_one(precision: Any, checkpoint: Any) -> None:
    settings: dict[str, Any] = {"batch": 16, "length": 64, "precision": precision, "checkpoint": checkpoint}
    planned = plan(BERT, ss.LoraConfig(), device="cuda", **settings)
    assert planned.peak_bytes % 512 == 0
    assert planned.attention == ("memory-efficient",)
    assert planned.notes
    # the dropout of the scores is fused on a GPU, and its masks are of one byte a value
    assert planned.peak_bytes < plan(BERT, ss.LoraConfig(), **settings).peak_bytes


def test_attention_kernels_are_named() -> None:
    assert plan(BERT, ss.ProbeConfig(), batch=2).attention == ("flash (CPU)",)
    # dropout of the scores is on in training
    assert plan(BERT, ss.FullConfig(), batch=2).attention == ("plain (keeps the scores)",)


@pytest.mark.parametrize("name", ["vit", "swin", "timm_vit"])
def test_images(name: str) -> None:
    planned = plan(FAMILIES[name].build, ss.ReadConfig(rank=4), batch=3)
    assert (planned.batch, planned.length, planned.image_size) == (3, None, FAMILIES[name].image)


def test_backbones_by_name(tmp_path: Path) -> None:
    BERT.save_pretrained(tmp_path)
    by_folder = plan(tmp_path, ss.ProbeConfig(), batch=2)
    assert by_folder == plan(str(tmp_path / "config.json"), ss.ProbeConfig(), batch=2)
    assert by_folder == plan(BERT, ss.ProbeConfig(), batch=2)
    assert by_folder.length == 128
    with_own_head = plan(tmp_path, ss.FullConfig(), head=None, batch=2)
    assert with_own_head.head is None
    assert plan("timm:vit_tiny_patch16_224", ss.ProbeConfig(), batch=2).image_size == 224


def test_rotary_positions_are_planned_for_any_length() -> None:
    llama = t.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    assert plan(llama, ss.ProbeConfig(), batch=2, length=64).length == 64


def test_labels_follow_the_head() -> None:
    for head in (ss.Regress(), ss.Regress(targets=2), ss.Classify(num_labels=4, problem="multi")):
        assert plan(BERT, ss.ProbeConfig(), head=head, batch=2).head == {**head.to_dict(), "pool": "mean"}


@pytest.mark.parametrize("head", [ss.Tag(num_labels=9), ss.Span()], ids=["tags", "spans"])
@pytest.mark.parametrize("keep", ["full", "replay"])
def test_heads_of_all_tokens_are_planned_as_they_are_measured(head: HeadConfig, keep: Keep) -> None:
    how: dict[str, Any] = {"head": head, "batch": 16, "length": 64, "keep": keep}
    config = t.BertConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256)
    planned, measured = (plan(config, ss.ReadConfig(rank=16), measure=one, **how) for one in (False, True))
    assert planned.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.1)


def test_an_own_head_of_tokens_is_planned() -> None:
    found = plan(BERT, ss.LoraConfig(), head=None, own_head="tokens", batch=2, length=16)
    assert found.peak_bytes > 0


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"batch": 0}, "batch=0"),
        ({"length": 513}, "length=513, but BertModel takes 1 to 512 tokens"),
        ({"image_size": 32}, "BertModel reads texts"),
        ({"precision": "int4"}, "precision='int4': choose one of float32, bf16 autocast, bfloat16"),
        ({"optimizer": "Lion"}, "optimizer='Lion': choose one of AdamW"),
        ({"device": "tpu"}, "device='tpu': choose one of cpu, cuda"),
    ],
)
def test_settings_out_of_range(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        plan(BERT, ss.ProbeConfig(), **how)


def test_an_image_model_has_no_length() -> None:
    with pytest.raises(ValueError, match="ViTForImageClassification reads images: give image_size"):
        plan(FAMILIES["vit"].build, ss.ProbeConfig(), length=12)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"has no config\.json, which is all that a plan needs"):
        plan(tmp_path, ss.ProbeConfig())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoadError, match=f"the config of {tmp_path} cannot be read"):
        plan(tmp_path, ss.ProbeConfig())
    with pytest.raises(LoadError, match="'timm:no_such_model' cannot be planned"):
        plan("timm:no_such_model", ss.ProbeConfig())


class Moody(nn.Module):
    """Does something else depending on values, which fake tensors do not have."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 2 if hidden.sum() > 0 else hidden


def moody_bert() -> nn.Module:
    model = t.BertModel(BERT)
    model.encoder.layer[1].output.dropout = Moody()
    return model


def test_a_model_that_cannot_be_traced_is_named_with_the_place_and_can_be_measured() -> None:
    with pytest.raises(PlanError) as error:
        plan(moody_bert, ss.ProbeConfig(), batch=2)
    for part in ("BertModel with probe", "backbone.encoder.layer.1.output.dropout", "local_scalar_dense", "--measure"):
        assert part in str(error.value)
    found = plan(moody_bert, ss.ProbeConfig(), batch=2, measure=True)
    assert found.source == "measured"
    assert found.peak_bytes == pytest.approx(plan(BERT, ss.ProbeConfig(), batch=2).peak_bytes, rel=0.2)
    assert found.kept_bytes is None


def test_a_refused_backbone_stays_refused() -> None:
    with pytest.raises(ss.UnsupportedBackbone, match="no bias vectors"):
        plan(FAMILIES["t5"].build, ss.BitFitConfig())


@pytest.mark.parametrize("fixed", [0, 700])
@pytest.mark.parametrize("start", [1, 4, 500])
@pytest.mark.parametrize(
    "total",
    [lambda rows: 700 + 10 * rows, lambda rows: max(900 + rows, 700 + 10 * rows), lambda rows: 700 + rows**2 // 50],
)
def test_the_largest_batch_fits_and_the_next_does_not(total: Callable[[int], int], start: int, fixed: int) -> None:
    tried: list[int] = []

    def counted(rows: int) -> int:
        tried.append(rows)
        return total(rows)

    found = largest_batch(counted, 1234, start=start, fixed=fixed)
    assert total(found) <= 1234 < total(found + 1)
    assert {found, found + 1} <= set(tried)
    assert len(tried) <= 15


def test_no_batch_fits() -> None:
    assert largest_batch(lambda rows: 2000 + rows, 1234, start=32) == 0
    assert largest_batch(lambda rows: 2000 + rows, 1234, start=32, fixed=2000) == 0


def test_the_largest_batch_of_a_plan() -> None:
    def total(rows: int) -> int:
        return plan(BERT, ss.ReadConfig(rank=8), batch=rows, length=16).total_bytes

    limit = total(24)
    assert largest_batch(total, limit, start=4) == 24


def test_sizes_of_memory() -> None:
    assert memory_of("16GB") == memory_of(" 16 gib") == memory_of("16384M") == 16 * 2**30
    assert memory_of("1.5G") == 3 * 2**29
    for text in ("", "big", "-1GB", "0GB", "16PB"):
        with pytest.raises(ValueError, match="is no size of memory: write for example 16GB"):
            memory_of(text)


def test_alternatives_say_what_each_method_takes_or_why_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    some = ("bitfit", "dtl", "full", "lora", "lst", "probe", "read")
    monkeypatch.setattr(fit, "methods", lambda: {name: methods()[name] for name in some})

    def make(method: MethodConfig, **how: Any) -> ss.Plan:
        return plan(FAMILIES["llama"].build, method, batch=2, length=8, **how)

    asked = ss.ReadConfig(rank=3)
    found = {other.label: other for other in alternatives(make, asked)}
    assert set(some) | {"full+checkpoint", "lora+checkpoint"} <= set(found)
    assert not {"probe+checkpoint", "probe+replay", "lora+replay"} & set(found)
    assert {"read+replay", "dtl+replay", "lst+replay"} <= set(found)
    assert found["bitfit"].plan is None
    assert "no bias vectors" in str(found["bitfit"].reason)
    assert found["read"].plan is not None
    assert found["read"].plan.config["rank"] == 3
    totals = [other.plan.total_bytes for other in found.values() if other.plan is not None]
    assert totals == sorted(totals)
    unplanned = [other.plan is None for other in found.values()]
    assert unplanned == sorted(unplanned)


# another test registers the method that only collects what it sees
@pytest.mark.parametrize("method", sorted(methods().keys() - {"collect"}))
def test_every_method_is_planned(method: str) -> None:
    found = plan(FAMILIES["vit"].build, methods()[method].config(), batch=2, optimizer="SGD")
    assert found.method == method
    assert found.peak_bytes > 0


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    memory = psutil.virtual_memory()._replace(available=size)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_a_run_that_does_not_fit_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached()
    planned = plan_for(model, batch())
    needed = planned.peak_bytes + planned.optimizer_bytes
    free(monkeypatch, needed)
    check_fits(model, batch())
    free(monkeypatch, needed - 1)
    with pytest.warns(PlanWarning, match="batches of 4 will need about .* but the machine has free"):
        check_fits(model, batch())


def test_what_cannot_be_traced_is_not_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1)
    model = ss.attach(moody_bert(), ss.ProbeConfig(), head=HEAD)
    with warnings.catch_warnings(action="error"):
        check_fits(model, batch())
