"""Whether the chunks of a tensor tile it.

Owns one exact answer for many tensors at once. Pure: no I/O, no communication.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from holdfast.format.layout import IntArray


def first_untiled(
    name: IntArray, offsets: IntArray, lengths: IntArray, sizes: IntArray
) -> int | None:
    """Return the number of a tensor whose chunks do not tile it exactly; None: all do.

    One row per chunk, `sizes` by tensor; missing dimensions have offset 0 and length 1. Exact: the
    signed corners of the boxes sum to those of the whole if and only if the boxes tile it.
    """
    filled = (lengths > 0).all(axis=1)
    varies = (offsets != 0) | (lengths != sizes[name])
    pieces = np.bincount(name[filled], minlength=len(sizes))
    lacking = np.flatnonzero((pieces == 0) & (sizes > 0).all(axis=1))
    if len(lacking):
        return int(lacking[0])
    pattern = np.zeros(len(sizes), dtype=np.int64)
    bits = varies[filled] @ (1 << np.arange(sizes.shape[1], dtype=np.int64))
    np.bitwise_or.at(pattern, name[filled], bits)
    for each in np.unique(pattern[(pieces > 1) | (pattern != 0)]).tolist():
        tensors = np.flatnonzero((pattern == each) & (pieces > 0))
        part = filled & (pattern[name] == each)
        split = [column for column in range(sizes.shape[1]) if each >> column & 1]
        owner = np.concatenate((name[part], tensors))
        low = np.concatenate((offsets[part], np.zeros_like(sizes[tensors])))[:, split]
        high = low + np.concatenate((lengths[part], sizes[tensors]))[:, split]
        weight = np.repeat([1, -1], [len(owner) - len(tensors), len(tensors)])
        corners, signs = [], []
        for ends in product((False, True), repeat=len(split)):
            corners.append(np.column_stack((owner, np.where(ends, high, low))))
            signs.append(weight * (-1) ** sum(ends))
        points, sign = np.concatenate(corners), np.concatenate(signs)
        order = np.lexsort(points.T[::-1])
        points = points[order]
        first = np.flatnonzero(np.append(True, (np.diff(points, axis=0) != 0).any(axis=1)))
        wrong = np.flatnonzero(np.add.reduceat(sign[order], first))
        if len(wrong):
            return int(points[first[wrong[0]], 0])
    return None
