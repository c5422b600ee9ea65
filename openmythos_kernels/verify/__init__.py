"""How ops are checked: their specifications, the error budget, and the tables that users see."""
