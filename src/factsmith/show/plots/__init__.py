"""Pictures of records, drawn with matplotlib or as text."""
