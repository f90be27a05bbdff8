"""How long work takes when layers are read from disk each time they run.

    streamed_seconds(80, 1.7e9, 2e9)                         # one pass over 80 layers: 68 s
    streamed_seconds(80, 1.7e9, 2e9, passes=LOADING_PASSES)  # until the model is loaded
    streamed_seconds(80, 1.7e9, 2e9, passes=search_passes(80, 20, steps=25))

A layer is computed while the next one is read, so a pass takes as long as the slower of the two.
"""

from __future__ import annotations

from ..core.checks import check_count, check_number

LOADING_PASSES = 12.4
"""Passes over all layers that the dry run of `load` makes: it proves the structure, causality, the
cache, padding and the replay from several layers."""

HANDLING_SECONDS = 0.0015
"""Seconds that a layer takes in addition: its files are checked, and a thread is started."""

FINGERPRINT_PASSES = 1.0
"""Passes that a fingerprint takes. Editing methods ask for it once."""


def streamed_seconds(
    n_layers: int,
    bytes_a_layer: float,
    disk_bytes_a_second: float,
    *,
    passes: float = 1.0,
    compute_seconds_a_layer: float = 0.0,
) -> float:
    """Return the seconds that some passes over a model with its layers on disk take.

    Args:
        n_layers: The number of layers.
        bytes_a_layer: Bytes of a layer as they are in the file.
        disk_bytes_a_second: What the disk delivers, the copy into memory included.
        passes: How often all layers run, forward or backward. See `search_passes`.
        compute_seconds_a_layer: How long a layer computes on its batch.

    Raises:
        InputError: An argument is not a number of its kind.
    """
    n_layers = check_count(n_layers, "n_layers", "the number of layers")
    size = check_number(bytes_a_layer, "bytes_a_layer", least=0)
    rate = check_number(disk_bytes_a_second, "disk_bytes_a_second", above=0)
    passes = check_number(passes, "passes", least=0)
    computing = check_number(compute_seconds_a_layer, "compute_seconds_a_layer", least=0)
    return n_layers * passes * (max(size / rate, computing) + HANDLING_SECONDS)


def search_passes(n_layers: int, layer: int, *, steps: int, batches: int = 1) -> float:
    """Return the passes over all layers that a search for targets takes at most.

    It records one pass up to the edited layer and the prefixes above it. Each step then runs the
    layers above forward, and backward except after the last evaluation. All facts of a batch
    advance together.

    Args:
        n_layers: The number of layers.
        layer: The layer where targets are searched.
        steps: Evaluations of the loss.
        batches: Batches of facts.
    """
    above = (n_layers - layer - 1) / n_layers
    return batches * (1.0 + (2 * steps - 1) * above)
