from tests.kit.memory import poisoned_memory  # noqa: F401  (a fixture)
