"""Buddy Serve: an OpenAI-compatible server in which every request says how much of the model it may use."""
