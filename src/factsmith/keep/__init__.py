"""Keep patches: the ledger, the workbench, undo, exchange and export."""
