"""Runs every method at every budget on the same questions, on the real engine."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import mean
from typing import NoReturn

from tqdm import tqdm

from buddy_routing.action_space import SKIP
from buddy_routing.checkpoint import end_token_ids
from buddy_routing.decoder import RoutedDecoder
from buddy_routing.duo import DuoRouter
from buddy_routing.train.example import ExampleBatch, packed_in_order
from buddy_server.engine.build import BuiltEngine, assemble
from buddy_server.engine.routing import Routing
from buddy_server.engine.served_model import ServedModel
from buddy_server.engine.settings import EngineSettings
from buddy_server.eval.answering import Prompt, greedy_answers, log_likelihoods
from buddy_server.eval.methods import MethodSource
from buddy_server.eval.quality import bits_per_byte
from buddy_server.eval.questions import Question, as_example
from buddy_server.eval.row import EvalRow
from buddy_server.eval.search_bound import search_paths
from buddy_server.eval.zero_filling import zero_filled
from buddy_server.tokenizer import ChatTokenizer

MAX_ANSWER_TOKENS = 96
# Without a prefix cache, so that the measured speed is that of computation.
SETTINGS = EngineSettings(max_sequences=64, max_step_tokens=1024, prefix_cache=False)
BATCH_ROWS, BATCH_TOKENS = 16, 512
BOUNDS = ("bound", "bound:duo")


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """`router`, `exits` and `duo` are artifacts. `questions_of` draws the questions of a seed, `calibration` is for
    baselines that learn, `texts` for bits per byte. Full depth is measured once per seed, under the name "full". Runs
    with rows in `measured` are skipped."""

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    router: str
    questions_of: Callable[[int], Sequence[Question]]
    calibration: Sequence[Question] = ()
    texts: Sequence[str] = ()
    measured: Sequence[EvalRow] = ()
    exits: str | None = None
    duo: str | None = None

    def source(self, served: ServedModel, tokenizer: ChatTokenizer) -> MethodSource:
        calibration = question_batches(self.calibration, served, tokenizer)
        return MethodSource(served, self.router, self.exits, self.duo, calibration)

    def budgets_of(self, method: str, seed: int) -> list[float | None]:
        """The budgets at which `method` still has to be measured; None lets the predictor choose."""
        done = {row.budget for row in self.measured if (row.method, row.seed) == (method, seed)}
        budgets: tuple[float | None, ...] = self.budgets
        if method == "full":
            budgets = (1.0,)
        elif method in BOUNDS:
            budgets = tuple(budget for budget in self.budgets if budget < 1)
        elif method.startswith("auto"):
            budgets = (None,)
        return [budget for budget in budgets if budget not in done]


def evaluate(served: ServedModel, tokenizer: ChatTokenizer, plan: EvalPlan) -> Iterator[list[EvalRow]]:
    """The rows of one run, or of a seed's search bound, as they are measured.

    Raises MethodError and ArtifactError; ValueError if `plan.measured` covers another number of questions, or if exits
    cannot keep to a budget.
    """
    source = plan.source(served, tokenizer)
    drawn = {seed: plan.questions_of(seed) for seed in plan.seeds}
    _check_measured(plan, drawn)
    # What these raise, they raise before anything is measured.
    for method in plan.methods:
        if method.startswith(("auto", "exits", "duo", "router:")):
            source.routing(method, 0)
        elif method == "bound:duo":
            source.routing("duo", 0)
    if "exits" in plan.methods:
        actions = assemble(served, source.routing("exits", 0), SETTINGS).info.actions
        for asked in plan.budgets:
            actions.max_cost(asked)
    methods = ("full", *(method for method in plan.methods if method not in BOUNDS))
    num_answers = sum(len(plan.budgets_of(m, seed)) * len(drawn[seed]) for m in methods for seed in drawn)
    with tqdm(total=num_answers, desc="eval", unit="answer", mininterval=2) as bar:
        for seed, questions in drawn.items():
            for method in methods:
                if not (budgets := plan.budgets_of(method, seed)):
                    continue
                routing = source.routing("prior:cosine" if method == "full" else method, seed)
                for budget in budgets:
                    bar.set_postfix(method=method, budget=budget, seed=seed)
                    zero_kv = method == "router:zero-kv"
                    built = assemble(served, routing, replace(SETTINGS, native=not zero_kv))
                    with zero_filled(built) if zero_kv else nullcontext():
                        rows = list(_run(built, tokenizer, questions, method, budget, seed, bar))
                    if zero_kv:
                        # Runs in plain torch, so its speed is not comparable with the others'.
                        rows = [replace(row, tokens_per_s=None) for row in rows]
                    if plan.texts and budget is not None:
                        rows.append(_text_row(built, served, tokenizer, plan.texts, routing, method, budget, seed))
                    yield rows
            for method in BOUNDS:
                if method not in plan.methods or not (budgets := plan.budgets_of(method, seed)):
                    continue
                model = served.loaded.model
                if method == "bound:duo":
                    duo = source.routing("duo", seed).router
                    assert isinstance(duo, DuoRouter)
                    model = model.with_small_ffns(duo.small_ffns)
                batches = question_batches(questions, served, tokenizer)
                yield list(_bound(method, model, batches, questions, [b for b in budgets if b], seed))


def _check_measured(plan: EvalPlan, drawn: Mapping[int, Sequence[Question]]) -> None:
    count: dict[tuple[str, float | None, int], int] = defaultdict(int)
    for row in plan.measured:
        count[row.method, row.budget, row.seed] += row.n if row.accuracy is not None else 0
    for (method, budget, seed), n in count.items():
        if seed in drawn and n != len(drawn[seed]):
            raise ValueError(
                f"{method} at {budget}, seed {seed}, was measured on {n} questions, now there are {len(drawn[seed])}"
            )


def _text_row(
    built: BuiltEngine,
    served: ServedModel,
    tokenizer: ChatTokenizer,
    texts: Sequence[str],
    routing: Routing,
    method: str,
    budget: float,
    seed: int,
) -> EvalRow:
    actions = built.info.actions
    max_cost = actions.max_cost(budget)
    bits = bits_per_byte(served.loaded.model, tokenizer, texts, routing.router, max_cost)
    return EvalRow(method, budget, "text", None, max_cost / actions.full_cost, len(texts), seed, bits_per_byte=bits)


def question_batches(
    questions: Sequence[Question], served: ServedModel, tokenizer: ChatTokenizer
) -> list[ExampleBatch]:
    """The questions with their reference answers, in order, packed."""
    end_token = min(end_token_ids(served.loaded.directory), default=0)
    examples = [as_example(question, tokenizer, end_token) for question in questions]
    return [batch.to(served.device) for batch in packed_in_order(examples, BATCH_ROWS, BATCH_TOKENS)]


def _bound(
    method: str,
    model: RoutedDecoder,
    batches: Sequence[ExampleBatch],
    questions: Sequence[Question],
    budgets: Sequence[float],
    seed: int,
) -> Iterator[EvalRow]:
    """A search bound's rows: a question counts as answered if the best path gives exactly its reference answer."""
    actions = model.spec.actions
    most = [actions.max_cost(budget) for budget in budgets]
    right: dict[int, list[bool]] = defaultdict(list)
    spent: dict[int, list[int]] = defaultdict(list)
    for batch in batches:
        for max_cost, found in search_paths(model, batch, most).items():
            right[max_cost] += found.is_right.tolist()
            spent[max_cost] += found.costs.tolist()
    tasks = [question.task for question in questions]
    for budget, max_cost in zip(budgets, most, strict=True):
        for task in dict.fromkeys(tasks):
            members = [index for index, name in enumerate(tasks) if name == task]
            accuracy = mean(right[max_cost][index] for index in members)
            depth = mean(spent[max_cost][index] for index in members) / actions.full_cost
            yield EvalRow(method, budget, task, accuracy, depth, len(members), seed)


def _run(
    built: BuiltEngine,
    tokenizer: ChatTokenizer,
    questions: Sequence[Question],
    method: str,
    budget: float | None,
    seed: int,
    bar: "tqdm[NoReturn]",
) -> Iterator[EvalRow]:
    actions = built.info.actions
    costs = _costs(built, questions, budget)
    right = [False] * len(questions)
    paths: list[Sequence[bytes]] = [()] * len(questions)
    asked = [index for index, question in enumerate(questions) if not question.choices]
    started = time.perf_counter()
    prompts = [Prompt(questions[index].prompt_tokens, costs[index]) for index in asked]
    aligned = method == "router:aligned"
    for number, answer in greedy_answers(built.engine, prompts, MAX_ANSWER_TOKENS, aligned):
        index = asked[number]
        right[index] = questions[index].is_right(answer.text)
        paths[index] = answer.paths
        bar.update()
    elapsed = time.perf_counter() - started
    num_tokens = sum(len(path) for path in paths)
    chosen = _likeliest_choices(built, tokenizer, questions, costs)
    for index, choice in chosen.items():
        right[index] = questions[index].is_right(choice)
        bar.update()
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_task[question.task].append(index)
    for task, members in by_task.items():
        ran = [path for index in members for path in paths[index]]
        spent = [actions.path_costs[path] for path in ran] or [costs[index] for index in members]
        yield EvalRow(
            method=method,
            budget=budget,
            task=task,
            accuracy=mean(right[index] for index in members),
            mean_depth=mean(spent) / actions.full_cost,
            n=len(members),
            seed=seed,
            distinct_paths=mean(len(set(paths[index])) for index in members) if ran else None,
            tokens_per_s=num_tokens / elapsed if num_tokens else None,
            right=tuple(right[index] for index in members),
            depths=tuple(costs[index] / actions.full_cost for index in members),
            layer_use=tuple(mean(action != SKIP for action in of_layer) for of_layer in zip(*ran, strict=True)) or None,
        )


def _costs(built: BuiltEngine, questions: Sequence[Question], budget: float | None) -> list[int]:
    """Milli-layers that a token of each question may cost; without a budget the Budget Predictor chooses."""
    actions = built.info.actions
    if budget is not None:
        return [actions.max_cost(budget)] * len(questions)
    assert built.engine.depth_predictor is not None
    prompts = [question.prompt_tokens for question in questions]
    return built.engine.depth_predictor.costs(prompts, [(actions.smallest_cost, actions.full_cost)] * len(prompts))


def _likeliest_choices(
    built: BuiltEngine, tokenizer: ChatTokenizer, questions: Sequence[Question], costs: Sequence[int]
) -> dict[int, str]:
    """The likeliest choice of every question that has choices, by its index."""
    offered = [(index, choice) for index, question in enumerate(questions) for choice in question.choices]
    prompts = [
        Prompt((*questions[index].prompt_tokens, *tokenizer.encode_text(choice)), costs[index])
        for index, choice in offered
    ]
    num_given = [len(questions[index].prompt_tokens) for index, _ in offered]
    best: dict[int, tuple[float, str]] = {}
    for number, likelihood in log_likelihoods(built.engine, prompts, num_given):
        index, choice = offered[number]
        best[index] = max(best.get(index, (likelihood, choice)), (likelihood, choice))
    return {index: choice for index, (_, choice) in best.items()}
