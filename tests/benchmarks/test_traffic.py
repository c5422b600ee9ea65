import torch

from benchmarks.session import Session
from benchmarks.suites import traffic


def test_rows(monkeypatch):
    """Without Triton the rows are missing; a row above its limit fails."""
    session = Session(torch.device("cpu"), torch.empty(0, dtype=torch.uint8), "none")
    steps = {name: {"forward": 7.0, "backward": 12.5} for name in (*traffic.HELD_WHOLE, "wide")}
    counted = {**steps, **{name: {"read": 1.05} for name in (*traffic.DECODING, "moe_experts")}}
    monkeypatch.setattr(traffic, "_in_the_interpreter", lambda: counted)
    rows = traffic.run(session)["requirements"]
    assert [row["name"] for row in rows if not row["passed"]] == [r["name"] for r in rows if "backward" in r["name"]]
    monkeypatch.setattr(traffic.importlib.util, "find_spec", lambda _: None)
    assert all(
        row["measured"] is None and "not installed" in row["detail"] for row in traffic.run(session)["requirements"]
    )
