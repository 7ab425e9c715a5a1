"""Buddy Serve: an OpenAI-compatible server in which every request states how much of the model it may use."""
