"""Whether a reply gives a task's answer."""

import re

from buddy_routing.tasks.chat import accepted_replies
from buddy_routing.tasks.task import Task

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_CLAUSE_END = re.compile(r"[.!?:;](?=\s|$)|=|\n")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
# Between two numbers with only this, neither is a stated result: "3 or 9", "18, 19", "12 + 7".
_MERE_JOIN = re.compile(r"[\s,;/+*x-]*(?:\b(?:or|and|to|maybe|perhaps|plus|minus|times)\b[\s,]*)*")
_LEAD = re.compile(r"(?:.*\b)?(?:is|are|was|says|called|becomes|get|gets|equals)(?: a| an| the)?")
_HEDGES = (" or ", " not ")
_MIN_QUOTE_WORDS = 4


def is_correct(task: Task, reply: str) -> bool:
    """Whether the reply's final answer is `task.answer`; case, spaces and closing punctuation do not count.

    Numbers: the last number of the reply. "yes" and "no": the first or last word. Words and lists: the whole
    last clause, or what follows "is", "are", "says" and so on in it. Answers in capitals must be in capitals.
    Chat: one of the intent's accepted replies, or a reply that begins with the canonical one.
    A reply that repeats the prompt or offers several candidates is wrong.
    """
    text = reply.strip()
    if not text or _words(text) == _words(task.prompt):
        return False
    if task.family == "chat":
        return _is_accepted_chat(task, text)
    if _contradicts_itself(task, text):
        return False
    if task.answer in ("yes", "no"):
        return _says_yes_or_no(task.answer, text)
    if _NUMBER.fullmatch(task.answer):
        return _ends_in_number(task.answer, text) and not _quotes_prompt(task, text)
    return _ends_in_words(task.answer, text)


def _words(text: str) -> str:
    """Lower case, punctuation gone, single spaces."""
    return " ".join(re.findall(r"[\w+*/=:-]+", text.lower().replace("'", ""))).strip(" :")


def _is_accepted_chat(task: Task, text: str) -> bool:
    said = _words(text)
    if any(said == _words(accepted) for accepted in accepted_replies(task.key)):
        return True
    canonical = _words(task.answer)
    return said == canonical or said.startswith(canonical + " ")


def _quotes_prompt(task: Task, text: str) -> bool:
    """The reply is only a piece of the prompt, which may happen to end in the right number."""
    said = _words(text)
    return len(said.split()) >= _MIN_QUOTE_WORDS and f" {said} " in f" {_words(task.prompt)} "


def _contradicts_itself(task: Task, text: str) -> bool:
    """An earlier sentence differs from the last one only in the answer: "It is red. It is blue."."""
    *earlier, last = [_words(part) for part in _SENTENCE_END.split(text) if part.strip()] or [""]
    prefix, found, _ = last.rpartition(_words(task.answer))
    if not found:
        return False
    num_words = len(last.split())
    return any(s != last and s.startswith(prefix) and len(s.split()) == num_words for s in earlier)


def _says_yes_or_no(answer: str, text: str) -> bool:
    words = _words(text).split()
    other = "no" if answer == "yes" else "yes"
    return bool(words) and answer in (words[0], words[-1]) and other not in words


def _ends_in_number(answer: str, text: str) -> bool:
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    numbers = list(_NUMBER.finditer(text))
    if not numbers or numbers[-1].group() != answer:
        return False
    before = text[: numbers[-1].start()]
    if before.lower().endswith(_HEDGES):
        return False
    return len(numbers) == 1 or not _MERE_JOIN.fullmatch(text[numbers[-2].end() : numbers[-1].start()].lower())


def _ends_in_words(answer: str, text: str) -> bool:
    if not (answer.isupper() and len(answer) > 1):
        answer, text = answer.lower(), text.lower()
    clauses = [_list_form(clause) for clause in _CLAUSE_END.split(text) if clause.strip()]
    if not clauses:
        return False
    last = clauses[-1]
    wanted = _list_form(answer)
    if last in (wanted, f"the {wanted}", f"a {wanted}", f"an {wanted}"):
        return True
    return last.endswith(f" {wanted}") and bool(_LEAD.fullmatch(last.removesuffix(wanted).rstrip()))


def _list_form(clause: str) -> str:
    """Quotes gone, and "a, b and c" written "a, b, c" when the clause is a list."""
    clause = " ".join(re.sub(r"[\"'`*]", "", clause).split()).strip(" ,.")
    if "," in clause:
        clause = re.sub(r",? and ", ", ", clause)
    return re.sub(r"\s*,\s*", ", ", clause)
