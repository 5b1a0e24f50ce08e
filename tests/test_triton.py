"""The GPU kernels against their CPU twins: on a GPU where there is one, else through Triton's interpreter."""

import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saebench.sae import new_sae
from saebench.sae.sparse import gather_sum
from saebench.train.gradients import exact_gradients
from saebench.train.objectives import Context
from saebench.train.recipes import RECIPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", minversion="3.4")
kernels = importlib.import_module("saebench.sae.triton_kernels")


def operands(lengths: list[int], d_in: int, n_table: int, seed: int = 0, dtype: torch.dtype = torch.float32):
    """(offsets, index, weights, a row for each row, table) with rows of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    n = sum(lengths)
    index = torch.randint(n_table, (n,), generator=generator, dtype=torch.int32)
    weights, left, table = (torch.randn(*s, generator=generator) for s in ((n,), (len(lengths), d_in), (n_table, d_in)))
    return offsets, index, weights, left.to(dtype), table.to(dtype)


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def assert_near(found: Tensor, expected: Tensor, terms: int) -> None:
    """Equal up to float32's rounding of sums with that many terms of size about 1."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=2e-6 * max(terms, 1) ** 0.5)


def check_sum(offsets: Tensor, index: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    found = kernels.gather_sum(*on_device(offsets, index, weights, table))
    assert_near(found, gather_sum(offsets, index, weights, table.float()), int(offsets.diff().max()))
    return found


def check_dot(offsets: Tensor, index: Tensor, left: Tensor, table: Tensor) -> None:
    """(A row may name a row of the table twice here, which `sparse.gather_dot` on a CPU does not take.)"""
    found = kernels.gather_dot(*on_device(offsets, index, left, table))
    rows = torch.arange(len(left)).repeat_interleave(offsets.diff().long())
    assert_near(found, (left.float()[rows] * table.float()[index]).sum(1), left.shape[1])


def test_a_worked_sum():
    offsets, index = torch.tensor([0, 2, 2, 3]).int(), torch.tensor([1, 0, 1]).int()
    weights, table = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([[1.0, 10.0], [3.0, 4.0]])
    assert check_sum(offsets, index, weights, table).tolist() == [[5.0, -2.0], [0.0, 0.0], [1.5, 2.0]]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 31, 33, 256, 257]), min_size=1, max_size=5),
    d_in=st.sampled_from([1, 7, 16, 130]),
    n_table=st.integers(1, 40),
)
def test_products_on_random_shapes(lengths: list[int], d_in: int, n_table: int):
    offsets, index, weights, left, table = operands(lengths, d_in, n_table)
    check_sum(offsets, index, weights, table)
    check_dot(offsets, index, left, table)


# A long row that begins with a chunk, one that begins inside one, two that meet in one, one that fills chunks
# exactly, one that ends the entries, and empty rows at both ends.
@pytest.mark.parametrize(
    "lengths",
    [[1400], [5, 1400, 3], [0, 300, 300, 0, 2], [256, 512, 256], [10, 257], [250, 512, 3, 260, 0], [0, 600, 0]],
)
def test_rows_longer_than_a_chunk_are_summed_in_parts(lengths: list[int]):
    assert kernels.CHUNK == 256
    offsets, index, weights, _, table = operands(lengths, 20, 50)
    check_sum(offsets, index, weights, table)


def test_more_parts_than_one_block_sums(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "CHUNK", 4)
    offsets, index, weights, _, table = operands([3, 301, 2], 5, 9)
    check_sum(offsets, index, weights, table)


def test_the_same_bits_every_time():
    offsets, index, weights, _, table = operands([3, 900, 40, 0], 24, 30)
    first, second = (kernels.gather_sum(*on_device(offsets, index, weights, table)) for _ in range(2))
    assert torch.equal(first, second)


def test_bfloat16_tables_give_float32_sums_of_what_they_hold():
    offsets, index, weights, left, table = operands([4, 0, 300, 32], 40, 25, dtype=torch.bfloat16)
    check_sum(offsets, index, weights, table)
    check_dot(offsets, index, left, table)


def test_rows_that_no_entry_names_are_not_read():
    table = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])
    check_sum(torch.tensor([0, 1]).int(), torch.tensor([0]).int(), torch.tensor([3.0]), table)


def test_no_entries_at_all():
    offsets, index, weights, left, table = operands([0, 0], 3, 4)
    assert kernels.gather_sum(*on_device(offsets, index, weights, table)).tolist() == [[0.0] * 3] * 2
    assert kernels.gather_dot(*on_device(offsets, index, left, table)).shape == (0,)


def test_strided_operands():
    offsets, index, weights, _, table = operands([2, 5], 6, 6)
    found = kernels.gather_sum(
        *on_device(offsets, index), *(t.to(DEVICE) for t in (weights[:, None].expand(-1, 2)[:, 1], table.T))
    )
    assert_near(found, gather_sum(offsets, index, weights, table.T.contiguous()), 5)


def test_a_training_step_on_the_kernels_is_the_step_on_their_twins(monkeypatch: pytest.MonkeyPatch):
    """With a hot latent, active on every row of more rows than a chunk."""
    sae = new_sae("topk", 10, 12, k=3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        sae.get_parameter("b_enc")[3] = 50.0
    x = torch.randn(400, 10, generator=torch.Generator().manual_seed(2))
    context = Context(torch.tensor(0.0), torch.tensor([1, 5]), 3)
    expected = exact_gradients(RECIPES["topk"].gradients, sae, x, context)
    device_sae, device_x = sae.to(DEVICE), x.to(DEVICE)
    calls = []

    def counted(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *operands: (calls.append(kernel), kernel(*operands))[1]

    monkeypatch.setattr("saebench.sae.sparse.gather_sum", counted(kernels.gather_sum))
    monkeypatch.setattr("saebench.sae.sparse.gather_dot", counted(kernels.gather_dot))
    context = Context(torch.tensor(0.0, device=DEVICE), torch.tensor([1, 5], device=DEVICE), 3)
    found = exact_gradients(RECIPES["topk"].gradients, device_sae, device_x, context)
    assert len(calls) >= 4
    for name, value in expected.of.items():
        torch.testing.assert_close(found.of[name].cpu(), value, rtol=1e-4, atol=1e-4 * value.abs().max().item())
