import pytest

from lightning_modules.schedules import (
    Constant,
    Cosine,
    Exponential,
    InverseSquareRoot,
    Linear,
    Step,
    WarmupStableDecay,
)

STEPS = 100


def factors(schedule):
    return [schedule.factor(step, (step + 0.5) / STEPS) for step in range(STEPS)]


ALL = [Constant, Linear, Cosine, Step, Exponential, InverseSquareRoot, WarmupStableDecay]


@pytest.mark.parametrize("schedule", ALL)
def test_warm_up_in_steps_rises_in_a_line_from_above_zero_to_one(schedule):
    curve = factors(schedule(warmup_steps=9))
    plain = factors(schedule(warmup_steps=0)) if schedule is not InverseSquareRoot else [1.0] * STEPS
    assert [c / p for c, p in zip(curve[:9], plain, strict=False)] == pytest.approx([(i + 1) / 10 for i in range(9)])
    assert curve[20] > curve[0] > 0


@pytest.mark.parametrize("schedule", ALL)
def test_warm_up_as_a_fraction_of_the_run_takes_that_fraction(schedule):
    warmed, plain = factors(schedule(warmup_fraction=0.1)), factors(schedule(warmup_fraction=0.0))
    assert warmed[:10] < plain[:10] and warmed[10:] == plain[10:]


def test_the_shapes_end_where_they_say():
    end = {s: s(warmup_steps=0).factor(10**6, 1.0) for s in (Constant, Linear, Cosine, WarmupStableDecay)}
    assert end == {Constant: 1.0, Linear: 0.0, Cosine: pytest.approx(0.0), WarmupStableDecay: 0.0}
    assert Cosine(warmup_steps=0, final=0.1).factor(1, 1.0) == pytest.approx(0.1)


def test_warmup_stable_decay_is_constant_before_its_decay():
    curve = factors(WarmupStableDecay(warmup_steps=0, decay_fraction=0.4))
    assert curve[:60] == [1.0] * 60 and curve[59] > curve[60] > curve[99] > 0


def test_step_and_exponential_and_inverse_square_root_follow_the_step():
    assert Step(warmup_steps=0, every=10, gamma=0.5).factor(25, 0.1) == 0.25
    assert Exponential(warmup_steps=0, gamma=0.9).factor(3, 0.1) == pytest.approx(0.729)
    assert InverseSquareRoot(warmup_steps=100).factor(399, 0.1) == pytest.approx(0.5)


def test_a_fraction_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="warmup_fraction=1.5"):
        Cosine(warmup_fraction=1.5)
