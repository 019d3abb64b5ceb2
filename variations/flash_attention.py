"""
flash_attention.py - the same attention in tiles, without the T x T matrix

THE IDEA.  The attention formula stores a score for every query-key pair: T x T numbers
per head. But each result is only a weighted average, and an average can be updated piece by piece.
Take the keys in tiles, and keep three things per query: the largest score m so far, the sum of the
exponentials exp(score - m), and the sum of the values weighted by them (Milakov and Gimelshein
2018, online softmax; Dao et al. 2022, FlashAttention, section 3.1). If a tile has a larger score,
rescale the sums.

    scores   1  2 | 4  0           tile 1: m = 2, sum = e^-1 + e^0          = 1.37
             tile 1  tile 2        tile 2: m = 4, sum = 1.37 e^(2-4) + e^0 + e^-4 = 1.20

The backward pass stores no weights either. It computes them again, tile by tile, from the queries,
the keys, and one number per query: the logarithm of the sum of exp(score) (Dao 2023).

Run it:     python variations/flash_attention.py        (about 5 seconds on one CPU core)
"""
from measure import largest_difference, prepare, expect
import functools
import math
import weakref

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from decoder_only import attention, causal_mask
from housekeeping import run_script
from training import median_milliseconds

# =====================================================================================
# CONSTANTS - change one, run again
# =====================================================================================
FULL = False             # True: longer rows
TILE = 64                # queries and keys per tile
# =====================================================================================


# --- The part -------------------------------------------------------------------------
def tiles(length):
    return [slice(start, start + TILE) for start in range(0, length, TILE)]


class FlashAttention(torch.autograd.Function):
    """attention(queries, keys, values, mask) in tiles of TILE queries and TILE keys."""

    @staticmethod
    def scores(queries, keys, mask, rows, columns):
        """Return the masked scores of one tile, (B, H, TILE, TILE)."""
        scores = queries[:, :, rows] @ keys[:, :, columns].transpose(-2, -1)
        scores = scores / math.sqrt(queries.size(-1))
        if mask is None:
            return scores
        # A padding mask has a single row, which serves all queries.
        mask = mask[..., rows if mask.size(-2) > 1 else slice(None), columns]
        return scores.masked_fill(~mask, -math.inf)

    @staticmethod
    def forward(context, queries, keys, values, mask):
        out = torch.zeros_like(queries)  # (B, H, T, K)
        log_sums = queries.new_empty(queries.shape[:-1])  # (B, H, T)
        for rows in tiles(queries.size(2)):
            largest = torch.full_like(queries[:, :, rows, :1], -math.inf)  # (B, H, TILE, 1)
            total, weighted = torch.zeros_like(largest), torch.zeros_like(queries[:, :, rows])
            for columns in tiles(keys.size(2)):
                scores = FlashAttention.scores(queries, keys, mask, rows, columns)
                new_largest = torch.maximum(largest, scores.amax(-1, keepdim=True))
                # subtle: if all keys so far are masked, the largest score is -inf, and
                # -inf - -inf is NaN. Subtract 0 instead: exp(-inf) is 0.
                base = new_largest.masked_fill(new_largest == -math.inf, 0.0)
                exponentials = (scores - base).exp()  # (B, H, TILE, TILE)
                shrink = (largest - base).exp()  # rescales what was summed before
                total = total * shrink + exponentials.sum(-1, keepdim=True)
                weighted = weighted * shrink + exponentials @ values[:, :, columns]
                largest = new_largest
            # A query whose keys are all masked has total 0 and gets zeros.
            out[:, :, rows] = weighted / total.clamp(min=torch.finfo(total.dtype).tiny)
            log_sums[:, :, rows] = (largest + total.log())[..., 0]
        context.save_for_backward(queries, keys, values, out, log_sums, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(context, gradient):
        queries, keys, values, out, log_sums, mask = context.saved_tensors
        d_queries, d_keys, d_values = (torch.zeros_like(x) for x in (queries, keys, values))
        # The derivative of the softmax: dscores = weights * (dweights - sum(weights * dweights)).
        # The last sum is out . gradient for each query (Dao et al. 2022, appendix B.2).
        sums = (out * gradient).sum(-1, keepdim=True)  # (B, H, T, 1)
        log_sums = log_sums.masked_fill(log_sums == -math.inf, 0.0)[..., None]
        for rows in tiles(queries.size(2)):
            for columns in tiles(keys.size(2)):
                scores = FlashAttention.scores(queries, keys, mask, rows, columns)
                weights = (scores - log_sums[:, :, rows]).exp()  # (B, H, TILE, TILE)
                d_values[:, :, columns] += weights.transpose(-2, -1) @ gradient[:, :, rows]
                d_weights = gradient[:, :, rows] @ values[:, :, columns].transpose(-2, -1)
                d_scores = weights * (d_weights - sums[:, :, rows]) / math.sqrt(queries.size(-1))
                d_queries[:, :, rows] += d_scores @ keys[:, :, columns]
                d_keys[:, :, columns] += d_scores.transpose(-2, -1) @ queries[:, :, rows]
        return d_queries, d_keys, d_values, None


def flash_attention(queries, keys, values, mask=None, dropout=0.0):
    """A drop-in replacement for `attention`. Returns (result, None), as it stores no weights."""
    if dropout:
        raise ValueError("flash_attention has no dropout: use DROPOUT = 0.0")
    return FlashAttention.apply(queries, keys, values, mask), None


# --- The check ------------------------------------------------------------------------
def run_checks():
    print("The check: largest differences, in float64")
    torch.manual_seed(0)
    shapes = (2, 3, 150, 8), (2, 3, 170, 8), (2, 3, 170, 8)  # not multiples of TILE
    padding = (torch.arange(170) < torch.tensor([170, 90])[:, None])[:, None, None]
    no_keys = causal_mask(150, 170)
    no_keys[..., :70, :] = False
    masks = {"no mask": None, "padding": padding, "causal, queries without keys": no_keys}
    for name, mask in masks.items():
        results = []
        for function in (attention, flash_attention):
            torch.manual_seed(1)
            inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True)
                      for shape in shapes]
            # For a query without keys, the formula gives an average and the tiles give zeros, as
            # PyTorch's kernel does. Nothing uses either, so these rows are not compared.
            used = 1.0 if mask is None else mask.any(-1, keepdim=True)
            out = function(*inputs, mask)[0] * used
            # The power makes the gradient differ between elements.
            results.append([out, *torch.autograd.grad((out ** 3).sum(), inputs)])
        for what, one, other in zip(("output", "dQ", "dK", "dV"), *results):
            expect(f"{name}: {what}", largest_difference(one, other))


# --- The measurement ------------------------------------------------------------------
class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive inside the `with` block, and their peak.

    Every operation passes through __torch_dispatch__, and a finalizer runs when memory is freed. It
    does not see the buffers inside a kernel.
    """

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def free(self, key, size):
        self.now -= size
        self.seen.discard(key)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.data_ptr(), storage.nbytes())
        return result


def step(function, length):
    """Run attention and its gradients for one row of `length` tokens and 2 heads."""
    inputs = [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
    function(*inputs)[0].sum().backward()


def main():
    prepare(globals())
    run_checks()
    ways = {"formula": attention, "tiles": flash_attention,
            "PyTorch's kernel": lambda *inputs: (F.scaled_dot_product_attention(*inputs), None)}
    print("\nThe measurement: forward and backward, 2 heads of 16; peak bytes of all tensors")
    print(f"  {'T':>6s}{'T x T, 2 heads':>16s}" + "".join(f"{name:>26s}" for name in ways))
    peaks = {}
    for length in (256, 512, 1024, 2048) + ((4096, 8192) if FULL else ()):
        cells = ""
        for name, function in ways.items():
            with Memory() as memory:
                step(function, length)
            peaks.setdefault(name, []).append(memory.peak)
            taken = median_milliseconds(functools.partial(step, function, length))
            cells += f"{memory.peak / 2 ** 20:12.2f} MiB{taken:7.1f} ms"
        print(f"  {length:6d}{2 * length ** 2 * 4 / 2 ** 20:12.2f} MiB{cells}", flush=True)
    print("\nWhat this size cannot show: speed. On a GPU, the tiles stay in its small fast memory, "
          "which makes\nFlashAttention faster. In Python, each tile costs several calls.")
    return {"base": f"{peaks['formula'][-1] / 2 ** 20:.1f} MiB, T = {length}",
            "variation": f"{peaks['tiles'][-1] / 2 ** 20:.1f} MiB"}


if __name__ == "__main__":
    run_script(main)
