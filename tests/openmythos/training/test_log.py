import pytest

from openmythos.training.log import FILE, Log, read
from openmythos.training.plot import plot_runs


def fill(out, steps, start=0):
    log = Log(out, start)
    for step in range(start + 1, steps + 1):
        log.write({"step": step, "loss": 1 / step, "tokens": step, "seconds": step, "flops": step})
    log.write({"step": steps, "held_out": 0.5})
    log.close()


def test_records_come_back(tmp_path):
    fill(tmp_path, 3)
    lines = read(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 3] and lines[-1]["held_out"] == 0.5


def test_a_resumed_run_drops_what_it_runs_again(tmp_path):
    fill(tmp_path, 5)
    fill(tmp_path, 4, start=2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 4]


def test_an_unfinished_line_is_left_out(tmp_path):
    fill(tmp_path, 2)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": 3, "lo')
    assert len(read(tmp_path)) == 3
    fill(tmp_path, 3, start=2)
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 2, 3, 3]


def test_runs_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, 20)
    plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no .*log.* with a record"):
        plot_runs([tmp_path], tmp_path / "loss.png")
