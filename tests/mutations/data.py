"""Small faults in what prepares token shards and reads them."""

from tests.mutations.mutation import Mutation

_DATA, _TESTS = "openmythos/training/data", "tests/openmythos/training/data"
_KILLED = f"{_TESTS}/test_prepare.py -k killed"

MUTATIONS = [
    Mutation(
        "shards: a resumed run repeats the document that it was in",
        f"{_DATA}/writer.py",
        "point.taken if number == point.document else 0",
        "0",
        _KILLED,
    ),
    Mutation(
        "shards: a shard that was not recorded yet is written again",
        f"{_DATA}/writer.py",
        "if not (path.exists() and",
        "if True or not (path.exists() and",
        _KILLED,
    ),
    Mutation(
        "shards: what a killed run was writing stays",
        f"{_DATA}/writer.py",
        "        file.unlink()\n    path = next(",
        "        pass\n    path = next(",
        _KILLED,
    ),
    Mutation(
        "shards: both splits go on where the first one was",
        f"{_DATA}/prepare.py",
        "begin[document.split].document",
        'begin["train"].document',
        _KILLED,
    ),
    Mutation(
        "shards: sources may change under way",
        f"{_DATA}/prepare.py",
        "point.digest != document.digest",
        "False",
        f"{_TESTS}/test_prepare.py -k under_way",
    ),
    Mutation(
        "shards: the split depends on the documents before",
        f"{_DATA}/prepare.py",
        "int.from_bytes(own[:8]",
        "int.from_bytes(digest.digest()[:8]",
        f"{_TESTS}/test_prepare.py -k order",
    ),
    Mutation(
        "shards: a document's text may end it",
        f"{_DATA}/tokenizers.py",
        "encode_special_tokens = True",
        "encode_special_tokens = False",
        f"{_TESTS}/test_tokenizers.py -k file",
    ),
    Mutation(
        "shards: texts with half a surrogate pair stop a run",
        f"{_DATA}/sources.py",
        'return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")',
        "return text",
        f"{_TESTS}/test_sources.py -k json_lines",
    ),
    Mutation(
        "shards: the last window has no target at its end",
        f"{_DATA}/shards.py",
        "(total - 1) // tokens",
        "total // tokens",
        f"{_TESTS}/test_shards.py -k every_window",
    ),
    Mutation(
        "shards: a window stays in its shard",
        f"{_DATA}/shards.py",
        "divmod(start + done, self._size)",
        "divmod(start, self._size)",
        f"{_TESTS}/test_shards.py -k every_window",
    ),
    Mutation(
        "shards: every epoch has the same order",
        f"{_DATA}/shards.py",
        "self.seed, int(epoch)",
        "self.seed, 0",
        f"{_TESTS}/test_shards.py -k alone",
    ),
    Mutation(
        "shards: ranks overlap",
        f"{_DATA}/shards.py",
        "self.rank * rows",
        "self.rank",
        f"{_TESTS}/test_shards.py -k ranks",
    ),
    Mutation(
        "shards: the places of documents are not checked",
        f"{_DATA}/shards.py",
        "_compare(self.folder / part.starts_file, part.starts_checksum)",
        "pass",
        f"{_TESTS}/test_shards.py -k damaged",
    ),
    Mutation(
        "shards: neighbours stay together", f"{_DATA}/order.py", "_ROUNDS = 6", "_ROUNDS = 1", f"{_TESTS}/test_order.py"
    ),
]
