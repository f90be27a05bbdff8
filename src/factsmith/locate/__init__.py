"""Where a fact lives: which tokens and layers carry it."""
