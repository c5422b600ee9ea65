import json
import sys
import types

import pytest

from openmythos.training.data.sources import check, documents


def read(*sources, key="text", size=1000):
    check(sources)
    return list(documents(sources, key, size))


def test_a_folder_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "b/1.py", "a.md", "c.bin", ".git/x", "b/.hidden", "empty"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    (tmp_path / "c.bin").write_bytes(b"PNG\0")
    (tmp_path / "empty").write_text("")
    assert read(str(tmp_path)) == ["<a.md>", "<b/1.py>", "<b/2.txt>"]
    assert read(str(tmp_path / "b" / "2.txt"), str(tmp_path)) == ["<b/2.txt>", "<a.md>", "<b/1.py>", "<b/2.txt>"]


def test_bytes_become_text(tmp_path):
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\xff d")
    assert read(str(tmp_path / "t")) == ["a\r\nb\rc\n\ufffd d"]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_long_texts_are_cut_behind_lines(tmp_path, name):
    text = "".join(f"line {i}\r\n" for i in range(200)) + "x" * 500 + "\nend"
    (tmp_path / name).write_bytes((json.dumps({"text": text}) if name == "t.jsonl" else text).encode())
    pieces = read(str(tmp_path / name), size=100)
    assert "".join(pieces) == text and all(0 < len(piece) <= 200 for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces if "x" not in piece and piece != pieces[-1])
    assert len(pieces) > 15 and read(str(tmp_path / name), size=10_000) == [text]


def test_json_lines(tmp_path):
    file = tmp_path / "t.jsonl"
    rows = [{"text": "one\nline"}, {"text": ""}, {"id": 3, "text": "\u2028 two"}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    assert read(str(file)) == ["one\nline", "\u2028 two"]
    file.write_text('{"body": "\\ud83d\\ude00 \\ud83d."}')
    assert read(str(file), key="body") == ["\U0001f600 \ufffd."]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "is no JSON"),
        ('"text"', "must be an object with a string under text_key = 'text'; it has str"),
        ('{"body": 1, "x": 2}', "text_key = 'text'; it has keys body, x"),
        ('{"text": null}', "it has keys text"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "good"}\n' + line)
    with pytest.raises(ValueError, match=rf"t\.jsonl:2: .*{message}"):
        read(str(file))


def test_what_there_is_not(tmp_path):
    with pytest.raises(ValueError, match=r"sources: '.*nowhere' does not exist; must be a file"):
        check([str(tmp_path / "nowhere")])
    (tmp_path / "picture").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"picture' holds a zero byte"):
        check([str(tmp_path / "picture")])
    (tmp_path / "empty").write_text("")
    for source in (tmp_path, tmp_path / "empty"):
        with pytest.raises(ValueError, match=rf"sources: '{source}' holds no text"):
            read(str(source))


def test_the_standard_library_is_a_few_megabytes_and_the_same_every_time():
    texts = read("stdlib", size=100_000)
    assert texts == read("stdlib", size=100_000)
    assert 4_000_000 < sum(map(len, texts)) < 20_000_000 and len(texts) > 200
    assert any("class JSONDecoder" in text for text in texts)  # a package, not only single modules
    assert not any("class TestCase" in text and "import torch" in text for text in texts)


def test_a_data_set_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return iter([{"text": "one"}, {"text": "two\n" * 30}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("hf:org/name", size=1000) == ["one", "two\n" * 30]
    assert len(read("hf:org/name:part:test", size=100)) == 3
    read("hf:org/name::validation")
    assert asked == [
        (("org/name", None), dict(split="train", streaming=True)),
        (("org/name", "part"), dict(split="test", streaming=True)),
        (("org/name", None), dict(split="validation", streaming=True)),
    ]
    with pytest.raises(ValueError, match=r"'hf:a:b:c:d': must be hf:NAME\[:CONFIG\[:SPLIT\]\]"):
        read("hf:a:b:c:d")
    with pytest.raises(ValueError, match=r"hf:org/name, row 0: must be an object .* 'body'; it has keys text"):
        read("hf:org/name", key="body")


def test_data_sets_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"sources: 'hf:x' needs the datasets package: pip install datasets"):
        check(["hf:x"])
