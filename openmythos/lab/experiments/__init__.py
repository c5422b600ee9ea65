"""One experiment a file: a module here with an `EXPERIMENT` is one, and no list names it."""
