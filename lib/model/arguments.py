"""What a caller's arguments say about the tokens of a row: which keys are padding, which document each token is of, and
at which position it stands. What cannot be honoured is refused in one sentence, never dropped.

B rows, T tokens that are new, S = T and the cached ones before them.
"""

from dataclasses import dataclass

import torch
from transformers.masking_utils import find_packed_sequence_indices
from transformers.utils import is_tracing

from lib.errors import UsageError

# What transformers' own forward reads out of its **kwargs: the loss's arguments, and what it returns.
PASSED_ON = {"num_items_in_batch", "ignore_index", "shift_labels", "output_hidden_states", "return_dict"}


class Unsupported(UsageError, ValueError):
    """An argument of transformers' that these models do not honour, or one that cannot be meant."""


@dataclass
class Tokens:
    """`padding_mask` (B, S) bool, False where a key is padding; `seq_idx` (B, T), the document of each token;
    `position_ids` (B or 1, T). Each None where there is nothing to say.

    `given_mask` (B, S) is the caller's, for transformers: it builds nothing from it, but warns where there is none.
    """

    given_mask: torch.Tensor | None
    padding_mask: torch.Tensor | None
    seq_idx: torch.Tensor | None
    position_ids: torch.Tensor | None


def read(shape, past, attention_mask=None, position_ids=None, seq_idx=None, kwargs=None) -> Tokens:
    """What the arguments of a forward of `shape` (B, T) after `past` cached tokens say. Takes its own out of `kwargs`.

    Documents are told apart by `seq_idx`, by FlashAttention's `cu_seq_lens_q`, by a mask (B, 1, T, S), or, as
    transformers does where no mask is given, by positions that restart.
    """
    padding_mask, masked_documents = read_mask(attention_mask, shape, past)
    seq_idx = read_documents(shape, seq_idx, {} if kwargs is None else kwargs)
    if seq_idx is None:
        seq_idx = masked_documents
    elif masked_documents is not None:
        raise Unsupported("documents are told apart by seq_idx or by attention_mask, not by both; give one of them")
    if position_ids is not None:
        position_ids = read_positions(position_ids, shape)
        if seq_idx is None and attention_mask is None and past == 0 and shape[1] > 1:
            seq_idx = find_packed_sequence_indices(position_ids.expand(shape))
    elif padding_mask is not None or seq_idx is not None:
        position_ids = positions(shape, padding_mask, seq_idx)
    given_mask = None
    if attention_mask is not None and attention_mask.dim() == 2:
        given_mask = attention_mask.expand(shape[0], -1)
    return Tokens(given_mask, padding_mask, seq_idx, position_ids)


def read_mask(mask, shape, past):
    """(padding_mask, seq_idx) of transformers' `attention_mask`, (B, S) or (B, 1, T, S); None for what it is silent on.

    Without a look at the values (torch.compile, fake tensors) a (B, S) mask is taken as given, and another refused.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4):
        what = f"{mask.dim()} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise Unsupported(f"attention_mask must be a tensor (B, S) or (B, 1, T, S), not {what}")
    (B, T), S = shape, past + shape[1]
    wanted = (B, S) if mask.dim() == 2 else (B, 1, T, S)
    if mask.shape[-1] != S or (mask.shape != wanted and mask.shape != (1, *wanted[1:])):
        raise Unsupported(
            f"attention_mask is {tuple(mask.shape)}, but {B} rows of {past} cached and {T} new tokens need {wanted}"
        )
    mask = mask.expand(wanted)
    if mask.dim() == 4:
        return read_square_mask(mask.squeeze(1))
    if mask.dtype != torch.bool:
        if not is_tracing(mask) and ((mask != 0) & (mask != 1)).any():
            raise Unsupported(
                "attention_mask (B, S) is 1 for a token and 0 for padding; tell documents apart by seq_idx"
            )
        mask = mask.bool()
    if not is_tracing(mask) and mask.all():
        return None, None
    return mask, None


def read_square_mask(mask):
    """(padding_mask, seq_idx) of a mask (B, T, S), bool (True: seen) or to be added to the scores (0: seen)."""
    if is_tracing(mask):
        raise Unsupported("torch.compile cannot look into an attention_mask (B, 1, T, S); give seq_idx or (B, S)")
    if mask.is_floating_point():
        seen = mask == 0
        if (mask[~seen] > torch.finfo(mask.dtype).min / 2).any():
            raise Unsupported("attention_mask (B, 1, T, S) adds a bias to scores, which is not honoured; leave it out")
    elif mask.dtype == torch.bool:
        seen = mask
    else:
        raise Unsupported(f"attention_mask (B, 1, T, S) must be bool, or floats to be added, not {mask.dtype}")
    T, S = seen.shape[1:]
    causal = torch.ones(T, S, dtype=torch.bool, device=seen.device).tril(S - T)
    real = seen.diagonal(S - T, 1, 2)  # (B, T): padding does not see itself
    keys = seen.any(1)  # (B, S): seen by somebody
    if not ((seen != (causal & keys[:, None])) & real[..., None]).any():
        return (None if keys.all() else keys), None
    if T == S:
        first = torch.where(real, seen.byte().argmax(-1), torch.arange(T, device=seen.device))  # (B, T)
        seq_idx = (first == torch.arange(T, device=seen.device)).cumsum(1)  # padding is a document of its own
        if not ((seen != (causal & same_document(seq_idx))) & real[..., None]).any():
            return (None if keys.all() else keys), seq_idx
    raise Unsupported(
        "attention_mask (B, 1, T, S) is honoured where it is causal and hides padding or, without a cache, keeps "
        "documents apart that follow each other; this one hides or shows other keys"
    )


def same_document(seq_idx):
    """(B, T) -> (B, T, T): whether two tokens are of one document."""
    return seq_idx[:, :, None] == seq_idx[:, None, :]


def read_documents(shape, seq_idx, kwargs):
    """(B, T), counted up from one document to the next, of `seq_idx` or of FlashAttention's lengths; None without."""
    starts, others = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None)
    for name in ("max_length_q", "max_length_k"):  # how much room a kernel needs for the same documents
        kwargs.pop(name, None)
    if starts is not None and seq_idx is None:
        if shape[0] != 1 or (others is not None and not torch.equal(starts, others)):
            raise Unsupported("cu_seq_lens_q is honoured for one row, and equal to cu_seq_lens_k; give seq_idx instead")
        seq_idx = torch.bucketize(torch.arange(shape[1], device=starts.device), starts[1:], right=True)[None]
    if seq_idx is None:
        return None
    if seq_idx.shape != tuple(shape):
        raise Unsupported(f"seq_idx is {tuple(seq_idx.shape)}, but there are {tuple(shape)} tokens to tell apart")
    return starts_of(seq_idx).cumsum(1)


def starts_of(seq_idx):
    """(B, T) -> (B, T) bool, True where a document begins."""
    return torch.cat([torch.ones_like(seq_idx[:, :1], dtype=torch.bool), seq_idx[:, 1:] != seq_idx[:, :-1]], dim=1)


def read_positions(position_ids, shape):
    """`position_ids` as (B or 1, T)."""
    position_ids = position_ids[None] if position_ids.dim() == 1 else position_ids
    if position_ids.shape not in ((shape[0], shape[1]), (1, shape[1])):
        raise Unsupported(f"position_ids is {tuple(position_ids.shape)}, but there are {tuple(shape)} tokens")
    return position_ids


def positions(shape, padding_mask, seq_idx):
    """(B, T): how many real tokens of its document stand before each token."""
    real = torch.ones_like(seq_idx) if padding_mask is None else padding_mask.long()  # (B, S)
    count = real.cumsum(1)
    if seq_idx is not None:  # no cache: S is T
        count = count - torch.where(starts_of(seq_idx), count - real, 0).cummax(1).values
    return (count - 1).clamp(min=0)[:, -shape[1] :]


def refuse_unknown(kwargs, labels=None) -> None:
    """Raises Unsupported for an argument that nothing here or in transformers' GPT-2 would read."""
    if labels is None and kwargs.get("shift_labels") is not None:
        raise Unsupported("shift_labels is honoured beside labels; give labels too")
    for name, value in kwargs.items():
        if name == "output_attentions" and value:
            raise Unsupported("output_attentions cannot be given, since attention weights are not kept; leave it out")
        if name not in PASSED_ON and value is not None and value is not False:
            raise Unsupported(f"the model's forward has no argument {name!r}, or does not honour it; leave it out")
