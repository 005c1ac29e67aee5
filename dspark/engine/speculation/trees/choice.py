"""Tree or chain: which of the two drafts a round, by what finished rounds of both have given.

A tree keeps more tokens of a round than a chain of as many drafts, and its lattice takes longer to
draft; under load, and where tokens are sampled, the second may outweigh the first. Each of the two
has its scheduler, which weighs, shortens and pauses drafts as ever. A round goes to whichever has
made more tokens per millisecond of the rounds that it drafted, and to chains where trees pause. The
other one is tried again now and then, the more rarely the surer it is that it is slower; rounds in
which nothing is drafted bring no try nearer, so a pause of chains sees one try of trees at most.

Only finished rounds count, so no output changes its distribution.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from dspark.scheduling.calibration import TemperatureClass

# Rounds of chains before a tree is tried, and after how many a round weighs half.
_FIRST, _HALF_LIFE = 3, 1024.0
# The logarithm of how many times a chain's tokens a tree keeps, before any is seen: a little less
# than was measured (docs/trees.md), so that trees have to show it; and its standard deviation.
_PRIOR, _PRIOR_DEVIATION = 0.03, 0.1
# Rounds between two of the one that seems slower, by standard deviations of the difference, and
# by rounds that it was seen in: the first are slow, since nothing is in the processor's caches.
_PAUSES = (8, 16, 64, 256)
# Rounds whose times count, and what a slow one is taken for, in medians of these.
_TIMES, _OUTLIER = 128, 2.0
# Rounds of a load after which each one is weighed, and between two weighings from then on.
_OFTEN, _EVERY = 32, 8


@dataclass
class _Rounds:
    """What the rounds of one of the two have given of late, sums that fade.

    Attributes:
        times: of the last of them, milliseconds.
    """

    count: float = 0.0
    tokens: float = 0.0
    squares: float = 0.0
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))

    def learn(self, tokens: float, ms: float) -> None:
        """A round gave so many tokens per request."""
        self.times.append(ms)
        fade = 0.5 ** (1 / _HALF_LIFE)
        self.count = fade * self.count + 1
        self.tokens = fade * self.tokens + tokens
        self.squares = fade * self.squares + tokens**2

    @property
    def mean_ms(self) -> float:
        """Of a round, slow moments of the machine left out."""
        most = _OUTLIER * sorted(self.times)[len(self.times) // 2]
        return sum(min(each, most) for each in self.times) / len(self.times)

    @property
    def variance(self) -> float:
        """Of the logarithm of the mean number of tokens."""
        mean = self.tokens / self.count
        spread = max(self.squares / self.count - mean**2, 0.0)
        # One round of good faith, off by the mean: few equal rounds prove little.
        return (spread * self.count + mean**2) / (self.count * mean) ** 2


@dataclass
class _Load:
    """What is known of rounds of one load.

    Attributes:
        ways: of chains and of trees.
        rounds: of both.
        since: rounds since one of each.
        latest: the edge as it was weighed last.
    """

    ways: tuple[_Rounds, _Rounds] = field(default_factory=lambda: (_Rounds(), _Rounds()))
    rounds: int = 0
    since: list[int] = field(default_factory=lambda: [0, _PAUSES[0]])
    latest: float = 0.0

    def decide(self) -> bool:
        """Whether the next round is a tree's."""
        chain, tree = self.ways
        if len(chain.times) < _FIRST:
            return False
        found, seen = self.latest > 0, min(chain.count, tree.count)
        pause = _PAUSES[int(min(abs(self.latest), seen, len(_PAUSES) - 1))]
        return found if self.since[not found] < pause else not found

    def learn(self, tree: bool, tokens: float, ms: float | None) -> None:
        """A round of a tree or a chain gave so many tokens per request.

        Without a time it counts as a try, and nothing else is learned from it.
        """
        self.since[tree], self.since[not tree] = 0, self.since[not tree] + 1
        if not ms:
            return
        self.ways[tree].learn(tokens, ms)
        self.rounds += 1
        if all(way.count for way in self.ways) and (
            self.rounds < _OFTEN or self.rounds % _EVERY == 0
        ):
            self.latest = self.edge()

    def edge(self) -> float:
        """How much faster trees are, in standard deviations of what is known of it."""
        chain, tree = self.ways
        gain = math.log(tree.tokens / tree.count) - math.log(chain.tokens / chain.count)
        cost = math.log(tree.mean_ms) - math.log(chain.mean_ms)
        seen, prior = 1 / (chain.variance + tree.variance), _PRIOR_DEVIATION**-2
        gain = (seen * gain + prior * _PRIOR) / (seen + prior)
        return (gain - cost) * math.sqrt(seen + prior)


class TreeChoice:
    """Decides per round whether trees are drafted or chains.

    What is known is kept for 1, 2-3, 4-7, ... requests, greedy and sampled ones apart.

    Attributes:
        tree: what was decided last; False as well where the scheduler of trees then paused.
    """

    def __init__(self) -> None:
        self._loads: dict[tuple[TemperatureClass, int], _Load] = {}
        self.tree = False

    def decide(self, kind: TemperatureClass, requests: int) -> bool:
        """Whether so many requests draft trees in this round."""
        self.tree = requests > 0 and self._load(kind, requests).decide()
        return self.tree

    def learn(self, kind: TemperatureClass, requests: int, tokens: int, ms: float | None) -> None:
        """Take note of a finished round that drafted.

        Args:
            kind: as it was decided for.
            requests: likewise.
            tokens: committed to all of them.
            ms: that it took; None where prompts rode along.
        """
        if requests and tokens:
            self._load(kind, requests).learn(self.tree, tokens / requests, ms)

    def _load(self, kind: TemperatureClass, requests: int) -> _Load:
        return self._loads.setdefault((kind, requests.bit_length()), _Load())
