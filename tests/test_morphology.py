"""Stroke width and slant of strokes drawn with known ones."""

import math

import pytest
import torch
from morphology import slant, stroke_width

from pyrovae.errors import DataError


def stroke(width, angle=0.0, size=40, length=26.0, finer=8):
    """A straight stroke, leaning to the right by ``angle``, with grey edges: the share of each pixel that it covers."""
    grid = (torch.arange(size * finer) + 0.5) / finer - size / 2
    r, c = grid.unsqueeze(1), grid.unsqueeze(0)
    across = c * math.cos(angle) + r * math.sin(angle)
    along = r * math.cos(angle) - c * math.sin(angle)
    ink = (across.abs() <= width / 2) & (along.abs() <= length / 2)
    return torch.nn.functional.avg_pool2d(ink.float()[None], finer)[0]


@pytest.mark.parametrize("angle", [0.0, 0.3, -0.5])
@pytest.mark.parametrize("width", [2.0, 3.0, 4.5, 6.0])
def test_the_width_of_a_stroke(width, angle):
    """Its two ends are nearer to an edge: they take w / (3 length) of it, relatively."""
    expected = width * (1 - width / (3 * 26))
    assert stroke_width(stroke(width, angle)).item() == pytest.approx(expected, abs=0.15)


def test_the_width_of_a_ring_has_no_ends():
    grid = (torch.arange(40 * 8) + 0.5) / 8 - 20
    radius = (grid.unsqueeze(1) ** 2 + grid**2).sqrt()
    ring = torch.nn.functional.avg_pool2d(((radius - 12).abs() <= 2).float()[None], 8)[0]
    assert stroke_width(ring).item() == pytest.approx(4.0, abs=0.15)


@pytest.mark.parametrize("angle", [-0.6, -0.2, 0.0, 0.1, 0.5])
def test_the_slant_of_a_thin_stroke_is_its_angle(angle):
    assert slant(stroke(1.0, angle, length=30.0)).item() == pytest.approx(angle, abs=0.01)


@pytest.mark.parametrize("angle", [-0.4, 0.3])
def test_a_sheared_figure_is_slanted_by_the_shear(angle):
    """Exactly so for a figure whose rows are each moved by a whole number of pixels."""
    r = torch.arange(21)
    image = torch.zeros(21, 60, dtype=torch.float64)
    moved = (-(r - 10) * math.tan(angle)).round().long()
    for row, shift in zip(r, moved, strict=True):
        image[row, 25 + shift : 35 + shift] = 1.0
    centred = (r - r.double().mean()).double()
    expected = -math.atan((centred * moved).sum() / (centred * centred).sum())
    assert slant(image).item() == pytest.approx(expected, abs=1e-12)
    assert slant(image).item() == pytest.approx(angle, abs=0.05)


def test_symmetric_figures_and_single_rows_have_no_slant():
    cross = torch.zeros(9, 9)
    cross[4], cross[:, 4] = 1.0, 1.0
    assert slant(cross) == 0
    assert slant(torch.ones(1, 5)) == 0


def test_batches_and_channels():
    images = torch.stack([stroke(2.0), stroke(4.0, 0.3)])
    for measure in (slant, stroke_width):
        one_by_one = torch.stack([measure(image) for image in images])
        for batch in (images, images.unsqueeze(1), images.double()):
            assert measure(batch).shape == (2,)
            torch.testing.assert_close(measure(batch).float(), one_by_one)
        assert measure(images.view(2, 1, 1, 40, 40)).shape == (2, 1)
    assert slant((images * 255).byte()).shape == (2,)


@pytest.mark.parametrize("measure", [slant, stroke_width])
def test_errors(measure):
    with pytest.raises(DataError, match="without ink: leave it out"):
        measure(torch.stack([stroke(2.0), torch.zeros(40, 40)]))
    with pytest.raises(DataError, match=r"images must be \[\.\.\., height, width\], got \[5\]"):
        measure(torch.ones(5))
    with pytest.raises(DataError, match="ink must not be negative"):
        measure(-stroke(2.0))


def test_ink_too_faint_for_a_stroke():
    with pytest.raises(DataError, match="no ink above 1/2"):
        stroke_width(stroke(2.0) * 0.4)
