"""One path a file: when it may run, and how."""
