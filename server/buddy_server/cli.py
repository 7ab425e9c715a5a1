"""The command `buddy`: serve, chat, tenants, keys, eval, bench, train."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from buddy_server.version import server_version

EXTRAS = {"accelerate": "train", "matplotlib": "eval", "peft": "train", "ray": "ray", "tensorboard": "train"}
"""What brings a package that not everyone needs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. User errors end with one line on stderr: status 2 for errors in the command line, otherwise 1."""
    parsed = make_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        sys.exit(f"buddy: this needs the package {error.name}: pip install 'buddy-serve[{EXTRAS[error.name]}]'")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="buddy", description="Serve a language model of which each request uses as much as it asks for."
    )
    parser.add_argument("--version", action="version", version=f"buddy-serve {server_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="start the server"))
    _add_chat(commands.add_parser("chat", help="talk to a running server"))
    _add_tenants(commands.add_parser("tenants", help="list and change the tenants in the store"))
    _add_keys(commands.add_parser("keys", help="make, list and revoke API keys"))
    _add_eval(commands.add_parser("eval", help="measure quality and speed at budgets, against baselines"))
    bench = commands.add_parser("bench", help="measure speed").add_subparsers(required=True, metavar="WHAT")
    _add_bench_engine(bench.add_parser("engine", help="the engine alone, against its own budgets and other engines"))
    _add_bench_server(bench.add_parser("server", help="a server over HTTP, beside the engine alone"))
    train = commands.add_parser("train", help="train models and routers").add_subparsers(required=True, metavar="WHAT")
    _add_train_router(train.add_parser("router", help="make a router for your model from your conversations"))
    _add_train_correction(train.add_parser("correction", help="correct a router's scores by variations of its paths"))
    _add_train_predictor(train.add_parser("predictor", help="teach a router to choose budgets itself"))
    _add_train_exits(train.add_parser("exits", help="give your model exits, to leave it early, in place of a router"))
    _add_train_duo(train.add_parser("duo", help="give your model's layers small FFNs and a router that chooses them"))
    _add_train_demo(train.add_parser("demo", help="make the embedded model and its router from the texts"))
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH_OR_ID", help="model directory or hub id (default: the embedded model)")
    parser.add_argument(
        "--router",
        metavar="DIR",
        help="artifact of a router, exits or small FFNs, or prior:cosine (ppl, taylor, greedy); "
        "default: the embedded model's own, else prior:cosine",
    )
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="Jinja template in place of the model's own")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of tenants, tiers and engine sizes")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16", "int8"))
    parser.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N|MIN-MAX",
        help="run N engines behind one address on Ray Serve, or MIN to MAX by load (pip install 'buddy-serve[ray]')",
    )
    parser.set_defaults(run=_serve)


def _port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port, allowed are 1 to 65535")
    return int(text)


def _replicas(text: str) -> tuple[int, int]:
    """The fewest and the most."""
    fewest, dash, most = text.partition("-")
    most = most if dash else fewest
    if not (fewest.isdecimal() and most.isdecimal() and 0 < int(fewest) <= int(most)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of replicas, allowed are a number of 1 and more, or two of them as in 1-3"
        )
    return int(fewest), int(most)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="one question; without it, a conversation")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--budget", help='share of the layers, or "auto" (default: the tenant\'s)')
    parser.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s, the likeliest answer")
    parser.add_argument("--api-key", help="default: the environment variable BUDDY_API_KEY")
    parser.set_defaults(run=_chat)


def _add_tenants(parser: argparse.ArgumentParser) -> None:
    from buddy_server.tenant_arguments import add_tenant_arguments

    add_tenant_arguments(parser)
    parser.set_defaults(run=_administer, command="buddy tenants")


def _add_keys(parser: argparse.ArgumentParser) -> None:
    from buddy_server.tenant_arguments import add_key_arguments

    add_key_arguments(parser)
    parser.set_defaults(run=_administer, command="buddy keys")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    from buddy_server.eval.command import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_eval)


def _add_bench_engine(parser: argparse.ArgumentParser) -> None:
    from buddy_server.bench.command import add_engine_arguments

    add_engine_arguments(parser)
    parser.set_defaults(run=_bench_engine)


def _add_bench_server(parser: argparse.ArgumentParser) -> None:
    from buddy_server.bench.server_command import add_server_arguments

    add_server_arguments(parser)
    parser.set_defaults(run=_bench_server)


def _add_train_router(parser: argparse.ArgumentParser) -> None:
    from buddy_routing.train.router_plan import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_train_router)


def _add_train_correction(parser: argparse.ArgumentParser) -> None:
    from buddy_routing.train.correction_plan import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_train_correction)


def _add_train_predictor(parser: argparse.ArgumentParser) -> None:
    from buddy_routing.train.predictor_plan import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_train_predictor)


def _add_train_exits(parser: argparse.ArgumentParser) -> None:
    from buddy_routing.train.exits_plan import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_train_exits)


def _add_train_duo(parser: argparse.ArgumentParser) -> None:
    from buddy_routing.train.duo_plan import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_train_duo)


def _add_train_demo(parser: argparse.ArgumentParser) -> None:
    from buddy_routing.train.demo_plan import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=_train_demo)


# Each command imports what it needs when it runs: `buddy --version` should not wait for torch.


def _serve(parsed: argparse.Namespace) -> None:
    from buddy_server.serve import START_ERRORS, ServeOptions, make_server

    options = ServeOptions(
        model=parsed.model,
        router=parsed.router,
        chat_template=parsed.chat_template,
        config=parsed.config,
        host=parsed.host,
        port=parsed.port,
        device=parsed.device,
        dtype=parsed.dtype,
    )
    try:
        if parsed.replicas is not None:
            from buddy_server.replicas.local import serve_replicas

            serve_replicas(options, *parsed.replicas)
            return
        server = make_server(options)
    except START_ERRORS as error:
        sys.exit(f"buddy serve: {error}")
    server.serve_forever()


def _chat(parsed: argparse.Namespace) -> None:
    from buddy_server.chat_client import ChatClient, ChatError

    client = ChatClient(parsed.url, parsed.api_key, parsed.budget, parsed.temperature)
    try:
        client.run(" ".join(parsed.prompt))
    except ChatError as error:
        sys.exit(f"buddy chat: {error}")


def _administer(parsed: argparse.Namespace) -> None:
    from buddy_server.errors import BuddyError
    from buddy_server.tenant_commands import run_command

    try:
        run_command(parsed)
    except BuddyError as error:
        sys.exit(f"{parsed.command}: {error}")


def _eval(parsed: argparse.Namespace) -> None:
    from buddy_server.eval.command import run

    try:
        run(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"buddy eval: {error}")


def _bench_engine(parsed: argparse.Namespace) -> None:
    from buddy_server.bench.command import run_engine

    try:
        run_engine(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"buddy bench engine: {error}")


def _bench_server(parsed: argparse.Namespace) -> None:
    from buddy_server.bench.server_command import run_server

    try:
        run_server(parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"buddy bench server: {error}")


def _train_artifact(
    kind: str, parsed: argparse.Namespace, plan_from: Callable[[argparse.Namespace], Any], make: Callable[..., None]
) -> None:
    """Make what is trained on a file of conversations and saved in a directory of its own."""
    from buddy_routing.train.router_job import TrainingError
    from buddy_server.engine.served_model import DTYPES, resolve_device

    try:
        plan = plan_from(parsed)
        make(parsed.model, parsed.data, parsed.out, plan, resolve_device(parsed.device), DTYPES[parsed.dtype])
    except (ValueError, OSError, TrainingError) as error:
        sys.exit(f"buddy train {kind}: {error}")


def _train_router(parsed: argparse.Namespace) -> None:
    from buddy_routing.train.router_job import make_router
    from buddy_routing.train.router_plan import plan_from

    _train_artifact("router", parsed, plan_from, make_router)


def _train_correction(parsed: argparse.Namespace) -> None:
    from buddy_routing.train.correction_job import make_correction
    from buddy_routing.train.correction_plan import plan_from
    from buddy_routing.train.router_job import TrainingError
    from buddy_server.engine.served_model import DTYPES, resolve_device

    try:
        plan = plan_from(parsed)
        device, dtype = resolve_device(parsed.device), DTYPES[parsed.dtype]
        make_correction(parsed.model, parsed.router, parsed.data, parsed.out, plan, device, dtype)
    except (ValueError, OSError, TrainingError) as error:
        sys.exit(f"buddy train correction: {error}")


def _train_predictor(parsed: argparse.Namespace) -> None:
    from buddy_routing.train.predictor_plan import plan_from
    from buddy_routing.train.router_job import TrainingError, make_predictor
    from buddy_server.engine.served_model import DTYPES, resolve_device

    try:
        plan = plan_from(parsed)
        device, dtype = resolve_device(parsed.device), DTYPES[parsed.dtype]
        make_predictor(parsed.model, parsed.router, parsed.data, plan, device, dtype)
    except (ValueError, OSError, TrainingError) as error:
        sys.exit(f"buddy train predictor: {error}")


def _train_exits(parsed: argparse.Namespace) -> None:
    from buddy_routing.train.exits_job import make_exits
    from buddy_routing.train.exits_plan import plan_from

    _train_artifact("exits", parsed, plan_from, make_exits)


def _train_duo(parsed: argparse.Namespace) -> None:
    from buddy_routing.train.duo_job import make_duo
    from buddy_routing.train.duo_plan import plan_from

    _train_artifact("duo", parsed, plan_from, make_duo)


def _train_demo(parsed: argparse.Namespace) -> None:
    from buddy_routing.train.demo import make_demo
    from buddy_routing.train.demo_plan import plan_from
    from buddy_server.eval.model_card import write_model_card

    try:
        plan = plan_from(parsed)
    except ValueError as error:
        sys.exit(f"buddy train demo: {error}")
    make_demo(plan)
    write_model_card(plan)
