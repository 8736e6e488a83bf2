"""What a block's d x d matrices go through between the moments and the map: the weight, and the terms of dX."""

from polywhiten.cpu.device.simd import get, number, pointer, put


def fold_weight(numbers, scratch, share):
    """A share of A' (blocks, d, d), of A = diag(weight) W, and of the weight's gradient (blocks, d).

    That is the sum of the rows of K times those of W. Numbers: shares, blocks, d, the addresses of W, weight, A', K and
    the gradient.
    """
    shares, blocks, d = numbers[0], numbers[1], numbers[2]
    w, weight, a = pointer(numbers[3], scratch), pointer(numbers[4], scratch), pointer(numbers[5], scratch)
    k, gradient = pointer(numbers[6], scratch), pointer(numbers[7], scratch)
    for row in range(share * blocks // shares * d, (share + 1) * blocks // shares * d):
        block, i = divmod(row, d)
        factor, total = get(weight, row), 0.0
        for j in range(d):
            total += get(k, row * d + j) * get(w, row * d + j)
            put(a, (block * d + j) * d + i, factor * get(w, row * d + j))
        put(gradient, row, total)


def gradient_terms(numbers, scratch, share):
    """A share of (dS + dS') / M (blocks, d, d) in place of dS, and of s / M (blocks, d).

    Numbers: shares, blocks, d, M, the addresses of dS, s and s / M.
    """
    shares, blocks, d, count = numbers[0], numbers[1], numbers[2], numbers[3]
    ds, s, centre = pointer(numbers[4], scratch), pointer(numbers[5], scratch), pointer(numbers[6], scratch)
    divisor = number(s, count)
    for row in range(share * blocks // shares * d, (share + 1) * blocks // shares * d):
        block, i = divmod(row, d)
        put(centre, row, get(s, row) / divisor)
        for j in range(i + 1):
            other = (block * d + j) * d + i
            value = (get(ds, row * d + j) + get(ds, other)) / divisor
            put(ds, row * d + j, value)
            put(ds, other, value)
