import torch

from mixtura.types import ExpertOrder


def order_slots(ids, num_experts, tiling):
    flat = ids.reshape(-1).long()
    N = flat.numel()
    key = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    so = key.argsort(stable=True)
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    off = torch.zeros(num_experts + 1, dtype=torch.int32)
    off[1:] = counts.cumsum(0)
    mt, ml = tiling.max_tiles(N, num_experts)
    tiles = torch.full((mt + ml, 4), -7, dtype=torch.int32)
    nt = [0, 0]
    for e in range(num_experts):
        c = int(counts[e])
        o = int(off[e])
        r = 0
        while r < c:
            n = min(tiling.rows, c - r)
            if tiling.tail_rows and n <= tiling.tail_rows and n < tiling.rows:
                tiles[mt + nt[1]] = torch.tensor([e, o + r, n, 0])
                nt[1] += 1
            else:
                tiles[nt[0]] = torch.tensor([e, o + r, n, 0])
                nt[0] += 1
            r += n
    return ExpertOrder(ids, so.int(), off, tiles, torch.tensor(nt, dtype=torch.int32), tiling)
