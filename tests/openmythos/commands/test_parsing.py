from dataclasses import asdict, dataclass, field

import pytest

pytest.importorskip("jsonargparse")

from openmythos.commands.parsing import parse, write
from openmythos.commands.train import CONFIGS
from openmythos.training.config import TrainConfig


@dataclass(frozen=True)
class Inner:
    """Inside.

    Attributes:
        rate: how fast.
    """

    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    """Outside.

    Attributes:
        steps: how many.
        name: what it is called.
        inner: more.
    """

    steps: int = 3
    name: str | None = None
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "some.toml").write_text('steps = 7\nname = "x"\n[inner]\nrate = 2\n')
    return tmp_path / "some.toml"


def test_defaults_then_the_file_then_the_command_line(file):
    assert parse(Outer, [], "p") == Outer()
    assert parse(Outer, [str(file)], "p") == Outer(7, "x", Inner(2.0))
    assert parse(Outer, [str(file), "inner.rate=3", "steps=1"], "p") == Outer(1, "x", Inner(3.0))
    assert parse(Outer, ["--steps=1"], "p") == Outer(1)


def test_a_named_configuration(file):
    assert parse(Outer, ["some"], "p", file.parent).steps == 7
    with pytest.raises(ValueError, match="CONFIG = 'other': no such file, nor one of some"):
        parse(Outer, ["other"], "p", file.parent)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["stepz=1"], "stepz: no such key, did you mean steps"),
        (["inner.rat=1"], "inner.rat: no such key, did you mean inner.rate"),
        (["steps=x"], 'key "steps".*int.*x'),
        (["a.toml", "b.toml"], "CONFIG: got a.toml and b.toml; expected one"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(Outer, arguments, "p")


def test_an_unknown_key_in_a_file(tmp_path):
    (tmp_path / "bad.toml").write_text("stepz = 1\n")
    with pytest.raises(ValueError, match="stepz"):
        parse(Outer, [str(tmp_path / "bad.toml")], "p")


def test_help_shows_every_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as left:
        parse(Outer, ["--help"], "p")
    text = capsys.readouterr().out
    assert left.value.code == 0
    for words in ("--steps", "how many", "--inner.rate", "how fast"):
        assert words in text


def test_what_is_written_is_read_again(tmp_path):
    config = Outer(9, None, Inner(0.25))
    write(config, tmp_path / "out.toml")
    assert parse(Outer, [str(tmp_path / "out.toml")], "p") == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_named_configuration_fits_its_model(path):
    config = parse(TrainConfig, [path.stem], "p", CONFIGS)
    config.check()
    assert asdict(config)["out"] == f"runs/{path.stem}"
