"""`buddy serve --replicas` that is in a hurry to scale down, and updates itself when told:

    python tests/replicas_process.py FEWEST MOST CONFIG PORT MODEL ROUTER

Every line on stdin is a dtype: the application is deployed again with that.
"""

import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

from buddy_server.config import load_config
from buddy_server.replicas import application, local, scaling
from buddy_server.serve import ServeOptions

FEWER_AFTER_S = 6.0
TRY_AFTER_S = 10.0


def main() -> None:
    fewest, most, config, port, model, router = sys.argv[1:]
    # Room for the replica that an update adds.
    os.cpu_count = lambda: int(most) + 1
    application.FEWER_AFTER_S, scaling.TRY_AFTER_S = FEWER_AFTER_S, TRY_AFTER_S
    options = ServeOptions(
        model=model, router=router, config=Path(config), port=int(port), device="cpu", dtype="float32"
    )
    threading.Thread(target=update, args=(options, int(fewest), int(most)), daemon=True).start()
    local.serve_replicas(options, int(fewest), int(most))


def update(options: ServeOptions, fewest: int, most: int) -> None:
    for line in sys.stdin:
        changed = replace(options, dtype=line.strip())
        target = application.application(changed, load_config(options.config), fewest, most)
        local.serve.run(target, name=local.NAME)
        print("updated", flush=True)


if __name__ == "__main__":
    main()
