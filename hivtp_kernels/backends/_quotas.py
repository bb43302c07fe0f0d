"""The quotas of any number of regions as eight integers, which a kernel takes by value."""

from __future__ import annotations

from functools import lru_cache

from ..config import region_bounds
from ..types import SelectParams

Classes = tuple[int, int, int, int]


@lru_cache(maxsize=1024)
def quota_classes(params: SelectParams) -> tuple[Classes, Classes]:
    """Write the quotas as `base[class] + (region < cut[class])`; returns `(base, cut)`.

    Rows of regions have one of two heights and columns one of two widths, so regions have at most
    four areas: class `2 * tall + wide`, where `tall` regions have more than `H / Ry` rows and
    `wide` regions more than `W / Rx` columns. A `PruneConfig` shares its budget by area and gives
    the remaining patches to the lower regions of a class, one each.

    Raises
    ------
    ValueError
        If the quotas do not have that form; those of a `PruneConfig` always do.
    """
    tall, wide = (
        [(stop - start) * count > extent for start, stop in region_bounds(extent, count)]
        for extent, count in zip(params.grid, params.regions, strict=True)
    )
    classes = [2 * t + w for t in tall for w in wide]
    base, cut = [0] * 4, [0] * 4
    for c in set(classes):
        members = [region for region, kind in enumerate(classes) if kind == c]
        base[c] = min(params.quotas[region] for region in members)
        above = [region for region in members if params.quotas[region] > base[c]]
        cut[c] = above[-1] + 1 if above else 0
    if params.quotas != tuple(base[c] + (region < cut[c]) for region, c in enumerate(classes)):
        raise ValueError(f"quotas must be those of a PruneConfig, got {params.quotas}")
    return (base[0], base[1], base[2], base[3]), (cut[0], cut[1], cut[2], cut[3])
