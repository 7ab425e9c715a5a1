import pytest
import torch

from buddy_kernels.gpu.token_draw import SamplingRows, draw_tokens, draw_tokens_reference
from listed_rows import every_other, listed

NO_TOKEN = -1


def sampling(num_rows, device, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Each row the same, but for the drawn number."""

    def of_rows(value, dtype=torch.float64):
        return torch.full((num_rows,), value, dtype=dtype, device=device)

    uniform = torch.rand(num_rows, dtype=torch.float64).to(device)
    return SamplingRows(of_rows(temperature), of_rows(top_k, torch.int64), of_rows(top_p), of_rows(min_p), uniform)


def assert_same_tokens(logits, given, rows):
    got, want = (torch.full((len(logits),), NO_TOKEN, device=logits.device) for _ in range(2))
    draw_tokens(logits, given, rows, got)
    draw_tokens_reference(logits, given, rows, want)
    assert got.tolist() == want.tolist()


def logits_with_ties(num_rows, vocab, device):
    """Many are equal, some can not be taken."""
    logits = (torch.randn(num_rows, vocab) * 6).round() / 2
    logits[:, 1::7] = -torch.inf
    logits[:, -1] += 0.25
    return logits.to(device)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {},
        {"temperature": 1e-9},
        {"temperature": 0.7, "top_k": 1},
        {"temperature": 1.5, "top_k": 40},
        {"top_k": 10**6},
        {"top_p": 0.0},
        {"top_p": 0.5},
        {"temperature": 0.5, "top_p": 0.95},
        {"min_p": 1.0},
        {"min_p": 0.02},
        {"temperature": 1.2, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
@pytest.mark.parametrize(("num_rows", "vocab"), [(3, 1), (5, 257), (3, 5000)])
def test_tokens_are_those_of_the_reference(settings, num_rows, vocab, device):
    torch.manual_seed(vocab)
    given = sampling(num_rows, device, **settings)
    assert_same_tokens(logits_with_ties(num_rows, vocab, device), given, every_other(num_rows, device))


@pytest.mark.parametrize("top_p", [0.0, 1e-3, 0.5, 0.999])
@pytest.mark.parametrize("vocab", [4, 257])
def test_of_equal_tokens_the_first_are_kept(top_p, vocab, device):
    torch.manual_seed(0)
    given = sampling(8, device, top_p=top_p)
    assert_same_tokens(torch.zeros(8, vocab, device=device), given, listed(range(8), 8, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_logits_may_be_of_the_model_s_dtype(dtype, device):
    torch.manual_seed(0)
    given = sampling(3, device, top_p=0.9)
    assert_same_tokens(logits_with_ties(3, 257, device).to(dtype), given, listed(range(3), 3, device))


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
def test_the_ends_of_the_drawn_number_give_a_token_that_can_be_taken(uniform, settings, device):
    torch.manual_seed(1)
    given = sampling(4, device, **settings)
    given.uniform.fill_(uniform)
    logits = logits_with_ties(4, 257, device)
    logits[:, -5:] = -torch.inf
    assert_same_tokens(logits, given, listed(range(4), 4, device))


def test_greedy_takes_the_lowest_of_equals_and_minus_zero_is_zero(device):
    logits = torch.tensor([[-1.0, -0.0, 0.0], [-3.0, -2.0, -2.0]], device=device)
    tokens = torch.full((2,), NO_TOKEN, device=device)
    draw_tokens(logits, sampling(2, device, temperature=0.0), listed([0, 1], 2, device), tokens)
    assert tokens.tolist() == [1, 1]


def test_without_rows_nothing_is_drawn(device):
    tokens = torch.full((3,), NO_TOKEN, device=device)
    draw_tokens(torch.zeros(3, 5, device=device), sampling(3, device), listed([], 3, device), tokens)
    assert (tokens == NO_TOKEN).all()


@pytest.mark.parametrize("vocab", [7, 40])
def test_only_where_a_sum_meets_top_p_may_a_token_more_or_less_be_kept(vocab, device):
    """Equal tokens, and the highest number to draw by, which takes the last of those that are kept."""
    shares = torch.arange(1, 2 * vocab, dtype=torch.float64) / (2 * vocab)  # every other sum meets its own
    given = sampling(len(shares), device)
    given.top_p.copy_(shares)
    given.uniform.fill_(1 - 2.0**-53)
    logits, rows = torch.zeros(len(shares), vocab, device=device), listed(range(len(shares)), len(shares), device)
    got, want = (torch.full((len(shares),), NO_TOKEN, device=device) for _ in range(2))
    draw_tokens(logits, given, rows, got)
    draw_tokens_reference(logits, given, rows, want)
    assert torch.equal(got[::2], want[::2])
    assert (got - want).abs().max() <= 1


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("broken", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}], ids=str)
def test_logits_that_are_not_finite_give_a_token_all_the_same(broken, settings, device):
    logits = torch.randn(2, 257)
    logits[0, 19] = broken
    logits[1] = -torch.inf
    tokens = torch.full((2,), NO_TOKEN, device=device)
    draw_tokens(logits.to(device), sampling(2, device, **settings), listed(range(2), 2, device), tokens)
    assert all(0 <= token < 257 for token in tokens.tolist())
