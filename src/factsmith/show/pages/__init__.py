"""Pages of records, as HTML."""
