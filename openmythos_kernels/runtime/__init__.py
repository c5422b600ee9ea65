"""Which backend runs and why; loading the compiled extension; diagnostics."""
