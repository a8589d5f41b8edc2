"""Mesh sizes: what fits the devices, and what one line says when it does not."""

import jax
import pytest
from jax.sharding import AxisType

from sharding import MeshAxes, make_mesh


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (MeshAxes(), (1, 8, 1)),
        (MeshAxes(data=2, tensor=2), (2, 2, 2)),
        ({"tensor": 8}, (1, 1, 8)),
        ({"data": -1, "fsdp": 4}, (2, 4, 1)),
    ],
)
def test_one_size_may_be_what_is_left(axes, shape):
    mesh = make_mesh(axes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor", "context"), (*shape, 1), strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_some_of_the_devices():
    assert make_mesh(MeshAxes(), jax.devices()[:3]).devices.size == 3


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 3}, "data 1 x fsdp 3 x tensor 1 needs 3 devices; expected exactly the 8"),
        ({"data": 3, "fsdp": -1}, "needs 3 devices; expected a divisor of the 8"),
        ({"data": 16, "fsdp": -1}, "needs 16 devices; expected a divisor of the 8"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "sizes of at least 1"),
        ({"model": 8}, "mesh axis 'model' is unknown; expected some of data, fsdp, tensor"),
    ],
)
def test_wrong_sizes_are_one_line(axes, message):
    with pytest.raises(ValueError, match=message) as error:
        make_mesh(axes)
    assert "\n" not in str(error.value)
