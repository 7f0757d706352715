"""Keys and values of the tokens so far, so that each further token costs a forward pass of its own only.

Every row of a batch is a sequence, padded in front so that all end in one column: the next token of each row is in the
same column, at a position of its own. Shapes: see nn/decoder.py; C columns, S slots that a layer keeps of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tptrain.models.spec import LongScaling, RotarySpec
from tptrain.nn.attention import Attention
from tptrain.nn.context import Context
from tptrain.nn.decoder import Decoder
from tptrain.nn.rotary import rotary_table
from tptrain.ops.reference import attend


class LayerCache:
    """Of one layer, for this rank's KV heads. Column c lies in slot c mod S: where a query sees a window of W keys
    only, W slots are enough.
    """

    def __init__(self, layer: Attention, rows: int, columns: int, like: Tensor) -> None:
        self.slots = min(columns, layer.spec.window or columns)
        self.k, self.v = (
            like.new_empty(rows, layer.kv_heads, self.slots, layer.d) for _ in range(2)
        )  # (B, K/tp, S, d)

    def columns(self, end: int) -> Tensor:
        """The column that lies in each slot once columns 0 to end - 1 have been kept: (min(end, S),)."""
        slot = torch.arange(min(end, self.slots), device=self.k.device)
        return end - 1 - (end - 1 - slot) % self.slots

    def keep(self, k: Tensor, v: Tensor, first: int) -> None:
        """k and v (B, K/tp, T, d) of the columns from `first` on."""
        T = k.shape[2]
        if T == 1:
            self.k[:, :, first % self.slots], self.v[:, :, first % self.slots] = k[:, :, 0], v[:, :, 0]
            return
        last = range(max(0, T - self.slots), T)
        slot = torch.arange(first + last.start, first + T, device=k.device) % self.slots
        self.k.index_copy_(2, slot, k[:, :, last.start :])
        self.v.index_copy_(2, slot, v[:, :, last.start :])


class Cache:
    """Of a model, for B rows of up to C columns. `length`: columns that have been kept."""

    def __init__(self, model: Decoder, rows: int, columns: int, padding: Tensor | None = None) -> None:
        """`padding`: (B,), the columns in front of each row that are none of it; None where there are none."""
        self.model, self.capacity, self.length = model, columns, 0
        self._pad(padding)
        attentions = [module for module in model.modules() if isinstance(module, Attention)]
        self.layers = {layer: LayerCache(layer, rows, columns, model.norm.weight) for layer in attentions}
        self.ids = torch.zeros(rows, columns, dtype=torch.int64, device=model.mesh.device)  # (B, C)
        rotaries = [layer.spec.rotary for layer in attentions if layer.spec.rotary is not None]
        self.contexts = {each.scaling.context for each in rotaries if isinstance(each.scaling, LongScaling)}

    @property
    def bytes(self) -> int:
        """Memory on this rank."""
        return sum(each.nbytes for layer in self.layers.values() for each in (layer.k, layer.v))

    def select(self, rows: Tensor) -> None:
        """Keep these rows only; a row may be named several times."""
        for layer in self.layers.values():
            layer.k, layer.v = layer.k[rows], layer.v[rows]
        self.ids = self.ids[rows]
        self._pad(None if self.padding is None else self.padding[rows])

    def _pad(self, padding: Tensor | None) -> None:
        self.padding = padding
        self.common_padding = 0 if padding is None else int(padding.min())  # columns that are padding in every row

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) ids of the next columns -> (B, T, D), the head's input; the columns are kept."""
        B, T = tokens.shape
        first, end = self.length, self.length + T
        assert end <= self.capacity, "the cache is full"
        self.ids[:, first:end] = tokens
        if any(first <= context < end for context in self.contexts) and first > 0:
            # Beyond it LongRoPE turns all positions in another way: as Transformers' Phi-3 does, begin again.
            first = self.length = 0
        x = self.model(self.ids[:, first:end], Cached(self, self.ids[:, first:end]))  # (N, D)
        self.length = end
        return x.view(B, -1, x.shape[1])[:, -T:]


class Cached(Context):
    """T columns of B rows, after those that a cache has."""

    def __init__(self, cache: Cache, tokens: Tensor) -> None:
        super().__init__(tokens.shape[1], tokens.device, {})
        self.cache, self.first, self.rows = cache, cache.length, (1, -1)
        columns = torch.arange(self.first, self.first + self.T, device=self.device)  # (T,)
        padding = columns.new_zeros(len(tokens)) if cache.padding is None else cache.padding
        self.places = (columns - padding.unsqueeze(1)).clamp(min=0).flatten()  # (N,), positions
        self.longest = self.first + self.T - cache.common_padding  # tokens
        self.masks: dict[tuple[int, int | None], Tensor | None] = {}  # by slots and window

    def positions(self, B: int) -> Tensor:
        # Columns after the end of a row that is shorter than others may have no position, and nobody reads them.
        return self.places.clamp(max=self.cache.model.spec.max_positions - 1)

    def rotation(self, rotary: RotarySpec, d: int) -> Tensor:
        """(2, N, 1, d/2): see `rotary_table`. Each token has a position of its own."""
        key = rotary, d, self.longest
        if key not in self.tables:
            self.tables[key] = rotary_table(rotary, d, self.places, self.longest)
        return self.tables[key]

    def attend(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, N, H/tp, d), k and v (1, N, K/tp, d) -> (B, T, H/tp, d)."""
        q, k, v = (x.view(-1, self.T, *x.shape[2:]) for x in (q, k, v))  # (B, T, H/tp, d), 2 x (B, T, K/tp, d)
        kept, spec = self.cache.layers[layer], layer.spec
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))  # (B, H/tp, T, d), 2 x (B, K/tp, T, d)
        if self.first == 0 and self.cache.padding is None:
            kept.keep(keys, values, 0)
            return super().attend(layer, q, k, v)
        if self.T == 1:
            kept.keep(keys, values, self.first)
            seen = min(self.first + 1, kept.slots)
            keys, values = kept.k[:, :, :seen], kept.v[:, :, :seen]  # (B, K/tp, S, d)
            # The query heads that share a KV head are so many queries of one head: neither k nor v is repeated.
            queries = queries.view(len(q), keys.shape[1], -1, layer.d)  # (B, K/tp, H/K, d)
            mask = self._mask(kept, None, lambda: kept.columns(self.first + 1))
            y = attend(queries, keys, values, mask, spec.scale, spec.softcap)
            return y.reshape(q.shape)
        past = min(self.first, kept.slots)
        mask = self._mask(kept, spec.window, lambda: self._past_and_new(kept))
        new = keys, values
        if past:
            keys = torch.cat([kept.k[:, :, :past], keys], dim=2)  # (B, K/tp, S + T, d)
            values = torch.cat([kept.v[:, :, :past], values], dim=2)
        y = attend(queries, keys, values, mask, spec.scale, spec.softcap)
        kept.keep(*new, self.first)
        return y.transpose(1, 2)

    def _past_and_new(self, kept: LayerCache) -> Tensor:
        new = torch.arange(self.first, self.first + self.T, device=self.device)
        return torch.cat([kept.columns(self.first), new]) if self.first else new

    def _mask(self, kept: LayerCache, window: int | None, columns: Callable[[], Tensor]) -> Tensor | None:
        """Which of the keys, that lie in these columns, each query sees: (B or 1, 1, T, keys); None: all of them."""
        key = kept.slots, window
        if key not in self.masks:
            self.masks[key] = self._visible(columns(), window)
        return self.masks[key]

    def _visible(self, keys: Tensor, window: int | None) -> Tensor | None:
        padding = self.cache.padding
        if self.T == 1 and padding is None:
            return None
        queries = torch.arange(self.first, self.first + self.T, device=self.device).unsqueeze(1)  # (T, 1)
        visible = keys <= queries  # (T, keys)
        if window is not None:
            visible &= keys > queries - window
        if padding is None:
            return visible.view(1, 1, *visible.shape)
        own = keys >= padding.view(-1, 1, 1)  # (B, 1, keys)
        # A column of padding sees itself, so that its softmax has a sum; nobody sees it.
        return ((visible & own) | (keys == queries)).unsqueeze(1)
