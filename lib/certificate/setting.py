"""What of a run its certificate is about: sizes, precision, device and lengths."""

import dataclasses
import math
from dataclasses import dataclass

from lib.errors import UsageError
from lib.model import config_of, devices, gpt2_config

REFERENCE_COST = {"cpu": 2e9, "cuda": 2e10}  # layers x width x T² that references may cost: seconds on either
LONGEST_REFERENCE = 1024  # some hold T x T numbers per head and round


@dataclass(frozen=True)
class Setting:
    """The run that a certificate speaks for. The defaults are a small model, enough for most mistakes, in a second."""

    layers: int = 2
    width: int = 32
    heads: int = 4
    positions: int = 300
    dropout: float = 0.0
    context: int = 150  # more than a default window, and no multiple of any chunk
    batch_size: int = 3
    learning_rate: float = 1e-3
    precision: str = "fp32"
    device: str = "cpu"
    inference_contexts: tuple[int, ...] = ()
    new_tokens: int = 1
    position_embedding: str = "learned"
    architecture: str = "gpt2"
    convolution: int = 0
    mlp_width: int | None = None  # None: the architecture's own

    def __post_init__(self):
        if self.context < 2:
            raise UsageError(
                f"a certificate is of a context of at least 2 tokens, one of which sees the other, not {self.context}"
            )

    @classmethod
    def of(cls, p) -> "Setting":
        """That of a run with the parameters `p` (`lib.parameters.resolve`), with what `auto` means here."""
        device = devices.choose(p.device)
        given = {field.name: getattr(p, field.name, field.default) for field in dataclasses.fields(cls)}
        if getattr(p, "match", "none") == "parameters":
            given["mlp_width"] = config_of(vars(p), 2).n_inner
        given |= {"device": device.type, "precision": devices.resolve_precision(p.precision, device)}
        return cls(**given | {"inference_contexts": tuple(p.inference_contexts)})

    def values(self) -> dict:
        """As JSON holds it."""
        return dataclasses.asdict(self) | {"inference_contexts": list(self.inference_contexts)}

    def config(self, vocabulary: int, dropout: float = 0.0):
        """The configuration of the run's model."""
        sizes = (self.layers, self.width, self.heads, self.positions, vocabulary, dropout)
        layers = {"position_embedding": self.position_embedding, "architecture": self.architecture}
        config = gpt2_config(*sizes, **layers, convolution=self.convolution)
        config.n_inner = self.mlp_width
        return config

    @property
    def rows(self) -> int:
        """Rows of a batch: the run's, and never fewer than three."""
        return max(3, self.batch_size)

    @property
    def length(self) -> int:
        """Tokens in each of `rows` rows, at no more scores than the run's own batch has."""
        return max(2, min(self.context, math.isqrt(self.batch_size * self.context**2 // self.rows)))

    @property
    def longest(self) -> int:
        """Tokens in the longest row: all that the model has positions for."""
        return self.positions

    def rows_at(self, length: int) -> int:
        """Rows of `length` tokens with no more scores than the run's own batch has; one at the least."""
        return max(1, min(self.rows, self.batch_size * self.context**2 // length**2))

    @property
    def decoded(self) -> int:
        """Tokens up to which decoding is followed: the longest that the run decodes, or its context."""
        told = [context + self.new_tokens for context in self.inference_contexts]
        return min(self.positions, max([self.context, *told]))

    @property
    def prefixes(self) -> list[int]:
        """Lengths of prefixes: the run's own, powers of two and odd ones: multiples of usual chunks are there."""
        M = self.longest
        own = [n for c in self.inference_contexts for n in (c, c + self.new_tokens)]
        powers = [2**k for k in range(6, M.bit_length())]
        odd = [1, 2, 33, M // 3, M // 2 + 1, M - 1, *range(1000, M, 1000)]
        return sorted({n for n in (self.context - 1, self.context, *own, *powers, *odd) if 0 < n < M})

    def reference_length(self, device: str) -> int:
        """Tokens for which the slow references are computed on a device."""
        affordable = math.isqrt(int(REFERENCE_COST[device] / (self.layers * self.width)))
        return min(self.positions, LONGEST_REFERENCE, max(self.gradient_length, affordable))

    @property
    def gradient_length(self) -> int:
        """Tokens for which gradients of the references are: past a usual window, a multiple of no chunk."""
        return min(self.context, 150)


QUICK = Setting(  # the defaults of notebooks/train.ipynb
    layers=4, width=128, heads=8, positions=512, context=256, batch_size=4, learning_rate=2e-3,
    inference_contexts=(64, 256), new_tokens=32,
)  # fmt: skip
