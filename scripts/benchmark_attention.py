#!/usr/bin/env python3
"""Ours against what a user would pick otherwise: forward and backward, interleaved in one process.

`layer` times one attention layer of width 256 (4 heads, B = 1) by context length, each variant beside reference
implementations, with random weights; `step` a whole training step of GPT-2 124M, or of as large a Llama. All take
turns, in another order each round, so that a busy machine is busy for all, and each variant takes a second turn, as its
A/A control. A ratio is ours over the best of theirs, of medians and of minima: above 1, ours is slower. One that is not
installed is named as absent, one that runs out of memory too. fp32 on a CPU, bf16 on CUDA.

Implementations beyond the project's own pins, of which none is a dependency: local-attention, reformer-pytorch and
pytorch-fast-transformers, on CUDA also fla-core and FlexAttention; for `step` nanoGPT's model.py, by its path.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import random
import statistics
import sys
import time
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DiffLlamaConfig,
    GPT2LMHeadModel,
    GptOssConfig,
    KimiLinearConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    MiniMaxConfig,
    Qwen3NextConfig,
    ReformerConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextGatedDeltaNet
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from lib import attention, errors, record
from lib.analysis import benchmarks
from lib.measure import environment
from lib.model import build_model, devices, gpt2_config
from lib.model.llama import swiglu_width
from lib.record.benchmark import AGAIN

WIDTH, HEADS, WINDOW, ROUNDS, CHUNK, LATENT, ROPE = 256, 4, 128, 4, 64, 256, 32  # the variants' own defaults
SHAPE = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2}
SIZE = 12, 768, 12  # layers, width and heads of GPT-2 124M, for `step`


class Other(nn.Module):
    """Any layer as (B, T, C) -> (B, T, C): `call(layer, x)`."""

    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


class Projected(nn.Module):
    """A kernel over heads (B, H, T, D) between the two projections that every layer has."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel, self.c_attn, self.c_proj = kernel, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        return self.c_proj(self.kernel(q, k, v).transpose(1, 2).flatten(2))


def causal_mask(x):
    return torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype, device=x.device).triu(1)[None, None]


def gpt2(T, kernel):
    config = gpt2_config(1, WIDTH, HEADS, T, 2)
    config._attn_implementation = kernel
    return Other(GPT2Attention(config, layer_idx=0), lambda layer, x: layer(x, attention_mask=mask_for(kernel, x))[0])


def mask_for(kernel, x):
    return causal_mask(x) if kernel == "eager" else None  # transformers' sdpa then says is_causal


def rotary(layer, positions, kernel):
    def call(layers, x):
        turns = layers[1](x, torch.arange(x.shape[1], device=x.device)[None])
        return layers[0](x, attention_mask=mask_for(kernel, x), position_embeddings=turns)[0]

    return Other(nn.ModuleList([layer, positions]), call)


def llama(T, kernel):
    config = LlamaConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=1, max_position_embeddings=T,
        attn_implementation=kernel,
    )  # fmt: skip
    return rotary(LlamaAttention(config, 0), LlamaRotaryEmbedding(config), kernel)


def deepseek(T, kernel):
    D = WIDTH // HEADS
    config = DeepseekV2Config(
        hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=LATENT, q_lora_rank=None,
        qk_nope_head_dim=D, v_head_dim=D, qk_rope_head_dim=ROPE, max_position_embeddings=T, attn_implementation=kernel,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    return rotary(DeepseekV2Attention(config, 0), DeepseekV2RotaryEmbedding(config), kernel)


def transformers_reformer(T):
    config = ReformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_head_size=WIDTH // HEADS, is_decoder=True,
        num_hashes=ROUNDS, num_buckets=T // CHUNK, lsh_attn_chunk_length=CHUNK, lsh_num_chunks_before=1,
        lsh_num_chunks_after=0, max_position_embeddings=T,
    )  # fmt: skip
    layers = nn.Sequential(LSHSelfAttention(config), nn.Linear(WIDTH, WIDTH))
    return Other(layers, lambda layers, x: layers[1](layers[0](x).hidden_states))


def lucidrains_reformer(T):
    from reformer_pytorch import LSHSelfAttention as Layer

    return Layer(WIDTH, HEADS, bucket_size=CHUNK, n_hashes=ROUNDS, causal=True)


def local_attention(T):
    from local_attention import LocalAttention

    return Projected(LocalAttention(WINDOW, causal=True, exact_windowsize=True, use_rotary_pos_emb=False))


def unrotated(layer, kernel, width):
    """A layer of a model with rotary positions, given turns by nothing: ours in GPT-2 has none. `width` is of cos."""

    def call(layer, x):
        turns = x.new_ones(1, x.shape[1], width), x.new_zeros(1, x.shape[1], width)
        return layer(x, attention_mask=mask_for(kernel, x), position_embeddings=turns)[0]

    return Other(layer, call)


def qwen3_next(T, kernel):
    config = Qwen3NextConfig(
        **SHAPE, head_dim=WIDTH // HEADS, num_key_value_heads=HEADS, layer_types=["full_attention"] * 2,
        attn_implementation=kernel,
    )  # fmt: skip
    layer = Qwen3NextAttention(config, 0)
    layer.q_norm = layer.k_norm = nn.Identity()  # ours has them by an option alone
    return unrotated(layer, kernel, WIDTH // HEADS)


def diff_llama(T, kernel):
    config = DiffLlamaConfig(
        **SHAPE, head_dim=WIDTH // HEADS, num_key_value_heads=HEADS, attention_bias=True, attn_implementation=kernel
    )
    return unrotated(DiffLlamaAttention(config, 0), kernel, WIDTH // HEADS)


def gpt_oss(T):
    """Its eager form: with PyTorch's kernel it has no sinks. It computes all scores and masks some."""
    config = GptOssConfig(
        **SHAPE, head_dim=WIDTH // HEADS, num_key_value_heads=HEADS, sliding_window=WINDOW,
        layer_types=["sliding_attention"] * 2, attn_implementation="eager",
    )  # fmt: skip

    def call(layer, x):
        mask = causal_mask(x) + torch.full((T, T), -torch.inf, dtype=x.dtype, device=x.device).tril(-WINDOW)
        turns = x.new_ones(1, T, WIDTH // HEADS // 2), x.new_zeros(1, T, WIDTH // HEADS // 2)
        return layer(x, attention_mask=mask, position_embeddings=turns)[0]

    return Other(GptOssAttention(config, 0), call)


def qwen3_next_delta(T):
    config = Qwen3NextConfig(
        **SHAPE, layer_types=["linear_attention"] * 2, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS,
        linear_key_head_dim=WIDTH // HEADS, linear_value_head_dim=WIDTH // HEADS, linear_conv_kernel_dim=1,
    )  # fmt: skip
    return Qwen3NextGatedDeltaNet(config, 0)


def kimi_linear(T):
    config = KimiLinearConfig(
        **SHAPE, layer_types=["linear_attention"] * 2, linear_num_heads=HEADS, linear_head_dim=WIDTH // HEADS,
        linear_conv_kernel_dim=1,
    )  # fmt: skip
    layer = KimiLinearDeltaAttention(config, 0)
    for weight in (layer.forget_gate.A_log, layer.forget_gate.dt_bias):
        nn.init.ones_(weight)  # which its model fills, and the layer by itself does not
    return layer


def minimax(T):
    config = MiniMaxConfig(
        **SHAPE, head_dim=WIDTH // HEADS, num_key_value_heads=HEADS, layer_types=["linear_attention"] * 2
    )
    return Other(MiniMaxLightningAttention(config, 0), lambda layer, x: layer(x, None, None)[0])


def transformers_mamba2(T):
    config = Mamba2Config(
        hidden_size=WIDTH, expand=1, num_heads=HEADS, head_dim=WIDTH // HEADS, state_size=128, n_groups=1,
        num_hidden_layers=1, chunk_size=CHUNK,  # half the time of its default on a CPU
    )  # fmt: skip
    return Mamba2Mixer(config, 0)


def fast_transformers(T):
    from fast_transformers.causal_product import causal_dot_product

    def kernel(q, k, v):
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        norm = (q * k.cumsum(2)).sum(-1, keepdim=True)
        return causal_dot_product(q.contiguous(), k.contiguous(), v.contiguous()) / norm

    return Projected(kernel)


def fla(T):
    from fla.ops.linear_attn import chunk_linear_attn  # on CUDA alone

    def kernel(q, k, v):  # theirs has time before heads
        q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
        out, _ = chunk_linear_attn(*(x.transpose(1, 2) for x in (q, k, v)), scale=1.0, normalize=True)
        return out.transpose(1, 2)

    return Projected(kernel)


def flex(T, window):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not torch.cuda.is_available():
        raise ImportError("FlexAttention has no backward on a CPU")
    masked = create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < window), None, None, T, T)
    compiled = torch.compile(flex_attention)
    return Projected(lambda q, k, v: compiled(q, k, v, block_mask=masked))


SOFTMAX = {
    "transformers' GPT-2 eager": lambda T: gpt2(T, "eager"),
    "transformers' GPT-2 sdpa": lambda T: gpt2(T, "sdpa"),
    "FlexAttention": lambda T: flex(T, T),
}
IMPLEMENTATIONS = {
    "baseline": {"transformers' GPT-2 eager": SOFTMAX["transformers' GPT-2 eager"]},  # the same algorithm: scores kept
    "sdpa": SOFTMAX,
    "flash": SOFTMAX,
    "gqa": {f"transformers' Llama {kernel}": lambda T, kernel=kernel: llama(T, kernel) for kernel in ("eager", "sdpa")},
    "linear": {"fast-transformers": fast_transformers, "fla-core": fla},
    "sliding_window": {"local-attention": local_attention, "FlexAttention, window": lambda T: flex(T, WINDOW)},
    "lsh": {"transformers' Reformer": transformers_reformer, "lucidrains' Reformer": lucidrains_reformer},
    "mla": {
        f"transformers' DeepSeek-V2 {kernel}": lambda T, kernel=kernel: deepseek(T, kernel)
        for kernel in ("eager", "sdpa")
    },
    "gated_deltanet": {"transformers' Qwen3-Next DeltaNet": qwen3_next_delta},
    "sinks": {"transformers' gpt-oss eager": gpt_oss},
    "gated": {
        f"transformers' Qwen3-Next {kernel}": lambda T, kernel=kernel: qwen3_next(T, kernel)
        for kernel in ("eager", "sdpa")
    },
    "retention": {"transformers' MiniMax": minimax},
    "mamba2": {"transformers' Mamba-2": transformers_mamba2},
    "kda": {"transformers' Kimi Linear": kimi_linear},
    "differential": {
        f"transformers' DiffLlama {kernel}": lambda T, kernel=kernel: diff_llama(T, kernel)
        for kernel in ("eager", "sdpa")
    },
}


def layer_turns(names, T, device, batch=1) -> tuple[dict, dict]:
    """A turn per layer of these variants and of their reference implementations; what is absent, with the reason."""
    makers = {name: lambda T, name=name: our_layer(name, T) for name in names}
    makers |= {other: make for name in names for other, make in IMPLEMENTATIONS.get(name, {}).items()}
    turns, absent = {}, {}
    for name, make in makers.items():
        try:
            turns[name] = layer_turn(make(T), T, device, batch)
        except ImportError as error:
            absent[name] = str(error)
    return turns, absent


def our_layer(name, T):
    return Other(attention.load(name)(gpt2_config(1, WIDTH, HEADS, T, 2), 0), lambda layer, x: layer(x)[0])


def layer_turn(layer, T, device, batch=1):
    """One forward and backward on random input, made here once."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = layer.to(device, dtype).train()
    x = torch.randn(batch, T, WIDTH, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)

    def turn():
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(gradient)

    return turn


def step_turns(
    names, T, device, nanogpt=None, batch=1, compiled=False, vocabulary=50257, architecture="gpt2"
) -> tuple[dict, dict]:
    """A turn per training step of GPT-2 124M, or of as large a Llama, with these variants or patterns, of transformers'
    model and, of GPT-2, of nanoGPT's."""
    config = gpt2_config(*SIZE, max(T, 1024), vocabulary, architecture=architecture)
    kind, theirs, called = transformers_s(config)
    makers = {name: (lambda name=name: build_model(name, config), transformers_loss, fused_adamw) for name in names}
    for kernel in ("eager", "sdpa"):
        make = partial(kind._from_config, theirs, attn_implementation=kernel)
        makers[f"transformers' {called} {kernel}"] = make, transformers_loss, fused_adamw
    if nanogpt is not None:
        makers["nanoGPT"] = partial(nanogpt_model, nanogpt, config), nanogpt_loss, nanogpt_optimizer
    turns = {}
    for name, (make, loss_of, optimizer_of) in makers.items():
        model = make().to(device).train()
        optimizer = optimizer_of(model, device)
        if compiled:
            model = torch.compile(model)
        turns[name] = step_turn(model, loss_of, optimizer, (batch, T), vocabulary, device)
    return turns, {"nanoGPT": "no --nanogpt"} if nanogpt is None and called == "GPT-2" else {}


def transformers_s(config):
    """transformers' class for a config of ours, its config of the same sizes, and its name."""
    if getattr(config, "architecture", "gpt2") == "gpt2":
        theirs = copy.copy(config)
        theirs.activation_function = "gelu_new"  # as GPT-2's checkpoints have it
        return GPT2LMHeadModel, theirs, "GPT-2"
    theirs = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=swiglu_width(config.n_embd),
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, rms_norm_eps=config.layer_norm_epsilon,
        max_position_embeddings=config.n_positions, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM, theirs, "Llama"


def load_nanogpt(path):
    """The module of nanoGPT's model.py. Raises what its loading raises, AttributeError where it has no model."""
    found = SourceFileLoader("nanogpt_model", str(path))
    module = sys.modules["nanogpt_model"] = module_from_spec(spec_from_loader("nanogpt_model", found))
    found.exec_module(module)
    return SimpleNamespace(GPT=module.GPT, GPTConfig=module.GPTConfig)


def nanogpt_model(module, config):
    size = {"n_layer": config.n_layer, "n_embd": config.n_embd, "n_head": config.n_head}
    size |= {"block_size": config.n_positions, "vocab_size": config.vocab_size}
    return module.GPT(module.GPTConfig(**size, dropout=0.0))


def nanogpt_loss(model, ids):
    return model(ids[:, :-1], ids[:, 1:])[1]


def transformers_loss(model, ids):
    return model(ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss


def fused_adamw(model, device):
    """`lib.training`'s, and the default of transformers' Trainer."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def nanogpt_optimizer(model, device):
    """Its own AdamW, which is fused on CUDA alone."""
    with contextlib.redirect_stdout(None):  # it prints what it found
        return model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)


def step_turn(model, loss_of, optimizer, shape, vocabulary, device):
    """One training step on random tokens as all take it: autocast, clip to 1, and the optimizer that each brings."""
    batch, T = shape
    ids = torch.randint(0, vocabulary, (batch, T + 1), device=device)
    autocast = devices.autocast("auto", device)

    def turn():
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = loss_of(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return turn


def interleave(turns: dict, rounds: int, device: torch.device) -> tuple[dict, dict]:
    """Milliseconds of each turn by round, and what ran out of memory; a first round that warms up does not count."""
    times_ms, failed = {name: [] for name in turns}, {}
    order = list(turns)
    for number in range(-1, rounds):
        random.shuffle(order)
        for name in order:
            if name in failed:
                continue
            try:
                with errors.one_sentence_when_out_of_memory():
                    devices.synchronize(device)
                    begin = time.perf_counter()
                    turns[name]()
                    devices.synchronize(device)
            except errors.OutOfMemory as error:
                failed[name] = str(error)
                del times_ms[name]
                continue
            if number >= 0:
                times_ms[name].append((time.perf_counter() - begin) * 1e3)
    return times_ms, failed


def bound_memory():
    """Lets a CPU's allocation fail where the machine's memory ends, before the kernel kills the process."""
    import psutil

    try:
        import resource
    except ImportError:  # no Unix
        return
    own = psutil.Process().memory_info()
    limit = psutil.virtual_memory().available + own.rss
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layer", "step"))
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="by default all, for `step` sdpa")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="T", help="512 2048 8192, for `step` 512")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once (1)")
    parser.add_argument("--compile", action="store_true", help="for `step`: every model through torch.compile")
    parser.add_argument("--vocabulary", type=int, default=50257, metavar="N", help="for `step` (50257)")
    parser.add_argument(
        "--rounds", type=int, default=7, metavar="N", help="turns at the longest length (7), up to 8 N below"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of a CPU (2)")
    parser.add_argument(
        "--architecture", choices=("gpt2", "llama"), default="gpt2", help="for `step`: whose layers (gpt2)"
    )
    parser.add_argument("--nanogpt", type=Path, metavar="FILE", help="model.py of a nanoGPT checkout, for `step`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the record goes, see lib/record/benchmark.py")
    options = parser.parse_args(words)
    if min(options.rounds, options.threads, options.batch, options.vocabulary, *(options.lengths or [1])) < 1:
        parser.error("--rounds, --threads, --batch, --vocabulary and --lengths want 1 or more")
    if options.nanogpt and options.architecture == "llama":
        parser.error("nanoGPT's model has GPT-2's layers; leave --nanogpt out beside --architecture llama")
    try:
        nanogpt = load_nanogpt(options.nanogpt) if options.nanogpt else None
    except Exception as error:  # it is another's code: whatever it does, its name is what can be put right
        parser.error(f"{options.nanogpt} is no model.py of nanoGPT: {type(error).__name__}: {error}")
    try:
        if options.out:  # said before minutes are measured
            options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{options.out.parent} cannot be made: {error.strerror}; name another file by --out")
    try:
        for name in options.variants or ():
            attention.load(name)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)
    device = devices.choose("auto")
    names = options.variants or (attention.variants() if options.what == "layer" else ["sdpa"])
    lengths = sorted(set(options.lengths or ())) or ([512, 2048, 8192] if options.what == "layer" else [512])
    bound_memory()
    others = {name: list(IMPLEMENTATIONS.get(name, {})) for name in names}
    times_ms, out_of_memory, absent = {}, {}, {}
    for T in lengths:
        if options.what == "layer":
            turns, absent = layer_turns(names, T, device, options.batch)
        else:
            words = nanogpt, options.batch, options.compile, options.vocabulary, options.architecture
            turns, absent = step_turns(names, T, device, *words)
            others = {name: [turn for turn in turns if turn not in names] for name in names}
        turns |= {f"{name}{AGAIN}": turns[name] for name in names if name in turns}
        rounds = options.rounds * min(8, max(lengths) // T)  # what is short is cheap to repeat, and noisier
        times_ms[T], out_of_memory[T] = interleave(turns, rounds, device)
        show(T, options.batch * T, times_ms[T], out_of_memory[T], benchmarks.ratios(times_ms[T], others))
    found = benchmarks.Benchmark(
        finished_at=record.now(),
        what=options.what,
        batch=options.batch,
        compiled=options.compile,
        architecture=options.architecture,
        vocabulary=options.vocabulary,
        threads=options.threads,
        environment=environment.describe(device),
        versions=versions(),
        reference_implementations=others,
        times_ms=times_ms,
        out_of_memory=out_of_memory,
        absent=absent,
    )
    if len(lengths) > 1:
        for name, exponent in benchmarks.exponents(found).items():
            print(f"{name:<16} T^{exponent:.2f} between {lengths[-2]} and {lengths[-1]}")
    for name, why in absent.items():
        print(f"absent: {name} ({why})")
    if options.out:
        try:
            record.write_checked(found, options.out)
        except errors.UsageError as error:
            parser.exit(1, f"{error}\n")
    return 0


def versions() -> dict[str, str]:
    """Of the reference implementations' packages that are installed."""
    found = {}
    for name in ("transformers", "local-attention", "reformer-pytorch", "pytorch-fast-transformers", "fla-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def show(T, tokens, times_ms, out_of_memory, ratios):
    print(f"\nT = {T}, {tokens:,} tokens: ms, minimum and median, and tokens/s at the median")
    for name, taken in sorted(times_ms.items(), key=lambda pair: min(pair[1])):
        said = ratios.get(name, {})
        beside = ""
        if said.get("minimum_ratio"):
            beside = f"  x {said['minimum_ratio']:.2f} / {said['median_ratio']:.2f}  of {said['minimum_best_other']}"
        median_ms = statistics.median(taken)
        print(f"{name:<32}{min(taken):>10.1f}{median_ms:>10.1f}{tokens / median_ms * 1e3:>12,.0f}{beside}")
    for name, why in out_of_memory.items():
        print(f"{name:<32}{why}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
