"""Data: from a loader or a DATA spec to checked batches of pixels and labels.

``batches`` reads and checks what a loader yields, ``images`` gathers what an evaluation attacks,
``train_batches`` and ``holdout`` split training data into seeded batches and held-out images, and
``loader`` makes a DataLoader from a DATA spec.

To add a data set: write a function (ROOT, split, size, augment) that returns an ``ImageSource``,
and enter it in ``datasets.SOURCES`` and ``datasets.DATA_HELP``.
"""

from .batches import check_images, check_labels, from_pixels, to_pixels, unpack
from .images import Images, gather
from .loader import load_data, to_measure

__all__ = ["Images", "check_images", "check_labels", "from_pixels", "gather", "load_data",
           "to_measure", "to_pixels", "unpack"]
