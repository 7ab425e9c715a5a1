"""Simple tasks whose answers can be checked exactly, to train and to evaluate a very small chat model.

A problem is split by its key, whatever its phrasing, so that no problem evaluated was asked in training. What is known
by heart (facts, chat, the order of days and months, the tables of arithmetic and of units) is split by pairs of a
problem and a phrasing. A held-out sum may occur as a step in the working of another problem, a story's above all.
"""

from buddy_routing.tasks.checking import is_correct
from buddy_routing.tasks.sampler import FAMILIES, generate, sample_tasks
from buddy_routing.tasks.stories import StoryTask, mentions_required, story_requests
from buddy_routing.tasks.task import LEVELS, SPLITS, Split, Task, split_of

__all__ = [
    "FAMILIES",
    "LEVELS",
    "SPLITS",
    "Split",
    "StoryTask",
    "Task",
    "generate",
    "is_correct",
    "mentions_required",
    "sample_tasks",
    "split_of",
    "story_requests",
]
