"""The pictures: sizes and pixels where they are exact, and that every kind of input gives a whole file."""

import io
import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pyrovae import plots
from pyrovae.models import VAE
from pyrovae.plots.images import BETWEEN, CELL, FRAME, GAP


def read(figure):
    """The pixels of a figure as a notebook shows it."""
    return pixels(io.BytesIO(figure._repr_png_()))


def pixels(file):
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


@pytest.fixture(autouse=True)
def no_global_state(tmp_path):
    """No figure of pyplot's is left, no setting is changed, and no file but the PNG."""
    settings = dict(matplotlib.rcParams)
    yield
    assert plt.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings
    assert all(
        file.suffix == ".png" and not file.name.startswith(".") for file in tmp_path.rglob("*") if file.is_file()
    )


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
def test_image_grid_shows_every_pixel_as_a_square(shape):
    images = torch.rand(6, *shape)
    picture, side = read(plots.image_grid(images, columns=4)), CELL + GAP
    assert picture.shape == (2 * side + GAP, 4 * side + GAP, 3)
    for i, image in enumerate(images):
        top, left = GAP + i // 4 * side, GAP + i % 4 * side
        cell = picture[top : top + CELL, left : left + CELL]
        exact = (255 * image.reshape(-1, 8, 8).expand(3, 8, 8)).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(cell[::7, ::7], exact)
        assert np.array_equal(cell, exact.repeat(7, 0).repeat(7, 1))
    assert (picture[side + GAP :, 2 * side + GAP :] == 255).all()  # the two cells without an image


def test_a_white_image_stands_in_its_place():
    images = torch.zeros(9, 1, 28, 28)
    images[5] = 1
    picture, side = read(plots.image_grid(images)), CELL + GAP
    assert picture.shape == (3 * side + GAP, 3 * side + GAP, 3)
    assert (picture[side + GAP : 2 * side, 2 * side + GAP : 3 * side] == 255).all()
    assert (picture == 255).sum() == 3 * CELL**2
    assert (picture[side : side + GAP] == FRAME).all()


def test_values_outside_the_unit_interval_are_clipped():
    image = torch.tensor([[[-3.0, 2.0], [math.nan, math.inf]]])
    picture = read(plots.image_grid(image))[GAP:-GAP, GAP:-GAP, 0]
    assert np.array_equal(picture[:: CELL // 2, :: CELL // 2], [[0, 255], [0, 255]])


def test_a_title_adds_a_line():
    plain = read(plots.image_grid(torch.zeros(4, 8, 8)))
    titled = read(plots.image_grid(torch.zeros(4, 8, 8), title="four"))
    assert titled.shape == (len(plain) + 30, *plain.shape[1:])
    assert np.array_equal(titled[30:], plain)
    assert titled[:30].min() < 128


def test_groups_stand_side_by_side_under_their_names():
    one, other = torch.rand(9, 8, 8), torch.rand(4, 3, 10, 10)
    picture = read(plots.side_by_side({"data": one, "a name that is wider than its grid": other}))
    first, second = read(plots.image_grid(one)), read(plots.image_grid(other))
    assert np.array_equal(picture[30:, : first.shape[1]], first)
    left = first.shape[1] + BETWEEN
    assert np.array_equal(picture[30 : 30 + len(second), left : left + second.shape[1]], second)
    assert (picture[30 + len(second) :, left:] == 255).all()
    assert picture.shape[1] == left + 8 * len("a name that is wider than its grid")
    assert picture[:30, : first.shape[1]].min() < 128
    assert picture[:30, left:].min() < 128


def test_smooth_images_keep_their_place_and_their_mean():
    torch.manual_seed(0)
    images = 0.25 + 0.5 * torch.rand(2, 8, 8)
    sharp, smooth = (read(plots.image_grid(images, smooth=smooth)).astype(float) for smooth in (False, True))
    assert sharp.shape == smooth.shape
    for i in range(2):
        cells = [p[GAP : GAP + CELL, GAP + i * (CELL + GAP) :][:, :CELL, 0] for p in (sharp, smooth)]
        assert abs(cells[0].mean() - cells[1].mean()) < 2
        centres = cells[1][3::7, 3::7] - cells[0][3::7, 3::7]
        assert np.abs(centres).max() < 30
        assert len(np.unique(cells[0])) <= 64 < len(np.unique(cells[1]))


WRITERS = [
    lambda path: plots.image_grid(X, path),
    lambda path: plots.side_by_side({"a": X, "b": X}, path),
    lambda path: plots.image_rows({"a": X, "b": X}, path),
    lambda path: plots.reconstructions(X, X, path),
    lambda path: plots.curves(HISTORY, path),
    lambda path: plots.latent_plane(torch.arange(10.0).view(5, 2), path),
    lambda path: plots.unit_activity(X[0, 0, 0], X[0, 0, 1], path),
    lambda path: plots.manifold(lambda z: z[:, :1, None].expand(-1, 8, 8), path, event_shape=(8, 8), steps=2),
]


@pytest.mark.parametrize("draw", WRITERS)
def test_a_figure_is_written_as_it_is_shown(tmp_path, draw):
    draw(path := tmp_path / "new" / "picture.png")
    assert np.array_equal(pixels(path), read(draw(None)))


def test_rows_stand_in_their_order_whatever_their_lengths_and_names():
    long = "a name that is longer than a row"
    figure = plots.image_rows({"a": torch.ones(3, 8, 8), long: torch.zeros(1, 8, 8)})
    picture, row = read(figure), CELL + 2 * GAP
    left = picture.shape[1] - (3 * (CELL + GAP) + GAP)
    assert figure.texts[1].get_window_extent().x0 >= 0
    assert picture.shape[0] == 2 * row
    assert (picture[GAP : GAP + CELL, left + GAP : left + GAP + CELL] == 255).all()
    assert (picture[row + GAP : row + GAP + CELL, left + GAP : left + GAP + CELL] == 0).all()
    assert (picture[row:, left + row :] == 255).all()  # the page


@pytest.mark.parametrize("count", [1, 9, 10, 13])
def test_reconstructions_stand_below_their_data(count):
    figure = plots.reconstructions(torch.ones(count, 1, 8, 8), torch.zeros(count, 1, 8, 8))
    picture = read(figure)[:, 46:]  # right of the labels
    columns, row = min(count, 10), CELL + 2 * GAP
    assert picture.shape[:2] == (math.ceil(count / 10) * (2 * row + 6 * GAP) - 6 * GAP, columns * (CELL + GAP) + GAP)
    assert (picture[GAP : GAP + CELL, GAP : GAP + CELL] == 255).all()
    assert (picture[row + GAP : row + GAP + CELL, GAP : GAP + CELL] == 0).all()
    assert (picture == 0).sum() == 3 * count * CELL**2


HISTORY = [
    {
        "epoch": e + 1, "bound": -100 - 400 / (e + 1) ** 2, "validation_bound": -101.0, "reconstruction": -80.0,
        "kl": 20.0, "kl_per_unit": {"z": [1.0, 2.0]}, "active_units": {"h1": 5, "h2": 3}, "grad_norm": 10.0 / (e + 1),
        "learning_rate": 1e-3, "seconds": 1.0,
    }
    for e in range(30)
]  # fmt: skip


@pytest.mark.parametrize(
    "history",
    [
        HISTORY,
        HISTORY[:1],
        [{"bound": -1.0}, {"bound": -1.0}],
        [{"epoch": 1, "bound": math.nan}, {"epoch": 2, "bound": -math.inf}, {"epoch": 3, "bound": -3.0}],
        [{"epoch": 1, "bound": math.nan, "grad_norm": math.nan}],
        [{"epoch": 1, "bound": -3.0}, {"epoch": 2, "bound": -2.0, "validation_bound": -2.5}],
        [{"epoch": 1, "grad_norm": 0.0}],
        [{"bound": -1.0}] * 40,
    ],
)
@pytest.mark.filterwarnings("error")
def test_curves_of_any_history(history):
    picture = read(plots.curves(history))
    panels = {"bound", "reconstruction", "kl", "active_units", "grad_norm"} & set().union(*history)
    assert picture.shape[:2] == (390 * math.ceil(len(panels) / 3), 540 * min(len(panels), 3))
    assert picture.std() > 1


@pytest.mark.parametrize("units", [1, 2, 7])
@pytest.mark.parametrize("classes", [None, 1, 10, 15, 60])
@pytest.mark.filterwarnings("error")
def test_latent_plane(units, classes):
    torch.manual_seed(0)
    means = torch.randn(200, units, dtype=torch.float64)
    labels = None if classes is None else torch.arange(200) % classes
    plain = read(plots.latent_plane(means))
    picture = read(plots.latent_plane(means, labels=labels))
    assert picture.shape[0] == plain.shape[0] == 690
    assert np.array_equal(picture, plain) == (labels is None)


def test_latent_plane_shows_the_units_that_vary_most():
    torch.manual_seed(0)
    means = torch.randn(100, 4) * torch.tensor([0.1, 2.0, 0.1, 3.0])
    picture = read(plots.latent_plane(means))
    means[:, [0, 2]] = 0
    assert np.array_equal(picture, read(plots.latent_plane(means)))


def test_nothing_of_a_latent_plane_is_cut_off():
    corners = torch.tensor([[-2.26, -2.39, 0.0], [2.21, 1.15, 0.0]])
    figure = plots.latent_plane(corners, labels=torch.arange(2))
    figure.draw_without_rendering()
    assert figure.get_tightbbox().x0 > 0


@pytest.mark.parametrize("low", [0.3, 7.5])
@pytest.mark.parametrize("times", [1.8, 30.0])
def test_gradient_norms_have_several_ticks(low, times):
    (axes,) = plots.curves([{"grad_norm": low}, {"grad_norm": low * times}]).axes
    bottom, top = axes.get_ylim()
    assert sum(bottom <= tick <= top for tick in axes.get_yticks()) >= 3


def test_manifold_runs_left_to_right_and_bottom_to_top():
    class Decoder(nn.Module):
        def forward(self, z):
            assert not self.training
            assert (z[:, 2] == 0).all()
            on = (z[:, 0] > 0) & (z[:, 1] > 0)
            return on.float().reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    decoder = Decoder()
    picture = read(plots.manifold(decoder, latent_dim=3, event_shape=(1, 8, 8), steps=10))
    assert decoder.training
    assert picture.shape == (960, 960, 3)
    assert picture[[300, 300, 700, 700], [300, 700, 300, 700], 0].tolist() == [0, 255, 0, 0]


def test_a_smooth_manifold_leaves_gaps_and_keeps_its_order():
    def decode(z):
        return ((z[:, 0] > 0) & (z[:, 1] > 0)).float().view(-1, 1, 1).expand(-1, 8, 8)

    sharp, smooth = (
        read(plots.manifold(decode, event_shape=(8, 8), steps=4, smooth=smooth)) for smooth in (False, True)
    )
    cells = np.ix_([200, 750], [200, 750], [0])
    assert sharp[cells].flatten().tolist() == smooth[cells].flatten().tolist() == [0, 255, 0, 0]
    assert (sharp[750] == FRAME).all(-1).sum() < 3 < (smooth[750] == FRAME).all(-1).sum()


def test_manifold_of_a_model_in_its_own_dtype():
    vae = VAE((1, 8, 8), latent_dim=2, hidden=(4,)).double()
    assert read(plots.manifold(vae.decode, event_shape=vae.input_shape, steps=3)).std() > 0


@pytest.mark.parametrize("units", [1, 20, 50])
@pytest.mark.filterwarnings("error")
def test_unit_activity(units):
    torch.manual_seed(0)
    kl = torch.rand(units)
    active = read(plots.unit_activity(kl, torch.ones(units)))
    idle = read(plots.unit_activity(kl, torch.zeros(units)))
    blue = np.array([0x2F, 0x67, 0x96])
    assert active.shape == (660, 1080, 3)
    assert (active == blue).all(-1).sum() > 10_000
    assert not (idle == blue).all(-1).any()


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    plots.image_grid(torch.zeros(1, 8, 8), path := tmp_path / "grid.png")
    before = path.read_bytes()

    def fails(self, name, **options):
        name.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(OSError, match="no space"):
        plots.image_grid(torch.ones(1, 8, 8), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


X = torch.zeros(4, 1, 8, 8)


@pytest.mark.parametrize(
    ("draw", "match"),
    [
        (lambda p: plots.image_grid(torch.zeros(4, 784), p), r"images must be \[N, H, W\] .* got \(4, 784\)"),
        (lambda p: plots.image_grid(torch.zeros(4, 2, 8, 8), p), r"1 or 3 channels, got \(4, 2, 8, 8\)"),
        (lambda p: plots.image_grid(torch.zeros(0, 8, 8), p), r"got \(0, 8, 8\)"),
        (lambda p: plots.image_grid([1, 2], p), "got list"),
        (lambda p: plots.side_by_side({}, p), "groups is empty"),
        (lambda p: plots.image_rows({}, p), "groups is empty"),
        (lambda p: plots.image_rows({"a": X[:0]}, p), r"images of 'a' must be .* got \(0, 1, 8, 8\)"),
        (lambda p: plots.side_by_side({"a": X, "b": X[:0]}, p), r"images of 'b' must be .* got \(0, 1, 8, 8\)"),
        (
            lambda p: plots.side_by_side(dict.fromkeys("ab", torch.zeros(1, 10, 30_000)), p),
            r"x 60,\d+ pixels, a side has at most",
        ),
        (lambda p: plots.image_grid(X, p, columns=0), "columns must be an integer of at least 1"),
        (lambda p: plots.reconstructions(X, X[:3], p), r"one shape, got \(4, 1, 8, 8\) and \(3, 1, 8, 8\)"),
        (lambda p: plots.curves([], p), "history is empty"),
        (lambda p: plots.curves([{"epoch": 1}], p), "nothing to draw, only epoch"),
        (lambda p: plots.latent_plane(torch.zeros(3), p), r"means must be \[N, D\], got \(3,\)"),
        (lambda p: plots.latent_plane(torch.zeros(3, 2), p, labels=torch.zeros(2)), r"labels must be \[3\]"),
        (lambda p: plots.manifold(lambda z: z, p, latent_dim=1, event_shape=(8, 8)), "latent_dim must be"),
        (lambda p: plots.manifold(lambda z: z, p, event_shape=(2,)), r"what decode returns must be .*got \(400, 2\)"),
        (lambda p: plots.unit_activity(torch.zeros(2), torch.zeros(3), p), r"both be \[D\], got \(2,\) and \(3,\)"),
    ],
)
def test_errors_name_the_rule_the_value_and_the_fix(tmp_path, draw, match):
    with pytest.raises(ValueError, match=match):
        draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
