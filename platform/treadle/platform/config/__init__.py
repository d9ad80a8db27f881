"""Configuration: frozen dataclasses filled from YAML and `key=value` overrides, checked before anything
starts."""

from treadle.platform.config.loading import load
from treadle.platform.config.schema import members_of, variant, variant_map, variants
from treadle.platform.config.views import (
    Scalar,
    diff_from_defaults,
    fingerprint,
    flatten,
    to_yaml,
)

__all__ = [
    "Scalar",
    "diff_from_defaults",
    "fingerprint",
    "flatten",
    "load",
    "members_of",
    "to_yaml",
    "variant",
    "variant_map",
    "variants",
]
