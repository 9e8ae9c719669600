"""A grouped matrix product for any GPU that Triton supports: rows sorted by expert, each times its expert's weights.

torch's own grouped product is fast on Hopper in bf16; elsewhere it waits for the host and loops. This one never waits:
its grid is an upper bound, and a program without rows ends before reading weights.
"""

import warnings

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # comes with torch's builds for GPUs
    triton = None
else:

    @triton.jit
    def _product(
        x, w, out, ends, width, n,
        x_row, x_column, w_expert, w_row, w_column, out_row,
        SIZE: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        """out[rows of e, columns] = x[rows of e] @ w[e]; x [rows, SIZE], w [n, SIZE, width], ends [n] int32."""
        # The expert of this program's block of rows: each expert has as many blocks as its rows fill.
        block, number = tl.program_id(0), tl.arange(0, EXPERTS)
        until = tl.load(ends + number, mask=number < n, other=0)
        since = tl.load(ends + number - 1, mask=(number > 0) & (number < n), other=0)
        blocks = tl.cdiv(tl.maximum(until - since, 0), ROWS)
        expert = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
        if expert >= n:
            return
        earlier = tl.sum(tl.where(number < expert, blocks, 0), 0)
        first = tl.sum(tl.where(number == expert, since, 0), 0) + (block - earlier) * ROWS
        last = tl.sum(tl.where(number == expert, until, 0), 0)

        row = first + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        x_at = x + row[:, None].to(tl.int64) * x_row + depth[None, :] * x_column
        w_at = w + expert.to(tl.int64) * w_expert
        w_at += depth[:, None].to(tl.int64) * w_row + column[None, :].to(tl.int64) * w_column
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, SIZE, DEPTH):
            left = SIZE - start
            a = tl.load(x_at, mask=(row[:, None] < last) & (depth[None, :] < left), other=0.0)
            b = tl.load(w_at, mask=(depth[:, None] < left) & (column[None, :] < width), other=0.0)
            total = tl.dot(a, b, total, input_precision="ieee")
            x_at += DEPTH * x_column
            w_at += DEPTH * w_row
        at = out + row[:, None].to(tl.int64) * out_row + column[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=(row[:, None] < last) & (column[None, :] < width))


def blocking(rows: int, n: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """The kernel's block sizes and pipeline. With few rows, reading weights takes the time: many programs read long lines. With
    many rows, arithmetic takes it."""
    wide = 2 if dtype == torch.float32 else 1  # float32 takes twice the shared memory and registers
    sizes = {"ROWS": 16, "COLUMNS": 64 if width > 8192 else 32, "DEPTH": 128 // wide, "num_warps": 4, "num_stages": 4}
    if rows > 16 * n:
        sizes = {"ROWS": 64, "COLUMNS": 128 // wide, "DEPTH": 64 // wide, "num_warps": 4, "num_stages": 3}
    return sizes | {"EXPERTS": max(2, 1 << (n - 1).bit_length())}


def launch(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The kernel, with the arguments of `product`; rows after the last end are not initialised."""
    (count, size), (n, _, width) = rows.shape, weight.shape
    out = rows.new_empty(count, width)
    sizes = blocking(count, n, width, rows.dtype)
    # An upper bound on the blocks: each expert's last one may not be full.
    grid = (min(count, -(-count // sizes["ROWS"]) + n), -(-width // sizes["COLUMNS"]))
    strides = (*rows.stride(), *weight.stride(), out.stride(0))
    with torch.cuda.device_of(rows):  # Triton launches on the current device, not on its arguments'
        _product[grid](rows, weight, out, ends, width, n, *strides, SIZE=size, **sizes)
    return out


@torch.library.custom_op("esparse::grouped_product", mutates_args=())
def product(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """[rows, size] by [n, size, width] -> [rows, width]: each row times the weights of its expert.

    rows: sorted by expert. ends: int32 [n], the end of each expert's rows; rows after the last end are not computed.
    torch.compile treats it as one operator. Off the GPU: one product after another.
    """
    if rows.is_cuda:
        return launch(rows, weight, ends)
    out, start = rows.new_zeros(len(rows), weight.shape[2]), 0
    for number, end in enumerate(ends.tolist()):
        torch.mm(rows[start:end], weight[number], out=out[start:end])
        start = end
    return out


@product.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


_works: dict[tuple[torch.device, torch.dtype], bool] = {}  # not functools.cache, past which torch.compile traces


def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel compiles for this GPU and dtype and multiplies correctly; tried once, on a small product."""
    if (device, dtype) not in _works:
        _works[device, dtype] = triton is not None and _try(device, dtype)
    return _works[device, dtype]


def _try(device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((5, 96), (3, 96, 80)))
    expected = torch.cat([rows[:2] @ weight[0], rows[2:4] @ weight[2]])
    try:
        found = launch(rows, weight, torch.tensor([2, 2, 4], dtype=torch.int32, device=device))[:4]
        if torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-1):
            return True
        reason = "its result is wrong"
    except Exception as error:  # any compiler or driver error: another path exists
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    warnings.warn(
        f"esparse's grouped product does not run on {device} in {dtype} ({reason}): skipping is slower.", stacklevel=2
    )
    return False
