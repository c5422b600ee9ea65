"""The suites: each has `run(session) -> dict` of plain values, with requirement rows under "requirements"."""

from benchmarks.suites import cache, depth, headline, kernels, loop, mla, model, moe, traffic, train

SUITES = {
    "cache": cache.run,
    "traffic": traffic.run,
    "train": train.run,
    "headline": headline.run,
    "depth": depth.run,
    "loop": loop.run,
    "moe": moe.run,
    "mla": mla.run,
    "kernels": kernels.run,
    "model": model.run,
}
ON_REQUEST = {
    "kernels",
    "loop",
    "mla",
    "model",
    "moe",
    "traffic",
}  # run by `--only` alone: what `python -m benchmarks` measures must end within five minutes
