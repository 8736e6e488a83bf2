"""What happens to the d x d matrices of a block between the moments and the affine map."""

from polywhiten.cpu.arguments import GradientTermsArgs, ScaleWhitenerArgs, unpack
from polywhiten.cpu.device.pointers import cast, get, put


def scale_whitener(packed, workspace, part, num_parts):
    """Compute A' of A = diag(weight) W, and the gradient of the weight, for a part of the blocks.

    That gradient is the sum of each row of K times the same row of W.
    """
    args = unpack(ScaleWhitenerArgs, packed, workspace)
    blocks, d, w = args.blocks, args.d, args.whitener
    for row in range(part * blocks // num_parts * d, (part + 1) * blocks // num_parts * d):
        block, i = divmod(row, d)
        factor, total = get(args.weight, row), 0.0
        for j in range(d):
            total += get(args.k, row * d + j) * get(w, row * d + j)
            put(args.scaled, (block * d + j) * d + i, factor * get(w, row * d + j))
        put(args.dweight, row, total)


def gradient_terms(packed, workspace, part, num_parts):
    """Compute s / M, and overwrite dS with (dS + dS') / M, for a part of the blocks; s is dY 1."""
    args = unpack(GradientTermsArgs, packed, workspace)
    blocks, d, ds = args.blocks, args.d, args.ds
    divisor = cast(args.s, args.num_samples)
    for row in range(part * blocks // num_parts * d, (part + 1) * blocks // num_parts * d):
        block, i = divmod(row, d)
        put(args.mean_dy, row, get(args.s, row) / divisor)
        for j in range(i + 1):
            other = (block * d + j) * d + i
            value = (get(ds, row * d + j) + get(ds, other)) / divisor
            put(ds, row * d + j, value)
            put(ds, other, value)
