"""Names for annotations: Float[Tensor, " pairs"] says dtype and shape.

The tests enforce the annotations (`tests/conftest.py`); elsewhere they are for reading.  Where jaxtyping is not
installed they mean plain tensors.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
else:
    try:
        from jaxtyping import Bool, Float, Int
    except ModuleNotFoundError:

        class Float:
            """Float[Tensor, "shape"] -> Tensor."""

            def __class_getitem__(cls, tensor_and_shape: tuple[Any, str]) -> Any:
                return tensor_and_shape[0]

        Bool = Int = Float

__all__ = ["Bool", "Float", "Int", "Tensor"]
