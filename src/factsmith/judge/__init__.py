"""Judging edits: what is asked, how answers are scored, and the runs that do it."""
