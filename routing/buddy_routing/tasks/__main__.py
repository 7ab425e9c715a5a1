"""Prints tasks as chat JSONL, to train a router with: `python -m buddy_routing.tasks --count 20000 > tasks.jsonl`."""

import json
from argparse import ArgumentParser

from buddy_routing.tasks import SPLITS, sample_tasks

parser = ArgumentParser(description=__doc__)
parser.add_argument("--count", type=int, default=10_000, help="how many (default: %(default)s)")
parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
parser.add_argument("--split", default="train", choices=SPLITS, help="default: %(default)s")
parsed = parser.parse_args()
for task in sample_tasks(parsed.seed, parsed.count, parsed.split):
    messages = [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.reply}]
    print(json.dumps({"messages": messages}))
