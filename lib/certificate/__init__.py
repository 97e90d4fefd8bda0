"""Does an attention compute what its name promises? A variant that fails is drawn apart and never ranked.

`certify` is for a variant of the study, in the model that a run builds; `examine` for any module that maps (B, T, C) to
(B, T, C); `python -m lib.certificate` for both, and for any causal language model. docs/certificate.md says how to read
what they say. Against mistakes, not against cheats.
"""

from lib.certificate.counts import activation_bytes
from lib.certificate.measures import CLAIMS, TOLERANCE
from lib.certificate.others import examine
from lib.certificate.setting import Setting
from lib.certificate.show import numbers, scope, table, yes
from lib.certificate.variant import certify, examined

__all__ = [
    "CLAIMS", "TOLERANCE", "Setting", "activation_bytes", "certify", "examine", "examined", "numbers", "scope", "table",
    "yes",
]  # fmt: skip
