"""Initial noise: the same seed gives the same latents on every machine and with every version of numpy.

The definition, so that any program can repeat it:

1. The words are numpy's ``Philox`` (Philox-4x64 with 10 rounds; Salmon et al., "Parallel random numbers: as easy as
   1, 2, 3", 2011) with ``key=seed`` and the counter at its start, as 64-bit words in order (``random_raw``). A bit
   generator's words are part of numpy's compatibility promise; its ``standard_normal`` is not.
2. Word ``w`` is the uniform number ``((w >> 11) + 1) * 2**-53`` in (0, 1].
3. Uniform numbers ``u[2k], u[2k+1]`` give two Gaussian ones (Box-Muller, float64):
   ``r = sqrt(-2 ln u[2k])``, ``z[2k] = r cos(2 pi u[2k+1])``, ``z[2k+1] = r sin(2 pi u[2k+1])``, rounded to float32.
4. The numbers fill the latents in C order.

It differs from torch's generators: a seed does not give the video that the same seed gives in a PyTorch pipeline. Pass
that pipeline's latents to ``Pipeline.generate`` instead. The module knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**64 - 1


def gaussian_noise(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """Return unit Gaussian noise, float32 of ``shape``, as the module's docstring defines it.

    Args:
        shape: Any shape; only the number of elements and the C order matter.
        seed: 0 to ``MAX_SEED``.
    """
    count = int(np.prod(shape, dtype=np.int64))
    words = np.random.Philox(key=seed).random_raw(count + count % 2)
    uniform = ((words >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
    angle = (2.0 * np.pi) * uniform[1::2]
    noise = np.empty(uniform.shape, np.float32)
    noise[0::2] = radius * np.cos(angle)
    noise[1::2] = radius * np.sin(angle)
    return noise[:count].reshape(tuple(shape))
