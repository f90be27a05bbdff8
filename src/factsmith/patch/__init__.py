"""Decide whether a Delta deserves to be kept: plan, layers, proof, gates."""
