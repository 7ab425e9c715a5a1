"""The Serve application on a Ray of this machine, as on a cluster, but in a hurry to scale down, and updated when told:

    python tests/replicas_process.py FEWEST MOST CONFIG PORT MODEL ROUTER

Every line on stdin is a dtype: the application is deployed again with that.
"""

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
    import ray
    from ray.serve.config import HTTPOptions

    fewest, most, config, port, model, router = sys.argv[1:]
    application.FEWER_AFTER_S, scaling.TRY_AFTER_S = FEWER_AFTER_S, TRY_AFTER_S
    options = ServeOptions(
        model=model, router=router, config=Path(config), port=int(port), device="cpu", dtype="bfloat16"
    )
    # Room for the replica that an update adds.
    ray.init("local", num_cpus=int(most) + 1, include_dashboard=False, object_store_memory=local.OBJECT_STORE_BYTES)
    stopped = local._stop_signal()
    local.serve.start(http_options=HTTPOptions(host=options.host, port=options.port))
    deploy(options, int(fewest), int(most))
    threading.Thread(target=update, args=(options, int(fewest), int(most)), daemon=True).start()
    stopped.wait()
    local._drain()
    local.serve.shutdown()
    ray.shutdown()


def update(options: ServeOptions, fewest: int, most: int) -> None:
    for line in sys.stdin:
        deploy(replace(options, dtype=line.strip()), fewest, most)


def deploy(options: ServeOptions, fewest: int, most: int) -> None:
    local.serve.run(application.application(options, load_config(options.config), fewest, most), name=local.NAME)


if __name__ == "__main__":
    main()
