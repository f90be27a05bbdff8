"""Measure what an edit did. This package knows no editing method."""
