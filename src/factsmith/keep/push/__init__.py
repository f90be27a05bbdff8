"""Push a revision to a server, prove it there, and take it back."""
