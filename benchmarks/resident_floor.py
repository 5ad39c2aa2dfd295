"""What a step of the resident engine should take on an H200, phase by phase: an estimate, from counts and latencies.

    python benchmarks/resident_floor.py [--blocks 8] [--hidden-dim 64 ...]

Nothing here is measured. Items, products, bytes and barriers are counted as csrc/cuda/resident has them; instructions
as nvcc makes them, by benchmarks/resident_sass.py. The latencies are round figures, assumed from what is published
about the H100 (such as Luo et al., arXiv 2402.13499), or guesses. A phase takes at least as long as it waits for
results and for L2, and hardly longer than the issue of all its instructions, if that is longer: all branches count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

CLOCK = 1.755e9  # Hz
WARPS, AHEAD, TILE = 8, 4, 16  # of a block; tiles loaded before they are needed; rows and columns of a tile
L2, SHARED, SHUFFLE, EXP = 270, 33, 25, 40  # cycles from issue to result
PRODUCT = 40  # cycles for two tiles that are in shared memory, and their products, which wait for the sums before them
BARRIER, CLUSTER_BARRIER = 40, 900  # cycles; the second flushes to L2 and invalidates L1
ITEM = 150  # cycles: division of the work, call, epilogue
L2_BYTES = 64  # per cycle and block
WARPS_PER_SCHEDULER = 2  # each scheduler issues an instruction per cycle
SASS = Path(__file__).parent / "results/resident_sass.json"


class Sizes(NamedTuple):
    vocab_size: int = 128
    hidden_dim: int = 64
    layers: int = 2
    heads: int = 2
    context: int = 128
    batch_size: int = 1


class Phase(NamedTuple):
    name: str
    times: int  # in a step
    wait: float  # cycles for results and for L2
    issue: float  # cycles to issue all instructions
    mma: int  # products of 16 by 16 by 8, of the whole cluster
    l2_bytes: int  # that a block loads


@cache
def sass() -> dict[str, dict[str, int]]:
    """Return the counts of :mod:`resident_sass`, by phase."""
    return json.loads(SASS.read_text())["phases"]


def issue(phase: str, trips: int = 1) -> float:
    """Return the cycles in which two warps of a scheduler issue an item of a phase each."""
    own = sass()[phase]
    return WARPS_PER_SCHEDULER * (own["item"] + trips * own["trip"]) / own["copies"]


def issue_product(variant: str, groups: int) -> float:
    """The same for a call of ``multiply``."""
    own = sass()[f"multiply<{variant}>"]
    loop = own["item"] + own["trip"]
    return WARPS_PER_SCHEDULER * (own["all"] - loop + groups * loop)


def phases(s: Sizes, blocks: int) -> Iterator[Phase]:
    """Return the phases of a step, in order, with all that lies in shared memory where it does for ``blocks``."""
    row_blocks = s.batch_size * -(-s.context // TILE)
    own, keys, d, mlp = -(-row_blocks // blocks), -(-s.context // TILE), s.hidden_dim // TILE, 4 * s.hidden_dim // TILE
    vocab, head, of_all = -(-s.vocab_size // TILE), s.hidden_dim // s.heads // TILE, WARPS * blocks

    def product(name, times, items, steps, *, variant="0, 0", weights=False, spread=False, warps=WARPS) -> Phase:
        far = weights + spread  # factors that are not in the block's own memory
        groups = -(-steps // AHEAD)  # each computes while the next is on its way
        latency = groups * max(L2 * bool(far) + SHARED, AHEAD * PRODUCT) + min(steps, AHEAD) * PRODUCT + ITEM
        l2 = items * steps * 512 * far * WARPS // warps
        total = items * steps * 2 * (blocks if warps == WARPS else 1)
        turns, issued = -(-items // warps), issue(name) + issue_product(variant, groups)
        return Phase(name, times, max(turns * latency, l2 / L2_BYTES) + BARRIER, turns * issued + BARRIER, total, l2)

    def rows(name, times, items, passes, width, each=SHARED) -> Phase:
        trips = -(-width // 32)
        latency = passes * (trips * each + 4 * SHUFFLE) + ITEM
        turns = -(-items // (2 * WARPS))
        return Phase(name, times, turns * latency + BARRIER, turns * issue(name, trips) + BARRIER, 0, 0)

    n, lanes = s.layers, s.hidden_dim
    yield rows("embedding", 1, own * TILE, 1, lanes, 2 * L2)
    yield rows("layer norms", 2 * n + 1, own * TILE, 3, lanes)
    yield product("c_attn", n, own * 3 * d, d, variant="0, 1", weights=True)
    yield product("scores", n, own * s.heads * keys, head, variant="0, 1", spread=blocks > 1)
    yield rows("softmax", n, own * TILE * s.heads, 3, s.context, SHARED + EXP)
    yield product("mixed values", n, own * d, keys, spread=blocks > 1)
    yield product("attn_proj", n, own * d, d, variant="0, 1", weights=True)
    yield product("c_fc, GELU", n, own * mlp, d, variant="0, 1", weights=True)
    yield product("mlp_proj", n, own * d, mlp, variant="0, 1", weights=True)
    yield product("logits", 1, own * vocab, d, variant="0, 1", weights=True)
    yield rows("loss", 1, own * TILE, 3, s.vocab_size, SHARED + EXP)
    yield product("head, backward", 1, own * d, vocab, weights=True)
    yield rows("layer norms, backward", 2 * n + 1, own * TILE, 4, lanes, 2 * SHARED)  # two of them for the partial sums
    yield product("mlp_proj, GELU, backward", n, own * mlp, d, weights=True)
    yield product("c_fc, backward", n, own * d, mlp, weights=True)
    yield product("attn_proj, backward", n, own * d, d, weights=True)
    yield product("attention weights, backward", n, own * s.heads * keys, head, variant="0, 1", spread=blocks > 1)
    yield rows("softmax, backward", n, own * TILE * s.heads, 2, s.context, SHARED)
    yield product("queries, backward", n, own * d, keys, spread=blocks > 1)
    yield product("keys and values, backward", n, 2 * own * d, keys, variant="1, 0", spread=blocks > 1)
    yield product("c_attn, backward", n, own * d, 3 * d, weights=True)
    items = n * (4 * d * d + 2 * d * mlp) + vocab * d
    yield product("weight gradients", 1, items, row_blocks, variant="1, 0", weights=True, spread=True, warps=of_all)
    parameters = (s.vocab_size + s.context + 2) * s.hidden_dim + n * (12 * s.hidden_dim + 13) * s.hidden_dim
    turns = -(-parameters // 1024 // of_all)
    issued = turns * issue("norm") + issue("clipping")
    yield Phase("norm", 1, (turns + 1) * (L2 + 400), issued, 0, parameters * 2 // blocks)
    turns, pack = -(-parameters // 256 // of_all), WARPS_PER_SCHEDULER * sass()["Adam, recording"]["pack"]
    yield Phase("Adam, recording", 1, turns * L2, turns * (pack + L2), 0, parameters * 8 // blocks)
    barrier = CLUSTER_BARRIER if blocks > 1 else BARRIER
    yield Phase("cluster barriers", 2 * n + 4, barrier, issue("cluster barriers"), 0, 0)


def seconds(s: Sizes, blocks: int) -> tuple[float, float]:
    """Return what a step should take: at least, and with the issue of all instructions."""
    found = list(phases(s, blocks))
    return sum(p.times * p.wait for p in found) / CLOCK, sum(p.times * max(p.wait, p.issue) for p in found) / CLOCK


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=8, choices=(1, 2, 4, 8))
    for name, value in Sizes()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    arguments = vars(parser.parse_args())
    blocks = arguments.pop("blocks")
    sizes = Sizes(**arguments)
    print(
        f"An estimate for an H200, {blocks} blocks\n\n| phase | times | µs, waiting | µs, issuing | mma | KB from L2 |"
    )
    print("|---|---|---|---|---|---|")
    for p in phases(sizes, blocks):
        wait, issued = (p.times * cycles / CLOCK * 1e6 for cycles in (p.wait, p.issue))
        columns = f"{wait:.1f} | {issued:.1f} | {p.times * p.mma:,} | {p.times * p.l2_bytes / 1024:,.0f}"
        print(f"| {p.name} | {p.times} | {columns} |")
    least, most = seconds(sizes, blocks)
    print(f"\n{least * 1e6:.0f} to {most * 1e6:.0f} µs: {1 / most:,.0f} to {1 / least:,.0f} steps/s")


if __name__ == "__main__":
    main()
