"""The page and the Markdown of an evaluation."""
