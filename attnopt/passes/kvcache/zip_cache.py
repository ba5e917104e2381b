"""Keep the cache in 4 and 2 bits: more for the tokens that attention returns to, decided a block at a time.

    the last 100 tokens   exact
    a full block of 100   its salient half in 4 bits, the others in 2: keys by channel of each set, values balanced by channel, by token

    saliency of token j = sum over the queries of the block of their weight on j / how many of them could see j
    v / c, c = sqrt(max |v|) of each channel over the block, then one scale and zero point a token; times c when read

The sum alone favours tokens that were there earlier; its share of the queries that could see a token does not. The paper looks at some
probe queries only, because a fused kernel keeps no weights; in decoding the queries of a block come one by one, and each is a probe.
Which half is salient is decided per key head and block of 100 tokens, so that every block takes equally many bytes and the state has
the same shapes whatever the text; the paper ranks all tokens of a prompt at once and the 100 of each streaming step. A past that is
given exactly, without what attention gave it, counts its first tokens as salient.

Source: "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnopt.ir.site import Refusal
from attnopt.passes.candidate import Candidate, Evidence, Group, Per
from attnopt.passes.edits.caches.block_state import Pair, keep_blocks, unfit
from attnopt.passes.edits.caches.blocks import Blocks
from attnopt.passes.edits.caches.slots import Slot, slots


@dataclass(frozen=True)
class ZipCache:
    """Keep the cache in 4 and 2 bits: more for the tokens that attention returns to, decided a block at a time.

    block: tokens that are rounded together. shares: of the tokens of a block that keep 4 bits, a candidate each.
    """

    name: str = "zip-cache"
    exact: bool = False
    per: Per = "model"
    block: int = 100
    shares: tuple[float, ...] = (1.0, 0.5)

    def propose(self, group: Group, evidence: Evidence | None) -> list[Candidate] | Refusal:
        held = slots(group)
        if isinstance(held, Refusal):
            return held
        found = []
        for share in self.shares:
            blocks = Blocks(self.block, round(share * self.block))
            made = [pair_or_refusal(k, v, blocks) for k, v in by_site(held)]
            refused = next((one for one in made if isinstance(one, Refusal)), None)
            pairs = [one for one in made if isinstance(one, Pair)]
            both = [slot for pair in pairs for slot in (pair.k, pair.v)]
            parts = [blocks.parts(s.side, s.past.shape or (), s.past.dtype) for s in both]
            refused = refused or group.host.refuses_split([s.past for s in both], [s.present for s in both], parts)
            if refused is not None or not pairs:
                return refused or Refusal("no attention has keys and values in a cache of its own")
            found.append(self.candidate(pairs, share, blocks))
        return found

    def candidate(self, pairs: list[Pair], share: float, blocks: Blocks) -> Candidate:
        before = sum(slot.bytes_per_token for p in pairs for slot in (p.k, p.v))
        after = sum(blocks.bytes_per_token(s.side, s.heads, s.width) for p in pairs for s in (p.k, p.v))
        what = f"{share:.0%} of the tokens in 4 bits, the others in 2" if share < 1 else "tokens in 4 bits"
        said = f"past keys and values of {len(pairs)} layers by blocks of {self.block}, {what}: {before} -> {after:.1f} bytes per token"
        return Candidate(
            self.name,
            False,
            f"{said}, beside {self.block} exact ones; they come and go as codes, scales, zeros, balance and saliency",
            "ZipCache",
            options={"sites": [p.site.name for p in pairs], "blocks": blocks.plain()},
            kind=f"{share:.0%} salient" if share < 1 else "4-bit blocks",
            cached={p.site.name: blocks.words_of_a_spec for p in pairs},
            changes=("cache", "structure"),
        )

    def apply(self, candidate: Candidate, group: Group) -> Group:
        """Edits the host of the group in place; give it a copy, and finish it."""
        held, blocks = slots(group), Blocks.of(candidate.options["blocks"])
        assert not isinstance(held, Refusal)
        chosen = [(k, v) for k, v in by_site(held) if k is not None and k.site.name in candidate.options["sites"]]
        return keep_blocks(group, [Pair(k, v, blocks) for k, v in chosen if v is not None])


def by_site(held: list[Slot]) -> Iterator[tuple[Slot | None, Slot | None]]:
    """Keys and values of each attention; None for what it shares with another, or has in no cache."""
    names = dict.fromkeys(slot.site.name for slot in held)
    for name in names:
        sides = {slot.side: slot for slot in held if slot.site.name == name}
        yield sides.get("k"), sides.get("v")


def pair_or_refusal(k: Slot | None, v: Slot | None, blocks: Blocks) -> Pair | Refusal:
    if k is None or v is None:
        at = (k or v).site.name  # type: ignore[union-attr]
        return Refusal("tokens that are put in order need keys and values in caches of one attention", at)
    return unfit(k.site, k, v, blocks) or Pair(k, v, blocks)
