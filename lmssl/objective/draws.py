"""Random numbers that are a function of their key, such as (seed, purpose, position)."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import numpy.typing as npt


def uniforms(count: int, *key: int | str) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1) fixed by the key; fewer numbers of one key are the first of more.

    They come from the raw output of Philox, which NumPy keeps stable between releases.

    >>> bool((uniforms(2, 7, "prefix", 0) == uniforms(5, 7, "prefix", 0)[:2]).all())
    True
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    source = np.random.Philox(key=int.from_bytes(digest, "little"))
    bits: npt.NDArray[np.uint64] = source.random_raw(count) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53
