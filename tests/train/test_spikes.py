"""What counts as a spike, on losses made for it."""

import math

import numpy as np
import pytest

from dsv3_book.train import spikes
from dsv3_book.train.spikes import find_spikes, told


def falling(count: int, noise: float = 0.05) -> np.ndarray:
    """A loss as of a healthy run."""
    return 3 + 5 * np.exp(-np.arange(count) / 200) + noise * np.random.default_rng(0).standard_normal(count)


def test_a_healthy_run_has_none() -> None:
    found = find_spikes(range(1, 1001), falling(1000))
    assert found.judged == 980 and found.over == [] and found.largest is not None and found.largest.rise < 6
    assert "No spike in this run" in told(found) and "980 steps" in told(found)


def test_a_spike_that_comes_back() -> None:
    loss = falling(1000)
    loss[600:610] += np.linspace(2.0, 0.2, 10)
    found = find_spikes(range(1, 1001), loss)
    assert found.over[0].step == 601 and found.largest == found.over[0]
    assert found.largest.loss == loss[600] and found.largest.usual == pytest.approx(np.median(loss[550:600]))
    deviation = np.median(abs(loss[550:600] - np.median(loss[550:600])))
    assert found.largest.rise == pytest.approx((loss[600] - found.largest.usual) / (1.4826 * deviation))
    assert found.largest.back is not None and 601 < found.largest.back < 640 and found.lasting == []
    assert "the loss came back to where it had been" in told(found) and "at step 601" in told(found)


def test_a_spike_that_stays() -> None:
    loss = falling(1000)
    loss[600:] += 2.0
    found = find_spikes(range(1, 1001), loss)
    assert found.lasting and found.lasting[0].step == 601
    assert "so far that spike is not overcome" in told(found) and "came back" not in told(found)


def test_too_short_flat_falling_and_holed() -> None:
    assert find_spikes([], []).largest is None and "Too few" in told(find_spikes([1], [2.0]))
    assert "Too few" in told(find_spikes(range(20), [1.0] * 20))
    flat = find_spikes(range(21), [1.0] * 21)
    assert flat.judged == 1 and flat.largest is None and "none lay above" in told(flat)
    assert find_spikes(range(100), np.linspace(5, 1, 100)).largest is None
    holes = [math.nan if i % 7 == 3 else 1.0 for i in range(100)]
    holes[86] = 1.5  # the spread of a constant loss is a thousandth of it
    found = find_spikes(range(100), holes)
    assert [spike.step for spike in found.over] == [86] and found.largest is not None
    assert found.largest.rise == pytest.approx(500) and found.largest.back == 88  # 87 is a hole


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = falling(300)
    loss[120] = 9.0
    whole = find_spikes(range(300), loss)
    monkeypatch.setattr(spikes, "BLOCK", 7)
    assert find_spikes(range(300), loss) == whole and whole.over
