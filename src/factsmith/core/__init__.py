"""The base of all packages: errors, checks, files, tables, progress, facts."""
