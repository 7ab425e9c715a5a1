"""The task generator: seeded, split without overlap, and checked by answers that hold up."""

import itertools
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

import pytest

from buddy_routing.tasks import (
    FAMILIES,
    LEVELS,
    SPLITS,
    Split,
    StoryTask,
    Task,
    generate,
    is_correct,
    mentions_required,
    sample_tasks,
    split_of,
    story_requests,
)
from buddy_routing.tasks.arithmetic import worked_out

NUM_TASKS_PER_SPLIT = 10_000


@pytest.fixture(scope="module")
def tasks_by_split() -> Mapping[Split, list[Task]]:
    return {
        "train": list(sample_tasks(seed=11, count=NUM_TASKS_PER_SPLIT, split="train")),
        "validation": list(sample_tasks(seed=11, count=NUM_TASKS_PER_SPLIT, split="validation")),
        "heldout": list(sample_tasks(seed=11, count=NUM_TASKS_PER_SPLIT, split="heldout")),
    }


@pytest.fixture(scope="module")
def all_tasks(tasks_by_split: Mapping[Split, list[Task]]) -> list[Task]:
    return [task for tasks in tasks_by_split.values() for task in tasks]


def a_task(family: str = "arithmetic", prompt: str = "What is 12 + 7?", answer: str = "19") -> Task:
    return Task(family, 1, prompt, "", answer, "key")


def normalised(prompt: str) -> str:
    return prompt.lower().rstrip(".?!").strip()


def test_same_seed_gives_same_tasks() -> None:
    assert list(sample_tasks(seed=3, count=200)) == list(sample_tasks(seed=3, count=200))


def test_other_seed_gives_other_tasks() -> None:
    assert list(sample_tasks(seed=3, count=200)) != list(sample_tasks(seed=4, count=200))


def test_every_family_and_level_is_drawn_in_every_split(tasks_by_split: Mapping[Split, list[Task]]) -> None:
    wanted = {(family, level) for family in FAMILIES for level in LEVELS}
    for tasks in tasks_by_split.values():
        assert {(task.family, task.level) for task in tasks} == wanted


def test_splits_share_no_problem_and_no_prompt(tasks_by_split: Mapping[Split, list[Task]]) -> None:
    for one, other in itertools.combinations(tasks_by_split.values(), 2):
        assert not {task.key for task in one} & {task.key for task in other}
        assert not {normalised(task.prompt) for task in one} & {normalised(task.prompt) for task in other}


def test_split_follows_from_the_key_alone(tasks_by_split: Mapping[Split, list[Task]]) -> None:
    for split, tasks in tasks_by_split.items():
        assert {split_of(task.key) for task in tasks} == {split}


def test_swapped_operands_are_the_same_problem(all_tasks: list[Task]) -> None:
    keys = {task.key for task in all_tasks if task.key.startswith(("add:", "mul:"))}
    assert all(int(key.split(":")[1]) >= int(key.split(":")[2]) for key in keys)


def test_every_family_and_level_has_a_hundred_problems(all_tasks: list[Task]) -> None:
    keys = defaultdict(set)
    for task in all_tasks:
        keys[task.family, task.level].add(task.key)
    assert min(len(problems) for problems in keys.values()) >= 100


def test_every_reference_reply_is_correct(all_tasks: list[Task]) -> None:
    assert [task for task in all_tasks if not is_correct(task, task.reply)] == []


def test_bare_answer_is_correct(all_tasks: list[Task]) -> None:
    assert [task for task in all_tasks if not is_correct(task, task.answer)] == []


def test_repeating_the_prompt_is_wrong(all_tasks: list[Task]) -> None:
    assert [task for task in all_tasks if is_correct(task, task.prompt)] == []


def test_replies_to_other_tasks_are_mostly_wrong(all_tasks: list[Task]) -> None:
    rng = random.Random(0)
    by_family = defaultdict(list)
    for task in all_tasks:
        by_family[task.family].append(task)
    for tasks in by_family.values():
        others = rng.sample(tasks, len(tasks))
        num_right = sum(is_correct(task, other.reply) for task, other in zip(tasks, others, strict=True))
        assert num_right < 0.15 * len(tasks)


def test_replies_are_short_and_plain(all_tasks: list[Task]) -> None:
    assert max(len(task.reply) for task in all_tasks) <= 140
    assert all(task.reply.isascii() and task.prompt.isascii() for task in all_tasks)
    assert not [task for task in all_tasks if "{" in task.prompt + task.reply or "  " in task.prompt + task.reply]


def test_one_problem_is_asked_in_many_ways() -> None:
    rng = random.Random(0)
    prompts = Counter(re.sub(r"\d+", "N", generate("arithmetic", 1, rng).prompt) for _ in range(2000))
    assert len(prompts) > 100


def test_arithmetic_answers_agree_with_python(all_tasks: list[Task]) -> None:
    for task in all_tasks:
        if task.family == "arithmetic":
            operation, *numbers = task.key.split(":")
            a = int(numbers[0])
            match operation:
                case "double":
                    expected = 2 * a
                case "half":
                    expected = a // 2
                case _:
                    compute = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__, "div": int.__floordiv__}
                    expected = compute[operation](a, int(numbers[1]))
            assert int(task.answer) == expected


@pytest.mark.parametrize(
    ("a", "op", "b", "said"),
    [
        (9, "+", 8, "9 + 8 = 17"),
        (34, "+", 25, "34 + 25: 4 + 5 = 9, 3 + 2 = 5. The answer is 59"),
        (7, "+", 95, "7 + 95: 5 + 7 = 12, 9 + 1 = 10. The answer is 102"),
        (100, "-", 7, "100 - 7: 10 - 7 = 3, 10 - 1 = 9, 1 - 1 = 0. The answer is 93"),
        (61, "-", 1, "61 - 1: 1 - 1 = 0. The answer is 60"),
        (12, "x", 12, "12 x 12 = 144"),
        (24, "x", 3, "24 x 3: 20 x 3 = 60, 4 x 3 = 12. The answer is 72"),
        (30, "x", 3, "30 x 3 = 90"),
        (196, "/", 4, "196 / 4: 160 / 4 = 40, 36 / 4 = 9. The answer is 49"),
        (5, "+", 0, "5 + 0 = 5"),
    ],
)
def test_beyond_the_tables_a_working_leads_to_the_answer(a: int, op: str, b: int, said: str) -> None:
    assert worked_out(a, op, b) == said


def test_tables_share_no_prompt_between_the_splits() -> None:
    rng = random.Random(0)
    prompts: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for split in prompts:
        for _ in range(6000):
            prompt = generate("arithmetic", 1, rng, split).prompt
            prompts[split].add(prompt.lower().rstrip(".?! "))
    for one, other in itertools.combinations(prompts.values(), 2):
        assert not one & other


@pytest.mark.parametrize("family", ["arithmetic", "conversion", "dates", "word_problems"])
def test_every_equation_in_the_working_holds(family: str, all_tasks: list[Task]) -> None:
    equation = re.compile(r"(\d+) ([-+x/]) (\d+)(?: ([-+]) 1)? = (\d+)")
    num_checked = 0
    for task in all_tasks:
        for left, sign, right, carry, result in equation.findall(task.reply if task.family == family else ""):
            a, b = int(left), int(right)
            value = {"+": a + b, "-": a - b, "x": a * b, "/": a / b if b else None}[sign]
            assert value == int(result) - {"": 0, "+": 1, "-": -1}[carry], task
            num_checked += 1
    assert num_checked > 100


def test_sorted_lists_hold_the_items_asked_for(all_tasks: list[Task]) -> None:
    for task in all_tasks:
        if task.family == "sorting":
            items = task.answer.split(", ")
            assert all(re.search(rf"\b{item}\b", task.prompt) for item in items)
            in_order = sorted(items, key=int) if items[0].isdigit() else sorted(items)
            assert items in (in_order, in_order[::-1])


@pytest.mark.parametrize(
    "reply",
    ["19", "12 + 7 = 19.", "The answer is 19", "  the sum is 19!", "2 + 7 = 9, so it makes 19 apples."],
)
def test_number_is_found_at_the_end_of_a_reply(reply: str) -> None:
    assert is_correct(a_task(), reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "18",
        "19.5",
        "119",
        "-19",
        "18 or 19",
        "18, 19",
        "It is not 19",
        "19 or 20",
        "The answer is 18. The answer is 19.",
    ],
)
def test_other_numbers_and_several_numbers_are_wrong(reply: str) -> None:
    assert not is_correct(a_task(), reply)


def test_piece_of_the_prompt_is_not_an_answer() -> None:
    task = a_task("word_problems", "Tom has 6 pens. Tom gives away 3. How many are left?", "3")
    assert not is_correct(task, "Tom gives away 3.")


@pytest.mark.parametrize("reply", ["apple, fig, pear.", "Apple, fig and pear", "The order is apple, fig, pear."])
def test_list_may_be_written_in_a_few_ways(reply: str) -> None:
    assert is_correct(a_task("sorting", "Sort pear, fig, apple.", "apple, fig, pear"), reply)


@pytest.mark.parametrize(
    "reply", ["apple, pear, fig", "an egg, apple, fig, pear", "apple, fig, pear, plum", "fig, pear"]
)
def test_list_with_other_items_or_order_is_wrong(reply: str) -> None:
    assert not is_correct(a_task("sorting", "Sort pear, fig, apple.", "apple, fig, pear"), reply)


@pytest.mark.parametrize(
    "reply",
    [
        "Monday or Tuesday",
        "Monday, Tuesday",
        "Monday. Tuesday.",
        "It is Monday. It is Tuesday.",
        "not Tuesday",
    ],
)
def test_several_candidate_words_are_wrong(reply: str) -> None:
    task = a_task("dates", "What day comes after Monday?", "Tuesday")
    assert is_correct(task, "the day after Monday is tuesday")
    assert not is_correct(task, reply)


def test_yes_needs_no_no_beside_it() -> None:
    task = a_task("comparison", "Is 9 more than 7?", "yes")
    assert is_correct(task, "Yes, 9 is more than 7.")
    assert not is_correct(task, "Yes or no")
    assert not is_correct(task, "No.")


def test_capitals_must_be_capitals() -> None:
    task = a_task("strings", "Write 'cat' in capitals.", "CAT")
    assert is_correct(task, "CAT.")
    assert not is_correct(task, "cat.")


def test_clock_time_is_one_answer() -> None:
    task = a_task("dates", "What time is 10 minutes after 4:05?", "4:15")
    assert is_correct(task, "5 + 10 = 15. The answer is 4:15.")
    assert not is_correct(task, "The answer is 3:15.")


def test_chat_accepts_each_reply_of_the_intent_and_more_words_after_the_canonical_one() -> None:
    task = next(task for task in sample_tasks(1, 500, families=["chat"]) if task.key.startswith("chat:who:"))
    assert task.answer == "I am Buddy, a small language model that can run with fewer layers."
    assert is_correct(task, "i am buddy")
    assert is_correct(task, task.answer + " Nice to meet you!")
    assert not is_correct(task, "I am Bob.")
    assert not is_correct(replace(task, prompt="I am Buddy."), "I am Buddy.")


def test_unknown_family_is_named_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="'algebra'; allowed: arithmetic, "):
        generate("algebra", 1, random.Random(0))


def test_unknown_level_is_named_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="level is 4; allowed: 1, 2, 3"):
        generate("arithmetic", 4, random.Random(0))


def test_bad_sampling_arguments_are_named_before_the_first_task() -> None:
    with pytest.raises(ValueError, match="count is -1"):
        sample_tasks(0, -1)
    with pytest.raises(ValueError, match="split is 'test'; allowed: train, validation, heldout"):
        sample_tasks(0, 1, split="test")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'algebra'"):
        sample_tasks(0, 1, families=["algebra"])


STORIES = [
    'One day, a girl named Lily found a big kite. "Look!" said Lily. The kite was red. Lily ran home.',
    "Once upon a time there was a little frog. The frog lived in a pond. It swam all day. The pond was cold.",
    "The sun was warm. Mom and Dad smiled. They sat outside. They were happy. Mom and Dad went home.",
]


def test_story_is_asked_for_by_its_own_name_and_things() -> None:
    seen = {task.required for seed in range(60) for task in story_requests(STORIES[:1], seed)}
    assert seen == {("Lily", "kite"), ("Lily",), ("kite",), ()}


def test_story_without_a_name_is_asked_for_by_its_things() -> None:
    words = {word for seed in range(60) for task in story_requests(STORIES[1:2], seed) for word in task.required}
    assert words == {"frog", "pond"}


def test_story_with_nothing_to_name_gets_an_open_request() -> None:
    assert {task.required for seed in range(20) for task in story_requests(STORIES[2:], seed)} == {()}


def test_each_story_is_the_reply_to_its_request_and_mentions_what_is_required() -> None:
    tasks = list(story_requests(STORIES, seed=1))
    assert [task.reply for task in tasks] == STORIES
    assert tasks == list(story_requests(STORIES, seed=1))
    for task in tasks:
        assert mentions_required(task, task.reply)
        assert all(word in task.prompt for word in task.required)


def test_required_words_are_whole_words_in_any_case() -> None:
    task = StoryTask("Tell me a story about Tim and a cat.", "", ("Tim", "cat"))
    assert mentions_required(task, "tim had two cats.")
    assert not mentions_required(task, "Timmy saw a caterpillar.")
