"""The fixtures of conftest.py guard every other test, so they are tested too."""

import pytest
import torch

BASE = torch.zeros(3, 2)


@pytest.mark.parametrize(
    "allocate",
    [
        lambda dtype: torch.empty(3, 2, dtype=dtype),
        lambda dtype: torch.empty(3, dtype=dtype, out=torch.zeros(3, dtype=dtype)),
        lambda dtype: torch.empty(3, 2, dtype=dtype, requires_grad=True),
        lambda dtype: torch.empty_like(BASE, dtype=dtype),
        lambda dtype: torch.empty_strided((3, 2), (1, 3), dtype=dtype),
        lambda dtype: BASE.new_empty(3, 2, dtype=dtype),
        lambda dtype: BASE.new_empty_strided((3, 2), (1, 3), dtype=dtype),
    ],
    ids=["empty", "out", "requires_grad", "like", "strided", "new", "new_strided"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_uninitialised_memory_is_nan(allocate, dtype):
    assert allocate(dtype).isnan().all()


def test_uninitialised_integers_sparse_and_meta_tensors_still_work():
    assert torch.empty(3, dtype=torch.int64).shape == (3,)
    assert torch.empty(3, 2, layout=torch.sparse_coo).shape == (3, 2)
    assert torch.empty(3, device="meta").is_meta


def test_seed_is_fixed(seed):
    drawn = torch.rand(3)
    torch.manual_seed(seed)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("attempt", [1, 2])
def test_default_dtype_is_restored(attempt):
    assert torch.get_default_dtype() is torch.float32
    torch.set_default_dtype(torch.float64)
