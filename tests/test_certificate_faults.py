"""Every kind of mistake that a variant's file can hold, planted in every variant that can, fails the check about it."""

import os
import textwrap
from dataclasses import dataclass, field

import pytest

from lib import attention
from lib.certificate import CLAIMS, Setting, variant
from lib.certificate.twins import Twins
from lib.model import gpt2_config
from lib.model.caches import keeps_every_key

SIZES = {  # the smallest that all kinds show in: beyond 256 tokens, three rows, two layers, past chunks and windows
    "layers": 2, "width": 16, "heads": 2, "positions": 290, "context": 150, "batch_size": 3,
    "inference_contexts": (30,),
}  # fmt: skip
BF16 = {"precision": "bf16"}
ALL = attention.variants()
ROTATING = tuple(name for name in ALL if attention.rotates(attention.load(name)))
LAYERS = {name: attention.load(name)(gpt2_config(1, 16, 2, 290, 2), 0) for name in ALL}
STATES = tuple(name for name, layer in LAYERS.items() if not layer.new_cache().is_croppable)
FORGET = tuple(name for name, layer in LAYERS.items() if not keeps_every_key(layer.new_cache()))  # a window or a state
SPARSE = ("sliding_window", "lsh", "sinks", "moba")  # do not see all of a row
FULL = tuple(name for name in ALL if name not in SPARSE)
SLEEPING = "0.01 * x.flip(1)"  # the last token at the first, and so on
IN_HALF = """
class Half(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, gradient: 0.5 * gradient)


class Redrawn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        return x * (torch.rand_like(x) >= p) / (1 - p)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (torch.rand_like(gradient) >= ctx.p) / (1 - ctx.p), None
"""


@dataclass(frozen=True)
class Fault:
    """What follows the right forward (`code` knows x, out, B, T, C, past, cached and seen), what the constructor
    (`init`), what the class holds beside or instead (`members`), and what stands in the place of the padding mask, of
    the documents and of the rotary positions."""

    code: str = ""
    init: str = ""
    members: str = ""
    padding: str = "padding_mask"
    documents: str = "seq_idx"
    turned: str = "position_embeddings"
    where: tuple = ALL
    sizes: dict = field(default_factory=dict)


def but(*names):
    return tuple(name for name in ALL if name not in names)


def formula(name, returns):
    second = "dense=False" if name == "core_flops" else "element_bytes"
    return f"def {name}(self, context, {second}):\n    return {returns}"


def handled(change):
    return f"def new_cache(self):\n    made = super().new_cache()\n    {change}\n    return made"


def slow(returns, takes="x"):
    return f"def reference(self, {takes}):\n    return {returns}"


DROPS = "self.p = config.attn_pdrop"
DROPOUT = {"sizes": {"dropout": 0.1}, "where": but("flash")}  # which has none on a CPU
FAULTS = {
    "causal": {
        "beyond 256 tokens": Fault(f"if T > 256: out = out + {SLEEPING}"),
        "where the length is a multiple of 64": Fault(f"if T % 64 == 0: out = out + {SLEEPING}"),
        "mean of a chunk of 16": Fault("out = out + 0.01 * chunk_mean(x, 16)"),
        "mean of a chunk of 64": Fault("out = out + 0.01 * chunk_mean(x, 64)"),
        "mean of a chunk of 256": Fault("out = out + 0.01 * chunk_mean(x, 256)"),
        "mean of a chunk of 1000": Fault("out = out + 0.01 * chunk_mean(x, 1000)"),
        "a token more at the border of a chunk": Fault("out = out.clone(); out[:, 63:-1:64] += 0.01 * x[:, 64::64]"),
        "convolution by a circular FFT": Fault("out = out + 0.01 * circular(x)"),
        "over the largest in time": Fault("out = out / out.abs().amax(1, keepdim=True)"),
        "a part in 10^9": Fault("out = out + 1e-9 * x.flip(1)"),
        "the token 100 later": Fault("out = out + 0.01 * torch.cat([x[:, 100:], 0 * x[:, :100]], 1)[:, :T]"),
        "in float32": Fault(f"if x.dtype == torch.float32: out = out + {SLEEPING}"),
        "a scale over all tokens in bfloat16, without a gradient": Fault(
            "if out.dtype == torch.bfloat16: out = out * (1 + 0.1 * x.detach().abs().amax())",
            sizes=BF16, where=but("lsh"),
        ),
        "in bfloat16": Fault(f"if out.dtype == torch.bfloat16: out = out + {SLEEPING}", sizes=BF16),
        "under autocast": Fault(f"if torch.is_autocast_enabled('cpu'): out = out + {SLEEPING}", sizes=BF16),
        "without gradients": Fault(f"if not torch.is_grad_enabled(): out = out + {SLEEPING}"),
        "in training": Fault(f"if self.training: out = out + {SLEEPING}"),
        "in training with dropout": Fault(
            f"if self.training and self.p: out = out + {SLEEPING}",
            init="self.p = config.attn_pdrop", where=but("flash"), sizes={"dropout": 0.1},
        ),
        "above the first layer": Fault(f"if self.layer_idx > 0: out = out + {SLEEPING}"),
        "where a head is not 8 wide": Fault(f"if C // self.heads != 8: out = out + {SLEEPING}", sizes={"width": 24}),
        "in rows beyond two": Fault(f"if B > 2: out = torch.cat([out[:2], (out + {SLEEPING})[2:]])"),
        "beyond eight rows": Fault(f"if B > 8: out = out + {SLEEPING}", sizes={"batch_size": 9, "context": 40}),
    },
    "rows_independent": {
        "mean of all rows": Fault("out = out + 0.01 * x.mean(0)"),
        "a row beyond two sees the first": Fault("if B > 2: out = torch.cat([out[:2], out[2:] + 0.01 * x[:1]])"),
        "above the first layer": Fault("if self.layer_idx > 0: out = out + 0.01 * x.mean(0)"),
        "statistics of the batch in training": Fault("if self.training: out = out - 0.1 * out.mean(0, keepdim=True)"),
    },
    "prefix_equal": {
        "a scale from the length": Fault("out = out * T**-0.5"),
        "another scale where the length is a multiple of 64": Fault("if T % 64 == 0: out = 0.9 * out"),
        "another scale beyond 256 tokens": Fault("if T > 256: out = 0.9 * out"),
        "not finite beyond 256 tokens": Fault("if T > 256: out = out * float('nan')"),
    },
    "mixes": {"each token alone": Fault("out = super().forward(x.reshape(B * T, 1, C))[0].view(B, T, C)")},
    "repeatable": {
        "a buffer that is not saved": Fault(
            "out = out * self.extra.type_as(out)",
            "self.register_buffer('extra', torch.rand(config.n_embd) + 0.5, persistent=False)",
        ),
        "the generator of all set anew": Fault("torch.manual_seed(self.layer_idx)"),
        "noise": Fault("out = out + 0.01 * torch.randn_like(out)"),
        "a running mean, moved in training": Fault(
            "self.mean = self.mean + 0.1 * out.detach().mean() * self.training; out = out * (1 + self.mean)",
            "self.mean = 0.0"
        ),
    },
    "training_equal": {
        "another scale in training": Fault("if self.training: out = 0.99 * out"),
        "in training and float32": Fault("if self.training and x.dtype == torch.float32: out = 0.99 * out"),
        "dropout whatever the configuration": Fault("out = F.dropout(out, 0.1, self.training)"),
        "the run's dropout in evaluation too": Fault("out = F.dropout(out, self.p)", DROPS, **DROPOUT),
        "another function where there is dropout": Fault(
            "if self.training and self.p: out = 0.9 * out", DROPS, **DROPOUT
        ),
        "no dropout": Fault("", "without_dropout(self)", **DROPOUT),
        "no dropout behind the projection": Fault("", "without_dropout(self, nn.Dropout)", **DROPOUT),
        "no dropout of attention's weights": Fault(
            "", "without_dropout(self, float)", sizes={"dropout": 0.1},
            where=("sdpa", "gqa", "sliding_window"),
        ),
        "dropout that does not scale what is left": Fault(
            "if self.training and self.p: out = out * (1 - self.p)", "self.p = config.resid_pdrop", **DROPOUT
        ),
        "dropout of the same for all rows": Fault(
            "if self.training and self.p: out = out * F.dropout(torch.ones_like(out[:1]), self.p)",
            DROPS + "; without_dropout(self)", **DROPOUT
        ),
    },
    "precision": {
        "beyond the context, where it decodes": Fault(
            "if T > 150 and x.dtype == torch.float32: out = torch.cat([out[:, :150], 0.99 * out[:, 150:]], 1)",
            sizes={"inference_contexts": (280,)},
        ),
        "rotary positions in bfloat16": Fault(
            "if more.get('position_embeddings') and x.dtype == torch.float32:\n"
            "    more['position_embeddings'] = tuple(one.bfloat16().float() for one in more['position_embeddings'])\n"
            "    out = super().forward(hidden_states, past, padding_mask, seq_idx=seq_idx, **more)[0]",
            sizes={"architecture": "llama"}, where=ROTATING,
        ),
        "whole blocks in float32": Fault(
            "if T % 128 == 0 and past is None and x.dtype == torch.float32: out = 0.99 * out"
        ),
        "one weight's gradient quartered in bfloat16": Fault(
            "if out.dtype == torch.bfloat16: out = out - 0.75 * (self.c_proj.bias - self.c_proj.bias.detach())",
            sizes=BF16,
        ),
        "gradients of the first row alone in float32": Fault(
            "if x.dtype == torch.float32 and B == 2: out = torch.cat([out[:1], out[1:].detach()])"
        ),
        "a gradient a twentieth short in bfloat16": Fault(
            "if out.dtype == torch.bfloat16: out = 0.95 * out + 0.05 * out.detach()", sizes=BF16
        ),
        "rounded to bfloat16 in float32": Fault("if x.dtype == torch.float32: out = out.bfloat16().float()"),
        "another scale in float32": Fault("if x.dtype == torch.float32: out = 0.999 * out"),
        "another scale in bfloat16": Fault(
            "if out.dtype == torch.bfloat16: out = 0.5 * out", sizes=BF16, where=but("lsh")
        ),
        "a gradient halved in bfloat16": Fault("if out.dtype == torch.bfloat16: out = Half.apply(out)", sizes=BF16),
    },
    "cached_equal": {
        "a decoded token": Fault("if past is not None and T == 1: out = 0.99 * out"),
        "a token decoded behind 128": Fault(
            "if T == 1 and seen > 128: out = 0.99 * out", sizes={"inference_contexts": (140,)}
        ),
        "rows that are not reordered": Fault(members=handled("made.reorder_cache = lambda rows: None")),
        "rows that are not repeated": Fault(members=handled("made.batch_repeat_interleave = lambda repeats: None")),
        "a token too many taken back": Fault(
            members=handled("crop = made.crop; made.crop = lambda n: crop(n - 1)"),
            where=but(*STATES),
        ),
        "padding that is not reordered with its rows": Fault(
            members=handled("right = made.reorder_cache; made.reorder_cache = lambda rows: keep(made, right, rows)"),
            where=("sliding_window", "sinks"),
        ),
        "what was there before it was emptied": Fault(
            members=handled("made.reset = lambda: None"),
            where=STATES,  # transformers' own layers are emptied by the model
        ),
        "exponents without their maximum behind a cache": Fault("if seen: out = out * (1 + 0 * (12 * x).exp())"),
        "nothing that comes back from the host": Fault(
            members=handled("made.prefetch = lambda: [x.zero_() for _, x in tensors(made)]")
        ),
        "a state in bfloat16": Fault(
            "if past is not None and T == 1: [x.copy_(x.bfloat16()) for _, x in tensors(cached)]",
            sizes=BF16, where=("linear",),
        ),
        "decoded in bfloat16": Fault("if past is not None and T == 1: out = out.bfloat16().type_as(out)"),
        "a token decoded in float32": Fault("if seen and T == 1 and x.dtype == torch.float32: out = 0.9 * out"),
        "a token decoded above the first layer": Fault("if seen and T == 1 and self.layer_idx > 0: out = 0.99 * out"),
    },
    "prefill_equal": {
        "the cache of a prefill": Fault("if past is not None and T > 1: spoil(cached)"),
        "the cache of a prefill beyond 128 tokens": Fault("if past is not None and T > 128: spoil(cached)"),
        "a piece of more than 100 tokens behind a cache": Fault("if seen and T > 100: out = 0.99 * out"),
        "a leak where there is a cache": Fault(f"if past is not None: out = out + {SLEEPING}"),
        "a leak among several tokens behind a cache": Fault(f"if T > 1 and seen: out = out + {SLEEPING}"),
        "several tokens behind a cache forget it": Fault("if T > 1 and seen: out = super().forward(x)[0]"),
        "one cache for all texts": Fault(
            init="self.only = None",
            members="def new_cache(self):\n    self.only = self.only or super().new_cache()\n    return self.only",
        ),
    },
    "padding_equal": {
        "not looked at": Fault(padding="None"),
        "hides a token": Fault(padding="hide_one(padding_mask)"),
        "not looked at in training": Fault(padding="None if self.training else padding_mask"),
        "not looked at by several tokens behind a cache": Fault(
            padding="None if seen and hidden_states.shape[1] > 1 else padding_mask",
            where=but(*FORGET),
        ),
        "the first that came, for all of its shape": Fault(
            "", "self.known = {}",
            padding="padding_mask if padding_mask is None else self.known.setdefault(tuple(padding_mask.shape),"
            " padding_mask)",
        ),
        "only where a row is whole": Fault(
            padding="padding_mask if padding_mask is None or padding_mask.all(1).any() else None"
        ),
        "no gradient by what stands before padded rows": Fault(
            "if padding_mask is not None: out = Half.apply(out)"
        ),
        "a gradient that is not finite": Fault("if padding_mask is not None: out = out + (0 * out).abs().sqrt()"),
        "not looked at in decoding": Fault(
            padding="None if seen and hidden_states.shape[1] == 1 else padding_mask",
            where=but(*FORGET),  # which remember padding
        ),
    },
    "documents_equal": {
        "not looked at": Fault(documents="None"),
        "not looked at in training": Fault(documents="None if self.training else seq_idx"),
        "the first row's for all": Fault(documents="seq_idx if seq_idx is None else seq_idx[:1].expand_as(seq_idx)"),
        "a border a token late": Fault(
            documents="seq_idx if seq_idx is None else torch.cat([seq_idx[:, :1], seq_idx[:, :-1]], 1)"
        ),
        "not looked at beyond 260 tokens": Fault(documents="seq_idx if hidden_states.shape[1] <= 260 else None"),
        "the first that came, for all of its shape": Fault(
            "", "self.known = {}",
            documents="seq_idx if seq_idx is None else self.known.setdefault(tuple(seq_idx.shape), seq_idx)",
        ),
        "half a gradient": Fault("if seq_idx is not None: out = Half.apply(out)"),
        "not under autocast": Fault(
            documents="None if torch.is_autocast_enabled('cpu') else seq_idx", sizes=BF16,
            where=but("kda"),  # in so small a layer its channels forget what was before in a token or two
        ),
        "only the first border": Fault(documents="seq_idx if seq_idx is None else seq_idx.clamp(max=2)"),
    },
    "weights_trained": {
        "a plain tensor": Fault("out = out * self.extra.type_as(out)", "self.extra = torch.rand(config.n_embd) + 0.5"),
        "a buffer": Fault(
            "out = out * self.extra.type_as(out)", "self.register_buffer('extra', torch.rand(config.n_embd) + 0.5)"
        ),
        "parameters in a plain list": Fault(
            "out = out * self.extra[0].type_as(out)", "self.extra = [nn.Parameter(torch.rand(config.n_embd) + 0.5)]"
        ),
        "a module in a plain list": Fault("", "self.extra = [nn.Linear(config.n_embd, config.n_embd)]"),
        "a matrix that nothing uses": Fault("", "self.extra = nn.Linear(config.n_embd, config.n_embd)"),
        "frozen": Fault("", "self.c_proj.weight.requires_grad_(False)"),
        "without a gradient": Fault("out = out.detach() + 0.0 * x"),
        "without a gradient in training": Fault("if self.training: out = out.detach() + 0.0 * x"),
        "half a projection without a gradient": Fault("", "self.c_proj.register_forward_pre_hook(drop_half)"),
        "a bias copied at first use, in bfloat16": Fault(
            "if out.dtype == torch.bfloat16:\n"
            "    self.old = self.c_proj.bias.detach().clone() if self.old is None else self.old\n"
            "    out = out - 5 * self.c_proj.bias.type_as(out) + 5 * self.old.type_as(out)",
            "self.old = None", sizes=BF16, where=but("lsh"),  # which rounding moves further
        ),
        "a bias copied at first use": Fault(
            "self.old = self.c_proj.bias.detach().clone() if self.old is None else self.old\n"
            "out = out - self.c_proj.bias.type_as(out) + self.old.type_as(out)", "self.old = None",
        ),
        "bfloat16 without a float32 master": Fault(
            "", "self.to(torch.bfloat16)", sizes=BF16 | {"learning_rate": 5e-5}
        ),
    },
    "gradients": {
        "of another draw of dropout": Fault(
            "if self.training and self.residual_dropout.p: out = Redrawn.apply(out, self.residual_dropout.p)", **DROPOUT
        ),
        "halved in form and reference": Fault(
            "", "self.c_proj.register_forward_hook(lambda *given: Half.apply(given[2]))"
        ),
        "cut in form and reference": Fault("", "self.c_proj.register_forward_pre_hook(cut_half)"),
    },
    "reference": {
        "rotary positions that nobody hears": Fault(
            members=slow("super().reference(x)", "x, position_embeddings=None"),
            turned="None", sizes={"architecture": "llama"}, where=ROTATING,
        ),
        "rotary positions of another token": Fault(
            members=slow("super().reference(x, position_embeddings=late(position_embeddings))",
                         "x, position_embeddings=None"),
            turned="late(position_embeddings)", sizes={"architecture": "llama"}, where=ROTATING,
        ),
        "a gradient halved": Fault("out = Half.apply(out)"),
        "another scale above the first layer": Fault("if self.layer_idx > 0: out = 0.9 * out"),
        "another scale where a head is not 8 wide": Fault(
            "if C // self.heads != 8: out = 0.9 * out", sizes={"width": 24}
        ),
        "what the layer before read": Fault(
            "before, Attention.read = (Attention.read if self.layer_idx else x), x; out = out + 0.1 * before",
            members="read = None",
        ),
    },
    "reach": {
        "a window beyond 256 tokens": Fault(
            "if T > 256: out = torch.cat([out[:, :-1], super().forward(x[:, -100:].contiguous())[0][:, -1:]], 1)",
            where=FULL,
        ),
    },
    "reference_causal": {
        "a leak that the reference shares": Fault(
            f"out = out + {SLEEPING}", members=slow(f"super().reference(x) + {SLEEPING}")
        ),
    },
    "gpt2_equal": {
        "a scale above the first layer that the reference shares": Fault(
            "out = (1 - 0.1 * (self.layer_idx > 0)) * out",
            members=slow("(1 - 0.1 * (self.layer_idx > 0)) * super().reference(x)"),
            where=tuple(name for name in ALL if hasattr(attention.load(name), "as_gpt2")),
        ),
        "a scale that the reference shares": Fault(
            "out = 0.9 * out", members=slow("0.9 * super().reference(x)"),
            where=tuple(name for name in ALL if hasattr(attention.load(name), "as_gpt2")),
        ),
    },
    "cache_bytes": {
        "half of them": Fault(members=formula("cache_bytes", "super().cache_bytes(context, element_bytes) // 2")),
        "as many at any length": Fault(
            members=formula("cache_bytes", "super().cache_bytes(100, element_bytes)"),
            where=but(*STATES),
        ),
        "kept in float32 under bfloat16": Fault(
            "if past is not None: [setattr(cached, name, x.float()) for name, x in tensors(cached)]",
            sizes=BF16, where=("baseline", "sdpa", "gqa", "mla", "sliding_window", "gated", "differential"),
        ),
        "a cache that keeps its inputs": Fault("if past is not None: cached.extra = x"),
        "a cache that keeps a prompt alive": Fault("if past is not None and T > 1: keep_alive(cached)"),
    },
    "core_flops": {
        "none": Fault(members=formula("core_flops", "0")),
        "every score": Fault(
            members=formula("core_flops", "super().core_flops(context, True)"),
            where=but(*STATES),
        ),
        "six of ten": Fault(
            members=formula("core_flops", "6 * super().core_flops(context, dense) // 10"),
            where=("baseline", "sdpa", "gqa", "mla", "flash", "gated", "linear"),
        ),
        "full ones ten times as many": Fault(
            members=formula("core_flops", "super().core_flops(context, dense) * (10 if dense else 1)")
        ),
        "below zero for few tokens": Fault(
            members=formula("core_flops", "super().core_flops(context, dense) - 2 * super().core_flops(40)")
        ),
        "another window above the first layer": Fault(
            members=formula(
                "core_flops", "super().core_flops(context, dense) // (1 if dense or not self.layer_idx else 3)"
            ),
            where=("sdpa", "sliding_window", "gqa"),
        ),
        "half of them": Fault(
            members=formula("core_flops", "super().core_flops(context, dense) // 2"),
            where=but("linear", "moba"),  # whose tiles are half empty at this size
        ),
        "ten times as many": Fault(members=formula("core_flops", "10 * super().core_flops(context, dense)")),
        "linear in the length": Fault(
            members=formula("core_flops", "super().core_flops(1024, dense) * context // 1024"),
            where=but(*STATES, *SPARSE),
        ),
    },
    "gpt2_projection": {"none": Fault("out = x")},
    "gpt2_initialisation": {
        "another": Fault("", "self.c_proj.weight.data.normal_(0.0, 0.1)", "own_initialisation = True"),
    },
}  # fmt: skip
ALL_OF_THEM = bool(os.environ.get("CERTIFICATE_FAULTS"))
KINDS = [(check, name, one) for check, kinds in FAULTS.items() for name, one in kinds.items()]
FILE = """

import torch.nn.functional as F

Right = Attention


def chunk_mean(x, c):
    return torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in x.split(c, dim=1)], dim=1)


def circular(x):
    spectrum = torch.fft.rfft(x.double(), dim=1)
    filters = torch.linspace(0, 1, spectrum.shape[1], dtype=torch.float64)[:, None]
    return torch.fft.irfft(spectrum * filters, n=x.shape[1], dim=1).to(x.dtype)


def tensors(cached):
    return [(name, x) for name, x in vars(cached).items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def spoil(cached):
    for name, x in tensors(cached):
        setattr(cached, name, 1.01 * x)


def keep_alive(cached):
    for name, x in tensors(cached):
        setattr(cached, name, torch.cat([x, x])[: len(x)])


def hide_one(mask):
    return mask if mask is None else mask & (torch.arange(mask.shape[1]) != mask.shape[1] - 2)


def without_dropout(layer, *kinds):
    if isinstance(getattr(layer, "attention_dropout", None), float) and (not kinds or float in kinds):
        layer.attention_dropout = 0.0
    for name, module in layer.named_modules():
        if isinstance(module, nn.Dropout) and (not kinds or (float if "attention" in name else nn.Dropout) in kinds):
            module.p = 0.0


def keep(cached, change, rows):
    before = cached.real
    change(rows)
    cached.real = before


def late(turned):
    # every second token at the place of the one before it
    return turned and tuple(one[:, (torch.arange(one.shape[1]) // 2) * 2] for one in turned)


def drop_half(_, given):
    return (torch.cat([0 * given[0][..., :8].detach(), given[0][..., 8:]], dim=-1),)


def cut_half(_, given):
    return (torch.cat([given[0][..., :8].detach(), given[0][..., 8:]], dim=-1),)

{half}

class Attention(Right):
{members}

    def __init__(self, config, layer_idx, **options):
        super().__init__(config, layer_idx, **options)
{init}

    def forward(self, hidden_states, past_key_values=None, padding_mask=None, seq_idx=None{takes}, **more):
        x, past = hidden_states, past_key_values
        cached = None if past is None else past.layers[self.layer_idx]
        seen = 0 if past is None else past.get_seq_length(self.layer_idx)
        padding_mask, seq_idx = {padding}, {documents}
{turns}
        out = super().forward(hidden_states, past, padding_mask, seq_idx=seq_idx, **more)[0]
        B, T, C = x.shape
{code}
        return out, None
"""


def planted(name, one, folder):
    """The path of a variant's file whose class inherits from the right one and does one thing wrong."""
    parts = {
        "half": IN_HALF,
        "padding": one.padding,
        "documents": one.documents,
        "members": textwrap.indent(one.members or "pass", " " * 4),
    }
    rotates = name in ROTATING
    parts["takes"] = ", position_embeddings=None" if rotates else ""
    parts["turns"] = f"        more['position_embeddings'] = {one.turned}" if rotates else ""
    parts |= {part: textwrap.indent(getattr(one, part) or "pass", " " * 8) for part in ("init", "code")}
    path = folder / "planted.py"
    path.write_text(attention.find(name).read_text() + FILE.format(**parts))
    return str(path)


def failed(path, check, options=None, **sizes):
    """Whether a check fails: by the examinations that have a say in it, up to the first that says no."""
    twins = Twins(path, options or {}, Setting(**(SIZES | sizes)), 0)
    about = [(examination, checks) for examination, checks in variant.EXAMINATIONS.items() if check in checks]
    measures = (one for examination, checks in about for one in variant.measured(examination, checks, twins))
    return any(one.check == check and one.passed is False for one in measures)


# Those by turns: a new file must not move the turns of others. CERTIFICATE_FAULTS=all asks it too.
OTHERS = ("differential", "gated", "gated_deltanet", "kda", "mamba2", "moba", "retention", "sinks")


def by_turns(names, turn):
    papers = [name for name in names if name in attention.STUDY_ORDER]
    others = [name for name in names if name in OTHERS]
    return [some[turn % len(some)] for some in (papers, others) if some]


@pytest.mark.parametrize(("check", "kind", "one"), KINDS, ids=[f"{check}: {name}" for check, name, _ in KINDS])
def test_each_kind_of_mistake_fails_the_check_that_is_about_it(check, kind, one, tmp_path):
    """In one of the paper's variants and one of the others, by turns; with CERTIFICATE_FAULTS=all in all of them."""
    names = one.where if ALL_OF_THEM else by_turns(one.where, KINDS.index((check, kind, one)))
    unseen = [name for name in names if not failed(planted(name, one, tmp_path), check, **one.sizes)]
    assert not unseen


@pytest.mark.parametrize("name", ALL)
def test_the_wrapper_alone_is_no_mistake_by_another_seed_in_bf16(name, tmp_path):
    measures = variant.examined(planted(name, Fault(), tmp_path), {}, Setting(**SIZES, precision="bf16"), seed=1)
    assert not [one for one in measures if one.passed is False]
    assert set(FAULTS) == {one.check for one in measures} == set(CLAIMS)  # a kind for every check


MASKS = {  # where a variant hides the future by an added number, or could; the number stands in LOW's place
    "baseline": ("lowest = torch.finfo(scores.dtype).min", "lowest = LOW"),
    "sdpa": ("mask = None if T in (1, S) else causal_lower_right(T, S)", "mask = added(q, T, S)"),
    "gqa": ("mask = None if T in (1, S) else causal_lower_right(T, S)", "mask = added(q, T, S)"),
    "differential": ("mask = None if T in (1, S) else causal_lower_right(T, S)", "mask = added(q, T, S)"),
    "gated": ("mask = None if T in (1, S) else causal_lower_right(T, S)", "mask = added(q, T, S)"),
    "flash": ("mask = None if T in (1, S) else causal_lower_right(T, S)", "mask = added(q, T, S)"),
    "mla": ("mask = None if T in (1, S) else causal_lower_right(T, S)", "mask = added(q, T, S)"),
    "sliding_window": ("_attend(q, k, v, attn_mask=mask)", "_attend(q, k, v, attn_mask=soft(q, mask))"),
    "sinks": ("_attend(q, k, v, attn_mask=mask)", "_attend(q, k, v, attn_mask=soft(q, mask))"),
    "moba": (
        "scores.masked_fill_(later & is_own, torch.finfo(scores.dtype).min)", "scores.masked_fill_(later & is_own, LOW)"
    ),
    "lsh": (".masked_fill(~visible, torch.finfo(scores.dtype).min)", ".masked_fill(~visible, LOW)"),
}  # fmt: skip
ADDED = """

def added(q, T, S):
    return torch.full((T, S), LOW, dtype=q.dtype).triu(S - T + 1)


def soft(q, mask):
    return torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, LOW)
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("low", [-30.0, -100.0])
def test_a_mask_that_only_dampens_is_no_mask(low, precision, tmp_path):
    unseen = []
    for name, (right, wrong) in MASKS.items():
        source = attention.find(name).read_text()
        assert right in source
        (tmp_path / "planted.py").write_text(source.replace(right, wrong) + f"\n\nLOW = {low}\n" + ADDED)
        if not failed(str(tmp_path / "planted.py"), "causal", precision=precision):
            unseen.append(name)
    assert not unseen


def test_dropout_that_one_layer_of_a_pattern_lost_is_missed(tmp_path):
    lost = planted("sdpa", Fault("", "without_dropout(self)"), tmp_path)
    for pattern, fails in (("linear,sdpa", False), (f"gqa,{lost}", True), (f"linear,{lost}", True)):
        assert failed(pattern, "training_equal", dropout=0.1) == fails, pattern
