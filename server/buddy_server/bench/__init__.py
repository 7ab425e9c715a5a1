"""`buddy bench`: how fast the engine is, against its own budgets and against what a user would take instead."""
