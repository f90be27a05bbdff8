"""What studio does, one module for each room; `rooms` puts the verbs in order."""
