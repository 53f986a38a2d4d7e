"""The only place where an attention mask is made. In every mask True means: this query may see this key.

An entity-causal ("block-causal") mask lets a query see a key when `entity[query] >= entity[key]`. Cells of
2 tokens, 3 cells, queries down, keys across, # = may attend::

         a a b b c c
       a # # . . . .
       a # # . . . .
       b # # # # . .
       b # # # # . .
       c # # # # # #
       c # # # # # #

Teacher forcing runs the sequence twice, clean then noisy, under one more mask. Clean n sees clean <= n;
noisy n sees clean < n and noisy n. One token per entity, 3 entities, clean a b c, noisy A B C::

         a b c A B C
       a # . . . . .
       b # # . . . .
       c # # # . . .
       A . . . # . .
       B # . . . # .
       C # # . . . #
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_causal_mask(entity: Tensor, keys: Tensor | None = None) -> Tensor:
    """Who may see whom, from the entity of each token.

    Args:
        entity: [N] int64, the entity of each query token.
        keys: [M] int64, the entity of each key token; the queries themselves when absent.

    Returns:
        [N, M] bool, True = may attend. (XTRA, arXiv 2411.15648, section 3; xAR, arXiv 2502.20388, section 3.2.)
    """
    keys = entity if keys is None else keys
    return entity[:, None] >= keys[None, :]


def teacher_forcing_mask(entity: Tensor) -> Tensor:
    """The mask of the doubled sequence [clean ; noisy]: [N] int64 -> [2N, 2N] bool, True = may attend.

    A noisy entity never sees its own clean version, so its loss cannot be met by copying. The clean version of the last
    entity is seen by nobody else: its rows and columns can be left out.
    """
    same = entity[:, None] == entity[None, :]
    causal = block_causal_mask(entity)
    nothing = torch.zeros_like(same)
    return torch.cat((torch.cat((causal, nothing), 1), torch.cat((causal & ~same, same), 1)), 0)
