"""Several processes that serve the same tenants: what they tell each other, and where."""
