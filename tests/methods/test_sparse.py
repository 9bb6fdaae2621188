"""Sparse tuning: which weights it chooses, that its state is of their size, and that runs and files are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields
from sidestep.disk import task_folder
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.measure.plan.trace import plan_for
from sidestep.measure.step import measure_step
from sidestep.methods.sparse import Candidates
from sidestep.tasks import load as loading
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import reviews, text_backbone
from tiny import FAMILIES, LABELS, logits

HEAD = ss.Classify(num_labels=LABELS)
RANDOM = ss.SparseConfig(density=0.05, select="random")
BERT = FAMILIES["bert"]


def attached(config: ss.SparseConfig = RANDOM, backbone: nn.Module | None = None) -> ss.SideModel:
    torch.manual_seed(3)
    return ss.attach(BERT.model() if backbone is None else backbone, config, head=HEAD)


def batches(count: int) -> list[dict[str, Tensor]]:
    return [{**BERT.inputs(rows=1, seed=n), "labels": torch.tensor([n % LABELS])} for n in range(count)]


def changed(model: ss.SideModel, seed: int = 0) -> ss.SideModel:
    """The model with random values in its diff and head."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# --- what is trained ---------------------------------------------------------------------------------------


def test_the_diff_covers_what_the_head_reads_and_has_the_asked_share_of_it() -> None:
    model = attached()
    pooler = {f"{name}" for name, _ in model.trunk.named_parameters() if "pooler" in name}
    expected = {name: p.numel() for name, p in model.trunk.named_parameters() if name not in pooler}
    assert {name: tensor.numel() for name, tensor in model.sparse.tensors.items()} == expected
    assert len(model.sparse.values) == round(0.05 * sum(expected.values()))
    assert [name for name, _ in model.trained_parameters()] == [
        "head.linear.weight",
        "head.linear.bias",
        "sparse.values",
    ]
    assert set(model.state_dict()) == {"head.linear.weight", "head.linear.bias", "sparse.values", "sparse.positions"}


def test_gradients_and_optimizer_state_are_of_the_diffs_size() -> None:
    model = attached().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        model(**BERT.inputs(), labels=BERT.labels()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        held = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    size = sum(p.numel() for _, p in model.trained_parameters())
    averages = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
    assert held == size
    assert sum(v.numel() for v in averages) == 2 * size


def test_a_gradient_is_the_dense_ones_at_the_positions() -> None:
    model = changed(attached()).eval()
    full = ss.attach(BERT.model(), ss.FullConfig(), head=HEAD).eval()
    with torch.no_grad():
        for name, tensor in model.sparse.tensors.items():
            full.trunk.get_parameter(name).copy_(tensor)
        full.head.load_state_dict(model.head.state_dict())
        model.sparse.write()
        for name, tensor in model.sparse.tensors.items():
            full.trunk.get_parameter(name).copy_(tensor)
    for one in (model, full):
        one(**BERT.inputs(), labels=BERT.labels()).loss.backward()
    dense = {name: full.trunk.get_parameter(name).grad for name in model.sparse.support()}
    expected = torch.cat([dense[name].flatten()[index] for name, index in model.sparse.support().items()])
    torch.testing.assert_close(model.sparse.values.grad, expected)


# --- how the support is chosen -----------------------------------------------------------------------------


def test_fisher_takes_the_largest_mean_squared_gradients() -> None:
    model = attached(ss.SparseConfig(density=0.05))
    assert ss.initialise(model, batches(4)) == 4
    plain = ss.attach(BERT.model(), ss.FullConfig(), head=HEAD).eval()
    plain.head.load_state_dict(model.head.state_dict())
    squares = {name: torch.zeros_like(p) for name, p in model.sparse.tensors.items()}
    for batch in batches(4):
        plain.zero_grad()
        plain(**batch).loss.backward()
        for name in squares:
            squares[name] += plain.trunk.get_parameter(name).grad.square()
    flat = torch.cat([square.flatten() for square in squares.values()])
    expected = flat.topk(len(model.sparse.values)).indices.sort().values
    assert torch.equal(model.sparse.positions, expected)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(logits(model.eval()(**BERT.inputs())), logits(plain(**BERT.inputs())))


def test_before_its_support_is_chosen_it_is_not_trained_or_saved(tmp_path: Path) -> None:
    model = attached(ss.SparseConfig()).train()
    with pytest.raises(ValueError, match=r"sparse has not chosen yet which weights it trains: .* ss\.initialise"):
        model(**BERT.inputs(), labels=BERT.labels())
    for config in (ss.SparseConfig(select="magnitude"), ss.DiffPruningConfig()):
        relaxing = ss.attach(BERT.model(), config, head=HEAD).train()
        with pytest.raises(ValueError, match=r"which needs `sidestep train` or ss\.train$"):
            relaxing(**BERT.inputs(), labels=BERT.labels())
    with pytest.raises(task_folder.TaskError, match="has not chosen its support yet"):
        model.save_pretrained(tmp_path / "task")
    with pytest.raises(ValueError, match="starts without data"):
        ss.initialise(attached(), batches(1))
    with pytest.raises(ValueError, match="no rows to initialise from"):
        ss.initialise(model, [])


def test_a_random_support_is_its_seeds() -> None:
    first, again, other = (attached(ss.SparseConfig(density=0.1, select="random", seed=s)) for s in (0, 0, 1))
    assert torch.equal(first.sparse.positions, again.sparse.positions)
    assert not torch.equal(first.sparse.positions, other.sparse.positions)


@pytest.mark.parametrize("parts", [1, 3])
def test_candidates_are_the_largest_gradients_off_the_support(parts: int) -> None:
    model = attached()
    diff = model.sparse
    found = Candidates(diff, 20)
    generator = torch.Generator().manual_seed(0)
    steps = [{n: torch.randn(shape, generator=generator) for n, shape in diff.shapes.items()}] * parts
    for gradients in steps:
        for name, gradient in gradients.items():
            found.see(name, gradient)
    flat = torch.cat([gradient.flatten() for gradient in steps[0].values()]).abs()
    flat[diff.positions] = 0
    assert set(found.best().tolist()) == set(flat.topk(20).indices.tolist())


def test_growing_gives_up_the_smallest_changes_and_moves_the_averages_along() -> None:
    model = changed(attached(ss.SparseConfig(density=0.05, select="grow", grow_every=2, grow_share=0.4))).train()
    diff, delta = model.sparse, model.delta
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-3)
    before = {name: tensor.clone() for name, tensor in diff.tensors.items()}
    for step in (1, 2):
        delta.before_step(diff, step, 4)
        model(**BERT.inputs(), labels=BERT.labels()).loss.backward()
        assert all(t.grad is None for t in diff.tensors.values())
        optimizer.step()
        optimizer.zero_grad()
        values, old = diff.values.detach().clone(), diff.positions.clone()
        averages = optimizer.state[diff.values]["exp_avg"].clone()
        delta.after_step(diff, optimizer)
    count = int(0.4 * (1 - 2 / 4) * len(values))
    kept = torch.isin(old, diff.positions)
    assert int((~kept).sum()) == count
    assert values[~kept].abs().max() <= values[kept].abs().min()
    stayed = torch.isin(diff.positions, old)
    assert torch.equal(diff.values[stayed], values[kept])
    assert torch.equal(optimizer.state[diff.values]["exp_avg"][stayed], averages[kept])
    assert not diff.values[~stayed].any()
    assert not optimizer.state[diff.values]["exp_avg"][~stayed].any()
    assert torch.equal(diff.positions, diff.positions.sort().values)
    diff.revert()
    assert all(torch.equal(t, FAMILIES["bert"].model().base_model.get_parameter(n)) for n, t in diff.tensors.items())
    assert before.keys() == diff.tensors.keys()


def test_magnitude_keeps_the_largest_changes_and_rewinds_or_goes_on() -> None:
    for rewind in (True, False):
        model = attached(ss.SparseConfig(density=0.05, select="magnitude", rewind=rewind)).train()
        diff, head = model.sparse, model.head.linear.weight
        start = head.detach().clone()
        trained = [p for _, p in model.trained_parameters() if p is not diff.values]
        how = {"rate": 0.01, "weight_decay": 0.0, "max_norm": 0.0, "seed": 0}
        optimizer = model.delta.relax(diff, trained, **how)
        before = {name: tensor.detach().clone() for name, tensor in diff.tensors.items()}
        model(**BERT.inputs(), labels=BERT.labels()).loss.backward()
        optimizer.step()
        after = {name: tensor.detach().clone() for name, tensor in diff.tensors.items()}
        model.delta.project(optimizer, diff)
        change = torch.cat([(after[name] - before[name]).flatten() for name in before])
        chosen = torch.zeros_like(change, dtype=torch.bool)
        chosen[diff.positions] = True
        assert change[chosen].abs().min() >= change[~chosen].abs().max()
        assert torch.equal(diff.values, torch.zeros_like(diff.values) if rewind else change[chosen])
        assert torch.equal(head, start) == rewind
        diff.revert()
        assert all(torch.equal(tensor, before[name]) for name, tensor in diff.tensors.items())


def test_growing_refuses_a_step_that_it_is_not_told_of() -> None:
    model = attached(ss.SparseConfig(density=0.05, select="grow", grow_every=1)).train()
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=1e-3)

    def step() -> None:
        model(**BERT.inputs(), labels=BERT.labels()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # nothing is learned yet, as in a meter's step
    with pytest.raises(ValueError, match=r"nothing tells it of them.*callbacks=\[.*MoveSupport"):
        step()
    for number in (1, 2):
        model.delta.before_step(model.sparse, number, 2)
        step()
        model.delta.after_step(model.sparse, optimizer)
    batch = {**BERT.inputs(), "labels": BERT.labels()}
    assert measure_step(model, batch).kept_bytes > 0
    assert plan_for(model, batch).kept_bytes > 0
    with pytest.raises(ValueError, match="nothing tells it"):
        step()


# --- whole runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_backbone(tmp_path_factory.mktemp("bert"))


def task_data(backbone: Path) -> TaskData:
    rows = [Dataset.from_list(reviews(count, seed)) for count, seed in ((32, 0), (12, 1))]
    return prepare(*rows, Fields(text="text", label="label"), load_processor(backbone))


def run(backbone: Path, output: Path, config: ss.SparseConfig, **how: Any) -> tuple[ss.SideModel, Any]:
    torch.manual_seed(0)
    data = task_data(backbone)
    model = ss.attach(load_backbone(backbone), config, head=head_for(data))
    common = {"epochs": 2, "batch_size": 8, "learning_rate": 0.02, "progress": False, "measure": False}
    return model, train(model, data, TrainSettings(output=output, **{**common, **how}))


@pytest.mark.parametrize(
    "config",
    [
        ss.SparseConfig(density=0.05, samples=6, value_dtype="bfloat16"),
        ss.SparseConfig(density=0.05, select="grow", grow_every=3),
        ss.SparseConfig(density=0.05, select="magnitude", full_epochs=1, full_rate=0.01),
        ss.SparseConfig(density=0.05, select="magnitude", full_epochs=3, full_rate=0.01),  # stopped in its first stage
    ],
    ids=["fisher", "grow", "magnitude", "magnitude-first"],
)
def test_a_resumed_run_is_the_uninterrupted_one(backbone: Path, tmp_path: Path, config: ss.SparseConfig) -> None:
    whole, results = run(backbone, tmp_path / "whole", config, save_steps=3, accumulate=2, epochs=3)
    assert results.trainable_parameters == len(whole.sparse.values) + sum(p.numel() for p in whole.head.parameters())
    part = tmp_path / "part"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sidestep.training.callbacks.StopIfDiverged.on_log", _stop_at(5))
        with pytest.raises(KeyboardInterrupt):
            run(backbone, part, config, save_steps=3, accumulate=2, epochs=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sidestep.training.train.initialise", None)  # the support is loaded, not chosen again
        resumed, _ = run(backbone, part, config, save_steps=3, accumulate=2, epochs=3, resume=True)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    saved = [load_file(folder / task_folder.WEIGHTS) for folder in (tmp_path / "whole", part)]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())


def test_settings_that_fit_no_stage_are_refused_before_the_first(backbone: Path, tmp_path: Path) -> None:
    config = ss.SparseConfig(density=0.05, select="magnitude", full_epochs=2)
    with pytest.raises(ValueError, match=r"in the first stage of sparse: milestones=\(3,\)"):
        run(backbone, tmp_path / "run", config, epochs=4, schedule="step", milestones=(3,))
    assert not (tmp_path / "run").exists()


def _stop_at(step: int) -> Callable[..., None]:
    def on_log(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= step:
            raise KeyboardInterrupt

    return on_log


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["float32", "bfloat16", "float16"])
@torch.no_grad()
def test_a_saved_task_is_the_scored_model(tmp_path: Path, weights: torch.dtype, values: Any) -> None:
    config = ss.SparseConfig(density=0.05, select="random", value_dtype=values)
    model = changed(attached(config, BERT.model().to(weights))).eval()
    expected = logits(model(**BERT.inputs()))
    model.save_pretrained(tmp_path / "task")
    again = ss.load(tmp_path / "task", BERT.model().to(weights))
    assert torch.equal(logits(again(**BERT.inputs())), expected)
    stored = load_file(tmp_path / "task" / task_folder.WEIGHTS)
    assert str(stored["sparse.values"].dtype) == f"torch.{values}"
    told = task_folder.inspect_task(tmp_path / "task")
    assert told["parameters"] == sum(p.numel() for _, p in model.trained_parameters())
    bare = ss.detach(again)
    before = BERT.model().to(weights).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())


@pytest.mark.parametrize("name", ["sparse.positions", "sparse.values"])
def test_a_flipped_bit_is_found_before_anything_is_applied(tmp_path: Path, name: str) -> None:
    changed(attached()).save_pretrained(tmp_path / "task")
    path = tmp_path / "task" / task_folder.WEIGHTS
    for damage in (_flipped(path, name), path.read_bytes()[:-7]):
        path.write_bytes(damage)
        backbone = BERT.model()
        with pytest.raises(task_folder.TaskError, match="is damaged"):
            ss.load(tmp_path / "task", backbone)
        assert all(torch.equal(p, q) for p, q in zip(backbone.parameters(), BERT.model().parameters(), strict=True))


def _flipped(path: Path, name: str) -> bytes:
    """The file with one bit of a tensor flipped."""
    data, tensor = bytearray(path.read_bytes()), load_file(path)[name]
    place = data.index(tensor.view(torch.uint8).numpy().tobytes()) + 50
    data[place] ^= 4
    return bytes(data)


def test_the_codecs_own_checksum_guards_a_file_with_a_forged_one(tmp_path: Path) -> None:
    changed(attached()).save_pretrained(tmp_path / "task")
    task = task_folder.read(tmp_path / "task")
    task.tensors["sparse.values"][3] += 1
    with pytest.raises(task_folder.TaskError, match="checksum of the diff"):
        loading._unpacked(task, attached())


def test_another_backbone_precision_or_resized_embeddings_are_refused(tmp_path: Path) -> None:
    changed(attached()).save_pretrained(tmp_path / "task")
    with pytest.raises(task_folder.TaskError, match="digest"):
        ss.load(tmp_path / "task", BERT.model(seed=9))
    resized = BERT.model()
    resized.resize_token_embeddings(44, mean_resizing=False)
    before = [p.clone() for p in resized.parameters()]
    with pytest.raises(task_folder.TaskError, match="digest"):
        ss.load(tmp_path / "task", resized)
    with (
        pytest.warns(loading.BackboneMismatch),
        pytest.raises(task_folder.TaskError, match=r"does not have in that shape: .*word_embeddings.*not resized"),
    ):
        ss.load(tmp_path / "task", resized, allow_mismatch=True)
    assert all(torch.equal(p, q) for p, q in zip(resized.parameters(), before, strict=True))
    half = BERT.model().bfloat16()
    before = [p.clone() for p in half.parameters()]
    with pytest.raises(task_folder.TaskError, match="load the backbone in float32, or pass allow_mismatch=True"):
        ss.load(tmp_path / "task", half)
    assert all(torch.equal(p, q) for p, q in zip(half.parameters(), before, strict=True))
    with pytest.warns(loading.DtypeMismatch, match="float32.*bfloat16"):
        ss.load(tmp_path / "task", half, allow_mismatch=True)


@pytest.mark.parametrize("values", ["bfloat16", "float16"])
def test_values_beyond_their_precision_are_not_saved(tmp_path: Path, values: Any) -> None:
    model = attached(ss.SparseConfig(density=0.05, select="random", value_dtype=values))
    with torch.no_grad():
        model.sparse.values[7] = torch.finfo(torch.float32).max
    with pytest.raises(task_folder.TaskError, match=f"cannot be saved: .* out of the range of torch.{values}"):
        model.save_pretrained(tmp_path / "task")
    assert not (tmp_path / "task").exists()


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"density": 0}, "density=0, but it must be a number above 0 and at most 1"),
        ({"density": "0.5"}, "density='0.5', but it must be a finite number"),
        ({"density": 1.5}, "density=1.5"),
        ({"select": "best"}, "select='best', but it must be \"fisher\", "),
        ({"value_dtype": "int8"}, "value_dtype='int8'"),
        ({"samples": 0}, "samples=0"),
        ({"full_rate": float("inf")}, "full_rate=inf, but it must be a finite number"),
        ({"grow_share": 1.0}, "grow_share=1.0"),
        ({"grow_share": "0.2"}, "grow_share='0.2', but it must be a finite number"),
    ],
)
def test_values_out_of_range(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ss.SparseConfig(**fields)


def test_a_density_of_less_than_one_weight_and_quantised_weights_are_refused() -> None:
    with pytest.raises(ss.UnsupportedBackbone, match=r"density=1e-09 of its \d+ weights is less than one"):
        attached(ss.SparseConfig(density=1e-9))
    backbone = BERT.model()
    layer = backbone.base_model.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ss.UnsupportedBackbone, match=r"weights are quantised \(int8\).*train a side network"):
        attached(backbone=backbone)


def test_all_weights_may_be_chosen() -> None:
    model = attached(ss.SparseConfig(density=1, select="random"))
    assert torch.equal(model.sparse.positions, torch.arange(model.sparse.total))
