"""Small tasks of which the answer is known: what a variant can do, apart from language.

A task draws batches of token `ids` and `labels`, (B, T) int64 each; a label is the token asked for at its position, and
IGNORED where nothing is asked. `difficulty` is what makes it harder: pairs to remember, or length. Everything is drawn
from the generator alone, so the same seed gives the same batches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

IGNORED = -100  # the label that cross-entropy leaves out
NOTHING = 0  # the token that stands where there is nothing to say: in no task a key, a value or a symbol


@dataclass(frozen=True)
class Net:
    """A size and a schedule of `lib.model.probe` with which the task is known to be learnt, in minutes on a core."""

    batch_size: int
    steps: int
    layers: int
    heads: int
    mlp: bool = False
    width: int = 64
    convolution: bool = True
    positions: bool = False


@dataclass(frozen=True)
class Task:
    """`draw(generator, batch, difficulty)` gives ids and labels; what is trained on and tested, in which net."""

    name: str
    title: str
    asks: str  # in one sentence
    paper: str
    vocabulary: int
    chance: Callable[[int], float]  # by difficulty: accuracy of guessing among the answers that a sequence offers
    unit: str  # what a difficulty counts
    trained_on: tuple[int, ...]  # difficulties, in turn over the steps
    tested_on: tuple[int, ...]
    draw: Callable[[torch.Generator, int, int], tuple[torch.Tensor, torch.Tensor]]
    net: Net

    def context(self, difficulty: int) -> int:
        """The length of a sequence of this difficulty."""
        ids, _ = self.draw(torch.Generator().manual_seed(0), 1, difficulty)
        return ids.shape[1]

    def scaled(self, accuracy: float, difficulty: int) -> float:
        """(a - chance) / (1 - chance): 0 is guessing, 1 is right."""
        return (accuracy - self.chance(difficulty)) / (1 - self.chance(difficulty))


RECALL_VOCABULARY, RECALL_CONTEXT = 256, 128
HALF = RECALL_VOCABULARY // 2  # keys are 1 to 127, values 128 to 255


def recall(generator: torch.Generator, batch: int, pairs: int):
    """Multi-query associative recall: keys with their values, and later each key once more, which asks for its value.

    With 3 pairs, keys 1 to 127 and values from 128 on, `.` for NOTHING and `-` for IGNORED:

        ids     5 200   9 131   7 180   .   9   .   .   5   7
        labels  -   -   -   -   -   -   -  131  -   -  200 180

    The keys come again at random places behind the pairs, in random order; what lies between is NOTHING.
    """
    keys = distinct(generator, batch, pairs, HALF - 1) + 1  # (B, K)
    values = torch.randint(HALF, RECALL_VOCABULARY, (batch, pairs), generator=generator)
    return _asked_later(generator, torch.stack([keys, values], dim=2).flatten(1), keys, values)


def recall_rewritten(generator: torch.Generator, batch: int, pairs: int):
    """Recall where every key is written twice, with another value, and the last value counts.

        ids     5 200   9 131   9 150   5 222   .   9   5
        labels  -   -   -   -   -   -   -   -   -  150 222

    The first writings come in random order before the second ones, which have an order of their own.
    """
    keys = distinct(generator, batch, pairs, HALF - 1) + 1  # (B, K)
    first = torch.randint(HALF, RECALL_VOCABULARY, (batch, pairs), generator=generator)
    other = torch.randint(1, RECALL_VOCABULARY - HALF, (batch, pairs), generator=generator)
    last = HALF + (first - HALF + other) % (RECALL_VOCABULARY - HALF)  # never the first again
    order = distinct(generator, batch, pairs, pairs)  # (B, K)
    once = torch.stack([keys, first], dim=2).flatten(1)  # (B, 2 K)
    again = torch.stack([keys.gather(1, order), last.gather(1, order)], dim=2).flatten(1)
    return _asked_later(generator, torch.cat([once, again], dim=1), keys, last)


def _asked_later(generator, written, keys, values):
    """Behind what is `written`, (B, N), each key at a random place, labelled with its value."""
    batch, length = written.shape
    places = length + distinct(generator, batch, keys.shape[1], RECALL_CONTEXT - length)  # (B, K)
    ids = torch.full((batch, RECALL_CONTEXT), NOTHING)
    labels = torch.full_like(ids, IGNORED)
    ids[:, :length] = written
    ids.scatter_(1, places, keys)
    labels.scatter_(1, places, values)
    return ids, labels


def distinct(generator: torch.Generator, batch: int, count: int, among: int) -> torch.Tensor:
    """`count` different numbers below `among` in each row, in random order: (B, count)."""
    return torch.rand(batch, among, generator=generator).argsort(dim=1)[:, :count]


ZERO, ONE, EVEN, ODD = 1, 2, 3, 4


def parity(generator: torch.Generator, batch: int, length: int):
    """Is the number of ones odd? Asked at the last bit: 1 is a zero, 2 a one, 3 says even, 4 odd.

    ids     2 1 2 2
    labels  - - - 4
    """
    bits = torch.randint(0, 2, (batch, length), generator=generator)
    labels = torch.full_like(bits, IGNORED)
    labels[:, -1] = EVEN + bits.sum(1) % 2
    return ZERO + bits, labels


INDUCTION_VOCABULARY, MARK = 16, 15  # symbols are 1 to 14


def induction(generator: torch.Generator, batch: int, length: int):
    """What came after the mark? Random symbols, among them one mark (15) and, at the end, the mark again.

    ids      3  7 15  4  4  9 15
    labels   -  -  -  -  -  -  4
    """
    ids = torch.randint(1, MARK, (batch, length), generator=generator)
    place = torch.randint(0, length - 2, (batch, 1), generator=generator)  # of the first mark
    ids.scatter_(1, place, MARK)
    ids[:, -1] = MARK
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1] = ids.gather(1, place + 1)[:, 0]
    return ids, labels


LOOKUP_VOCABULARY, ASK = 34, 33  # symbols are 1 to 32


def lookup_key_behind(generator: torch.Generator, batch: int, symbols: int):
    """A string of different symbols, then the sign that asks and a key from it: which symbol follows the key?

    ids     9 4 7 2 33 4
    labels  - - - -  - 7
    """
    string, key, answer = _string(generator, batch, symbols)
    ask = torch.full((batch, 1), ASK)
    return _answered_last(torch.cat([string, ask, key], dim=1), answer)


def lookup_key_before(generator: torch.Generator, batch: int, symbols: int):
    """The same with the key known before the string: a small memory is enough.

    ids     4 33 9 4 7 2 33
    labels  -  - - - - -  7
    """
    string, key, answer = _string(generator, batch, symbols)
    ask = torch.full((batch, 1), ASK)
    return _answered_last(torch.cat([key, ask, string, ask], dim=1), answer)


def _string(generator, batch, symbols):
    string = distinct(generator, batch, symbols, ASK - 1) + 1  # (B, N)
    place = torch.randint(0, symbols - 1, (batch, 1), generator=generator)
    return string, string.gather(1, place), string.gather(1, place + 1)


def _answered_last(ids, answer):
    labels = torch.full_like(ids, IGNORED)
    labels[:, -1:] = answer
    return ids, labels


ZOOLOGY = "Arora et al. 2023, Zoology (arXiv 2312.04927)"
TASKS = {
    task.name: task
    for task in (
        Task(
            "recall", "Recall (MQAR)", "recall the value that stood behind a key", ZOOLOGY, RECALL_VOCABULARY,
            lambda pairs: 1 / pairs, "pairs", (8, 16, 32), (8, 16, 32), recall,
            Net(32, 800, 1, 2),
        ),
        Task(
            "recall_rewritten", "Recall, rewritten", "recall the last of two values that were written under a key",
            f"{ZOOLOGY}, forgetting_mqar.py of its repository", RECALL_VOCABULARY, lambda pairs: 1 / pairs,
            "pairs", (4, 8, 16), (4, 8, 16), recall_rewritten,
            Net(32, 1000, 1, 2),
        ),
        Task(
            "parity", "Parity", "keep one bit of state over the whole length",
            "Grazzi et al. 2024, Unlocking State-Tracking (arXiv 2411.12537), table 3", 5, lambda _: 1 / 2, "bits",
            tuple(range(3, 41)), (40, 64, 128, 256), parity,
            Net(64, 1500, 2, 4, mlp=True, convolution=False),
        ),
        Task(
            "induction", "Induction", "find the mark again, at lengths that training never showed",
            "Gu and Dao 2023, Mamba (arXiv 2312.00752), section 4.1.2", INDUCTION_VOCABULARY, lambda _: 1 / (MARK - 1),
            "tokens", (64,), (64, 128, 256, 512, 1024), induction,
            Net(32, 1500, 2, 2),
        ),
        Task(
            "lookup_key_behind", "Lookup, key behind", "look a symbol up in a string that is over",
            "Jelassi et al. 2024, Repeat After Me (arXiv 2402.01032), section 4.2", LOOKUP_VOCABULARY,
            lambda symbols: 1 / (symbols - 1), "symbols", tuple(range(4, 31)), (8, 16, 30), lookup_key_behind,
            Net(64, 1500, 2, 2),
        ),
        Task(
            "lookup_key_before", "Lookup, key before", "look for a symbol in a string that comes",
            "Jelassi et al. 2024, Repeat After Me (arXiv 2402.01032), section 4.2", LOOKUP_VOCABULARY,
            lambda symbols: 1 / (symbols - 1), "symbols", tuple(range(4, 31)), (8, 16, 30), lookup_key_before,
            Net(64, 1500, 2, 2),
        ),
    )
}  # fmt: skip
