"""`buddy bench`: how fast the engine is, compared with its own budgets and with alternatives that users have."""
