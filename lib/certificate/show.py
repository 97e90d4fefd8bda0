"""A certificate as a reader sees it: claims, what was examined, and the numbers behind."""

from typing import TYPE_CHECKING

from lib.certificate.measures import CLAIMS, TOLERANCE

if TYPE_CHECKING:  # a certificate is had without it, its table is not
    import pandas as pd

CANNOT = (
    "It finds mistakes, not cheats: code that asks whether it is being examined passes.",
    "It does not run torch.compile, other batches or lengths than these, nor the data of the run.",
    "The weights are drawn or as they come; what shows only in weights of another size is not seen.",
)
CANNOT_OF_A_REFERENCE = (
    "Form and reference may share a mistake, where no options make the variant GPT-2's own attention."
)


def yes(fact: bool | None) -> str:
    """A fact as tables show it."""
    return "–" if fact is None else "yes" if fact else "NO"


def table(certificates: dict[str, dict]) -> "pd.DataFrame":
    """Certificates as a reader sees them, a column per variant; numbers rounded to what survives another CPU.

    A dash where a check could not be had, or was none yet when an older record was made.
    """
    import pandas as pd

    return pd.DataFrame({name: _shown(said) for name, said in certificates.items()})


def _shown(said: dict) -> dict:
    checks = {check: _verdict(said, check) for check in CLAIMS}
    within = [said["reference_difference"], said["reference_gradient_difference"]]
    if not said.get("measures"):
        checks["reference"] = None not in within and max(within) <= TOLERANCE
    shown = {CLAIMS[check]: yes(passed) for check, passed in checks.items()}
    return shown | {
        "tokens that the last one sees, in a layer": _of(said),
        "weights, over GPT-2's own": f"{said['parameters_vs_baseline']:.3f}",
        "memory for the backward pass grows as": _power(said["memory_growth"]),
        "FLOPs of attention core grow as": _power(said["flops_growth"]),
        "passed": yes(said["passed"]),
    }


def _verdict(said: dict, check: str) -> bool | None:
    if not said.get("measures"):
        return said.get(check)
    passed = [one["passed"] for one in said["measures"] if one["check"] == check and one["passed"] is not None]
    return all(passed) if passed else None


def _of(said: dict) -> str:
    if said["receptive_field"] is None:
        return "–"
    return f"{said['receptive_field']} of {said.get('tested', {}).get('context', FIRST_LENGTH)}"


FIRST_LENGTH = 150  # tokens, in certificates from before they said it


def _power(exponent: float | None) -> str:
    return "–" if exponent is None else f"T^{exponent:.1f}"


def numbers(said: dict) -> "pd.DataFrame":
    """A row per check: of its measurements the one that failed or came nearest to its limit, and of how many it is."""
    rows = []
    for check in dict.fromkeys(one["check"] for one in said["measures"]):
        measures = [one for one in said["measures"] if one["check"] == check]
        worst = max(measures, key=_badness)
        rows.append(
            {
                "check": check,
                "passed": yes(_verdict(said, check)),
                "largest": "–" if worst["largest"] is None else f"{worst['largest']:.1e}",
                "allowed": "–" if worst["allowed"] is None else f"{worst['allowed']:.1e}",
                "of": len(measures),
                "measured, at the worst": worst["what"] + (f": {worst['says']}" if worst["says"] else ""),
            }
        )
    import pandas as pd

    return pd.DataFrame(rows)


def page(said: dict) -> str:
    """What the command prints: `numbers`, what was tested, what that cannot say, and the outcome."""
    tested = ", ".join(f"{name} {value}" for name, value in said["tested"].items())
    outcome = f"{said['what']}: {'passed' if said['passed'] else 'FAILED'}, {said['seconds']} s"
    return "\n".join([_left(numbers(said)), "", f"tested: {tested}", *said["scope"], outcome])


def _badness(one: dict) -> tuple:
    """What failed before what passed, then by how near it is to its limit."""
    ratio = -1.0 if one["largest"] is None else one["largest"] / one["allowed"] if one["allowed"] else one["largest"]
    return one["passed"] is False, one["passed"] is not None, ratio


def _left(table: "pd.DataFrame") -> str:
    """pandas aligns text to the right."""
    texts = table.astype(str)
    widths = {name: max(len(name), *texts[name].str.len()) for name in texts}
    rows = [dict(zip(texts, texts, strict=True)), *texts.to_dict("records")]
    return "\n".join("  ".join(f"{row[name]:<{widths[name]}}" for name in texts).rstrip() for row in rows)


def scope(said: dict) -> list[str]:
    """What a certificate was examined at and what it cannot say, in sentences."""
    at = said["tested"]
    kept = f"{at['rows']} rows of {at['length']:,} tokens"
    around = ", as Llama's" if at.get("architecture") == "llama" else ""
    around += f", behind a convolution over {at['convolution']} tokens" if at.get("convolution") else ""
    return [
        f"Examined: {at['layers']} layers of width {at['width']} with {at['heads']} heads{around}, "
        f"{at['precision']} on {at['device']}, in training and evaluation; {kept}, rows up to {at['longest']:,} "
        f"tokens, decoding up to {at['decoded']:,}.",
        f"Beside its reference in float64 on {at['exact_device']}: outputs of {at['reference_length']:,} tokens, "
        f"gradients of {at['gradient_length']:,}.",
        *CANNOT,
        CANNOT_OF_A_REFERENCE,
    ]
