"""Puts an engine together: model, router, cache, scheduler. All start-up measuring and checking happens here."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from tokenizers import Tokenizer

from buddy_kernels import NativeBuildError, RoutedStep, UnknownArithmeticError, WeightKind
from buddy_kernels.arithmetics import AUTO
from buddy_kernels.routed_step import BLOCK_SIZE as NATIVE_BLOCK_SIZE
from buddy_routing.adapter import ADAPTER_DIR, merge_adapter
from buddy_routing.artifact import load_predictor, load_router
from buddy_routing.checkpoint import CheckpointError, LoadedModel, end_token_ids, load_model
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.embedded import MODEL_ID, embedded_router, model_directory
from buddy_routing.first_layer import FirstLayer
from buddy_routing.kv_cache import KVCache
from buddy_routing.model_spec import ModelSpec, UnsupportedModelError
from buddy_routing.planner import PathPlanner
from buddy_routing.predictor import BudgetPredictor
from buddy_routing.prior import bundled_text, measure_prior
from buddy_routing.router import Router, StaticRouter
from buddy_routing.router_config import INDICATORS, ArtifactError
from buddy_routing.stepper import NativeStepper, Stepper, TorchStepper, decoder_weights
from buddy_server.engine.block_pool import BlockPool
from buddy_server.engine.depth_predictor import DepthPredictor
from buddy_server.engine.engine import Engine
from buddy_server.engine.messages import EngineInfo
from buddy_server.engine.prefix_keys import PrefixKeys
from buddy_server.engine.runner import ModelRunner
from buddy_server.engine.scheduler import Scheduler
from buddy_server.engine.settings import EngineSettings

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,
}
WEIGHT_KINDS: dict[str, WeightKind] = {kind: kind for kind in get_args(WeightKind)}
DEFAULT_ROUTE_BLOCK = 128
PRIOR_TOKENS = 256


class EngineBuildError(ValueError):
    """An engine that cannot be built as asked; the message names the value and what is allowed."""


BUILD_ERRORS = (EngineBuildError, CheckpointError, UnsupportedModelError, ArtifactError, OSError)
"""What a user can put right; anything else is a bug."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model and its tokenizer, as the tokenizers library has it, for incremental detokenization. `dtype_name` is that
    of the weights that are run: "int8" ones are made of bfloat16."""

    model_id: str
    loaded: LoadedModel
    tokenizer: Tokenizer
    dtype_name: str

    @property
    def device(self) -> torch.device:
        return self.loaded.model.inv_freq.device

    @property
    def dtype(self) -> torch.dtype:
        return self.loaded.model.embed_tokens.weight.dtype


@dataclass(frozen=True, slots=True)
class Routing:
    """The source of masks, its route block, and the predictor for requests without a budget."""

    router: Router
    route_block: int = DEFAULT_ROUTE_BLOCK
    predictor: BudgetPredictor | None = None


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    engine: Engine
    info: EngineInfo
    directory: Path


def build_engine(
    model: str | None, router: str | None, settings: EngineSettings, device: str = "auto", dtype: str = "auto"
) -> BuiltEngine:
    """`model` is a directory or hub id, None the embedded one. `router` is an artifact's directory or "prior:" and an
    indicator; None is the embedded model's own router, for other models "prior:cosine".

    Raises one of BUILD_ERRORS.
    """
    if router is None:
        router = default_router(model)
        if model is not None:
            log.warning("no router given, a static prior measured now chooses the layers", extra={"router": router})
    served = load_served_model(model, router, device, dtype)
    return assemble(served, make_routing(router, served), settings)


def default_router(model: str | None) -> str:
    """The embedded model's own; for others the static prior that is the best of those that cost nothing to measure."""
    return str(embedded_router()) if model is None else "prior:cosine"


def load_served_model(model: str | None, router: str | None, device: str = "auto", dtype: str = "auto") -> ServedModel:
    """`model` as in build_engine, and what that raises. An adapter in the artifact `router` is merged into it."""
    where, dtype_name = resolve_device(device), resolve_dtype(dtype)
    directory = model_directory(model)
    loaded = load_model(directory, DTYPES[dtype_name], where)
    if router is not None and not router.startswith("prior:"):
        adapter = Path(router).expanduser() / ADAPTER_DIR
        if adapter.exists():
            merge_adapter(loaded.model, adapter)
    model_id = MODEL_ID if model is None else _model_id(model, directory)
    return ServedModel(model_id, loaded, load_tokenizer(directory), dtype_name)


def make_routing(router: str, served: ServedModel) -> Routing:
    """`router` is an artifact's directory or "prior:" and an indicator. Raises EngineBuildError, ArtifactError."""
    if not router.startswith("prior:"):
        artifact = Path(router).expanduser()
        learned, config = load_router(artifact, served.loaded.fingerprint, served.device)
        return Routing(learned, config.route_block, load_predictor(artifact, config, served.device))
    indicator = router.removeprefix("prior:")
    if indicator not in INDICATORS:
        allowed = ", ".join(f"prior:{name}" for name in INDICATORS)
        raise EngineBuildError(f"router {router!r} is unknown; allowed: a directory, {allowed}")
    ids = served.tokenizer.encode(bundled_text(), add_special_tokens=False).ids[:PRIOR_TOKENS]
    tokens = torch.tensor([ids], device=served.device)
    return Routing(StaticRouter(measure_prior(served.loaded.model, tokens, indicator), router))


def assemble(served: ServedModel, routing: Routing, settings: EngineSettings) -> BuiltEngine:
    """An engine of its own around a model that may be in several. Raises EngineBuildError."""
    model = served.loaded.model
    num_blocks = _num_blocks(model.spec, served.dtype, settings)
    if num_blocks < 1:
        raise EngineBuildError(f"kv_cache_gib {settings.kv_cache_gib} holds no block of {settings.block_size} tokens")
    planner = PathPlanner(routing.router, model.spec, settings.max_sequences, served.device)
    stepper = make_stepper(served, planner, num_blocks, settings)
    scheduler = Scheduler(
        BlockPool(num_blocks, settings.block_size),
        model.spec.actions,
        settings.max_sequences,
        settings.max_step_tokens,
        routing.route_block,
        make_prefix_keys(routing, settings),
        stepper.multi_step,
    )
    info = EngineInfo(
        model_id=served.model_id,
        actions=model.spec.actions,
        vocab_size=model.spec.vocab_size,
        max_context=model.spec.max_context,
        kv_capacity_tokens=num_blocks * settings.block_size,
        max_sequences=settings.max_sequences,
        router_id=routing.router.router_id,
        device=str(served.device),
        dtype=served.dtype_name,
        arithmetic=stepper.arithmetic,
        has_predictor=routing.predictor is not None,
    )
    directory = served.loaded.directory
    depth_predictor = None
    if routing.predictor is not None:
        depth_predictor = DepthPredictor(FirstLayer.of(model), routing.predictor, settings.cost_weight)
    engine = Engine(scheduler, ModelRunner(stepper), served.tokenizer, end_token_ids(directory), depth_predictor)
    return BuiltEngine(engine, info, directory)


def make_prefix_keys(routing: Routing, settings: EngineSettings) -> PrefixKeys | None:
    """None for an engine without a prefix cache."""
    if not settings.prefix_cache:
        return None
    if routing.route_block % settings.block_size:
        fields = {"route_block": routing.route_block, "block_size": settings.block_size}
        log.warning("no prefix cache: a route block is not a whole number of cache blocks", extra=fields)
        return None
    return PrefixKeys(routing.router.router_id, routing.route_block)


def resolve_device(name: str) -> torch.device:
    """ "auto" is the GPU when there is one. Raises EngineBuildError."""
    if name not in ("auto", "cpu", "cuda"):
        raise EngineBuildError(f"device {name!r} is unknown; allowed: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineBuildError("device 'cuda' is not available here; allowed: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str) -> str:
    """ "auto" is bfloat16. Raises EngineBuildError."""
    if name == "auto":
        return "bfloat16"
    if name not in DTYPES:
        raise EngineBuildError(f"dtype {name!r} is unknown; allowed: auto, {', '.join(DTYPES)}")
    return name


def make_stepper(served: ServedModel, planner: PathPlanner, num_blocks: int, settings: EngineSettings) -> Stepper:
    """The whole step in C++ where a CPU and a compiler allow it, else plain torch. Raises EngineBuildError for int8 or
    an `arithmetic` without the former, and for an arithmetic that this processor has not."""
    model, name = served.loaded.model, served.dtype_name
    try:
        if served.device.type == "cpu":
            return NativeStepper(native_step(model, name, num_blocks, settings), planner)
        reason = "it runs on a CPU"
    except UnknownArithmeticError as error:
        raise EngineBuildError(str(error)) from None
    except NativeBuildError as error:
        reason = str(error)
        log.warning("no native step, plain torch runs instead and is slower", extra={"reason": reason})
    if name == "int8":
        raise EngineBuildError(f"dtype 'int8' needs the native step: {reason}")
    if settings.arithmetic != AUTO:
        raise EngineBuildError(f"arithmetic {settings.arithmetic!r} needs the native step: {reason}")
    cache = KVCache.allocate(model.spec, num_blocks, settings.block_size, served.dtype, served.device)
    return TorchStepper(model, cache, planner)


def pin_threads(engine: Engine) -> None:
    """For a process that only serves: its steps do not move from processor to processor. By the thread that steps."""
    stepper = engine.runner.stepper
    if isinstance(stepper, NativeStepper):
        stepper.routed_step.pin_threads()
        # torch's own threads would all be where this one is; what is left to torch is small.
        torch.set_num_threads(1)


def native_step(model: RoutedDecoder, dtype_name: str, num_blocks: int, settings: EngineSettings) -> RoutedStep:
    """Raises NativeBuildError, UnknownArithmeticError."""
    if not settings.native:
        raise NativeBuildError("it is switched off")
    if settings.block_size != NATIVE_BLOCK_SIZE:
        raise NativeBuildError(f"it takes blocks of {NATIVE_BLOCK_SIZE} tokens, not {settings.block_size}")
    if dtype_name not in WEIGHT_KINDS:
        raise NativeBuildError(f"it takes {', '.join(WEIGHT_KINDS)}, not {dtype_name}")
    kind = WEIGHT_KINDS[dtype_name]
    return RoutedStep(decoder_weights(model), kind, num_blocks, num_cpus(), settings.arithmetic)


def num_cpus() -> int:
    """Threads that run at the same time: torch's number of them, no more than the cores a container may use."""
    cores = torch.get_num_threads()
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        most, period = quota.read_text(encoding="utf-8").split()
        if most != "max":
            cores = min(cores, max(1, int(most) // int(period)))
    return cores


def load_tokenizer(directory: Path) -> Tokenizer:
    """The model's tokenizer as the tokenizers library has it."""
    from transformers import AutoTokenizer

    backend: Tokenizer = AutoTokenizer.from_pretrained(directory).backend_tokenizer
    return backend


def _model_id(model: str, directory: Path) -> str:
    return directory.resolve().name if Path(model).expanduser().is_dir() else model


def _num_blocks(spec: ModelSpec, dtype: torch.dtype, settings: EngineSettings) -> int:
    block_bytes = 2 * spec.num_layers * spec.kv_dim * dtype.itemsize * settings.block_size
    affordable = int(settings.kv_cache_gib * 2**30) // block_bytes
    wanted = settings.max_sequences * -(-spec.max_context // settings.block_size)
    return min(affordable, wanted)
