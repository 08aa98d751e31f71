"""Views: which dimensions are rows and columns, and that a view shows the elements it should."""

from __future__ import annotations

import math

import pytest
import torch

from fused_adafactor.factoring import Factoring, View

VIEWS = {
    # (factoring, shape): matrices
    "last-two": (Factoring(View.LAST_TWO), (2, 3, 4, 5), (2, 3, 4, 5)),
    "largest-two": (Factoring(View.LARGEST_TWO), (7, 3, 9, 2), (3, 2, 7, 9)),
    "largest-two-tie": (Factoring(View.LARGEST_TWO), (5, 2, 5), (2, 5, 5)),
    "largest-two-tall": (Factoring(View.LARGEST_TWO), (9, 4), (4, 9)),
    "reshape-2d": (Factoring(View.RESHAPE), (6, 4), (6, 4)),
    "reshape-3d": (Factoring(View.RESHAPE), (2, 3, 4), (2, 12)),
    "reshape-4d": (Factoring(View.RESHAPE), (2, 3, 4, 5), (2 * 5, 3 * 4)),
    "reshape-5d": (Factoring(View.RESHAPE), (2, 3, 4, 5, 6), (2 * 6, 3 * 4 * 5)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_shape_of_the_matrices(name: str) -> None:
    factoring, shape, matrices = VIEWS[name]
    view = factoring.view_of(shape)
    assert view is not None
    assert view.matrices == matrices
    assert (view.rows, view.cols) == matrices[-2:]
    assert view.row_shape == matrices[:-1]
    assert view.col_shape == (*matrices[:-2], matrices[-1])


@pytest.mark.parametrize("name", VIEWS)
def test_there_and_back_is_the_same_tensor(name: str) -> None:
    factoring, shape, _ = VIEWS[name]
    view = factoring.view_of(shape)
    assert view is not None
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    matrices = view.to_matrices(tensor)
    assert torch.equal(view.from_matrices(matrices), tensor)
    assert matrices.data_ptr() == tensor.data_ptr(), "a view, not a copy"


def test_rows_are_the_second_largest_dimension_and_columns_the_largest() -> None:
    view = Factoring(View.LARGEST_TWO).view_of((7, 3, 9))
    assert view is not None
    tensor = torch.arange(7 * 3 * 9).reshape(7, 3, 9)
    assert torch.equal(view.to_matrices(tensor)[1], tensor[:, 1, :])


def test_a_reshape_mixes_indices_in_row_major_order() -> None:
    view = Factoring(View.RESHAPE).view_of((2, 3, 4, 5))
    assert view is not None
    tensor = torch.arange(120).reshape(2, 3, 4, 5)
    assert torch.equal(view.to_matrices(tensor), torch.arange(120).reshape(10, 12))


@pytest.mark.parametrize("shape", [(), (7,), (0,)], ids=str)
def test_vectors_are_not_factored(shape: tuple[int, ...]) -> None:
    for kind in View:
        assert Factoring(kind).view_of(shape) is None


def test_view_none_never_factors() -> None:
    assert Factoring(View.NONE).view_of((128, 128)) is None


@pytest.mark.parametrize(
    ("shape", "factored"),
    [((127, 500), False), ((128, 128), True), ((128, 2, 500), True), ((127, 2, 500), False)],
    ids=str,
)
def test_both_dimensions_must_reach_the_least_size(shape: tuple[int, ...], factored: bool) -> None:
    view = Factoring(View.LARGEST_TWO, min_dim_size=128).view_of(shape)
    assert (view is not None) == factored
