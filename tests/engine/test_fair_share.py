"""Who runs next and who gives way: the queue alone, then a scheduler whose steps are made up."""

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from statistics import median

import pytest

from buddy_server.engine import fair_share
from buddy_server.engine.fair_share import LONGEST_WAIT_S, LOOK_S, FairShare
from buddy_server.engine.messages import GenerationRequest, SamplingParams, StartEvent
from buddy_server.engine.pace import Pace
from buddy_server.engine.scheduler import Scheduler
from buddy_server.engine.sequence import Sequence
from made_up_steps import add, commit, make_scheduler
from tiny_engine import new_sequence

NOBODY: frozenset[tuple[str, int]] = frozenset()
_names = itertools.count()


def of(tenant: str, weight: float = 1.0, priority: int = 0, num_prompt: int = 4, max_tokens: int = 4) -> Sequence:
    return new_sequence(requested(tenant, weight, priority, num_prompt, max_tokens))


def requested(
    tenant: str, weight: float = 1.0, priority: int = 0, num_prompt: int = 4, max_tokens: int = 4, cost: int = 2000
) -> GenerationRequest:
    prompt, name = (7,) * num_prompt, f"{tenant}{next(_names)}"
    return GenerationRequest(name, tenant, prompt, cost, SamplingParams(max_tokens), weight=weight, priority=priority)


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


def served(queue: FairShare, cost: int = 1000) -> Sequence:
    """The next one, which runs, is charged, and ends."""
    sequence = queue.peek()
    assert sequence is not None
    queue.start(sequence)
    queue.charge(sequence, cost)
    queue.leave(sequence)
    return sequence


def tenants_served(queue: FairShare, count: int, cost: int = 1000) -> list[str]:
    return [served(queue, cost).request.tenant for _ in range(count)]


def test_lowest_counter_is_served_first_then_the_earliest() -> None:
    queue = FairShare()
    for tenant in ("a", "a", "a", "b", "b", "c"):
        queue.push(of(tenant))
    assert tenants_served(queue, 6) == ["a", "b", "c", "a", "b", "a"]
    assert (len(queue), queue.peek()) == (0, None)


def test_weight_divides_what_is_charged() -> None:
    queue = FairShare()
    for tenant, weight in (("a", 3.0), ("b", 1.0)):
        for _ in range(40):
            queue.push(of(tenant, weight))
    assert Counter(tenants_served(queue, 40)) == {"a": 30, "b": 10}


def test_newest_request_states_the_weight_of_its_tenant() -> None:
    queue = FairShare()
    for _ in range(40):
        queue.push(of("a", 1.0))
        queue.push(of("b", 1.0))
    queue.push(of("a", 3.0))
    assert Counter(tenants_served(queue, 40)) == {"a": 30, "b": 10}


def test_newest_weight_counts_for_what_a_tenant_is_ahead_of_others() -> None:
    queue = FairShare()
    for _ in range(40):
        queue.push(of("b"))
    queue.push(of("a", 0.01))
    queue.push(of("a", 0.01))
    while served(queue).request.tenant == "b":
        pass
    # The 1000 that a has run are 100,000 by its weight, which is 100 turns of b.
    queue.push(of("a", 1.0))
    assert tenants_served(queue, 3).count("a") >= 1


def test_rounding_takes_nothing_from_a_share() -> None:
    queue = FairShare()
    running: list[Sequence] = []
    for tenant in "abcdefghijklmn":
        running.append(of(tenant, 0.3))
        queue.push(running[-1])
        queue.start(running[-1])
    for sequence in running[4:]:
        queue.leave(sequence)
    assert [queue._share(queue._line(sequence), 32) for sequence in running[:4]] == [8.0] * 4


def test_prompt_counts_from_the_start_and_is_given_back_as_far_as_it_never_runs() -> None:
    queue = FairShare()
    first = of("a", num_prompt=8)
    for sequence in (first, of("a"), of("b"), of("b")):
        queue.push(sequence)
    queue.start(first)
    queue.charge(first, 500)
    # b will have run 1000; a has run 500, and 15,500 are to come.
    assert tenants_served(queue, 2) == ["b", "b"]
    queue.push(of("b"))
    queue.leave(first)
    assert tenants_served(queue, 2) == ["a", "b"]


def test_higher_priority_goes_first_whatever_it_has_run() -> None:
    queue = FairShare()
    queue.push(of("low"))
    for _ in range(5):
        queue.push(of("high", priority=1))
    assert tenants_served(queue, 6) == ["high"] * 5 + ["low"]


def test_idle_tenant_returns_without_a_windfall() -> None:
    queue = FairShare()
    queue.push(of("idle"))
    served(queue)
    for _ in range(100):
        queue.push(of("busy"))
    tenants_served(queue, 50)
    for tenant in ("idle", "new"):
        for _ in range(10):
            queue.push(of(tenant))
    assert Counter(tenants_served(queue, 30)) == {"busy": 10, "idle": 10, "new": 10}


def test_tenant_that_always_gets_what_it_asks_for_saves_nothing_up() -> None:
    queue = FairShare()
    modest = of("modest")
    queue.push(modest)
    queue.start(modest)
    queue.charge(modest, 8000)
    for _ in range(100):
        queue.push(of("busy"))
    tenants_served(queue, 50)
    for _ in range(20):
        queue.push(of("modest"))
    assert Counter(tenants_served(queue, 20)) == {"busy": 10, "modest": 10}


def test_nobody_gets_a_windfall_from_an_empty_server() -> None:
    queue = FairShare()
    for _ in range(50):
        queue.push(of("first"))
        served(queue)
    for _ in range(10):
        queue.push(of("second"))
        queue.push(of("first"))
    assert Counter(tenants_served(queue, 10)) == {"first": 5, "second": 5}


def test_tenant_whose_client_hangs_up_after_prefill_has_paid_for_it() -> None:
    queue = FairShare()
    for _ in range(20):
        queue.push(of("patient"))
    queue.push(of("hangs-up"))
    served(queue)
    gone = queue.peek()
    assert gone is not None
    assert gone.request.tenant == "hangs-up"
    queue.start(gone)
    queue.charge(gone, 10_000)
    queue.leave(gone)
    queue.push(of("hangs-up"))
    assert tenants_served(queue, 11) == ["patient"] * 10 + ["hangs-up"]


def test_preempted_sequence_goes_before_the_others_of_its_tenant() -> None:
    queue = FairShare()
    first, second, third = of("a"), of("a"), of("a")
    for sequence in (first, second, third):
        queue.push(sequence)
    queue.start(first)
    queue.start(second)
    queue.put_back(second)
    assert [served(queue) for _ in range(2)] == [second, third]


def test_sequence_that_has_waited_too_long_rises_to_the_highest_priority_one_of_a_tenant_at_a_time() -> None:
    clock = Clock()
    queue = FairShare(clock)
    for _ in range(3):
        queue.push(of("low"))
    for _ in range(200):
        queue.push(of("high", priority=5))
    tenants_served(queue, 100)
    clock.now_s += LONGEST_WAIT_S - 1
    assert tenants_served(queue, 1) == ["high"]
    clock.now_s += 1
    raised = queue.peek()
    assert raised is not None
    assert (raised.request.tenant, raised.priority) == ("low", 5)
    queue.start(raised)
    clock.now_s += LONGEST_WAIT_S
    assert tenants_served(queue, 3) == ["high"] * 3
    queue.leave(raised)
    clock.now_s += LOOK_S
    assert Counter(tenants_served(queue, 3)) == {"high": 2, "low": 1}


def test_time_of_running_in_between_does_not_make_a_long_wait_longer() -> None:
    clock = Clock()
    queue = FairShare(clock)
    low = of("low")
    queue.push(low)
    for _ in range(3):
        queue.start(low)
        clock.now_s += LONGEST_WAIT_S / 3
        queue.put_back(low)
    queue.push(of("high", priority=1))
    assert queue.peek() is low


def test_sequence_that_has_risen_rises_again_when_a_higher_priority_appears() -> None:
    clock = Clock()
    queue = FairShare(clock)
    first, second = of("low"), of("low")
    for sequence in (first, second, of("high", priority=1), of("low", priority=1)):
        queue.push(sequence)
    clock.now_s += LONGEST_WAIT_S
    queue.peek()
    for _ in range(5):
        queue.push(of("highest", priority=2))
    clock.now_s += LOOK_S
    queue.peek()
    assert (first.priority, second.priority) == (2, 0)


def test_long_waits_change_nothing_within_one_priority() -> None:
    clock = Clock()
    queue = FairShare(clock)
    sequences = [of("a") for _ in range(5)]
    for sequence in sequences:
        queue.push(sequence)
        clock.now_s += LONGEST_WAIT_S
    assert [served(queue) for _ in range(5)] == sequences


def test_time_in_the_queue_is_that_of_the_oldest_that_never_ran() -> None:
    clock = Clock()
    queue = FairShare(clock)
    assert queue.queue_s == 0
    first, second, third = of("a"), of("a"), of("b")
    for sequence in (first, second, third):
        queue.push(sequence)
        clock.now_s += 1
    assert queue.queue_s == 3
    assert queue.start(first) == 3
    queue.put_back(first)
    assert queue.queue_s == 2
    queue.remove(second)
    assert queue.queue_s == 1
    assert queue.start(first) is None
    assert queue.start(third) == 1
    assert queue.queue_s == 0


def test_tenant_with_more_than_its_share_does_not_count_in_the_time_in_the_queue() -> None:
    clock = Clock()
    queue = FairShare(clock)
    flood, small = [of("flood") for _ in range(8)], of("small")
    for sequence in flood:
        queue.push(sequence)
    for sequence in flood[:6]:
        queue.start(sequence)
    clock.now_s += 1
    # Alone, the whole is its share.
    assert queue.queue_s == 1
    queue.push(small)
    clock.now_s += 1
    assert queue.queue_s == 1
    queue.start(small)
    assert queue.queue_s == 0


def test_tenant_that_other_engines_serve_does_not_count_in_the_time_in_the_queue() -> None:
    clock = Clock()
    queue = FairShare(clock)
    queue.push(of("elsewhere"))
    clock.now_s += 1
    assert queue.queue_s == 1
    queue.charge_elsewhere({("elsewhere", 0): 1000}, NOBODY)
    assert queue.queue_s == 0
    queue.push(of("here"))
    clock.now_s += 1
    assert queue.queue_s == 1


def test_preempted_sequence_goes_first_also_among_tenants_that_have_run_as_much() -> None:
    queue = FairShare()
    first, other, second = of("a"), of("b"), of("a")
    for sequence in (first, other, second):
        queue.push(sequence)
    queue.start(first)
    assert queue.peek() is other
    queue.put_back(first)
    assert queue.peek() is first


def test_removed_sequence_never_comes_and_is_no_longer_counted() -> None:
    queue = FairShare()
    first, second = of("a"), of("b")
    queue.push(first)
    queue.push(second)
    queue.remove(first)
    queue.remove(first)
    assert len(queue) == 1
    assert served(queue) is second


def test_tenants_without_work_are_forgotten_and_gain_nothing_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair_share, "MOST_IDLE", 10)
    queue = FairShare()
    for _ in range(20):
        queue.push(of("busy"))
    for index in range(100):
        queue.push(of(f"t{index}"))
        served(queue, 5000)
    while len(queue) > 1:
        served(queue, 5000)
    assert len(queue._lines) == 11
    for tenant in ("busy", "t0") * 5:
        queue.push(of(tenant))
    assert Counter(tenants_served(queue, 6, 5000)) == {"busy": 3, "t0": 3}


def test_ten_thousand_that_wait_are_served_in_turns_and_within_a_second_or_so() -> None:
    queue = FairShare()
    sequences = [of(f"t{index % 5000}") for index in range(10_000)]
    for sequence in sequences:
        queue.push(sequence)
    for sequence in sequences[::100]:
        queue.remove(sequence)
    order = tenants_served(queue, len(queue))
    assert len(order) == 9900
    assert len(set(order[:4900])) == 4900


def test_what_is_charged_is_told_once_by_tenant_and_the_priority_that_it_ran_in() -> None:
    clock = Clock()
    queue = FairShare(clock)
    queue.push(of("a"))
    queue.push(of("b", priority=2))
    assert queue.take_served() == {}
    served(queue, 300)
    queue.push(of("b", priority=2))
    served(queue, 400)
    assert queue.take_served() == {("b", 2): 700}
    queue.push(of("b", priority=2))
    clock.now_s += LONGEST_WAIT_S
    # It has risen to the highest priority.
    assert served(queue, 500).request.tenant == "a"
    queue.charge_elsewhere({("b", 2): 10_000}, NOBODY)
    assert queue.take_served() == {("a", 2): 500}
    assert queue.take_served() == {}


def test_what_other_engines_run_for_a_tenant_counts_by_its_weight() -> None:
    queue = FairShare()
    for _ in range(40):
        queue.push(of("a", 2.0))
        queue.push(of("b", 1.0))
    tenants_served(queue, 3)
    queue.charge_elsewhere({("a", 0): 20_000}, NOBODY)
    # b has run as much by its weight when it has run 10 times; then they share again.
    assert set(tenants_served(queue, 10)) == {"b"}
    assert Counter(tenants_served(queue, 30)) == {"a": 20, "b": 10}


def test_tenant_without_work_here_is_not_charged_for_what_runs_elsewhere() -> None:
    queue = FairShare()
    queue.push(of("known"))
    for _ in range(20):
        queue.push(of("busy"))
    # Is ahead of the other when it has no work left.
    served(queue, 5000)
    assert ("known", 0) in queue._lines
    queue.charge_elsewhere({("known", 0): 10**9, ("unknown", 0): 10**9}, NOBODY)
    for tenant in ("known", "unknown"):
        for _ in range(10):
            queue.push(of(tenant))
    order = tenants_served(queue, 25)
    assert order.index("unknown") <= 1
    assert order.index("known") <= 12
    assert Counter(order[-9:]) == {"busy": 3, "known": 3, "unknown": 3}


def test_what_runs_elsewhere_while_nobody_waits_here_is_no_debt() -> None:
    queue = FairShare()
    running = of("a")
    queue.push(running)
    queue.start(running)
    queue.charge(running, 8000)
    queue.charge_elsewhere({("a", 0): 10**9}, NOBODY)
    for _ in range(10):
        queue.push(of("b"))
        queue.push(of("a"))
    assert Counter(tenants_served(queue, 10)) == {"a": 5, "b": 5}


@pytest.mark.parametrize(
    ("waiting", "next_ones"),
    [
        (({("a", 0)}, {("a", 0)}), "aaaa"),
        ((NOBODY, NOBODY), "abab"),
        ((NOBODY, {("a", 0)}), "abab"),
        (({("a", 0)}, NOBODY, {("a", 0)}), "abab"),
        (({("a", 1)}, {("a", 1)}), "abab"),
    ],
)
def test_tenant_that_always_waits_elsewhere_keeps_its_claim_while_nothing_of_it_waits_here(
    waiting: tuple[set[tuple[str, int]], ...], next_ones: str
) -> None:
    queue = FairShare()
    queue.push(of("a"))
    running = queue.peek()
    assert running is not None
    queue.charge_elsewhere({}, waiting[0])
    queue.start(running)
    queue.charge(running, 8000)
    for _ in range(40):
        queue.push(of("b"))
    for told in waiting[1:]:
        tenants_served(queue, 10)
        queue.charge_elsewhere({}, told)
    # Of a, one runs and none waits.
    tenants_served(queue, 10)
    for _ in range(20):
        queue.push(of("a"))
    assert "".join(tenants_served(queue, 4)) == next_ones


def test_tenant_of_which_nothing_runs_here_keeps_no_claim_wherever_it_waits() -> None:
    queue = FairShare()
    queue.charge_elsewhere({}, {("a", 0)})
    queue.push(of("a"))
    for _ in range(60):
        queue.push(of("b"))
    # Is ahead of the other when it has no work left, and far behind it when it returns.
    served(queue, 5000)
    assert ("a", 0) in queue._lines
    queue.charge_elsewhere({}, {("a", 0)})
    tenants_served(queue, 40)
    for _ in range(20):
        queue.push(of("a"))
    assert "".join(tenants_served(queue, 4)) == "abab"


def test_tenant_that_is_new_here_has_no_claim_wherever_it_waits() -> None:
    queue = FairShare()
    for _ in range(20):
        queue.push(of("b"))
    tenants_served(queue, 10)
    queue.charge_elsewhere({}, {("a", 0)})
    for _ in range(20):
        queue.push(of("a"))
    assert "".join(tenants_served(queue, 4)) == "abab"


def test_what_runs_elsewhere_changes_nothing_between_priorities() -> None:
    queue = FairShare()
    for _ in range(3):
        queue.push(of("high", priority=1))
        queue.push(of("low"))
    queue.charge_elsewhere({("high", 1): 10**9, ("high", 0): 10**9, ("low", 1): 10**9}, NOBODY)
    assert tenants_served(queue, 6) == ["high"] * 3 + ["low"] * 3


def test_low_priority_that_others_serve_rises_after_a_long_wait_as_any_other() -> None:
    clock = Clock()
    queue = FairShare(clock)
    queue.push(of("low"))
    for _ in range(50):
        queue.push(of("other"))
        queue.push(of("high", priority=1))
    queue.charge_elsewhere({("low", 0): 10**9}, NOBODY)
    assert "low" not in tenants_served(queue, 10)
    clock.now_s += LONGEST_WAIT_S
    assert "low" in tenants_served(queue, 3)


def test_tenant_that_others_serve_gets_a_lane_after_a_long_wait_and_is_as_far_as_those_here() -> None:
    clock = Clock()
    queue = FairShare(clock)
    for _ in range(100):
        queue.push(of("here"))
        queue.push(of("both"))
    assert tenants_served(queue, 2) == ["here", "both"]
    queue.charge_elsewhere({("both", 0): 10**9}, NOBODY)
    clock.now_s += LONGEST_WAIT_S - 1
    assert set(tenants_served(queue, 20)) == {"here"}
    clock.now_s += 1
    assert queue.peek() is not None
    # There may be no lane yet when more is told.
    queue.charge_elsewhere({("both", 0): 10**9}, NOBODY)
    assert tenants_served(queue, 6) == ["both", "here"] * 3
    # Its wait begins again with the last one that ran.
    queue.charge_elsewhere({("both", 0): 10**9}, NOBODY)
    clock.now_s += LONGEST_WAIT_S - 1
    assert set(tenants_served(queue, 20)) == {"here"}
    clock.now_s += 1
    assert tenants_served(queue, 1) == ["both"]


def test_tenant_that_has_a_lane_here_waits_for_the_next_until_others_have_run_as_much() -> None:
    clock = Clock()
    queue = FairShare(clock)
    running = of("both")
    queue.push(running)
    queue.start(running)
    for _ in range(100):
        queue.push(of("here"))
        queue.push(of("both"))
    queue.charge_elsewhere({("both", 0): 50_000}, NOBODY)
    clock.now_s += 2 * LONGEST_WAIT_S
    assert set(tenants_served(queue, 30)) == {"here"}
    queue.leave(running)
    clock.now_s += LONGEST_WAIT_S
    assert tenants_served(queue, 1) == ["both"]


def test_what_a_tenant_ran_here_is_never_forgiven() -> None:
    clock = Clock()
    queue = FairShare(clock)
    for _ in range(100):
        queue.push(of("greedy"))
        queue.push(of("patient"))
    served(queue, 30_000)
    queue.charge_elsewhere({("greedy", 0): 10_000, ("patient", 0): 10_000}, NOBODY)
    assert set(tenants_served(queue, 10)) == {"patient"}
    clock.now_s += 10 * LONGEST_WAIT_S
    # 40,000 to 20,000, of which 10,000 of the greedy one ran elsewhere.
    assert tenants_served(queue, 11) == ["patient"] * 10 + ["greedy"]


@dataclass
class Load:
    """Tenants that keep a number of requests open, on a scheduler with 8 lanes."""

    streams: dict[str, GenerationRequest]
    counts: dict[str, int]
    scheduler: Scheduler = field(default_factory=lambda: make_scheduler(num_blocks=1000, max_sequences=8))
    served: Counter[str] = field(default_factory=Counter)
    num_preemptions: int = 0
    waited: dict[str, list[int]] = field(default_factory=dict)
    _open: dict[str, set[Sequence]] = field(default_factory=dict)
    _added: dict[str, tuple[str, int]] = field(default_factory=dict)

    def run(self, num_steps: int, seed: int = 0) -> None:
        rng = random.Random(seed)
        for number in range(num_steps):
            for tenant, count in self.counts.items():
                self._fill(tenant, count, number, rng)
            batch = self.scheduler.schedule()
            output = commit(self.scheduler, batch)
            self.num_preemptions += output.stats.num_preemptions
            for tenant, depth in output.stats.depth.items():
                self.served[tenant] += depth.executed - depth.uncharged
            for name, event in output.events:
                if isinstance(event, StartEvent):
                    tenant, added = self._added.pop(name)
                    self.waited.setdefault(tenant, []).append(number - added)

    def _fill(self, tenant: str, count: int, number: int, rng: random.Random) -> None:
        alive = {sequence for sequence in self._open.get(tenant, set()) if not sequence.has_ended}
        while len(alive) < count:
            kind = self.streams[tenant]
            params = SamplingParams(rng.randint(kind.sampling.max_tokens // 2, kind.sampling.max_tokens))
            request = requested(tenant, kind.weight, kind.priority, len(kind.prompt_tokens), cost=kind.max_cost)
            request = GenerationRequest(**{**_fields(request), "sampling": params})
            self._added[request.request_id] = tenant, number
            alive.add(add(self.scheduler, request))
        self._open[tenant] = alive

    def running(self, tenant: str) -> int:
        return sum(sequence.request.tenant == tenant for sequence in self.scheduler.running)


def _fields(request: GenerationRequest) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__slots__}


def load(counts: dict[str, int], **kinds: GenerationRequest) -> Load:
    return Load({tenant: kinds.get(tenant, requested(tenant, max_tokens=40)) for tenant in counts}, counts)


@pytest.mark.parametrize(("weights", "costs"), [((3, 1), (2000, 2000)), ((1, 1), (2000, 4000)), ((2, 1), (4000, 3000))])
def test_floods_share_layer_tokens_by_weight_and_hardly_preempt_each_other(
    weights: tuple[int, int], costs: tuple[int, int]
) -> None:
    kinds = {
        tenant: requested(tenant, weight, max_tokens=40, cost=cost)
        for tenant, weight, cost in zip("ab", weights, costs, strict=True)
    }
    flood = load({"a": 20, "b": 20}, **kinds)
    flood.run(4000)
    assert flood.served["a"] / flood.served["b"] == pytest.approx(weights[0] / weights[1], rel=0.03)
    assert flood.num_preemptions < sum(map(len, flood.waited.values())) / 10


def test_lanes_that_become_free_together_are_divided() -> None:
    scheduler = make_scheduler(num_blocks=1000, max_sequences=8, max_step_tokens=64)
    for tenant in "a" * 60 + "b" * 60:
        params = SamplingParams(40)
        add(scheduler, GenerationRequest(f"{tenant}{next(_names)}", tenant, (7,) * 4, 2000, params))
    num_preemptions = 0
    while len(scheduler.fair_share) > 80:
        num_preemptions += commit(scheduler, scheduler.schedule()).stats.num_preemptions
        counts = Counter(sequence.request.tenant for sequence in scheduler.running)
        assert counts["a"] == counts["b"]
    assert num_preemptions == 0


def test_small_tenant_runs_at_once_beside_a_flood_of_long_answers() -> None:
    beside = load({"flood": 20}, flood=requested("flood", max_tokens=2000))
    beside.run(10)
    assert beside.running("flood") == 8
    beside.streams["small"], beside.counts["small"] = requested("small", max_tokens=20), 2
    beside.run(500)
    # One step for the flood to be charged for what it ran; each request of the small one then costs one preemption.
    assert max(beside.waited["small"]) <= 1
    assert beside.running("small") == 2
    assert beside.num_preemptions <= len(beside.waited["small"])


def test_tenant_is_given_no_more_than_half_its_share_of_lanes_by_preemption() -> None:
    beside = load({"flood": 20}, flood=requested("flood", max_tokens=2000))
    beside.run(10)
    beside.streams["other"], beside.counts["other"] = requested("other", max_tokens=2000), 20
    beside.run(100)
    assert (beside.running("flood"), beside.running("other"), beside.num_preemptions) == (6, 2, 2)


def test_tenants_that_outnumber_the_lanes_get_one_each_and_keep_it() -> None:
    many = load({"flood": 20}, flood=requested("flood", max_tokens=2000))
    many.run(10)
    for index in range(20):
        many.streams[f"t{index}"], many.counts[f"t{index}"] = requested(f"t{index}", max_tokens=2000), 1
    many.run(300)
    assert many.running("flood") == 1
    assert many.num_preemptions == 7


def test_higher_priority_takes_every_lane_and_gives_them_back() -> None:
    both = load(
        {"low": 20, "high": 20},
        low=requested("low", max_tokens=2000),
        high=requested("high", priority=1, max_tokens=20),
    )
    both.run(200)
    assert (both.running("low"), both.running("high")) == (0, 8)
    both.counts["high"] = 0
    both.run(40)
    assert both.running("low") == 8


def test_sequence_of_a_higher_priority_is_never_preempted_for_a_lower_one() -> None:
    scheduler = make_scheduler(max_sequences=2)
    high = [add(scheduler, requested("high", priority=1, max_tokens=50)) for _ in range(2)]
    commit(scheduler, scheduler.schedule())
    add(scheduler, requested("low"))
    for _ in range(10):
        commit(scheduler, scheduler.schedule())
    assert scheduler.running == high


def test_prompt_of_a_small_tenant_is_not_behind_the_prompts_of_a_flood() -> None:
    scheduler = make_scheduler(max_step_tokens=16)
    for _ in range(3):
        add(scheduler, requested("flood", num_prompt=64))
    commit(scheduler, scheduler.schedule())
    small = add(scheduler, requested("small", num_prompt=8))
    works = scheduler.schedule().works
    assert (works[0].sequence, works[0].length) == (small, 8)


def test_prompt_of_a_low_priority_is_not_overtaken_for_ever() -> None:
    clock = Clock()
    scheduler = make_scheduler(num_blocks=1000, max_sequences=8, max_step_tokens=16)
    scheduler.fair_share = FairShare(clock)
    low = add(scheduler, requested("low", num_prompt=8))
    high: list[Sequence] = []
    while not low.is_decoding:
        high = [sequence for sequence in high if not sequence.has_ended]
        high += [add(scheduler, requested("high", 1.0, 1, num_prompt=32, max_tokens=1)) for _ in range(4 - len(high))]
        commit(scheduler, scheduler.schedule())
        assert low.lane >= 0
        clock.now_s += 1
        assert clock.now_s < 100 + 2 * LONGEST_WAIT_S


def test_low_priority_gets_on_however_often_it_is_preempted() -> None:
    clock = Clock()
    scheduler = make_scheduler(num_blocks=1000, max_sequences=4, max_step_tokens=16)
    scheduler.fair_share = FairShare(clock)
    low = add(scheduler, requested("low", num_prompt=400))
    while not low.has_ended:
        if clock.now_s % 30 == 20:
            for _ in range(4):
                add(scheduler, requested("high", priority=1, max_tokens=8))
        commit(scheduler, scheduler.schedule())
        clock.now_s += 1
        assert clock.now_s < 1000


def test_nobody_of_a_lower_priority_is_preempted_in_vain() -> None:
    scheduler = make_scheduler(num_blocks=30, max_sequences=8)
    first = add(scheduler, requested("high", priority=1, num_prompt=60, max_tokens=20))
    commit(scheduler, scheduler.schedule())
    lows = [add(scheduler, requested("low")) for _ in range(3)]
    commit(scheduler, scheduler.schedule())
    # It needs 15 blocks, and only 14 are free or held by the low ones.
    add(scheduler, requested("high", priority=1, num_prompt=60))
    commit(scheduler, scheduler.schedule())
    assert scheduler.running == [first, *lows]


def test_nobody_of_a_flood_is_preempted_in_vain() -> None:
    scheduler = make_scheduler(num_blocks=15, max_sequences=8)
    flood = [add(scheduler, requested("flood", num_prompt=8, max_tokens=20)) for _ in range(4)]
    for _ in range(2):
        commit(scheduler, scheduler.schedule())
    add(scheduler, requested("big", num_prompt=44))
    commit(scheduler, scheduler.schedule())
    assert scheduler.running == flood


def test_blocks_are_taken_from_the_tenant_that_would_keep_most() -> None:
    scheduler = make_scheduler(num_blocks=8)
    flood = [add(scheduler, requested("flood", num_prompt=7, max_tokens=9)) for _ in range(3)]
    small = add(scheduler, requested("small", num_prompt=7, max_tokens=9))
    for _ in range(3):
        commit(scheduler, scheduler.schedule())
    # The small one has come last, and still runs: each lacked a third block.
    assert scheduler.running == [flood[0], small]
    while scheduler.has_work:
        commit(scheduler, scheduler.schedule())
    assert scheduler.pool.num_free == 8


def test_blocks_of_a_flood_make_room_for_a_small_tenant() -> None:
    scheduler = make_scheduler(num_blocks=12, max_sequences=8)
    for _ in range(20):
        add(scheduler, requested("flood", num_prompt=8, max_tokens=24))
    for _ in range(3):
        commit(scheduler, scheduler.schedule())
    small = add(scheduler, requested("small", num_prompt=8, max_tokens=8))
    for _ in range(2):
        commit(scheduler, scheduler.schedule())
    assert small in scheduler.running


@pytest.mark.parametrize(("fixed_s", "row_s", "num_rows"), [(0.0, 0.001, 19), (0.18, 0.001, 22), (0.01, 0.0, 31)])
def test_rows_beyond_a_share_are_run_as_far_as_they_do_not_slow_down_a_small_tenant(
    fixed_s: float, row_s: float, num_rows: int
) -> None:
    scheduler = make_scheduler(num_blocks=4000, max_sequences=32, max_step_tokens=64)
    flood = [add(scheduler, requested("flood", max_tokens=400)) for _ in range(30)]

    def run(num_steps: int) -> list[int]:
        counts = []
        for _ in range(num_steps):
            batch = scheduler.schedule()
            counts.append(sum(work.is_decode for work in batch.works))
            commit(scheduler, batch, seconds=fixed_s + row_s * batch.num_tokens)
        return counts

    for _ in range(40):
        add(scheduler, requested("flood", num_prompt=8, max_tokens=2))
        run(2)
    alone, before = run(20), [sequence.num_output for sequence in flood]
    small = [add(scheduler, requested("small", max_tokens=400)) for _ in range(2)]
    counts = run(200)
    assert alone[-1] == 30
    assert median(counts[20:]) == pytest.approx(num_rows, abs=1)
    assert {sequence.num_output for sequence in small} == {max(sequence.num_output for sequence in small)}
    # The flood's sequences take turns.
    gained = [sequence.num_output - earlier for sequence, earlier in zip(flood, before, strict=True)]
    assert max(gained) - min(gained) <= 2
    for sequence in small:
        scheduler.finish(sequence)
    assert run(1) == [30]


@pytest.mark.parametrize("seed", range(20))
def test_everybody_ends_whatever_their_weights_and_priorities(seed: int) -> None:
    rng = random.Random(seed)
    clock = Clock()
    scheduler = make_scheduler(num_blocks=rng.randint(6, 30), max_sequences=rng.randint(1, 6))
    scheduler.fair_share = FairShare(clock)
    scheduler.pace = Pace()
    to_come = [
        requested(
            rng.choice("abcd"), rng.choice((0.5, 1, 3)), rng.choice((0, 0, 2)), rng.randint(1, 12), rng.randint(1, 10)
        )
        for _ in range(60)
    ]
    alive: list[Sequence] = []
    num_steps = 0
    while to_come or scheduler.has_work:
        while to_come and (not scheduler.has_work or rng.random() < 0.4):
            alive.append(add(scheduler, to_come.pop()))
        if alive and rng.random() < 0.03:
            scheduler.finish(alive.pop(rng.randrange(len(alive))))
        commit(scheduler, scheduler.schedule())
        scheduler.check_idle()
        alive = [sequence for sequence in alive if not sequence.has_ended]
        clock.now_s += 1
        num_steps += 1
        assert num_steps < 5000, "no end in sight"
    assert not alive
    groups = scheduler.fair_share._classes.values()
    assert all((group.num_active, group.num_waiting, group.weight) == (0, 0, 0) for group in groups)
