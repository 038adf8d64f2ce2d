"""Films show what the environment did: its states, its limits, its clock, and how the episode ended."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from minirlhf_course import films
from minirlhf_course.films import Film, Player, record, strip
from minirlhf_course.plotting import to_png

from minirlhf.control.environments import make_envs
from minirlhf.control.evaluation import evaluate
from minirlhf.control.policies import Policy, make_networks

EVIL = "<img src=x onerror='window.ran = true'><script>window.ran = true</script>"


class Balance(Policy):
    """Pushes to where the pole falls: up for the whole episode."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), torch.nn.Identity())

    def outputs_of(self, features: torch.Tensor) -> torch.Tensor:
        lean = features @ torch.tensor([0.1, 0.5, 10.0, 1.0])
        return torch.stack((-lean, lean), -1)

    def mode(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(-1)


def film(name: str, x: list[float], theta: list[float]) -> Film:
    return Film(name, np.stack([x, np.zeros(len(x)), theta, np.zeros(len(x))], 1))


def poles(figure) -> list[list[tuple[float, float, str]]]:
    """Of each row its poles: how far the tip is from the pivot, sideways and up, and the colour."""
    lines = [[line for line in axes.get_lines() if line.get_gid() == "pole"] for axes in figure.axes]
    return [[(*np.diff(line.get_xydata(), axis=0)[0], line.get_color()) for line in row] for row in lines]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("seed", [3, 4])
def test_a_film_is_the_episode_of_an_evaluation(greedy: bool, seed: int) -> None:
    policy = make_networks(films.ENV, seed=seed).policy
    recorded = record(policy, "untrained", greedy=greedy, seed=seed)
    assert recorded.steps == evaluate(policy, films.ENV, 1, greedy=greedy, seed=seed).item()
    assert recorded.failed and re.fullmatch(rf"fell after {recorded.steps} steps", recorded.end)


def test_every_state_follows_from_the_one_before_by_the_environments_physics() -> None:
    recorded = record(Balance(), "balance", greedy=True, seed=7)
    assert recorded.states.shape == (501, 4) and recorded.end == "still up after 500 steps" and not recorded.failed
    env = gymnasium.make(films.ENV).unwrapped
    start, _ = make_envs(films.ENV, 1).reset(seed=7)
    np.testing.assert_array_equal(recorded.states[0], start[0])
    policy, now = Balance(), torch.from_numpy(recorded.states)
    actions = policy.mode(policy(now)).tolist()
    for t in range(recorded.steps):
        env.reset()
        env.state = recorded.states[t].astype(np.float64)
        after, _, terminated, _, _ = env.step(actions[t])
        np.testing.assert_allclose(after, recorded.states[t + 1], atol=1e-6)
        assert not terminated


def test_the_clock_and_the_limits_are_the_environments() -> None:
    env = gymnasium.make(films.ENV).unwrapped
    assert (env.tau, env.x_threshold) == (films.TAU, films.TRACK)
    assert pytest.approx(env.theta_threshold_radians) == films.TILT
    assert pytest.approx(2 * 2 * env.length) == films.POLE  # the environment's is half a pole


def test_a_strip_has_the_first_state_the_last_and_those_between() -> None:
    x, theta = np.linspace(0, 2, 13), np.linspace(0.05, 0.23, 13)
    fell, up = film("fell", list(x), list(theta)), film("up", [0.0] * 13, list(-theta / 2))
    figure = strip([fell, up], frames=7)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "fell: fell after 12 steps",
        "up: still up after 12 steps",
    ]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.texts] == [f"{step * 0.02:.2f} s" for step in range(0, 13, 2)]
    first, second = poles(figure)
    for drawn, angles in ((first, theta[::2]), (second, -theta[::2] / 2)):
        wanted = [(films.POLE * math.sin(angle), films.POLE * math.cos(angle)) for angle in angles]
        np.testing.assert_allclose([tip[:2] for tip in drawn], wanted)
    assert [colour for *_, colour in first] == [films.UP] * 6 + [films.DOWN]  # only the last state is beyond the limit
    assert {colour for *_, colour in second} == {films.UP}
    carts = [patch.get_x() + patch.get_width() / 2 for patch in figure.axes[0].patches]
    offsets = np.array(carts) - x[::2]  # each picture has a track of its own, at equal distances
    np.testing.assert_allclose(np.diff(offsets), np.diff(offsets)[0])
    assert np.diff(offsets)[0] > 2 * films.TRACK


def test_a_strip_fits_its_labels_and_weighs_little() -> None:
    figure = strip([film(f"film {i}", [0.0, 2.5], [0.0, 0.1]) for i in range(4)])
    png = to_png(figure, colours=16)
    assert len(png) < 30_000
    box = figure.bbox
    for text in (text for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title)):
        at = text.get_window_extent()
        assert box.x0 <= at.x0 and at.x1 <= box.x1 and box.y0 <= at.y0 and at.y1 <= box.y1, text.get_text()
    assert figure.axes[0].get_title(loc="left") == "film 0: left the track after 1 steps"


def test_the_player_gets_each_state_to_three_digits() -> None:
    recorded = record(make_networks(films.ENV).policy, "untrained")
    (sent,) = Player([recorded]).films
    assert (sent["name"], sent["end"], sent["failed"]) == ("untrained", recorded.end, True)
    np.testing.assert_allclose(np.array(sent["x"]) / 1000, recorded.states[:, 0], atol=0.00051)
    np.testing.assert_allclose(np.array(sent["theta"]) / 1000, recorded.states[:, 2], atol=0.00051)


def test_the_player_is_small_asks_for_nothing_and_makes_no_markup_from_text() -> None:
    source = Path(films.__file__).with_name("films.js").read_text(encoding="utf-8")
    long = record(Balance(), "after 50,000 steps", greedy=True)
    short = [record(make_networks(films.ENV, seed=seed).policy, EVIL, seed=seed) for seed in range(3)]
    player = Player([*short, long])
    sent = json.dumps({"films": player.films, "drawn": player.drawn})  # data, never part of the program
    assert len(source) + len(sent) < 20_000
    assert EVIL in [film["name"] for film in player.films] and EVIL not in player._esm
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "DOMParser", "eval(", "Function("):
        assert way not in source
    addresses = re.findall(r"https?://[^\"'`\s]+", source)
    assert addresses == ["http://www.w3.org/2000/svg"], "the name of SVG, which nobody fetches"
    for request in ("fetch(", "XMLHttpRequest", "import(", "import ", "WebSocket", "url("):
        assert request not in source
