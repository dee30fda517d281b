import pytest
import torch
from detectron2.engine import HookBase, hooks
from torch import nn

from fiber_d2.engine.schedule_hooks import PlateauHook, WeightDecaySchedule, schedule_hook
from fiber_d2.engine.schedules import PlateauSchedule, PublishedCosine, warmup_multistep
from fiber_d2.engine.step import StepTrainer


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0]))
        self.v = nn.Parameter(torch.tensor([1.0]))

    def forward(self, batch):
        return {"loss": self.w.square().sum() + self.v.square().sum()}


class Recorder(HookBase):
    """What each step is made with: per group the rate and the decay."""

    def __init__(self):
        self.rows = {}

    def before_step(self):
        groups = self.trainer.optimizer.param_groups
        self.rows[self.trainer.iter] = [(g["lr"], g["weight_decay"]) for g in groups]


class Interrupt(HookBase):
    """Ctrl-C after iteration ``last``."""

    def __init__(self, last):
        self.last = last

    def after_step(self):
        if self.trainer.iter == self.last:
            raise KeyboardInterrupt


class Metrics(HookBase):
    """Stands for an evaluation after every third iteration, whose metric only falls."""

    def __init__(self, hook):
        self.hook = hook

    def after_step(self):
        if self.trainer.iter % 3 == 2:
            self.hook.observe(1.0 - self.trainer.iter / 100)


def make_trainer(*make_hooks, lr=0.1, decay=0.5):
    model = Square()
    groups = [
        {"params": [model.w], "lr": lr, "weight_decay": decay},
        {"params": [model.v], "lr": lr / 10, "weight_decay": 0.0},
    ]
    trainer = StepTrainer(model, torch.optim.AdamW(groups, lr=lr), [[]] * 100)
    recorder = Recorder()
    made = [make() for make in make_hooks]
    for hook in list(made):
        if isinstance(hook, PlateauHook):
            made.append(Metrics(hook))
    trainer.register_hooks([*made, recorder])
    return trainer, recorder


def multistep():
    schedule = warmup_multistep(max_iter=20, warmup_iters=4, milestones=[0.5, 0.8])
    return schedule_hook(schedule)


def cosine():
    return schedule_hook(PublishedCosine(max_iter=20, warmup_iters=4, min_lr=0.02))


def plateau():
    return schedule_hook(PlateauSchedule(patience=1, warmup_iters=5, min_lr=0.0005))


def falling_decay():
    return WeightDecaySchedule(max_iter=20, milestones=[0.5, 0.8], ratio=0.65, gamma=0.1)


def test_weight_decay_falls_at_its_share_of_the_milestones():
    trainer, recorder = make_trainer(falling_decay)
    trainer.train(0, 20)
    # 0.65 times 10 and 16: 6.5 and 10.4.
    expected = [0.5] * 7 + [0.05] * 4 + [0.005] * 9
    assert [row[0][1] for row in recorder.rows.values()] == pytest.approx(expected)
    assert all(row[1][1] == 0.0 for row in recorder.rows.values())


def test_the_published_iterations_of_pretraining():
    hook = WeightDecaySchedule(max_iter=800_000)
    assert hook.thresholds == pytest.approx([357_512, 474_904])


def test_cosine_sets_each_group_by_itself():
    trainer, recorder = make_trainer(cosine)
    trainer.train(0, 20)
    schedule = PublishedCosine(max_iter=20, warmup_iters=4, min_lr=0.02)
    for iteration, row in recorder.rows.items():
        assert [lr for lr, _ in row] == [schedule.lr(base, iteration) for base in (0.1, 0.01)]


def test_plateau_hook_follows_what_it_is_told():
    trainer, recorder = make_trainer(plateau)
    trainer.train(0, 20)
    rates = [row[0][0] for row in recorder.rows.values()]
    # The metrics after iterations 2 and, being the fifth call or later, 5, 8, ... : the one after
    # iteration 5 is the best; those after 8 and 11 are below it, so the rates drop once, and
    # again after 14 and 17.
    assert rates[5:12] == [0.1] * 7
    assert rates[12:18] == pytest.approx([0.01] * 6)
    assert rates[18:] == pytest.approx([0.001] * 2)


@pytest.mark.parametrize("make", [multistep, cosine, plateau])
@pytest.mark.parametrize("stop", [1, 3, 6, 9, 15])
def test_rates_and_decays_go_on_where_they_were(make, stop):
    whole, expected = make_trainer(make, falling_decay)
    whole.train(0, 20)
    first, found = make_trainer(make, falling_decay)
    first.register_hooks([Interrupt(stop - 1)])
    with pytest.raises(KeyboardInterrupt):
        first.train(0, 20)
    second, later = make_trainer(make, falling_decay)
    second.model.load_state_dict(first.model.state_dict())
    # As a checkpoint does: before training begins.
    second.load_state_dict(first.state_dict())
    second.train(second.iter + 1, 20)
    assert {**found.rows, **later.rows} == expected.rows
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value)


def test_a_checkpoint_without_a_falling_decay():
    first, _ = make_trainer(multistep)
    first.train(0, 8)
    first.iter = 7
    second, recorder = make_trainer(multistep, falling_decay)
    second.load_state_dict(first.state_dict())
    second.train(8, 12)
    assert [row[0][1] for row in recorder.rows.values()] == pytest.approx([0.05] * 3 + [0.005])


def test_a_scheduler_of_the_optimiser_is_taken_as_it_is():
    model = Square()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attached = PublishedCosine(max_iter=4).attach(optimizer)
    assert schedule_hook(attached).scheduler is attached
    assert type(schedule_hook(attached)) is hooks.LRScheduler
    plateau = PlateauSchedule().attach(optimizer)
    assert schedule_hook(plateau).scheduler is plateau


def test_no_schedule_and_no_ratio():
    with pytest.raises(ValueError, match="no schedule of learning rates"):
        schedule_hook({"milestones": [1, 2]})
    with pytest.raises(ValueError, match="not above 0"):
        WeightDecaySchedule(max_iter=10, ratio=0.0)
