"""Films of CartPole, drawn from states: a strip of pictures, and a player for JupyterLab.

    films = [record(untrained, "untrained"), record(trained, "trained")]
    show(strip(films), "What to see here.")
    Player(films)

Cart and pole are drawn at twice their size: the track is 4.8 m long, the pole 1 m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import numpy as np
import torch
import traitlets

from minirlhf.control.environments import make_envs, to_environment
from minirlhf.control.policies import Policy
from minirlhf.report.plotting import GRID
from minirlhf.training import generator_for
from minirlhf_course.plotting import COLOURS, INK, QUIET, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Film", "Player", "record", "strip"]

ENV = "CartPole-v1"
TAU, TRACK, TILT = 0.02, 2.4, math.radians(12)
"""Seconds per step; the position, in metres, and the angle from upright beyond which an episode ends."""
CART, POLE = (0.8, 0.4), 2.0
"""Width and height of the cart, length of the pole: twice what they are."""
UP, DOWN = COLOURS["sft"], COLOURS["ppo"]
"""Colours of a pole that is up, and of one whose episode is over."""


@dataclass(frozen=True)
class Film:
    """One episode of CartPole."""

    name: str
    states: np.ndarray
    """[T + 1, 4], from the first state to the last: position, its speed, angle, its speed; m and radians."""

    @property
    def steps(self) -> int:
        return len(self.states) - 1

    @property
    def failed(self) -> bool:
        """Whether the episode ended before its time was up."""
        x, _, theta, _ = np.abs(self.states[-1])
        return bool(x > TRACK or theta > TILT)

    @property
    def end(self) -> str:
        how = "still up" if not self.failed else "left the track" if abs(self.states[-1, 0]) > TRACK else "fell"
        return f"{how} after {self.steps} steps"


@torch.inference_mode()
def record(policy: Policy, name: str, *, greedy: bool = False, seed: int = 1000) -> Film:
    """Play one episode and keep its states: the episode of `evaluate(policy, "CartPole-v1", 1)` with this seed.

    Args:
        policy: who plays; not changed.
        name: of the film.
        greedy: play the most likely action instead of sampling.
        seed: of the environment and of the sampling.

    Example:
        >>> from minirlhf.control.policies import make_networks
        >>> film = record(make_networks("CartPole-v1").policy, "untrained")
        >>> film.states.shape == (film.steps + 1, 4), film.end == f"fell after {film.steps} steps"
        (True, True)
    """
    envs, generator = make_envs(ENV, 1), generator_for(seed, "control/evaluation")
    observations, _ = envs.reset(seed=seed)
    states, running = [observations[0]], True
    while running:
        outputs = policy(torch.from_numpy(np.asarray(observations, dtype=np.float32)))
        actions = policy.mode(outputs) if greedy else policy.sample(outputs, generator)
        observations, _, terminated, truncated, _ = envs.step(to_environment(actions, envs.single_action_space))
        states.append(observations[0])
        running = not (terminated[0] or truncated[0])
    envs.close()
    return Film(name, np.stack(states))


def strip(films: Sequence[Film], frames: int = 7) -> Figure:
    """A row of pictures per film, from its first state to its last at equal distances, the time below each.

    Args:
        films: what to draw, from top to bottom.
        frames: pictures in a row.
    """
    pitch = 2 * TRACK + 0.8
    with style():
        figure, rows = panels(len(films), 1, width=9.0, height=1.2)
        for axes, film in zip(np.atleast_1d(rows), films, strict=True):
            axes.set_title(f"{film.name}: {film.end}", color=DOWN if film.failed else INK)
            axes.set_xlim(-pitch / 2, (frames - 0.5) * pitch)
            axes.set_ylim(-1.3, CART[1] + 1.1 * POLE)
            axes.set_aspect("equal")
            axes.axis("off")
            for place, step in enumerate(np.unique(np.linspace(0, film.steps, frames).round().astype(int))):
                over = film.failed and step == film.steps
                _frame(axes, place * pitch, film.states[step, 0], film.states[step, 2], DOWN if over else UP)
                axes.text(place * pitch, -0.3, f"{step * TAU:.2f} s", ha="center", va="top", fontsize=8, color=QUIET)
    return figure


def _frame(axes: Any, middle: float, x: float, theta: float, colour: str) -> None:
    """Track, cart and pole; dotted, the angles at which an episode ends."""
    from matplotlib.patches import Rectangle

    axes.plot([middle - TRACK, middle + TRACK], [0, 0], color=QUIET, linewidth=1, marker="|", markersize=5)
    pivot = np.array([middle + x, CART[1]])
    for angle in (-TILT, TILT):
        tip = pivot + 1.08 * POLE * np.array([math.sin(angle), math.cos(angle)])
        axes.plot(*zip(pivot, tip, strict=True), color=QUIET, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.add_patch(Rectangle((pivot[0] - CART[0] / 2, 0), *CART, facecolor=GRID, edgecolor=INK, linewidth=0.8))
    tip = pivot + POLE * np.array([math.sin(theta), math.cos(theta)])
    axes.plot(*zip(pivot, tip, strict=True), color=colour, linewidth=3, solid_capstyle="round", gid="pole")


class Player(anywidget.AnyWidget):
    """The films side by side on one clock, in JupyterLab: play, pause, a slider for the time.

    It runs in the page and asks the kernel nothing. Where there is no kernel, `strip` shows the films.

    Args:
        films: what to play.

    Example:
        >>> film = Film("standing", np.array([[0.0, 0, 0, 0], [0.0004, 0, 0.0126, 0]]))
        >>> Player([film]).films
        [{'name': 'standing', 'end': 'still up after 1 steps', 'failed': False, 'x': [0, 0], 'theta': [0, 13]}]
    """

    _esm = Path(__file__).with_name("films.js")
    films: Any = traitlets.List().tag(sync=True)
    """Of each film its words, and for each step the position in mm and the angle in thousandths of a radian."""
    drawn: Any = traitlets.Dict().tag(sync=True)
    """Sizes and colours, the strip's."""

    def __init__(self, films: Sequence[Film]) -> None:
        thousandths = [np.rint(1000 * film.states[:, [0, 2]]).astype(int).T.tolist() for film in films]
        super().__init__(
            films=[
                {"name": film.name, "end": film.end, "failed": film.failed, "x": x, "theta": theta}
                for film, (x, theta) in zip(films, thousandths, strict=True)
            ],
            drawn={
                "tau": TAU, "track": TRACK, "tilt": math.degrees(TILT), "cart": CART, "pole": POLE,
                "up": UP, "down": DOWN, "ink": INK, "quiet": QUIET, "grid": GRID,
            },
        )  # fmt: skip
