"""The exact encoder of a GPU: the screen of `screen`, whose statement and proof hold here, in loops of triton.

What differs from the CPU:

- The product is that of bfloat16 on tensor cores, left in float32 (`spread = 0`). A tensor core does not round as IEEE
  says: one instruction aligns its n products and the sum so far to the largest of them, cuts off what lies lower than
  2^-24 of it, adds, and cuts the sum to float32. With M the sum of all `|x'_i w'_ji|`, it loses at most
  `n 2^-24 M + 2^-23 M`, since the largest loses nothing: no more than `n 2^-23 M` for n of 2 or more. Over the whole sum
  that is the `d_model * 2^-23 |x'| |w'_j|` of the statement, twice what IEEE arithmetic could lose.
- The whole bound is added up where the product is, in float32. The norms in it are rounded up, 2^-20 of the size of all
  terms is added, more than its ten roundings can lose, and flushing to 0 is given twice its room.
- Blocks are neighbouring features, and their highest bounds come from the same place.
- Every candidate's exact value is held against its bound, not only those of the first k.
- Candidates come in any order. Their places in the result follow from the number of larger ones, so it is always the same.

Nothing waits for the GPU until the work for all tokens has been handed to it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.kernels import reference, triton_kernels
from qwen_scope.kernels.screen import LARGEST, BoundBroken

CHUNK_BYTES = 256 * 2**20
"""Upper bounds, candidates and their values held at a time."""
BLOCK = 64
"""Features whose largest value stands for them, where there are plenty."""
FEW_TOKENS = 16
"""Up to here reading the weights takes all the time: then tiles are low."""
_FEW: dict[str, Any] = {"ROWS": 16, "FEATURES": 128, "DEPTH": 128, "num_warps": 4, "num_stages": 4}
_MANY: dict[str, Any] = {"ROWS": 128, "FEATURES": 256, "DEPTH": 64, "num_warps": 8, "num_stages": 3}
SEGMENT = 1024
"""Features looked through for candidates by one program."""
SHARES = 16
"""Programs that compute the candidates of one token."""


@dataclass(frozen=True, eq=False)
class TritonScreen:
    """An encoder prepared for screening on its GPU: what the fast product reads, and two norms per feature."""

    W_enc: Float[Tensor, "d_sae d_model"]
    """The weights, float32 or bfloat16, contiguous; shared with the SAE, not copied."""
    operand: Float[Tensor, "d_sae d_model"]
    """What the product reads, in bfloat16: `W_enc` itself if it is."""
    b_enc: Float[Tensor, " d_sae"]
    lost: Float[Tensor, " d_sae"]
    """|w_j - w'_j|, rounded up."""
    length: Float[Tensor, " d_sae"]
    """|w'_j|, rounded up."""
    longest: float
    """The largest of the norms |w_j| and |w'_j|."""

    @staticmethod
    def of(W_enc: Float[Tensor, "d_sae d_model"], b_enc: Float[Tensor, " d_sae"]) -> "TritonScreen | None":
        """Prepares an encoder of float32 or bfloat16; None where a weight or a bias is not finite, or beyond `LARGEST`."""
        weights, bias = W_enc.detach().contiguous(), b_enc.detach().to(torch.float32, copy=True)
        with torch.cuda.device_of(weights):
            rows = _Rows.of(weights)
        longest = float(torch.maximum(rows.norm, rows.length).max())
        if not (longest < float("inf") and bool((bias.abs() <= LARGEST).all())):
            return None
        return TritonScreen(weights, rows.rounded, bias, rows.lost, rows.length, longest)

    @property
    def nbytes(self) -> int:
        """Bytes that this takes beside the SAE's own tensors."""
        own = 0 if self.operand.data_ptr() == self.W_enc.data_ptr() else self.operand.nbytes
        return own + self.b_enc.nbytes + self.lost.nbytes + self.length.nbytes

    def sums_in_float32(self) -> bool:
        """Whether the product sums in float32, as the bound assumes; tried on sums that would show it."""
        d_model, device = self.operand.shape[1], self.operand.device
        weights = torch.full((BLOCK, d_model), 0.5, dtype=torch.bfloat16, device=device)
        weights[:, 0] = 512.0  # so large that bfloat16 loses each of the halves that follow
        exact = 512.0 + 0.5 * (d_model - 1)
        nothing = torch.zeros(BLOCK, dtype=torch.float32, device=device)
        probe = TritonScreen(weights, weights, nothing, nothing, nothing, 512.0)
        for tokens in (1, FEW_TOKENS + 1):
            room = _Room.of(probe, tokens, 1)
            with torch.cuda.device_of(weights):
                probe._bound(torch.ones(tokens, d_model, dtype=torch.float32, device=device), room)
            if ((room.upper - exact).abs() > exact * 2**-12).any():
                return False
        return True

    def encode(
        self, x: Float[Tensor, "tokens d_model"], k: int
    ) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """As `reference.encode`, but of the exact pre-activations (see `screen`).

        Rows that the bound leaves too many candidates of are computed in float64 for all features.

        Raises:
            QwenScopeError: a token's pre-activations hold a NaN or an infinity.
            BoundBroken: see there.
        """
        room = _Room.of(self, len(x), k)
        indices = torch.empty(len(x), k, dtype=torch.long, device=x.device)
        # Rows that get no values keep infinity, which no bound of theirs reaches.
        values = torch.full((len(x), k), float("inf"), dtype=torch.float32, device=x.device)
        count = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        with torch.cuda.device_of(x):
            for start in range(0, len(x), len(room.upper)):
                rows = slice(start, start + len(room.upper))
                chunk = x[rows].detach().float().contiguous()
                self._encode_chunk(chunk, room, indices[rows], values[rows], count[rows])
        left = (count < k) | (count > room.chosen.shape[1])
        is_broken, any_left = torch.stack((room.broken.any(), left.any())).tolist()
        if is_broken:
            raise BoundBroken
        if any_left:
            whole = reference.encode_rows(x.detach()[left], self.W_enc, self.b_enc, k, torch.float64)
            indices[left], values[left] = whole
            reference.refuse_non_finite(values)
        return indices, values

    def _encode_chunk(
        self,
        x: Float[Tensor, "chunk d_model"],
        room: "_Room",
        indices: Int[Tensor, "chunk k"],
        values: Float[Tensor, "chunk k"],
        count: Int[Tensor, " chunk"],
    ) -> None:
        self._bound(x, room)
        k = values.shape[1]
        # Any k features give a lower bound of the k-th value; the best of the k best blocks give a good one.
        first = room.highest[: len(x)].topk(k, dim=1).values[:, -1].contiguous()
        nothing = torch.zeros_like(count)
        self._add_candidates(x, room, first, torch.full_like(first, float("inf")), nothing, count)
        _order(room, indices, values, count)
        known = count.clone()
        self._add_candidates(x, room, values[:, -1].contiguous(), first, known, count)
        _order(room, indices, values, count)

    def _bound(self, x: Float[Tensor, "chunk d_model"], room: "_Room") -> None:
        """Fills `room` with the upper bounds of a chunk."""
        (tokens, d_model), d_sae = x.shape, len(self.b_enc)
        rows = _Rows.of(x)
        sizes = _FEW if tokens <= FEW_TOKENS else _MANY
        tiles = -(-tokens // sizes["ROWS"]) * -(-d_sae // sizes["FEATURES"])
        triton_kernels.bound_pre_activations[(tiles,)](
            rows.rounded,
            rows.norm,
            rows.lost,
            rows.length,
            self.operand,
            self.lost,
            self.length,
            self.b_enc,
            room.upper,
            room.highest,
            tokens,
            d_model,
            d_sae,
            room.highest.shape[1],
            self.longest,
            LARGEST / max(self.longest, 1.0),
            BLOCK=room.block,
            **sizes,
        )

    def _add_candidates(
        self,
        x: Float[Tensor, "chunk d_model"],
        room: "_Room",
        least: Float[Tensor, " chunk"],
        below: Float[Tensor, " chunk"],
        known: Int[Tensor, " chunk"],
        count: Int[Tensor, " chunk"],
    ) -> None:
        """Computes the features whose upper bound is at least `least` and lower than `below`; `known` are there already."""
        (tokens, d_model), d_sae, most = x.shape, len(self.b_enc), room.chosen.shape[1]
        triton_kernels.collect[(tokens, -(-d_sae // SEGMENT))](
            room.upper,
            room.highest,
            least,
            below,
            room.chosen,
            count,
            d_sae,
            room.highest.shape[1],
            most,
            BLOCK=room.block,
            FEATURES=SEGMENT,
        )
        triton_kernels.compute_chosen[(tokens, SHARES)](
            x,
            self.W_enc,
            self.b_enc,
            room.upper,
            room.chosen,
            known,
            count,
            room.keys,
            room.broken,
            d_model,
            d_sae,
            most,
            CANDIDATES=8,
            DEPTH=256,
        )


class _Rows(NamedTuple):
    """Rows as the product reads them, and norms that are not too small: |x|, |x - x'| and |x'|."""

    rounded: Float[Tensor, "rows d_model"]
    norm: Float[Tensor, " rows"]
    lost: Float[Tensor, " rows"]
    length: Float[Tensor, " rows"]

    @staticmethod
    def of(given: Float[Tensor, "rows d_model"]) -> "_Rows":
        count, width = given.shape
        norms = [torch.empty(count, dtype=torch.float32, device=given.device) for _ in range(3)]
        rows = _Rows(given.to(torch.bfloat16), *norms)
        triton_kernels.measure_rows[(count,)](given, *rows, width, WIDTH=1024)
        return rows


class _Room(NamedTuple):
    """What a chunk of tokens needs, allocated once for all chunks."""

    block: int
    """Features in a block."""
    upper: Float[Tensor, "chunk d_sae"]
    highest: Float[Tensor, "chunk blocks"]
    chosen: Int[Tensor, "chunk most"]
    keys: Int[Tensor, "chunk most"]
    broken: Int[Tensor, " 1"]
    """Not 0 once an exact value was found above its bound."""

    @staticmethod
    def of(screen: TritonScreen, tokens: int, k: int) -> "_Room":
        d_sae = len(screen.b_enc)
        most = min(d_sae, max(4 * k + 64, d_sae // 16))
        # Eight times as many blocks as are needed, if there are as many features; a power of 2.
        block = 1 << (max(1, min(BLOCK, d_sae // (8 * k))).bit_length() - 1)
        blocks = -(-d_sae // block)
        chunk = CHUNK_BYTES // (4 * d_sae + 4 * blocks + 12 * most)
        chunk = max(1, min(tokens, chunk - chunk % _MANY["ROWS"] if chunk > _MANY["ROWS"] else chunk))

        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(chunk, width, dtype=dtype, device=screen.b_enc.device)

        return _Room(
            block,
            upper=empty(d_sae, torch.float32),
            highest=empty(blocks, torch.float32),
            chosen=empty(most, torch.int32),
            keys=empty(most, torch.long),
            broken=torch.zeros(1, dtype=torch.int32, device=screen.b_enc.device),
        )


def _order(
    room: _Room, indices: Int[Tensor, "chunk k"], values: Float[Tensor, "chunk k"], count: Int[Tensor, " chunk"]
) -> None:
    k, most = values.shape[1], room.keys.shape[1]
    triton_kernels.order[(len(values),)](room.keys, count, indices, values, k, most, KEYS=64)
