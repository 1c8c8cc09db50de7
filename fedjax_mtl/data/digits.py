"""The handwritten digits that scikit-learn ships: real data, no download."""

import numpy as np


def load_digits() -> dict[str, np.ndarray]:
    """Reads 1,797 grey images of handwritten digits, 8x8 pixels.

    Source: UCI ML hand-written digits (Alpaydin, Kaynak), as in ``sklearn.datasets.load_digits``.

    Returns:
        ``inputs`` float32 ``[1797, 8, 8, 1]`` in [0, 1], and ``labels`` int32 ``[1797]``, 0-9.
    """
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = (bunch.images / 16.0).astype(np.float32)[..., None]
    return {"inputs": images, "labels": bunch.target.astype(np.int32)}
