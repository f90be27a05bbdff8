"""Fixtures for the tests of patches: models and workbenches."""

from workbenches import atlas_bench, bench, eager, lm  # noqa: F401
