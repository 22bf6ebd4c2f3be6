"""Pictures of data, samples, training and latent spaces.

Every function takes plain tensors and returns a matplotlib figure, which a notebook shows; given a path, it writes a
PNG as well, in one move (a reader never sees half a picture). Nothing here touches pyplot: no display, no global state.
"""

from pyrovae.plots.charts import curves, latent_plane, manifold, unit_activity
from pyrovae.plots.images import image_grid, image_rows, is_image, reconstructions, side_by_side

__all__ = [
    "curves", "image_grid", "image_rows", "is_image", "latent_plane", "manifold", "reconstructions", "side_by_side",
    "unit_activity",
]  # fmt: skip
