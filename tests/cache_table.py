"""What each attention keeps of one long sequence in GPT-2 small: the table in docs/variants.md, by their formulas.

`python tests/cache_table.py --write` writes it; tests/test_docs.py holds it.
"""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib import attention
from lib.model import gpt2_config
from lib.paths import ROOT
from lib.site.lookup import PATTERNS

PAGE = ROOT / "docs" / "variants.md"
BEGIN, END = "<!-- the table, written by tests/cache_table.py -->", "<!-- end of the table -->"
CONTEXT, ELEMENT_BYTES, MIB = 32_768, 2, 1 << 20


def held(name: str) -> tuple[str, float]:
    """What figures call a variant or pattern, and bytes of its cache of one sequence of `CONTEXT` tokens in bf16."""
    with torch.device("meta"):
        layers = attention.layers(name, gpt2_config(12, 768, 12, CONTEXT, 2))
    return attention.title(layers, name), sum(layer.cache_bytes(CONTEXT, ELEMENT_BYTES) for layer in layers)


def table() -> str:
    """A row for each variant and pattern, the smallest first."""
    found = sorted((*held(name)[::-1], name) for name in (*attention.variants(), *PATTERNS))
    whole = held(attention.REFERENCE)[1]
    lines = ["| attention | | MiB | of SDPA's |", "| --- | --- | --- | --- |"]
    for size, title, name in found:
        who = PATTERNS.get(name, f"`{name}`")
        lines.append(
            f"| {title} | {who} | {size / MIB:,.{0 if size > 100 * MIB else 1}f} | {100 * size / whole:.1f} % |"
        )
    return "\n".join(lines)


def documented() -> str:
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
    print(table())
