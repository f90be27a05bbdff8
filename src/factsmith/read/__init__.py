"""Read a model: what its neurons match and promote, and how a prediction is made."""
