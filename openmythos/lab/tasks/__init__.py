"""Tasks made from a seed, whose difficulty is a number of steps."""
