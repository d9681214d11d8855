"""Joint-embedding families: what is trained, as one module each."""

from __future__ import annotations

from service.config import RunConfig
from service.families.base import Family
from service.families.ijepa import IJepaFamily
from service.families.image_vicreg import ImageVicregFamily

FAMILIES = {"image_vicreg": ImageVicregFamily, "ijepa": IJepaFamily}


def build_family(config: RunConfig) -> Family:
    """Build the module of `config.family`; its weights depend on torch's seed."""
    return FAMILIES[config.family.kind](config.family, config.data.image_size)  # pyright: ignore[reportArgumentType]
