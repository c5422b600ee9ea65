"""`python -m benchmarks` measures what the project claims, on the machine it runs on."""
