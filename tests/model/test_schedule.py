import pytest

from model.schedule import learning_rate


@pytest.mark.parametrize("warmup", [1, 7, 4000])
@pytest.mark.parametrize("d_model", [13, 512, 1024])
def test_learning_rate_rises_linearly_then_falls_with_the_root_of_the_step(d_model, warmup):
    """The description in section 5.3, where the peak is (d_model * warmup_steps)^-0.5."""
    peak = 1 / (d_model * warmup) ** 0.5
    for step in (1, 2, 3, warmup - 1, warmup, warmup + 1, 2 * warmup, 100_003):
        if step >= 1:
            expected = peak * step / warmup if step <= warmup else peak * (warmup / step) ** 0.5
            assert learning_rate(step, d_model, warmup) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_peaks_at_the_end_of_warmup():
    rates = {step: learning_rate(step, 17, 31) for step in range(1, 200)}
    assert max(rates, key=rates.__getitem__) == 31


def test_learning_rate_of_the_papers_base_model_peaks_at_7e_4():
    assert learning_rate(4000, d_model=512, warmup_steps=4000) == pytest.approx(6.988e-4, rel=1e-4)


def test_learning_rate_is_multiplied_by_the_scale():
    for step in (1, 31, 997):
        assert learning_rate(step, 17, 31, scale=1.75) == pytest.approx(1.75 * learning_rate(step, 17, 31))
