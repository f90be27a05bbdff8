"""Patch: second moments, targets, solver and the Delta they yield."""
