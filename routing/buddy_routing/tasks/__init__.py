"""Simple tasks whose answers can be checked exactly, to train and to evaluate a very small chat model.

A problem is split by its key, whatever its phrasing, so that nothing evaluated was trained on. Facts, chat, the plain
order of weekdays and months and the tables of arithmetic and of units are known by heart: there the split is over pairs
of a problem and a phrasing.
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
