"""Find where a fact lives: causal tracing, knowledge neurons, attribution."""
