"""Learning curves: the mean and the band are those of the seeds, on axes that are the same for every method."""

import io

import numpy as np
import pytest
from minirlhf_course import plotting
from PIL import Image

from minirlhf.control.evaluation import Evaluation


def evaluations(*points: tuple[int, float]) -> list[Evaluation]:
    return [Evaluation(steps, 0.0, value) for steps, value in points]


@pytest.fixture
def axes():
    return plotting.panels()[1]


def test_the_mean_and_the_band_lie_between_the_points_that_all_seeds_have(axes) -> None:
    seeds = [evaluations((0, 0), (100, 100), (300, 500)), evaluations((100, 200), (200, 400))]
    curve = plotting.learning_curves(axes, seeds, "reinforce")
    assert (curve.env_steps[0], curve.env_steps[-1]) == (100, 200)
    # At 100 the seeds stand at 100 and 200; at 200 the first is half-way from 100 to 500.
    assert (curve.low[0], curve.mean[0], curve.high[0]) == (100, 150, 200)
    assert (curve.low[-1], curve.mean[-1], curve.high[-1]) == (300, 350, 400)
    np.testing.assert_allclose(curve.mean, np.linspace(150, 350, len(curve.mean)))


def test_every_seed_keeps_its_line_with_its_own_points(axes) -> None:
    seeds = [evaluations((0, 0), (100, 90)), evaluations((10, 5), (50, 60), (100, 70)), evaluations((0, 1), (120, 3))]
    plotting.learning_curves(axes, seeds, "ppo", label="mine")
    name, colour = plotting.LEARNERS["ppo"]
    drawn = [line for line in axes.get_lines() if line.get_color() == colour]
    *thin, thick = drawn
    assert [list(line.get_xdata()) for line in thin] == [[0, 100], [10, 50, 100], [0, 120]]
    assert thick.get_label() == "mine" and name == "PPO"
    assert all(line.get_linewidth() < thick.get_linewidth() for line in thin)


def test_the_axes_are_set_once_for_all_methods(axes) -> None:
    for who in ("reinforce", "#333333"):
        plotting.learning_curves(axes, [evaluations((0, 20), (10, 30))], who)
    assert axes.get_ylim() == (0, 520) and "environment steps" in axes.get_xlabel() and axes.get_ylabel()
    assert [text.get_text() for text in axes.texts] == ["solved: 475"]
    assert axes.get_legend_handles_labels()[1] == ["REINFORCE", "#333333"]


def test_one_evaluation_a_seed_is_a_curve_too_where_they_meet(axes) -> None:
    curve = plotting.learning_curves(axes, [evaluations((5, 10)), evaluations((5, 30))], "a2c", solved=None)
    assert set(curve.mean) == {20} and not axes.texts


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], "at least one evaluation"),
        ([[]], "at least one evaluation"),
        ([evaluations((0, 1)), []], "at least one evaluation"),
        ([evaluations((0, 1), (10, 2)), evaluations((20, 1), (30, 2))], "covered by all seeds"),
    ],
)
def test_what_can_not_be_drawn_is_an_error(axes, seeds, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plotting.learning_curves(axes, seeds, "reinforce")


def test_a_picture_takes_few_bytes_and_keeps_its_colours() -> None:
    """Committed lessons hold their pictures: 64 colours weigh a quarter, and must not shift what the legend says."""
    with plotting.style():
        figure, axes = plotting.panels()
        for height, (_, colour) in enumerate(plotting.LEARNERS.values()):
            axes.plot([0, 1], [height, height + 1], color=colour, linewidth=8)
            axes.fill_between([0, 1], [0, 1], [2, 3], color=colour, alpha=0.13)
    png = plotting.to_png(figure)
    assert png == plotting.to_png(figure) and len(png) < 40_000
    picture = Image.open(io.BytesIO(png))
    assert picture.mode == "P"
    shown = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    assert len({colour for _, colour in plotting.LEARNERS.values()}) == len(plotting.LEARNERS)
    for _, colour in plotting.LEARNERS.values():
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(shown - wanted).max(1).min() <= 8, colour
    few = plotting.to_png(figure, colours=8)
    assert len(Image.open(io.BytesIO(few)).convert("RGB").getcolors()) <= 8 and len(few) < len(png)


@pytest.mark.parametrize("colours", [2, 5, 16, 17, 64])
def test_a_picture_has_the_pixels_of_the_figure_in_its_palette(colours: int) -> None:
    with plotting.style():
        # An odd number of pixels: packed in pairs, one is left over.
        figure, axes = plotting.panels(width=2.01, constrained=False)
        axes.fill_between([0, 1], [0, 1], [2, 3], color=plotting.INK, alpha=0.3)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=100)
    whole = Image.open(stream).convert("RGB")
    assert whole.width % 2 == 1
    few = whole.quantize(colours, kmeans=2, dither=Image.Dither.NONE).convert("RGB")
    picture = Image.open(io.BytesIO(plotting.to_png(figure, dpi=100, colours=colours)))
    assert picture.size == whole.size and picture.convert("RGB").tobytes() == few.tobytes()
