"""Speak HTTP to a server that holds a model."""
