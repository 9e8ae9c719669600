"""Which experts a token can choose, whichever are removed: the only ones that a trace must run."""

import torch
from torch import Tensor

from ..moe.routers import Router


def reach(n: int, k: int, keep: int | None, router: Router) -> int:
    """How many experts a token can reach at most when at least `keep` of n stay (None: k): min(n, k + n - keep), or k more for
    each group that a token leaves out.

    All n where removing experts changes the ranking of the others (a bias added to a softmax) or lets a token choose outside
    its best groups, unless all stay. With `extra_logits`, one more: the extra entry of `LayerTrace.order`.
    """
    lost = lost_of_each_group(n, k, keep, router)
    most = router.groups * lost + (1 + router.groups - router.top_groups) * k if router.ranks_within_groups else n
    return (min(n, most) if lost else k) + (router.extra_logits > 0)


def lost_of_each_group(n: int, k: int, keep: int | None, router: Router) -> int:
    """How many experts each of the router's groups loses when at least `keep` of n stay (None: as few as can)."""
    least = k if router.groups == 1 else router.groups * max(router.group_size, -(-k // router.top_groups))
    return (n - max(least, keep or k)) // router.groups


def within_reach(ranking: Tensor, k: int, lost: int, router: Router) -> Tensor:
    """Which experts a token can reach when `lost` of each group go, bool [tokens, n]; ranking: `Router.ungrouped`.

    A group with a experts before another expert in the ranking keeps at least a - lost of them. So this one is out of reach if
    k are kept by its own group together with the `top_groups` - 1 others that keep least. Beside the `lost` of each group,
    these groups hold at most k experts within reach, and each of the others at most k.
    """
    order = ranking.argsort(1, descending=True)
    group = order // (ranking.shape[1] // router.groups)
    mine = torch.zeros_like(group, dtype=torch.int16)  # how many of those before an expert its own group keeps, [tokens, n]
    least = [torch.full_like(mine, k)] * (router.top_groups - 1)  # how many the others keep, rising
    for number in range(router.groups):
        own = group == number
        kept = (own.cumsum(1, dtype=torch.int16) - own.short() - lost).clamp_(min=0)
        mine += kept * own
        kept.masked_fill_(own, k)
        for place, less in enumerate(least):
            least[place], kept = torch.minimum(less, kept), torch.maximum(less, kept)
    return torch.zeros_like(ranking, dtype=torch.bool).scatter_(1, order, sum(least, mine) < k)
