"""The quotas of any number of regions as eight integers, which a kernel takes by value."""

from __future__ import annotations

from functools import lru_cache

from ..config import Rule, region_bounds

Classes = tuple[int, int, int, int]


@lru_cache(maxsize=1024)
def quota_classes(rule: Rule) -> tuple[Classes, Classes]:
    """Write the quotas as `base[class] + (region < cut[class])`; returns `(base, cut)`.

    Rows of regions have one of two heights and columns one of two widths, so regions have at most
    four areas: class `2 * tall + wide`, where `tall` regions have more than `H / Ry` rows and
    `wide` ones more than `W / Rx` columns. Every `PruneConfig` shares its budget by area, and the
    patches left over go to the lower regions of a class, one each.

    Raises
    ------
    ValueError
        Where the quotas do not have that form, which no `PruneConfig` makes.
    """
    tall, wide = (
        [(stop - start) * count > extent for start, stop in region_bounds(extent, count)]
        for extent, count in zip(rule.grid, rule.regions, strict=True)
    )
    classes = [2 * t + w for t in tall for w in wide]
    base, cut = [0] * 4, [0] * 4
    for c in set(classes):
        members = [region for region, kind in enumerate(classes) if kind == c]
        base[c] = min(rule.quotas[region] for region in members)
        above = [region for region in members if rule.quotas[region] > base[c]]
        cut[c] = above[-1] + 1 if above else 0
    if rule.quotas != tuple(base[c] + (region < cut[c]) for region, c in enumerate(classes)):
        raise ValueError(f"quotas must be those that a PruneConfig makes, got {rule.quotas}")
    return (base[0], base[1], base[2], base[3]), (cut[0], cut[1], cut[2], cut[3])
