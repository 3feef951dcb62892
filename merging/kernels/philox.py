"""Random numbers that depend on the element of a tensor, not on the order of calls: Philox4x32-10, counter-based.

The key is a hash of (seed, tensor name, model index), the counter is the element's index in the tensor, so a mask does
not depend on blocks, threads, shards or the order of the tensors. One call gives four words, whose halves belong to
eight neighbouring elements; indices may exceed 2**32.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3; known answers
from the authors' Random123. With 16 bits per element, a keep probability is attained to within 2**-17 (`attainable`);
code that divides by it divides by the attained one, which preserves the mean.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from .native import compiled

__all__ = ["STEPS", "attainable", "philox", "stream_key", "uniforms"]

M0, M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
W0, W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
WORD = np.uint64(0xFFFFFFFF)
U2, U3, U4, U5, U32 = (np.uint64(n) for n in (2, 3, 4, 5, 32))
STEPS = 65536.0  # probabilities are multiples of 1 / STEPS
STEP = np.float32(1.0 / STEPS)

Words = NDArray[np.uint64]
Four = tuple[np.uint64, np.uint64, np.uint64, np.uint64]


def stream_key(seed: int, tensor: str, model: int) -> Words:
    """Return the key of the random numbers of one tensor of one model: two 32-bit words, (2,) uint64."""
    digest = blake2b(f"{seed}\0{model}\0{tensor}".encode(errors="surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint64)


@compiled(inline="always")
def _round(c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64) -> Four:
    left, right = M0 * (c0 & WORD), M1 * (c2 & WORD)
    return (right >> U32) ^ c1 ^ k0, right & WORD, (left >> U32) ^ c3 ^ k1, left & WORD


@compiled(inline="always")
def _five_rounds(c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64) -> Four:
    # Written out: with a loop over rounds the compiler does not vectorise over counters (six times slower).
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 & WORD, k1 & WORD)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, (k0 + W0) & WORD, (k1 + W1) & WORD)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, (k0 + W0 * U2) & WORD, (k1 + W1 * U2) & WORD)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, (k0 + W0 * U3) & WORD, (k1 + W1 * U3) & WORD)
    return _round(c0, c1, c2, c3, (k0 + W0 * U4) & WORD, (k1 + W1 * U4) & WORD)


@compiled(inline="always")
def philox(c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64) -> Four:
    """Return the four words of counter (c0, c1, c2, c3) under key (k0, k1), ten rounds; all are 32 bits in a uint64."""
    c0, c1, c2, c3 = _five_rounds(c0, c1, c2, c3, k0, k1)
    return _five_rounds(c0, c1, c2, c3, k0 + W0 * U5, k1 + W1 * U5)


@compiled()
def attainable(probability: float) -> np.float32:
    """Return the nearest multiple of 1 / STEPS, exact in fp32; never 0, so that it can be a divisor."""
    steps = np.int32(probability * STEPS + 0.5)
    return np.float32(steps if steps > 1 else np.int32(1)) * STEP


@compiled()
def fill(key: Words, counter: np.uint64, out: NDArray[np.uint32]) -> None:
    """Fill `out` (4 n,) with the words of n counters, beginning at `counter`."""
    k0, k1 = key[0], key[1]
    for q in range(out.size // 4):
        index = counter + np.uint64(q)
        a, b, c, d = philox(index & WORD, index >> U32, np.uint64(0), np.uint64(0), k0, k1)
        out[4 * q] = a
        out[4 * q + 1] = b
        out[4 * q + 2] = c
        out[4 * q + 3] = d


@compiled()
def uniforms(key: Words, first: int, count: int, space: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Return integers below STEPS of elements [first, first + count), uint16 (count,): a view of `space`.

    `first` may be any index from 0; `space` has at least count / 2 + 7 words.
    """
    skipped = first & 7
    words = space[: (skipped + count + 7) // 8 * 4]
    fill(key, np.uint64(first >> 3), words)
    return words.view(np.uint16)[skipped : skipped + count]
