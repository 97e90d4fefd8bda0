"""What explore.ipynb shows: attention by hand, on models that a laptop trains while one looks."""

import copy
import statistics
import time
from functools import cache, partial
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from lib import attention, certificate
from lib.analysis import capability, style
from lib.data import corpus
from lib.data.tasks import TASKS
from lib.errors import UsageError
from lib.explore import budget, weights
from lib.explore.budget import GPT2_SMALL, SIZES
from lib.explore.widgets import LABELLED, Choice, Picker, Screen
from lib.explore.widgets import fitting as check
from lib.measure import assemble, inference
from lib.model import GPT2, build_model, devices, gpt2_config, meta_model
from lib.study import plan, probes
from lib.training import Trainer

SIZE = {"layers": 2, "width": 64, "heads": 4, "positions": 256}  # of the models on this page
LESSON = SIZE | {"context": 128, "batch_size": 4, "steps_per_epoch": 1000, "epochs": 1, "schedule": "constant"}
MOST_TOKENS = 40  # of a sentence whose map is still legible
CONTEXTS = tuple(2**power for power in range(6, 16))
MEASURED_CONTEXTS = (64, 128, 256, 512, 1024)
WARM_UPS, ROUNDS = 2, 8  # of "Measure here", at each length
PAGES = 16  # drawn while a model writes
REDRAWN_EVERY_S = 0.5  # while training
TESTED_EVERY_S = 1.5  # while a task is learnt


class Bench:
    """The page's models, and a picker that its screens share: `screen`s of one variant beside GPT-2's own attention."""

    def __init__(self, name: str, beside: str = "baseline", **options):
        self.picker, self.beside = Picker(name, **options), Choice(beside)
        self.trained: dict[str, tuple[GPT2, int]] = {}  # by a choice's label: the model, and its steps of training
        self.of_models: list[Screen] = []  # what training changes; measurements and certificates stay

    def screen(self, *words, of_models: bool = False, **options) -> Screen:
        shown = Screen(*words, follow=self.picker, **{"picks": False} | options)
        self.of_models += [shown] if of_models else []
        return shown

    def model(self, choice: Choice) -> tuple[GPT2, str]:
        """The small model with this attention, and a word on its weights: trained on this page, or as initialised."""
        if choice.label in self.trained:
            model, steps = self.trained[choice.label]
            return copy.deepcopy(model).cpu().eval(), f"after {steps:,} steps of training on this page"
        return small_model(choice).eval(), "as initialised, not trained yet"

    def budget(self) -> Screen:
        """What each variant needs and takes, beside a budget; the page's picker stands in it."""
        return self.screen("budget", budget.table, controls=budget.controls(), picks=True)

    def attention(self, sentence: str) -> Screen:
        controls = {
            "sentence": _text("sentence", sentence),
            "layer": widgets.IntSlider(min=1, max=SIZE["layers"], description="layer"),
            "head": widgets.Dropdown(
                options=[("mean of all", 0), *((str(h), h) for h in range(1, SIZE["heads"] + 1))], description="head"
            ),
        }
        return self.screen("attention map", self.attention_page, controls=controls, of_models=True)

    def attention_page(self, choice: Choice, sentence: str, layer: int, head: int) -> list:
        model, said = self.model(choice)
        tokens, found, seen = attention_map(model, sentence, layer)
        return [draw_map(choice.label, tokens, found, seen, layer, head), f"Weights of the model: {said}."]

    def certificate(self) -> Screen:
        return self.screen("certificate", self.certificate_pages, controls={}, button="Examine")

    def certificate_pages(self, choice: Choice):
        check(choice, SIZE)
        said = certificate.certify(choice.attention, choice.options)
        yield lambda: [_with_index(certificate.table({choice.label: said}), "what is claimed")]

    def costs(self) -> Screen:
        controls = {"size": _sizes(), "context": _contexts(1024)}
        return self.screen("cost table", cost_table, controls=controls)

    def cost_by_context(self) -> Screen:
        return self.screen("cost by context, on paper", on_paper, controls={"size": _sizes()})

    def measured(self) -> Screen:
        at_first = "Press “Measure here” for a few seconds of one layer, forward and backward, on this machine."
        show = partial(measured_pages, beside=self.beside)
        return self.screen("cost by context, here", show, controls={}, button="Measure here", at_first=at_first)

    def training(self, other: str, **options) -> Screen:
        controls = {"seconds": widgets.IntSlider(value=10, min=2, max=120, description="seconds")}
        at_first = "Press “Train” to train both side by side; “Stop” ends it sooner. The other screens then use them."
        rival = Picker(other, **options)
        show = partial(self.training_pages, rival)
        shown = self.screen("training", show, controls=controls, button="Train", at_first=at_first)
        shown.children = [shown.children[0], widgets.HTML("beside"), rival, *shown.children[1:]]
        return shown

    def training_pages(self, rival: Picker, choice: Choice, seconds: float):
        runs = [Lesson(one) for one in dict.fromkeys((choice, rival.choice))]
        try:
            shown_s = 0.0
            while sum(run.seconds for run in runs) < seconds and runs[0].steps < LESSON["steps_per_epoch"]:
                for run in runs:
                    run.step()
                if sum(run.seconds for run in runs) > shown_s + REDRAWN_EVERY_S:
                    shown_s = sum(run.seconds for run in runs)
                    yield partial(training_page, runs)
            yield partial(training_page, runs)
        finally:
            self.trained |= {run.choice.label: (run.trainer.model, run.steps) for run in runs if run.steps}
            for screen in self.of_models:
                screen.changed()

    def task(self) -> Screen:
        controls = {
            "task": widgets.Dropdown(
                options=[(task.title, name) for name, task in TASKS.items()], value="induction", description="task"
            ),
            "seconds": widgets.IntSlider(value=10, min=2, max=60, description="seconds"),
        }
        at_first = "Press “Learn”: both learn the task from nothing, in turns, on this machine."
        return self.screen("task", self.task_pages, controls=controls, button="Learn", at_first=at_first)

    def task_pages(self, choice: Choice, task: str, seconds: float):
        learners = [
            probes.Learner({"attention": one.attention, "options": _by_mixer(one)}, task)
            for one in dict.fromkeys((choice, self.beside))
        ]
        begin_s = shown_s = time.perf_counter()
        while all([learner.step() for learner in learners]) and time.perf_counter() < begin_s + seconds:
            if time.perf_counter() > shown_s + TESTED_EVERY_S:
                yield partial(task_page, learners)
                shown_s = time.perf_counter()
        yield partial(task_page, learners)

    def generation(self, prompt: str) -> Screen:
        controls = {
            "prompt": _text("prompt", prompt),
            "new_tokens": widgets.IntSlider(value=32, min=4, max=160, step=4, description="new tokens"),
        }
        return self.screen("generation", self.generation_pages, controls=controls, button="Generate", of_models=True)

    def generation_pages(self, choice: Choice, prompt: str, new_tokens: int):
        ids = [tokenizer().encode(prompt)]
        if not ids[0] or len(ids[0]) + new_tokens > SIZE["positions"]:
            raise UsageError(f"a prompt and its {new_tokens} new tokens must be 1 to {SIZE['positions']} tokens long")
        columns = dict.fromkeys((choice, self.beside))
        going = {one.label: generate(self.model(one)[0], ids) for one in columns}
        said = f"Written by the model {self.model(choice)[1]}:"
        grown = {label: [] for label in going}
        for number in range(1, new_tokens + 1):
            for label, tokens in going.items():
                text, cached, held = next(tokens)
                grown[label].append((cached, held, text))
            if number % max(1, new_tokens // PAGES) == 0 or number == new_tokens:
                yield partial(generation_page, choice.label, said, grown)


class Lesson:
    """A small model in training, step by step, and the seconds that its own steps took."""

    def __init__(self, choice: Choice):
        self.choice, self.steps, self.seconds = choice, 0, 0.0
        check(choice, SIZE)
        defaults = {name: line.default for name, line in plan.known_parameters().items()}
        p = SimpleNamespace(**defaults | LESSON | {"attention": choice.attention, "options": choice.options})
        self.tokens_per_step = p.batch_size * p.context
        self.trainer = Trainer(small_model(choice), corpus.load(p), p)
        self.trainer.model.train()

    def step(self):
        begin = time.perf_counter()
        self.trainer.take_step(self.steps)
        devices.synchronize(self.trainer.device)
        self.seconds += time.perf_counter() - begin
        self.steps += 1

    @property
    def losses(self) -> np.ndarray:
        return self.trainer.losses[: self.steps].cpu().numpy()


def small_model(choice: Choice) -> GPT2:
    """The page's small GPT-2 with this attention. Raises UsageError for a option that it refuses."""
    check(choice, SIZE)
    return build_model(choice.attention, gpt2_config(**SIZE, vocabulary=corpus.BUILTIN_VOCABULARY), **choice.options)


@cache
def tokenizer():
    return corpus.builtin_tokenizer()


def attention_map(model: GPT2, sentence: str, layer: int) -> tuple[list[str], weights.Map, torch.Tensor]:
    """Of layer `layer` (from 1) on a sentence: its tokens (T), the map, and what sees what through all layers, (T, T)
    bools. Raises UsageError for a sentence of less than two tokens or too many to read."""
    encoder = tokenizer()
    ids = encoder.encode(sentence)
    if not 2 <= len(ids) <= MOST_TOKENS:
        raise UsageError(f"a map needs 2 to {MOST_TOKENS} tokens, and these are {len(ids)}; write another sentence")
    model, heard = copy.deepcopy(model).cpu().double().eval(), []
    attn = model.transformer.h[layer - 1].attn
    hook = attn.register_forward_pre_hook(lambda _module, given: heard.append(given[0].detach()))
    with torch.no_grad():
        embedded = model.transformer.wte(torch.tensor([ids]))
        model(torch.tensor([ids]), use_cache=False)
    hook.remove()
    found = weights.of_layer(attn, heard[0], SIZE["heads"])

    def through_all_layers(x):
        return model.transformer(inputs_embeds=x, use_cache=False).last_hidden_state

    seen = weights.influence(through_all_layers, embedded, directions=1) > 0
    return [encoder.decode([token]).replace("\n", "↵") for token in ids], found, seen


def draw_map(label: str, tokens: list[str], found: weights.Map, seen: torch.Tensor, layer: int, head: int):
    """The map of a head (from 1; 0: the mean), and how many tokens each token sees in the layer and through all."""
    style.use_style()
    one = len(found.values) == 1
    values = found.values.mean(0) if one or not head else found.values[head - 1]
    of = "all heads together" if one else f"head {head}" if head else "mean of all heads"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 5.2), width_ratios=(1.9, 1), sharey=True)
    colours = mpl.colormaps["viridis_r"].with_extremes(bad=(0.5, 0.5, 0.5, 0.15))
    shown = values if found.kind == "weights" else values / values.max()
    picture = left.imshow(np.ma.masked_equal(shown.numpy(), 0.0), cmap=colours, aspect="auto", vmin=0, vmax=1)
    left.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    left.set_yticks(range(len(tokens)), tokens, fontsize=8)
    left.grid(visible=False)
    what = (
        "weight"
        if found.kind == "weights"
        else "influence (norm of the Jacobian, of the largest): no weights are found"
    )
    left.set_title(f"{label}: layer {layer}, {of}", loc="left")
    left.set_xlabel("token seen; grey: not at all")
    left.set_ylabel("token that looks")
    figure.colorbar(picture, ax=left, label=what)
    places = range(len(tokens))
    right.plot((found.values != 0).any(0).sum(1), places, "o-", markersize=4, label=f"layer {layer}")
    right.plot(seen.sum(1), places, "s--", markersize=4, label=f"all {SIZE['layers']} layers")
    right.set_xlim(0, len(tokens) + 1)
    right.set_title("Receptive field", loc="left")
    right.set_xlabel("tokens seen, itself included")
    right.legend(loc="upper right")
    figure.tight_layout()
    return figure


def _config(size: str, context: int):
    layers, width, heads, vocabulary = SIZES[size]
    return gpt2_config(layers, width, heads, context, vocabulary)


def cost_table(choice: Choice, size: str, context: int) -> list:
    """What a model of this size costs on paper with this attention and with GPT-2's own, for `context` positions."""
    config = _config(size, context)
    check(choice, {"layers": config.n_layer, "width": config.n_embd, "heads": config.n_head, "positions": context})
    p = SimpleNamespace(attention=choice.attention, label=choice.label, context=context)
    costs = assemble.costs(meta_model(choice.attention, config, **choice.options), p)
    return [_with_index(costs, f"{size}, one sequence of {context:,} tokens")]


def by_context(choice: Choice, size: str) -> pd.DataFrame:
    """Every variant at its defaults, and the choice: a row per context with `core_flops_per_token` and `cache_bytes`
    in bf16 of all layers. What refuses this size is left out, but not the choice: then UsageError."""
    every = [one for one in map(Choice, attention.variants()) if _fits(one, size)]
    tables = [_by_context(one.attention, tuple(one.options.items()), size) for one in dict.fromkeys((*every, choice))]
    return pd.concat(tables, ignore_index=True)


def _fits(choice: Choice, size: str) -> bool:
    try:
        _by_context(choice.attention, tuple(choice.options.items()), size)
    except UsageError:
        return False
    return True


@cache
def _by_context(name: str, options: tuple, size: str) -> pd.DataFrame:
    choice, rows, (layers, width, heads, _) = Choice(name, dict(options)), [], SIZES[size]
    sizes = {"layers": layers, "width": width, "heads": heads}
    check(choice, sizes | {"positions": max(CONTEXTS)})
    for context in CONTEXTS:
        try:
            own = _layers(choice, size, context)
            costs = {
                "core_flops_per_token": sum(layer.core_flops(context) for layer in own) / context,
                "cache_bytes": sum(layer.cache_bytes(context, 2) for layer in own),
            }
        except Exception:
            check(choice, sizes | {"positions": context})  # says in one sentence what so many positions are refused for
            raise
        rows.append({"label": choice.label, "name": choice.name, "context": context} | costs)
    return pd.DataFrame(rows)


def _layers(choice: Choice, size: str, context: int) -> list:
    """The layers without their weights of a model of a size with so many positions."""
    with devices.without_weights():
        return attention.layers(choice.attention, _config(size, context), **choice.options)


def on_paper(choice: Choice, size: str) -> list:
    """Attention core per token, and the cache, by context; the choice is drawn broad."""
    style.use_style()
    costs = by_context(choice, size)
    figure, all_axes = plt.subplots(1, 2, figsize=(10.5, 6.2))
    panels = (
        ("core_flops_per_token", 1e6, "Attention core, per token", "causal MFLOPs, forward, all layers"),
        ("cache_bytes", style.MIB, "Cache of one sequence", "MiB in bf16, all layers"),
    )
    for axes, (cost, scale, title, unit) in zip(all_axes, panels, strict=True):
        _lines(axes, costs, cost, scale, choice.label)
        _log_log(axes, CONTEXTS[::3])
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
    figure.tight_layout()
    return [figure]


def _lines(axes, costs: pd.DataFrame, cost: str, scale: float, chosen: str) -> None:
    """A line for each cost that differs from the others; variants that cost the same share one."""
    look = style.looks(sorted(set(costs["name"])))
    lines: dict[tuple, list] = {}
    for label, own in costs.groupby("label", sort=False):
        lines.setdefault(tuple(own[cost]), []).append((label, own))
    for same in lines.values():
        name, own = next((pair for pair in same if pair[0] == chosen), same[0])
        drawn = look[own["name"].iloc[0]] | {"markersize": 4}
        drawn |= {"linewidth": 4, "alpha": 0.9} if name == chosen else {"linewidth": 1.2}
        axes.plot(own["context"], own[cost] / scale, label="\n= ".join(label for label, _ in same), **drawn)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2, frameon=False)


def _log_log(axes, contexts) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("context, tokens")


def measured_pages(choice: Choice, beside: Choice, rounds: int = ROUNDS):
    """One layer of the quick profile, forward and backward over one sequence in fp32 on this CPU, by context: every
    time of `rounds` rounds, and the bytes that forward keeps for backward. Of a pattern, the mean over its layers.

    Both are warmed up at each length; then they take turns, and who begins changes from round to round.
    """
    _, width, heads, _ = next(iter(SIZES.values()))
    choices, rows = list(dict.fromkeys((choice, beside))), []
    for context in MEASURED_CONTEXTS:
        for one in choices:
            check(one, {"layers": _period(one), "width": width, "heads": heads, "positions": context})
        hidden, layers = torch.randn(1, context, width), {}
        for one in choices:
            config = gpt2_config(_period(one), width, heads, context, 2)
            layers[one.label] = attention.layers(one.attention, config, **one.options)
        seconds = {label: [] for label in layers}
        for number in range(WARM_UPS + rounds):
            for label in list(layers)[:: 1 if number % 2 else -1]:
                took_s = _forward_backward_s(layers[label], hidden)
                seconds[label] += [took_s] if number >= WARM_UPS else []
        for one in choices:
            times_s = seconds[one.label]
            row = {"label": one.label, "name": one.name, "context": context, "times_s": times_s}
            row |= {"time_s": statistics.median(times_s), "low_s": min(times_s), "high_s": max(times_s)}
            kept = [certificate.activation_bytes(layer, hidden) for layer in layers[one.label]]
            rows.append(row | {"activation_bytes": statistics.fmean(kept)})
        yield partial(measured_page, pd.DataFrame(rows), choice)


def _by_mixer(choice: Choice) -> dict[str, dict]:
    """The options of a variant, or of each of a pattern, by its name."""
    each = attention.by_part(choice.attention, choice.options)
    return {attention.stem(name): own for name, (_, own) in each.items()}


def _period(choice: Choice) -> int:
    """Layers of a pattern until it repeats."""
    return len(attention.parts(choice.attention))


def _forward_backward_s(layers: list, hidden: torch.Tensor) -> float:
    begin = time.perf_counter()
    for layer in layers:
        layer(hidden)[0].sum().backward()
    return (time.perf_counter() - begin) / len(layers)


def measured_page(costs: pd.DataFrame, choice: Choice) -> list:
    style.use_style()
    figure, all_axes = plt.subplots(1, 2, figsize=(10.5, 4.6))
    panels = (
        ("time_s", 1e-3, "Time of one layer", "ms, forward and backward"),
        ("activation_bytes", style.MIB, "Kept for the backward pass", "MiB of one layer"),
    )
    for axes, (cost, scale, title, unit) in zip(all_axes, panels, strict=True):
        _lines(axes, costs, cost, scale, choice.label)
        _log_log(axes, MEASURED_CONTEXTS)
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
    for _, own in costs.groupby("label", sort=False):
        all_axes[0].fill_between(own["context"], own["low_s"] / 1e-3, own["high_s"] / 1e-3, color=style.INK, alpha=0.2)
    figure.tight_layout()
    rounds = len(costs["times_s"].iloc[0])
    said = (
        f"One sequence, width 128, 8 heads, fp32, on this machine's CPU now. Medians of {rounds} rounds in turns, "
        f"after {WARM_UPS} to warm up; grey, and in brackets: the fastest and the slowest of them. Where the ratios of "
        "the rounds lie on both sides of 1, the comparison is inconclusive."
    )
    return [figure, said, _measured_table(costs, choice)]


def _measured_table(costs: pd.DataFrame, choice: Choice) -> pd.DataFrame:
    """A row per length and variant: median, fastest and slowest; and, round by round, the ratio of the choice to it."""
    rows = []
    for context, here in costs.groupby("context", sort=False):
        mine = here.loc[here["label"] == choice.label, "times_s"].iloc[0]
        for one in here.itertuples():
            row = {"context": f"{context:,}", "variant": one.label, "ms": _range(np.array(one.times_s) / 1e-3, ".3g")}
            ratios = np.array(mine) / np.array(one.times_s)
            row[f"{choice.label} takes of it, by round"] = "–" if one.label == choice.label else _range(ratios, ".2f")
            rows.append(row)
    return pd.DataFrame(rows)


def _range(values: np.ndarray, form: str) -> str:
    return f"{np.median(values):{form}} [{values.min():{form}} to {values.max():{form}}]"


def training_page(runs: list[Lesson]) -> list:
    """Losses by steps and by each one's own seconds, and a table of both."""
    style.use_style()
    figure, (by_step, by_second) = plt.subplots(1, 2, figsize=(10.5, 3.8), sharey=True)
    for run, colour, dash in zip(runs, (style.BLUE, style.ORANGE), ("-", "--"), strict=False):
        smooth = pd.Series(run.losses).ewm(span=10).mean()
        steps = np.arange(1, run.steps + 1)
        for axes, x in ((by_step, steps), (by_second, steps * run.seconds / run.steps)):
            axes.plot(x, run.losses, color=colour, linewidth=0.6, alpha=0.4)
            axes.plot(x, smooth, dash, color=colour, linewidth=1.8, label=run.choice.label)
    for axes, title, unit in ((by_step, "Loss by steps", "steps"), (by_second, "Loss by time", "seconds of its own")):
        axes.set_title(title, loc="left")
        axes.set_xlabel(unit)
    by_step.set_ylabel("training loss, nats per token")
    by_second.legend()
    figure.tight_layout()
    table = [
        {
            "variant": run.choice.label,
            "steps": f"{run.steps:,}",
            "seconds": f"{run.seconds:.1f}",
            "ms per step": f"{1e3 * run.seconds / run.steps:.1f}",
            "tokens per s": f"{run.steps * run.tokens_per_step / run.seconds:,.0f}",
            "loss of the last 10 steps, nats": f"{run.losses[-10:].mean():.3f}",
        }
        for run in runs
    ]
    return [figure, pd.DataFrame(table)]


def task_page(learners: list[probes.Learner]) -> list:
    """Loss by steps, with the accuracy so far, and in a sentence what is asked."""
    asks = TASKS[learners[0].cell.setting.task].asks
    return [f"It has to {asks}.", capability.learning_figure(pd.concat([one.rows() for one in learners]))]


@torch.no_grad()
def generate(model: GPT2, ids: list[list[int]]):
    """Greedy decoding with the model's cache; yields after each token the text, and the cache's tokens and bytes."""
    tokens, given, past = list(ids[0]), torch.tensor(ids), None
    while True:
        out = model(given, past_key_values=past, use_cache=True, logits_to_keep=1)
        given, past = out.logits[:, -1:].argmax(-1), out.past_key_values
        cached, tokens = len(tokens), [*tokens, given.item()]
        yield tokenizer().decode(tokens), cached, inference.cache_bytes(past)


def generation_page(label: str, said: str, grown: dict[str, list]) -> list:
    """The text so far, and the cache's bytes by its tokens, of the choice and of what stands beside it."""
    style.use_style()
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for (name, points), dash, colour in zip(grown.items(), ("-", "--"), (style.BLUE, style.ORANGE), strict=False):
        cached, held, _ = zip(*points, strict=True)
        axes.plot(cached, np.array(held) / 1024, dash, color=colour, linewidth=2.5, label=name)
    axes.set_ylim(bottom=0)
    axes.set_title("The cache while it writes", loc="left")
    axes.set_xlabel("tokens so far")
    axes.set_ylabel("KiB in fp32, all layers")
    axes.legend(loc="upper left")
    figure.tight_layout()
    table = [
        {"variant": name, "tokens so far": f"{points[-1][0]:,}", "cache, bytes": f"{points[-1][1]:,}"}
        for name, points in grown.items()
    ]
    return [said, f"“{grown[label][-1][2]}”", figure, pd.DataFrame(table)]


def _with_index(table: pd.DataFrame, heading: str) -> pd.DataFrame:
    return table.rename_axis(heading).reset_index()


def _text(name: str, value: str):
    return widgets.Text(value=value, description=name, continuous_update=False, layout={"width": "90%"})


def _sizes():
    return widgets.Dropdown(options=list(SIZES), value=GPT2_SMALL, description="size", style=LABELLED)


def _contexts(value: int):
    options = [(f"{context:,}", context) for context in CONTEXTS]
    return widgets.SelectionSlider(options=options, value=value, description="context, tokens", layout={"width": "50%"})
