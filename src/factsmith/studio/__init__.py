"""Studio: the verbs of factsmith as pages and as an HTTP API, in one process on one machine."""
