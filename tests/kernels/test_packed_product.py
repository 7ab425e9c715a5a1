"""Products with packed weights against plain torch, by every arithmetic of this processor; the choice among those."""

import time
from collections.abc import Callable

import pytest
import torch

from buddy_kernels import UnknownArithmeticError
from buddy_kernels.arithmetics import ALLOWED_ERROR, arithmetics, fastest
from buddy_kernels.packed_product import packed_product, packed_product_reference
from buddy_kernels.packing import PackedMatrix, pack
from sparse_decode import NATIVE

each_arithmetic = pytest.mark.parametrize(("kind", "arithmetic"), NATIVE)


@each_arithmetic
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (16, 64), (63, 257), (257, 704)])
@pytest.mark.parametrize("num_rows", [1, 3, 63, 257])
def test_products_are_those_of_the_reference(
    kind: str, arithmetic: str, outputs: int, inputs: int, num_rows: int
) -> None:
    torch.manual_seed(num_rows)
    matrix = pack(torch.randn(outputs, inputs), torch.randn(outputs), kind)
    x = torch.randn(num_rows, inputs)
    got, want = packed_product(x, matrix, arithmetic), packed_product_reference(x, matrix)
    assert (got - want).norm() <= ALLOWED_ERROR[kind] * want.norm()


@each_arithmetic
def test_a_row_has_the_same_bits_in_any_company(kind: str, arithmetic: str) -> None:
    torch.manual_seed(0)
    matrix, x = pack(torch.randn(200, 320), None, kind), torch.randn(40, 320)
    alone = torch.cat([packed_product(row[None], matrix, arithmetic) for row in x])
    for num_rows in (2, 3, 5, 7, 8, 9, 17, 33, 40):
        assert torch.equal(packed_product(x[:num_rows], matrix, arithmetic), alone[:num_rows])


def test_an_arithmetic_that_no_processor_has_is_named() -> None:
    with pytest.raises(UnknownArithmeticError, match="'magic', allowed for int8 on this processor: "):
        packed_product(torch.zeros(1, 1), pack(torch.zeros(1, 1), None, "int8"), "magic")


@pytest.mark.parametrize("wrong", [float("nan"), 1.1])
def test_an_arithmetic_that_computes_wrong_is_not_used(
    wrong: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def product(x: torch.Tensor, matrix: PackedMatrix, arithmetic: str) -> torch.Tensor:
        return packed_product(x, matrix, "fma") * (wrong if arithmetic == "broken" else 1)

    monkeypatch.setattr("buddy_kernels.arithmetics.known_arithmetics", lambda kind: ("broken", "fma"))
    monkeypatch.setattr("buddy_kernels.arithmetics.packed_product", product)
    assert arithmetics.__wrapped__("bfloat16") == ("fma",)
    assert "computes wrong" in caplog.text


def test_the_fastest_is_taken_all_works_counting_the_same_and_of_near_ones_the_first() -> None:
    def works(seconds: dict[str, tuple[float, float]]) -> list[Callable[[str], None]]:
        return [lambda name, work=work: keep_busy(seconds[name][work]) for work in range(2)]

    def keep_busy(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    assert fastest(["a", "b"], works({"a": (0.004, 0.001), "b": (0.005, 0.0003)})) == "b"
    assert fastest(["a", "b"], works({"a": (0.004, 0.001), "b": (0.004, 0.00095)})) == "a"
