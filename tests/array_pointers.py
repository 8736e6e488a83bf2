"""Pointers to arrays, in functions that Numba compiles. Processes that tests start import this module by its name."""

from numba import types
from numba.extending import intrinsic


@intrinsic
def pointer(typingctx, address, like):
    """The address of an array, as a pointer to its dtype."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate
