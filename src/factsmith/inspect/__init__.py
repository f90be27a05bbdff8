"""What the memory holds: what keys match, what values promote, and how a prediction is put together."""
