"""The generator against the published answers; its numbers depend on the element alone."""

import struct
from hashlib import blake2b

import numpy as np
import pytest

from gemma2.merging.kernels.philox import STEPS, philox, stream_key, uniforms

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [np.uint64(int(word, 16)) for word in text.split()]


def numbers(key, first, count):
    return uniforms(key, first, count, np.empty(count // 2 + 7, np.uint32))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert " ".join(f"{int(word):08x}" for word in philox(*words(counter), *words(key))) == expected


def test_the_first_numbers_are_the_halves_of_the_words_lower_ones_first():
    expected = [half for word in words(KNOWN[0][2]) for half in (int(word) & 0xFFFF, int(word) >> 16)]
    assert numbers(np.zeros(2, np.uint64), 0, 8).tolist() == expected


@pytest.mark.parametrize("first", [0, 2**32 - 50, 2**34 - 50, 2**40 + 3])
def test_a_number_depends_on_its_index_alone(first):
    key = stream_key(1, "a", 0)
    whole = numbers(key, first, 203)
    for begin, end in ((0, 1), (1, 3), (2, 203), (7, 90), (45, 62), (15, 16)):
        assert numbers(key, first + begin, end - begin).tolist() == whole[begin:end].tolist()


def test_indices_above_32_and_34_bits_do_not_repeat():
    key = stream_key(1, "a", 0)
    starts = [0, 2**32, 2**33, 2**34, 2**35, 2**36]
    assert len({tuple(numbers(key, start, 8).tolist()) for start in starts}) == len(starts)


def test_keys_differ_by_seed_tensor_and_model_and_are_stable():
    keys = {
        tuple(stream_key(*of).tolist()) for of in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a1", 0))
    }
    assert len(keys) == 5
    digest = blake2b(b"7\x001\x00model.norm.weight", digest_size=8).digest()
    assert stream_key(7, "model.norm.weight", 1).tolist() == list(struct.unpack("<II", digest))


def test_numbers_are_uniform_and_streams_unrelated():
    first, second = ((numbers(stream_key(0, "a", model), 0, 200_000) + 0.5) / STEPS for model in (0, 1))
    sigma = 1 / np.sqrt(12 * first.size)
    for stream in (first, second):
        assert stream.min() >= 0 and stream.max() < 1
        assert abs(stream.mean() - 0.5) < 4 * sigma
        counts = np.histogram(stream, 64, (0, 1))[0]
        expected = stream.size / 64
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * np.sqrt(2 * 63)
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 4 / np.sqrt(stream.size)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(first.size)
