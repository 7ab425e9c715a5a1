"""A server of its own process, for what signals do to it: `python -m fakes.streaming_server PORT GRACE_PERIOD_S`."""

import sys

import uvicorn
from tokenizers import Tokenizer, models

from buddy_server.api.app import create_app
from buddy_server.config import ServerConfig
from buddy_server.metrics import Metrics
from buddy_server.serve import Server, bind
from buddy_server.tokenizer import ChatTokenizer
from fakes.engine import FakeEngine
from fakes.tenancy import tenancy_of


class NoTokenizer(ChatTokenizer):
    """Every prompt is one token: loading a real tokenizer takes seconds."""

    backend = Tokenizer(models.BPE())

    def __init__(self) -> None:
        pass

    def render(self, *_: object) -> tuple[int, ...]:
        return (0,)


if __name__ == "__main__":
    engine, config = FakeEngine(delay_s=0.02, num_words=60), ServerConfig()
    metrics = Metrics(engine.info, config.tenants)
    app = create_app(config, engine, NoTokenizer(), metrics, tenancy_of(engine, config, metrics))
    settings = uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=5)
    listener = bind("127.0.0.1", int(sys.argv[1]))
    Server(settings, engine, listener, grace_period_s=float(sys.argv[2])).serve_forever()  # type: ignore[arg-type]
