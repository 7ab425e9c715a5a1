"""The HTTP layer: OpenAI-compatible endpoints on top of `EngineClient`. Imports no torch."""
