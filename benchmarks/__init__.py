"""What the project claims, measured on the machine in front of you: `python -m benchmarks`."""
