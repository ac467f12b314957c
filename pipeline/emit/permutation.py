"""A seeded shuffle of any number of pairs that needs no memory: each place is computed from the number alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.selection.keys import finalised

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]

#: Rounds of the Feistel network; four make a strong permutation of a good round function (Luby and Rackoff, 1988).
ROUNDS = 4


@dataclass(frozen=True)
class Permutation:
    """A random-looking one-to-one map of 0 ... `size` - 1 onto itself, the same for the same seed.

    A Feistel network permutes the smallest even number of bits that holds `size`; a result beyond `size` is sent
    through again until it is below (cycle walking), at most four times on average.
    """

    size: int
    seed: int

    def place(self, numbers: Numbers) -> Numbers:
        """Where each number goes."""
        return self._walk(numbers, range(ROUNDS))

    def number(self, places: Numbers) -> Numbers:
        """Which number goes to each place: the inverse of `place`."""
        return self._walk(places, range(ROUNDS - 1, -1, -1))

    def _walk(self, values: Numbers, rounds: range) -> Numbers:
        result = self._network(values.astype(np.uint64), rounds)
        while len(outside := np.flatnonzero(result >= self.size)):
            result[outside] = self._network(result[outside], rounds)
        return result.astype(np.int64)

    def _network(self, values: Words, rounds: range) -> Words:
        half = np.uint64(max(1, ((self.size - 1).bit_length() + 1) // 2))
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        forward = rounds.step > 0
        for number in rounds:
            if forward:
                left, right = right, left ^ (self._mix(right, number) & mask)
            else:
                left, right = right ^ (self._mix(left, number) & mask), left
        return (left << half) | right

    def _mix(self, values: Words, number: int) -> Words:
        """A hash of a value, keyed by seed and round."""
        key: np.uint64 = np.random.SeedSequence([self.seed % 2**64, number]).generate_state(1, np.uint64)[0]
        return finalised(values ^ key)
