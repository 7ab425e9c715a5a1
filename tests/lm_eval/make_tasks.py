"""Writes two local tasks for lm-eval from held-out problems: `python tests/lm_eval/make_tasks.py DIR`.

buddy_choice scores four replies by likelihood (echo and logprobs); buddy_answer generates one.
"""

import json
import random
import sys
from pathlib import Path

from buddy_routing.tasks import sample_tasks

CHOICE = """task: buddy_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {directory}/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""
ANSWER = """task: buddy_answer
dataset_path: json
dataset_kwargs:
  data_files: {{test: {directory}/answer.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{reply}}}}"
target_delimiter: ""
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 64
metric_list:
  - metric: exact_match
"""
NUM_DOCUMENTS, NUM_CHOICES = 100, 4


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    tasks = list(sample_tasks(0, NUM_DOCUMENTS, split="heldout", families=("facts", "comparison")))
    choices, answers = [], []
    for task in tasks:
        wrong = rng.sample([other.reply for other in tasks if other.reply != task.reply], NUM_CHOICES - 1)
        options = [task.reply, *wrong]
        rng.shuffle(options)
        choices.append({"prompt": task.prompt, "choices": options, "answer": options.index(task.reply)})
        answers.append({"prompt": task.prompt, "reply": task.reply})
    for name, template, rows in (("choice", CHOICE, choices), ("answer", ANSWER, answers)):
        (directory / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
        (directory / f"{name}.yaml").write_text(template.format(directory=directory.resolve()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
