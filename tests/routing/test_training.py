"""The training loops at a tiny size: they learn, and an interrupted run ends where an uninterrupted one does."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from buddy_routing.action_space import RUN, SMALL, ActionSpace
from buddy_routing.artifact import load_router, save_router
from buddy_routing.checkpoint import LoadedModel, load_model
from buddy_routing.decoder import MLP, Exit, RoutedDecoder
from buddy_routing.duo import DuoRouter, new_small_ffns
from buddy_routing.exits import new_exits
from buddy_routing.model_spec import ModelSpec
from buddy_routing.route_sources import conversation_starts
from buddy_routing.router import LearnedRouter, Router, StaticRouter
from buddy_routing.router_config import DuoConfig, ExitsConfig, RouterConfig
from buddy_routing.selection import action_shares
from buddy_routing.train import batch_training, example, pretrain, router_training
from buddy_routing.train.corpus import PackedTokens
from buddy_routing.train.demo import keep, router_from_prior
from buddy_routing.train.document import Document
from buddy_routing.train.duo_plan import DuoPlan
from buddy_routing.train.duo_training import train_duo
from buddy_routing.train.example import packed_batches
from buddy_routing.train.exits_plan import ExitsPlan
from buddy_routing.train.exits_training import ExitsLoss, train_exits
from buddy_routing.train.pretrain import FitPlan, fit, initialise, random_depth
from buddy_routing.train.routed_paths import routed_paths
from buddy_routing.train.router_plan import RouterPlan
from buddy_routing.train.router_training import train_router
from buddy_routing.train.tokenizer import TrainingTokenizer, train_tokenizer
from buddy_routing.train.training_state import OtherTrainingError
from sparse_decode import SparseDecode, segment_bounds
from tiny_models import CONFIGS, SHAPE, save_random_model

CPU = torch.device("cpu")
NUM_LAYERS: int = SHAPE["num_hidden_layers"]
PLAN = FitPlan(
    num_steps=8,
    batch_size=4,
    num_tokens=24,
    learning_rate=1e-2,
    final_lr_scale=0.0,
    warmup_steps=2,
    depth_drop=0.5,
)
TUNE_PLAN = replace(PLAN, depth_drop=0.0, routed_share=0.7, lowest_budget=0.5, route_block=8)
DOCUMENTS = [Document(f"The answer is {n % 7}.", f"What is {n}?") for n in range(40)]


class Interrupted(Exception):
    pass


class InterruptedTokens(PackedTokens):
    """Stops the run at step 5, as Ctrl-C would."""

    def batch(self, step: int, batch_size: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if step == 5:
            raise Interrupted
        return super().batch(step, batch_size, num_tokens)


def counting_tokens() -> PackedTokens:
    """Documents of 30: each counts on from 0, its first ten tokens a prompt."""
    place = np.arange(4000) % 30
    return PackedTokens(place.astype(np.uint16), place == 0, place >= 10)


def new_model() -> RoutedDecoder:
    config = CONFIGS["llama"]
    config.architectures = ["LlamaForCausalLM"]
    model = RoutedDecoder(ModelSpec.from_config(config))
    initialise(model, seed=0)
    return model


def trained(checkpoint: Path, data: PackedTokens, plan: FitPlan = PLAN) -> RoutedDecoder:
    model = new_model()
    fit(model, data, plan, checkpoint, CPU, seed=3, compile_layers=False)
    return model


def tuned(checkpoint: Path, data: PackedTokens, plan: FitPlan = TUNE_PLAN) -> torch.nn.ModuleList:
    """Model and router, trained together."""
    model = new_model()
    router = router_from_prior(model, counting_tokens(), 0, CPU)
    fit(model, data, plan, checkpoint, CPU, 3, compile_layers=False, router=router)
    return torch.nn.ModuleList([model, router])


def parameters(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("stage", [trained, tuned])
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    stage: Callable[[Path, PackedTokens], torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)
    data = counting_tokens()
    whole = stage(tmp_path / "whole.safetensors", data)
    with pytest.raises(Interrupted):
        stage(tmp_path / "cut.safetensors", InterruptedTokens(data.tokens, data.begins, data.counted))
    resumed = stage(tmp_path / "cut.safetensors", data)
    torch.testing.assert_close(parameters(resumed), parameters(whole), rtol=0, atol=0)


def test_tuning_trains_the_router_too(tmp_path: Path) -> None:
    data = counting_tokens()
    before = dict(tuned(tmp_path / "before.safetensors", data, replace(TUNE_PLAN, num_steps=0)).named_parameters())
    after = dict(tuned(tmp_path / "after.safetensors", data, replace(TUNE_PLAN, num_steps=4)).named_parameters())
    for name in ("1.decision.down.weight", "1.decision.up.weight"):
        assert not torch.equal(before[name], after[name])


def test_a_mean_of_weights_keeps_its_share_of_those_before() -> None:
    before, after = (torch.nn.Linear(2, 2, bias=False) for _ in range(2))
    wanted = 0.4 * before.weight + 0.6 * after.weight
    keep(0.4, before, after)
    torch.testing.assert_close(after.weight, wanted)


def test_a_training_state_without_the_router_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "state.safetensors", counting_tokens())
    with pytest.raises(OtherTrainingError, match="embed_tokens"):
        tuned(tmp_path / "state.safetensors", counting_tokens())


def test_pretraining_learns_to_count(tmp_path: Path) -> None:
    data = counting_tokens()
    model = trained(tmp_path / "state.safetensors", data, replace(PLAN, num_steps=60))
    tokens = torch.arange(24)[None]
    with torch.inference_mode():
        predicted = model.lm_head(model.dense(tokens)).argmax(-1)
    assert (predicted[0, 10:-1] == tokens[0, 11:]).float().mean() > 0.9


def test_random_depth_keeps_the_ends_and_half_of_the_layers() -> None:
    for seed in range(200):
        layers_on = random_depth(ActionSpace.skip_or_run(16), 1.0, random.Random(seed))
        assert layers_on is not None
        assert layers_on[0]
        assert layers_on[-1]
        assert 8 <= sum(layers_on) <= 15
    assert random_depth(ActionSpace.skip_or_run(16), 0.0, random.Random(0)) is None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TrainingTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    texts = [f"{document.prompt} {document.text}" for document in DOCUMENTS]
    train_tokenizer(texts, 300, SHAPE["max_position_embeddings"], directory)
    return TrainingTokenizer(directory)


@pytest.fixture
def loaded(tmp_path: Path, tokenizer: TrainingTokenizer, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    monkeypatch.setattr(CONFIGS["qwen3"], "vocab_size", tokenizer.vocab_size)
    save_random_model("qwen3", tmp_path / "model")
    return load_model(tmp_path / "model", torch.float32, CPU)


EXITS_PLAN = ExitsPlan((2, 4), num_rows=3, num_tokens=32, learning_rate=1e-2)
ROUTER_PLAN = RouterPlan(num_rows=3, num_tokens=32, rank=4, route_block=8)
NUM_STEPS = 12


def router_of(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, checkpoint: Path, documents: Iterator[Document] | None = None
) -> tuple[LearnedRouter, RouterConfig]:
    examples = map(tokenizer.encode_example, documents or cycle(DOCUMENTS))
    return train_router(loaded, examples, ROUTER_PLAN, NUM_STEPS, checkpoint)


def test_an_interrupted_router_training_ends_where_an_uninterrupted_one_does(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_training, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(router_training, "CALIBRATION_TOKENS", 64)
    monkeypatch.setattr(example, "POOL_BATCHES", 4)
    drawn = []
    whole, _ = router_of(loaded, tokenizer, tmp_path / "whole.safetensors", noted(drawn))
    with pytest.raises(Interrupted):
        router_of(loaded, tokenizer, tmp_path / "cut.safetensors", interrupted_after(len(drawn) * 2 // 3))
    resumed, _ = router_of(loaded, tokenizer, tmp_path / "cut.safetensors")
    torch.testing.assert_close(parameters(resumed), parameters(whole), rtol=0, atol=0)


def exits_of(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, checkpoint: Path, documents: Iterator[Document] | None = None
) -> torch.nn.ModuleDict:
    examples = map(tokenizer.encode_example, documents or cycle(DOCUMENTS))
    exits, config = train_exits(loaded, examples, EXITS_PLAN, NUM_STEPS, checkpoint)
    assert config == ExitsConfig(loaded.fingerprint, EXITS_PLAN.exits)
    return torch.nn.ModuleDict({str(number): exit_ for number, exit_ in exits.items()})


def test_an_interrupted_training_of_exits_ends_where_an_uninterrupted_one_does(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_training, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(example, "POOL_BATCHES", 4)
    drawn = []
    whole = exits_of(loaded, tokenizer, tmp_path / "whole.safetensors", noted(drawn))
    with pytest.raises(Interrupted):
        exits_of(loaded, tokenizer, tmp_path / "cut.safetensors", interrupted_after(len(drawn) * 2 // 3))
    assert (tmp_path / "cut.safetensors").exists()
    resumed = exits_of(loaded, tokenizer, tmp_path / "cut.safetensors")
    torch.testing.assert_close(parameters(resumed), parameters(whole), rtol=0, atol=0)


def test_trained_exits_come_nearer_to_full_depth_and_leave_the_model_bit_for_bit(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, tmp_path: Path
) -> None:
    untouched = load_model(tmp_path / "model", torch.float32, CPU).model
    held_out = next(packed_batches(map(tokenizer.encode_example, DOCUMENTS), 3, 32, seed=9))

    def loss(exits: Mapping[int, Exit]) -> float:
        with torch.no_grad():
            return float(ExitsLoss(loaded.model.with_exits(exits))(held_out))

    exits, _ = train_exits(
        loaded, map(tokenizer.encode_example, cycle(DOCUMENTS)), EXITS_PLAN, 60, tmp_path / "state.safetensors"
    )
    assert loss(exits) < 0.7 * loss(new_exits(loaded.model, EXITS_PLAN.exits))
    for name, parameter in untouched.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name


DUO_PLAN = DuoPlan(num_rows=3, num_tokens=32, learning_rate=1e-2, divisor=4, rank=4, route_block=8)


def duo_of(
    loaded: LoadedModel,
    tokenizer: TrainingTokenizer,
    checkpoints: Path,
    documents: Callable[[], Iterator[Document]] = lambda: cycle(DOCUMENTS),
    num_steps: int = NUM_STEPS,
) -> DuoRouter:
    checkpoints.mkdir(exist_ok=True)
    router, config = train_duo(
        loaded, lambda: map(tokenizer.encode_example, documents()), DUO_PLAN, num_steps, checkpoints
    )
    size = SHAPE["intermediate_size"] // DUO_PLAN.divisor
    assert config == DuoConfig(loaded.fingerprint, NUM_LAYERS, loaded.model.spec.kv_dim, 4, size, 8)
    return router


def all_parameters(router: DuoRouter) -> Tensor:
    return parameters(torch.nn.ModuleList((router, *router.small_ffns.values())))


def test_an_interrupted_training_of_small_ffns_ends_where_an_uninterrupted_one_does(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_training, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(example, "POOL_BATCHES", 4)
    drawn: list[list[Document]] = []

    def all_noted() -> Iterator[Document]:
        drawn.append([])
        return noted(drawn[-1])

    whole = duo_of(loaded, tokenizer, tmp_path / "whole", all_noted)
    # First the router is calibrated, then come the random choices, then the router's.
    for interrupted in (1, 2):
        counts = [len(of_part) * 2 // 3 if part == interrupted else None for part, of_part in enumerate(drawn)]
        parts = iter(counts)

        def some(parts: Iterator[int | None] = parts) -> Iterator[Document]:
            count = next(parts)
            return cycle(DOCUMENTS) if count is None else interrupted_after(count)

        with pytest.raises(Interrupted):
            duo_of(loaded, tokenizer, tmp_path / "cut", some)
    assert (tmp_path / "cut" / "training_random.safetensors").exists()
    resumed = duo_of(loaded, tokenizer, tmp_path / "cut")
    torch.testing.assert_close(all_parameters(resumed), all_parameters(whole), rtol=0, atol=0)


def test_trained_small_ffns_come_nearer_to_full_depth_and_leave_the_model_bit_for_bit(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, tmp_path: Path
) -> None:
    untouched = load_model(tmp_path / "model", torch.float32, CPU).model
    held_out = next(packed_batches(map(tokenizer.encode_example, DOCUMENTS), 3, 32, seed=9))

    def loss(small_ffns: Mapping[int, MLP]) -> float:
        """Of the model with the small FFNs in all layers that have one, from what it does at full depth."""
        model = loaded.model.with_small_ffns(small_ffns)
        path = torch.tensor([RUN, *[SMALL] * (NUM_LAYERS - 2), RUN]).expand(*held_out.tokens.shape, -1)
        starts = conversation_starts(held_out.begins)
        with torch.no_grad():
            full, left = (
                model.dense(held_out.tokens, choose, starts=starts)[held_out.counted]
                for choose in (None, lambda _: action_shares(path))
            )
            given, wanted = (model.lm_head(hidden).log_softmax(-1) for hidden in (left, full))
            return float(F.kl_div(given, wanted, reduction="batchmean", log_target=True))

    router = duo_of(loaded, tokenizer, tmp_path / "state", num_steps=60)
    assert loss(router.small_ffns) < 0.7 * loss(new_small_ffns(loaded.model, DUO_PLAN.divisor))
    for name, parameter in untouched.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name


def noted(drawn: list[Document]) -> Iterator[Document]:
    for document in cycle(DOCUMENTS):
        drawn.append(document)
        yield document


def interrupted_after(count: int) -> Iterator[Document]:
    yield from islice(cycle(DOCUMENTS), count)
    raise Interrupted


def test_a_trained_router_is_saved_and_serves_the_model_it_was_trained_for(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, tmp_path: Path
) -> None:
    router, config = router_of(loaded, tokenizer, tmp_path / "state.safetensors")
    save_router(tmp_path / "router", router, config)
    served, read = load_router(tmp_path / "router", loaded.fingerprint, CPU)
    assert read == config
    features = torch.randn(9, 2 * loaded.model.spec.kv_dim)
    torch.testing.assert_close(served.scores(features), router.scores(features))


def test_full_depth_with_a_distilled_router_is_the_base_model_bit_for_bit(
    loaded: LoadedModel, tokenizer: TrainingTokenizer, tmp_path: Path
) -> None:
    untouched = load_model(tmp_path / "model", torch.float32, CPU).model
    router, _ = router_of(loaded, tokenizer, tmp_path / "state.safetensors")
    for name, parameter in untouched.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter), name
    tokens = torch.randint(0, loaded.model.spec.vocab_size, (2, 40))
    actions = loaded.model.spec.actions
    begins, in_answer = torch.arange(40).expand(2, 40) == 0, torch.ones(2, 40) > 0
    choose = routed_paths(router, actions, begins, in_answer, torch.full((2, 40), actions.full_cost), 8)
    with torch.inference_mode():
        base = untouched.lm_head(untouched.dense(tokens))
        assert torch.equal(loaded.model.lm_head(loaded.model.dense(tokens, choose)), base)
        for native in (None, "float32"):
            routers: list[Router] = [router, StaticRouter(torch.zeros(NUM_LAYERS - 2), "any")]
            models = [loaded.model, untouched]
            runs = [
                SparseDecode(model, one, tokens, [NUM_LAYERS] * 2, native)
                for model, one in zip(models, routers, strict=True)
            ]
            for start, end in segment_bounds(20, 40, 8):
                spans = [(sequence, start, end) for sequence in range(2)]
                logits = [run.step(spans)[0] for run in runs]
                assert torch.equal(logits[0], logits[1])


def test_a_document_without_a_prompt_is_named(tokenizer: TrainingTokenizer) -> None:
    with pytest.raises(ValueError, match="no prompt: 'just text'"):
        tokenizer.encode_example(Document("just text"))
