"""The suites. Each has `run(session)`, which returns a dict of plain values with its rows under "requirements"."""

from benchmarks.suites import (
    cache,
    depth,
    depth_saved,
    headline,
    kernels,
    loop,
    mla,
    model,
    moe,
    traffic,
    train,
    train_run,
)

SUITES = {
    "cache": cache.run,
    "traffic": traffic.run,
    "train": train.run,
    "headline": headline.run,
    "depth": depth.run,
    "depth_saved": depth_saved.run,
    "loop": loop.run,
    "moe": moe.run,
    "mla": mla.run,
    "kernels": kernels.run,
    "model": model.run,
    "train_run": train_run.run,
}
# Suites that run only when `--only` names them, since `python -m benchmarks` must end within five minutes.
ON_REQUEST = {"depth_saved", "kernels", "loop", "mla", "model", "moe", "traffic", "train_run"}
