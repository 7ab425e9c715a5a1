"""Who is asking, and how much of the model they get."""
