"""Which token comes next, out of logits whose columns lie on the ranks of the tp axis.

Shapes: B rows; v a rank's columns of the vocabulary without padding, V all of them.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tptrain.nn.cross_entropy import OutputHead, largest
from tptrain.parallel.collectives import all_gather
from tptrain.parallel.mesh import Mesh


@dataclass(frozen=True)
class Sampling:
    """As in Transformers' `generate`: the logits are divided by the temperature, then all but the `top_k` largest are
    out, then the smallest ones whose probabilities together are no more than 1 - `top_p`.
    """

    temperature: float = 0.0  # 0: the largest logit
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0


class Sampler:
    """Draws tokens: every rank of the tp axis calls it, and gets the same at any degree."""

    def __init__(self, head: OutputHead, mesh: Mesh, sampling: Sampling) -> None:
        layout = head.weight.sharding
        self.group, self.sampling, self.vocab_size = mesh.group("tp"), sampling, head.vocab_size
        self.first = layout.offsets[0]  # id of this rank's first column
        self.width = layout.local_shape[0]
        self.columns = max(0, min(head.vocab_size - self.first, self.width))  # v

    def choose(self, logits: Tensor, keys: list[tuple[int, int]]) -> Tensor:
        """(B, V/tp) of the padded vocabulary -> ids (B,). `keys`: of each row, its prompt's number and the position of
        the token, by which it has random numbers of its own.
        """
        scores, sampling = logits[:, : self.columns].float(), self.sampling  # (B, v)
        if sampling.temperature > 0:
            scores = scores / sampling.temperature
            if sampling.top_k is not None or sampling.top_p < 1:
                scores = scores.masked_fill(scores < self._least(scores), -torch.inf)
            # The largest of logits with Gumbel noise is a draw from their softmax (Gumbel 1954; Maddison et al. 2014,
            # arXiv:1411.0030), and which is largest the ranks find as they do for the logits alone.
            scores = scores + self._noise(keys).to(scores.device)
        return largest(scores, self.first, self.group)

    def _least(self, scores: Tensor) -> Tensor:
        """The smallest score of each row that may be drawn: (B, 1)."""
        k, p = self.sampling.top_k, self.sampling.top_p
        everyone = self._whole(scores).sort(dim=-1, descending=True).values  # (B, V)
        if k is not None:
            everyone = everyone[:, : min(k, self.vocab_size)]  # (B, k)
        if p >= 1:
            return everyone[:, -1:]
        before = everyone.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)  # of the larger ones together
        before[:, 0] = 0.0
        count = (before < p).sum(dim=-1, keepdim=True)  # at least 1
        return everyone.gather(1, count - 1)

    def _whole(self, scores: Tensor) -> Tensor:
        """(B, v) of each rank -> (B, V), with minus infinity in columns of padding."""
        own = F.pad(scores, (0, self.width - self.columns), value=-torch.inf).contiguous()  # (B, V/tp), padded
        everyone, gathering = all_gather(own, self.group)  # (tp * B, V/tp)
        gathering.wait()
        return everyone.view(-1, len(scores), self.width).transpose(0, 1).flatten(1)

    def _noise(self, keys: list[tuple[int, int]]) -> Tensor:
        """Gumbel noise for this rank's columns: (B, v), on the cpu. All V numbers are drawn: what a column gets does
        not depend on how they are cut.
        """
        rows = []
        for prompt, position in keys:
            text = f"{self.sampling.seed}/{prompt}/{position}".encode()
            seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
            numbers = torch.empty(self.vocab_size).exponential_(generator=torch.Generator().manual_seed(seed))
            rows.append(-numbers[self.first : self.first + self.columns].log())
        return torch.stack(rows)
