"""Training, measuring and packing the bundled models: `make atlas`."""
