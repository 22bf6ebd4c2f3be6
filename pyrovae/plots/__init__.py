"""Pictures of data, samples, training and latent spaces, each written to one PNG.

Every function takes plain tensors and a path, writes the file in one move (a reader never sees half a picture) and
returns the path. Nothing here touches pyplot: no display, no global state.
"""

from pyrovae.plots.charts import curves, latent_plane, manifold, unit_activity
from pyrovae.plots.images import image_grid, is_image, reconstructions

__all__ = ["curves", "image_grid", "is_image", "latent_plane", "manifold", "reconstructions", "unit_activity"]
