"""The experiments, one file each: configuration as data, runs, judgement."""
