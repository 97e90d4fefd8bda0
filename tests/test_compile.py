"""`compile: true` leaves `baseline` what it is, and other lengths are answered too. No kernel is built here.

That it takes each model whole, in training, is a cell of the table in docs/transformers.md (tests/surface.py).
"""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes

from lib import attention
from lib.model import build_model, gpt2_config


# A mask that is made or left out, a band, hashes in order, and a state from chunk to chunk.
@pytest.mark.parametrize("name", ["sdpa", "sliding_window", "lsh", "gated_deltanet"])
def test_a_second_length_is_one_graph_too(name):
    torch._dynamo.reset()
    model = build_model(name, gpt2_config(1, 32, 4, 128, 50), seed=1).double().eval()
    whole = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for length in (16, 73):
            ids = torch.randint(0, 50, (2, length))
            got, expected = whole(ids, use_cache=False).logits, model(ids).logits
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def operators_after_inductor_s_patterns(layer, x, autocast):
    """Names of the operators that inductor would compile, forward and backward, after it has replaced what it knows."""
    found = set()

    def split(graph, inputs, **options):
        joint_graph_passes(graph)
        found.update(str(node.target) for node in graph.graph.nodes)
        return default_partition(graph, inputs, **options)

    def as_it_is(graph, inputs):
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=as_it_is, partition_fn=split, decompositions=select_decomp_table())
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = torch.compile(layer, fullgraph=True, backend=backend)(x)
    (out if isinstance(out, torch.Tensor) else out[0]).sum().backward()
    return found


class Textbook(nn.Module):
    """What inductor knows: softmax(Q Kᵀ / √D) V."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Linear(128, 384)

    def forward(self, x):
        q, k, v = (part.unflatten(2, (2, 64)).transpose(1, 2) for part in self.heads(x).chunk(3, dim=2))
        return (q @ k.transpose(2, 3)).div(8.0).softmax(-1) @ v


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_baseline_keeps_its_scores(autocast):
    x = torch.randn(2, 61, 128)
    baseline = attention.load("baseline")(gpt2_config(2, 128, 2, 128, 2), 0).train()
    assert not [name for name in operators_after_inductor_s_patterns(baseline, x, autocast) if "scaled_dot" in name]
    if not autocast:  # the same eyes see it where it happens
        assert [name for name in operators_after_inductor_s_patterns(Textbook(), x, autocast) if "scaled_dot" in name]
