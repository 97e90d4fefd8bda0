"""What is seen while a run trains: a progress line and the loss curve, in the notebook's output cell."""

import time

import numpy as np
from IPython.display import HTML, display
from tqdm import tqdm

WIDTH, HEIGHT = 640, 160


class Live:
    """Shows (steps done, their losses). A few strings an update: a plotting library's 100 ms would be in the window."""

    def __init__(self, steps: int, tokens_per_step: int):
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.begin = time.perf_counter()
        self.handle = display(HTML("<pre>training …</pre>"), display_id=True)

    def __call__(self, done: int, losses: np.ndarray) -> None:
        bar = tqdm.format_meter(
            done * self.tokens_per_step,
            self.steps * self.tokens_per_step,
            time.perf_counter() - self.begin,
            ncols=92,
            unit="token",
            unit_scale=True,
            postfix=f"loss {losses[-1]:.3f}",
        )
        if self.handle is not None:
            self.handle.update(HTML(f"<pre>{bar}</pre>{curve(losses, self.steps)}"))


def curve(losses: np.ndarray, steps: int) -> str:
    """The losses so far as an SVG line, in the page's own text colour; the axis ends at the last step to come."""
    shown = np.unique(np.linspace(0, len(losses) - 1, min(len(losses), 300)).astype(int))
    low, high = float(losses.min()), float(losses.max())
    x = shown / max(1, steps - 1) * (WIDTH - 80) + 60
    y = (high - losses[shown]) / max(1e-9, high - low) * (HEIGHT - 30) + 10
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    text = 'fill="currentColor" font-size="12"'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="training loss by step">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f'<text x="4" y="16" {text}>{high:.2f}</text><text x="4" y="{HEIGHT - 16}" {text}>{low:.2f}</text>'
        f'<text x="60" y="{HEIGHT - 2}" {text}>training loss (nats per token), step 1 to {steps}</text></svg>'
    )
