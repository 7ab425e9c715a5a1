"""Prompts are routed in blocks from their start, answers token by token, also when conversations stand end to end."""

import torch

from buddy_routing.route_sources import conversation_starts, route_sources


def test_a_prompt_follows_the_end_of_its_block_and_an_answer_itself() -> None:
    in_answer = torch.tensor([[False] * 5 + [True] * 3])
    sources = route_sources(conversation_starts(torch.zeros_like(in_answer)), in_answer, route_block=3)
    assert sources.tolist() == [[2, 2, 2, 4, 4, 5, 6, 7]]


def test_blocks_are_counted_from_the_start_of_each_conversation() -> None:
    #                  one: 4 of prompt, 2 of answer   two: 1 and 1       three: a prompt cut off
    in_answer = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0]], dtype=torch.bool)
    begins = torch.tensor([[1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0]], dtype=torch.bool)
    starts = conversation_starts(begins)
    assert starts.tolist() == [[0] * 6 + [6] * 2 + [8] * 3]
    assert route_sources(starts, in_answer, route_block=3).tolist() == [[2, 2, 2, 3, 4, 5, 6, 7, 10, 10, 10]]


def test_a_row_that_starts_in_the_middle_of_an_answer_counts_from_its_first_token() -> None:
    in_answer = torch.tensor([[True, True, False, False, True]])
    begins = torch.tensor([[False, False, True, False, False]])
    assert conversation_starts(begins).tolist() == [[0, 0, 2, 2, 2]]
    assert route_sources(conversation_starts(begins), in_answer, route_block=128).tolist() == [[0, 1, 3, 3, 4]]
