"""What every package needs and none of them owns: errors, checks, files, tables, progress, facts."""
