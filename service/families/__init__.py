"""Joint-embedding families: what is trained, as one module each."""

from __future__ import annotations

from service.config import RunConfig
from service.families.base import Family
from service.families.ijepa import IJepaFamily
from service.families.image_vicreg import ImageVicregFamily

FAMILIES = {"image_vicreg": ImageVicregFamily, "ijepa": IJepaFamily}


def build_family(config: RunConfig) -> Family:
    """Build the module of `config.family`: its weights follow torch's seed, its encoders' `init_from` if given."""
    family = FAMILIES[config.family.kind](config.family, config.data.image_size)  # pyright: ignore[reportArgumentType]
    family.views = config.family.views
    family.local_views = 0 if config.data.local is None else config.data.local.count
    if config.init_from is not None:
        from service.pretrained import load_initial  # timm costs seconds to import

        load_initial(family, config.init_from)
    return family
