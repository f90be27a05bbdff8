"""Write a patched model for others: checkpoint, adapter, patch folder."""
