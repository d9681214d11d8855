"""Joint-embedding families: what is trained, as one module each."""

from __future__ import annotations

from importlib import import_module

from service.config import RunConfig
from service.families.base import Family


def build_family(config: RunConfig) -> Family:
    """Build `config.family`: `NameFamily` of `families/name.py`; weights follow torch's seed, or `init_from`."""
    module = import_module(f"{__name__}.{config.family.kind}")
    family = getattr(module, f"{type(config.family).__name__}Family")(config.family, config.data.image_size)
    family.views = config.family.views
    family.local_views = 0 if config.data.local is None else config.data.local.count
    if config.init_from is not None:
        from service.pretrained import load_initial  # timm costs seconds to import

        load_initial(family, config.init_from)
    return family
