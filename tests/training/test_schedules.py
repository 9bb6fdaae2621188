"""Learning rates over a run: equal to transformers' and timm's own, and to what the releases step by."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import get_scheduler

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields
from sidestep.disk import task_folder
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.training import checkpoints
from sidestep.training.callbacks import EpochClock, StopIfDiverged
from sidestep.training.schedules import rate_factor
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from sidestep.training.trainer import make_trainer
from small_tasks import reviews, text_backbone

STEPS = 7  # of an epoch
DTL = {
    "schedule": "cosine_epochs",
    "epochs": 110,
    "warmup_epochs": 10,
    "start_rate": 1e-7,
    "end_rate": 1e-8,
}


def rates(rate: float, **how: object) -> list[float]:
    """The learning rate at each step of a run."""
    settings = TrainSettings(output=Path("out"), **how)
    factor = rate_factor(settings, rate, STEPS)
    return [rate * factor(step) for step in range(settings.epochs * STEPS)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_schedules_are_those_of_transformers(schedule, warmup):
    steps = 4 * STEPS
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=int(warmup * steps), num_training_steps=steps)
    ours = rates(0.5, epochs=4, schedule=schedule, warmup=warmup)
    for rate in ours:
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        theirs.step()


def test_steps_are_those_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
    ours = rates(0.5, epochs=6, schedule="step", milestones=(2, 5), warmup=0)
    for epoch in range(6):
        assert ours[epoch * STEPS : (epoch + 1) * STEPS] == pytest.approx([theirs.get_last_lr()[0]] * STEPS)
        optimizer.step()
        theirs.step()
    rising = rates(0.5, epochs=6, schedule="step", milestones=(2,), warmup_steps=10)
    assert rising[:11] == pytest.approx([0.05 * step for step in range(11)])
    assert rising[11:14] == [0.5] * 3
    assert rising[14:] == pytest.approx([0.05] * 28)


def test_a_warm_up_in_steps_may_be_longer_than_the_run():
    assert rates(1.0, epochs=2, warmup_steps=500) == pytest.approx([step / 500 for step in range(14)])
    assert rates(1.0, epochs=2, warmup_steps=4)[:6] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.9])


@pytest.mark.parametrize("rate", [1e-3, 8e-3])
def test_a_cosine_by_epochs_is_timms_scheduler_as_dtl_steps_it(rate):
    scheduler = pytest.importorskip("timm.scheduler")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    theirs = scheduler.CosineLRScheduler(
        optimizer, t_initial=100, lr_min=1e-8, warmup_t=10, warmup_lr_init=1e-7, warmup_prefix=False
    )
    ours = rates(rate, **DTL)
    for epoch in range(110):
        theirs.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        assert ours[epoch * STEPS : (epoch + 1) * STEPS] == pytest.approx([expected] * STEPS, rel=1e-9)


def test_dtls_rates_are_those_of_its_page():
    by_epoch = [math.nan, *rates(1e-3, **DTL)[::STEPS]]
    assert by_epoch[1] == pytest.approx(1e-7)
    assert by_epoch[10] == pytest.approx(0.9e-3, rel=1e-4)
    assert by_epoch[11] == pytest.approx(0.9755e-3, rel=1e-4)
    assert by_epoch[100] == pytest.approx(2.6e-7, rel=0.02)
    assert by_epoch[101:] == pytest.approx([1e-8] * 10)


def test_synqts_rates_rise_from_zero_and_end_at_the_floor():
    ours = rates(1e-3, schedule="cosine", epochs=50, warmup_epochs=10, end_rate=1e-6)
    rise = 10 * STEPS
    assert ours[0] == 0
    assert ours[1] == pytest.approx(1e-3 / rise)
    assert ours[rise] == pytest.approx(1e-3)
    half = ours[rise + 20 * STEPS]
    assert half == pytest.approx((1e-3 + 1e-6) / 2)
    assert ours[-1] == pytest.approx(1e-6, rel=0.05)
    assert min(ours[rise:]) > 1e-6


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"schedule": "zigzag"},
            '=\'zigzag\', but it must be "linear", "cosine", "cosine_epochs", "step" or "constant"',
        ),
        ({"warmup_epochs": 10}, "warmup_epochs=10, but it must be at least 0 and below the 10 epochs"),
        ({"warmup_epochs": 5, "schedule": "cosine_epochs"}, "Warm up for less than half of the epochs"),
        ({"warmup_steps": -1}, "warmup_steps=-1, but it must be at least 0, or not given"),
        ({"warmup_steps": 5, "warmup_epochs": 1}, "warmup_steps=5 with warmup_epochs=1 and schedule='linear': give"),
        ({"warmup_steps": 5, "schedule": "cosine_epochs"}, "epochs where the schedule is set once an epoch"),
        ({"schedule": "step"}, "milestones=() with schedule='step': the schedule 'step' needs the epochs"),
        ({"milestones": (2,)}, "rate falls, and no other takes them"),
        ({"milestones": (5, 5), "schedule": "step"}, "but it must be epochs from 1 to 9, ascending"),
        ({"milestones": (10,), "schedule": "step"}, "but it must be epochs from 1 to 9, ascending"),
        ({"end_rate": -1.0}, "end_rate=-1.0, but it must be a number of at least 0"),
        ({"decay": "some"}, 'decay=\'some\', but it must be "weights" or "all"'),
    ],
)
def test_settings_that_make_no_schedule_are_refused(how, said):
    with pytest.raises(ValueError, match=r"must be|Warm up|give one|milestones") as caught:
        TrainSettings(output=Path("out"), **how)
    assert said in str(caught.value)


# --- in the Trainer ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return text_backbone(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def data(backbone) -> TaskData:
    fields = Fields(text="text", label="label")
    rows = [Dataset.from_list(reviews(count, seed)) for count, seed in ((20, 0), (11, 1))]
    return prepare(*rows, fields, load_processor(backbone))


def attached(backbone: Path, data: TaskData) -> ss.SideModel:
    torch.manual_seed(0)
    return ss.attach(load_backbone(backbone), ss.ReadConfig(rank=4), head=head_for(data))


def settings(output: Path, **how: object) -> TrainSettings:
    return TrainSettings(
        output=output, **{"batch_size": 8, "learning_rate": 0.01, "progress": False, "measure": False, **how}
    )


def test_the_trainer_steps_by_the_schedule_and_resumes_it_exactly(backbone, data, tmp_path, monkeypatch):
    how = {
        "schedule": "cosine_epochs",
        "epochs": 5,
        "warmup_epochs": 1,
        "end_rate": 1e-4,
        "log_steps": 1,
        "patience": 0,
    }
    train(attached(backbone, data), data, settings(tmp_path / "whole", **how))

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(attached(backbone, data), data, settings(tmp_path / "parts", **how))
    train(attached(backbone, data), data, settings(tmp_path / "parts", **how, resume=True))

    def stepped(folder: str) -> list[float]:
        last = checkpoints.last_complete(tmp_path / folder / checkpoints.FOLDER)
        log = checkpoints.read_state(last)["log_history"]
        return [entry["learning_rate"] for entry in log if "learning_rate" in entry]

    factor = rate_factor(settings(tmp_path, **how), 0.01, 3)
    assert stepped("whole") == stepped("parts") == pytest.approx([0.01 * factor(step) for step in range(15)])
    whole, parts = (load_file(tmp_path / folder / task_folder.WEIGHTS) for folder in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_weight_decay_leaves_out_biases_and_norms_unless_asked(backbone, data, tmp_path):
    def decayed(**how: object) -> set[str]:
        model = attached(backbone, data)
        given = settings(tmp_path, weight_decay=0.1, **how)
        trainer = make_trainer(model, data, given, "accuracy", None, EpochClock())
        optimizer = trainer.create_optimizer()
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}

    trained = {name for name, _ in attached(backbone, data).trained_parameters()}
    assert decayed(decay="all") == trained
    assert decayed() < trained
    assert "head.linear.weight" in decayed()
    assert not any(name.endswith("bias") for name in decayed())


def test_drop_last_leaves_out_training_rows_only(backbone, data, tmp_path):
    given = settings(tmp_path / "a", drop_last=True)
    trainer = make_trainer(attached(backbone, data), data, given, "accuracy", None, EpochClock())
    assert [len(batch["labels"]) for batch in trainer.get_train_dataloader()] == [8, 8]
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader()) == 11
    results = train(attached(backbone, data), data, settings(tmp_path / "b", drop_last=True, epochs=2))
    assert (results.epochs, results.history[-1]["epoch"]) == (2.0, 2.0)
    with pytest.raises(ValueError, match=r"drop_last with 20 training rows and batch_size=32: no batch"):
        train(attached(backbone, data), data, settings(tmp_path / "c", drop_last=True, batch_size=32))
