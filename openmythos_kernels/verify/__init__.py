"""How an op is judged: what it describes of itself, the error budget, and the table a user sees."""
