"""Text read through a model: pieces, statistics over tokens, second moments."""
