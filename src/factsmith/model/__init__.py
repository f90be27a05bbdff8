"""One model: its structure, its answers, and temporary changes to it."""
