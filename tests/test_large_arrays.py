"""Work in threads and in blocks gives what plain NumPy does."""

import numpy as np
import pytest

from pae_jax.large_arrays import blocks, in_threads, packed_mask, place, selected

SIZES = [0, 1, 8, (1 << 16) - 1, 1 << 16, (3 << 16) + 5]


@pytest.mark.parametrize("size", SIZES)
def test_masks_select_pack_and_place_like_numpy(size):
    draw = np.random.default_rng(size)
    mask, values = draw.random(size) < 0.3, draw.normal(size=size).astype(np.float32)
    np.testing.assert_array_equal(selected(values, mask.__getitem__), values[mask])
    np.testing.assert_array_equal(packed_mask(size, mask.__getitem__), np.packbits(mask))
    found = np.zeros_like(values)
    place(found, mask.__getitem__, values[mask])
    np.testing.assert_array_equal(found, np.where(mask, values, 0))
    assert sum(block.stop - block.start for block in blocks(size)) == size


@pytest.mark.parametrize("sizes", [[1, 3, 2], [1 << 20, 3 << 20, 2 << 20]])
def test_results_come_in_order_and_the_first_error_is_raised(sizes):
    assert in_threads([lambda n=n: n for n in range(3)], sizes) == [0, 1, 2]

    def fail(number):
        raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        in_threads([lambda: 0, lambda: fail(1), lambda: fail(2)], sizes)
