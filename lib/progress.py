"""What is seen while a run trains: a progress bar and the loss curve, in the notebook's output cell."""

import time

import numpy as np
from IPython.display import display
from tqdm import tqdm

WIDTH, HEIGHT, LEFT = 640, 190, 46
INK, LINE_COLOUR = "#7f7f7f", "#3f8fd2"  # JupyterLab shows an SVG as an image: these stand on white and on black
WORDS = "{percentage:.0f} % of {total_fmt} tokens, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}"


class Live:
    """Shows (steps done, their losses). A few strings an update: a plotting library's time would be measured."""

    def __init__(self, steps: int, tokens_per_step: int):
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.begin = time.perf_counter()
        self.handle = display({"text/plain": "training ..."}, raw=True, display_id=True)

    def __call__(self, done: int, losses: np.ndarray) -> None:
        text = tqdm.format_meter(
            done * self.tokens_per_step,
            self.steps * self.tokens_per_step,
            time.perf_counter() - self.begin,
            bar_format=WORDS,
            unit=" tokens",
            unit_scale=True,
            postfix=f"loss {losses[-1]:.3f}",
        )
        if self.handle is not None:  # None outside a notebook
            picture = drawing(losses, self.steps, text)
            self.handle.update({"image/svg+xml": picture, "text/plain": text}, raw=True)


def drawing(losses: np.ndarray, steps: int, text: str) -> str:
    """An SVG: a bar, the progress in words, the losses so far on an axis up to the last step."""
    shown = np.unique(np.linspace(0, len(losses) - 1, min(len(losses), 300)).astype(int))
    low, high = float(losses.min()), float(losses.max())
    top, bottom, right = 40, HEIGHT - 28, WIDTH - 10
    x = LEFT + shown / max(1, steps - 1) * (right - LEFT)
    y = top + (high - losses[shown]) / max(1e-9, high - low) * (bottom - top)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    done = len(losses) / steps * WIDTH
    write = f'fill="{INK}" font-family="sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        'aria-label="training loss by step">'
        f'<rect width="{WIDTH}" height="5" fill="{INK}" opacity="0.25"/>'
        f'<rect width="{done:.1f}" height="5" fill="{LINE_COLOUR}"/>'
        f'<text y="24" {write}>{text}</text>'
        f'<polyline points="{points}" fill="none" stroke="{LINE_COLOUR}" stroke-width="2"/>'
        f'<text y="{top + 8}" {write}>{high:.2f}</text><text y="{bottom}" {write}>{low:.2f}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 8}" {write}>training loss, nats per token, steps 1 to {steps}</text></svg>'
    )
