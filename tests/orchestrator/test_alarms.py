"""Each alarm on numbers that leave their range, and none on those of a sound run."""

import pytest

from model.watch import Reference
from orchestrator.alarms import NUMBERS, AlarmConfig, Alarms

REFERENCE = Reference("videos of a test", std=1.0, energy=1.0, low=-1.0, high=3.0)
SOUND = {
    "student/latent_std": 1.1,
    "student/latent_energy": 1.2,
    "student/latent_outside": 0.01,
    "student/score_gap": 0.2,
    "student/average_distance": 0.03,
    "student/update_cosine": 0.1,
    "critic/flow_middle": 1.1,
    "teacher/flow_middle": 1.0,
}
"""What the coordinator measures in a student update."""
DIVERGING = {
    "latent_std_ratio": {"student/latent_std": 2.0},
    "latent_std_kept": {"student/latent_std": 0.65},  # though that itself is in its range
    "latent_energy_ratio": {"student/latent_energy": 0.1},
    "latent_outside": {"student/latent_outside": 0.4},
    "score_gap_growth": {"student/score_gap": 2.1},
    "critic_lag": {"critic/flow_middle": 2.5},
    "average_distance": {"student/average_distance": 0.5},
    "update_cosine": {"student/update_cosine": -0.9},
}


def told(alarms: Alarms, **metrics: float) -> list[str]:
    return [said for _, said in alarms.look(0, alarms.numbers({**SOUND, **metrics}))]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_its_range_is_told_once_until_it_is_well(name: str) -> None:
    alarms = Alarms(AlarmConfig(updates=3), REFERENCE)
    for _ in range(12):
        assert not told(alarms)
    for _ in range(2):
        assert not told(alarms, **DIVERGING[name])
    assert not told(alarms)  # three in a row, not three in all
    said = [told(alarms, **DIVERGING[name]) for _ in range(5)]
    (sentence,) = said[2]
    assert [len(each) for each in said] == [0, 0, 1, 0, 0]
    assert sentence.startswith(f"{name} (") and "for 3 student updates; " in sentence
    assert "distill." in sentence.rpartition(";")[2]  # a setting to change
    assert not told(alarms)
    assert [len(told(alarms, **DIVERGING[name])) for _ in range(3)] == [0, 0, 1]


def test_a_sound_start_is_silent() -> None:
    """An initial student is pale, and its contrast overshoots before it settles."""
    alarms = Alarms(AlarmConfig(updates=1), REFERENCE)
    for std in (0.7, 0.75, 0.9, 1.1, 1.3, 1.28, 1.25, 1.2, 0.95):
        assert not told(alarms, **{"student/latent_std": std, "student/latent_energy": std**2})


def test_ranges_are_settings_and_wrong_ones_are_refused() -> None:
    alarms = Alarms(AlarmConfig(updates=1, ranges={"latent_outside": (0.0, 0.5)}), REFERENCE)
    assert not told(alarms, **DIVERGING["latent_outside"])
    with pytest.raises(
        ValueError, match="ranges names 'contrast', which is not watched; use latent_std_ratio"
    ):
        AlarmConfig(ranges={"contrast": (0.0, 1.0)})
    with pytest.raises(ValueError, match="give a lowest and a highest value"):
        AlarmConfig(ranges={"latent_outside": (1.0, 0.5)})


def test_without_a_reference_or_a_teacher_what_needs_them_is_absent() -> None:
    alarms = Alarms(AlarmConfig())
    seen = {"student/latent_std": 0.5, "student/latent_energy": 1.0, "critic/flow_middle": 1.0}
    numbers = alarms.numbers(seen)
    assert numbers == {"latent_std_kept": 1.0}
