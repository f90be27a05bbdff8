"""The model side: loading, the feed-forward view, hooks, replay, tokens."""
