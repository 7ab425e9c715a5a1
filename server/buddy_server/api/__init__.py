"""The HTTP layer: the contract of the OpenAI client libraries over `EngineClient`. Imports no torch."""
