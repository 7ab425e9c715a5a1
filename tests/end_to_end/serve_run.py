"""`serve run` with the Serve config file that we ship, but on this machine and with a fixed number of replicas."""

import sys
from pathlib import Path
from typing import Any

import yaml

from end_to_end.tenant_site import Served

SHIPPED = Path(__file__).parents[2] / "deploy" / "ray" / "serve.yaml"
SERVE = str(Path(sys.executable).with_name("serve"))


def serve_run(folder: Path, config: dict[str, Any], num_replicas: int, **arguments: object) -> Served:
    """A server that has not been started. `arguments` are more of the application's."""
    file = folder / "serve.yaml"
    site = Served(folder, config, command=(SERVE, "run", str(file)))
    serve: dict[str, Any] = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    serve["http_options"] |= {"host": "127.0.0.1", "port": site.port}
    (application,) = serve["applications"]
    application["args"] |= {"config": str(site.config_file), "device": "cpu", **arguments}
    (engine,) = application["deployments"]
    del engine["autoscaling_config"]
    # Several replicas share two cores.
    engine |= {"num_replicas": num_replicas, "ray_actor_options": {"num_cpus": 0.5}}
    file.write_text(yaml.safe_dump(serve), encoding="utf-8")
    return site
