"""Outputs that backward recomputes instead of saving them.

The linear layers that read a norm's output or a gated product save it for backward, although one
cheap kernel can recompute it from tensors that are saved anyway. A function that produces such an
output marks it with the way to recompute it, its recipe (`recomputable`). Within `recomputing()`,
autograd then saves the recipe instead of the tensor. The first reader in backward runs it, the
others share the result, and it is freed after the last one. Results are identical bit for bit: the
same kernel runs on the same input.

The dtype casts of a marked tensor (three bf16 copies for q, k and v under autocast) are recipes
too. For any other tensor that was cast from 16 bits to fp32, the 16 bits are kept, once.

Everything else is saved as usual. Saved-tensor hooks disable autograd's check for in-place changes,
so the check is made here, with the same outcome.

A recipe without readers expires at the end of the block. Otherwise, a detached output would keep
its sources and their graph alive.

Inside other saved-tensor hooks (checkpointing, offloading), those take precedence, and nothing is
marked.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

import torch

from .runtime import PLAIN, is_looked_into, pays
from .second_derivative import gradients

_MARK = "_liger_recipe"
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_NARROW = (torch.bfloat16, torch.float16)
_MIN_WIDENED = 1 << 20  # with fewer elements, saving 2 bytes each is not worth a kernel


def recomputing() -> contextlib.AbstractContextManager:
    """Make autograd save recipes in place of marked tensors.

    Does nothing inside other saved-tensor hooks, or where torch disables such hooks.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled() or _top_hooks(True) is not None:
        return contextlib.nullcontext()
    return _recomputing()


def without_hooks() -> contextlib.AbstractContextManager:
    """Make autograd save tensors as they are, whatever saved-tensor hooks there are."""
    if _top_hooks(True) is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Block(threading.local):
    recipes: list[weakref.ref[Recipe]] | None = None  # made in this block of `recomputing`


_block = _Block()


@contextlib.contextmanager
def _recomputing() -> Iterator[None]:
    before, _block.recipes = _block.recipes, []
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):  # as torch.func calls what is on here
            raise
        raise RuntimeError(
            "This forward calls torch.func, which cannot look into one whose activations are "
            "recomputed: set activation_memory to keep in liger_kernel_config."
        ) from error
    finally:
        made, _block.recipes = _block.recipes, before
        for recipe in made:
            if (alive := recipe()) is not None:
                alive.expire()


def _is_recomputing() -> bool:
    """Return whether the innermost saved-tensor hooks are those of `recomputing`."""
    if is_looked_into():
        return False
    hooks = _top_hooks(True)
    return hooks is not None and hooks[0] is _pack


def recomputable(
    y: torch.Tensor,
    function: Callable[..., torch.Tensor],
    sources: tuple[torch.Tensor, ...],
    parameters: tuple[torch.Tensor | None, ...] = (),
) -> torch.Tensor:
    """Mark `y` as the result of `function(*sources, *parameters)`, and return it.

    Args:
        y: a tensor that owns its memory.
        function: returns `y`, bit for bit, whenever it runs.
        sources: tensors that autograd saves for the backward of `y` anyway.
        parameters: small tensors (a norm's weight). They are copied, because an engine may free
            them, or an optimizer may change them, between forward and backward.
    """
    if y.requires_grad and _is_recomputing():
        copies = tuple(None if p is None else p.detach().clone() for p in parameters)
        _mark(y, Recipe(y, function, sources, copies))
    return y


def by_torch(
    function: Callable[..., torch.Tensor],
    sources: tuple[torch.Tensor, ...],
    parameters: tuple[torch.Tensor | None, ...] = (),
) -> torch.Tensor:
    """Return `function(*sources, *parameters)`, computed in plain torch.

    Within `recomputing()`, only the arguments are saved for backward, and the result is marked.
    """
    arguments = (*sources, *parameters)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    if not (needed and _is_recomputing()):
        return function(*arguments)
    return recomputable(_FromArguments.apply(function, *arguments), function, sources, parameters)


class _FromArguments(torch.autograd.Function):
    """Save only the arguments; backward runs the function again and differentiates it."""

    @staticmethod
    def forward(ctx, function, *arguments):
        ctx.function, ctx.autocast = function, _autocast_state(arguments[0])
        ctx.save_for_backward(*arguments)
        return function(*arguments)

    @staticmethod
    def backward(ctx, dy):
        with torch.autocast(**ctx.autocast):
            found = gradients(ctx.function, ctx.saved_tensors, dy, torch.is_grad_enabled())
        return None, *found


def _autocast_state(x: torch.Tensor) -> dict[str, object]:
    device = x.device.type
    return {
        "device_type": device,
        "dtype": torch.get_autocast_dtype(device),
        "enabled": torch.is_autocast_enabled(device),
    }


class Recipe:
    """How to recompute a tensor. Its sources are packed when the first reader is."""

    __slots__ = (
        "__weakref__", "autocast", "casts", "dtype", "function", "output", "packed", "parameters",
        "readers", "sources", "stream", "unread", "value", "version",
    )  # fmt: skip

    def __init__(self, y, function, sources, parameters=()):
        self.function, self.parameters = function, parameters
        self.sources = tuple((t, t._version) for t in sources)
        self.output, self.version, self.dtype = weakref.ref(y), y._version, y.dtype
        self.autocast = _autocast_state(y)
        self.packed, self.value, self.stream = None, None, None
        self.readers = self.unread = 0
        self.casts: dict[torch.dtype, weakref.ref[Recipe]] = {}  # weak: each holds this recipe
        if _block.recipes is not None:
            _block.recipes.append(weakref.ref(self))

    def __reduce__(self):
        return _nothing, ()  # a tensor that is saved to a file loses its recipe

    def expire(self) -> None:
        """Release the sources and accept no reader, unless there is one already."""
        if self.packed is None:
            self.sources, self.version = (), -1

    def add_reader(self, y: torch.Tensor) -> bool:
        """Register a reader of `y`; return False if this recipe cannot reproduce `y` as it is."""
        if y._version != self.version:
            return False
        if self.packed is None:
            if any(t._version != version for t, version in self.sources):
                return False
            self.packed = tuple(_pack(t) for t, _ in self.sources)
            self.sources = ()
        self.readers += 1
        self.unread += 1
        return True

    def read(self) -> torch.Tensor:
        """Return the tensor for one reader; it is recomputed for the first, freed by the last."""
        stream = _stream(self.packed[0])
        value = self.value if self.stream == stream else None
        if value is None:
            with torch.no_grad(), torch.autocast(**self.autocast):
                value = self.function(*map(_unpack, self.packed), *self.parameters)
        self.unread -= 1
        if self.unread > 0:
            self.value, self.stream = value, stream
        else:  # the last reader; with retain_graph=True, all of them read once more
            self.value, self.unread = None, self.readers
        return value

    def cast(self, y: torch.Tensor) -> Recipe | None:
        """Return the recipe of `y`, a cast of this recipe's output."""
        output = self.output()
        # If the output is unchanged now, it was also unchanged when it was cast.
        if output is None or output._version != self.version or output.device != y.device:
            return None
        if output.stride() != y.stride():  # a cast that also changed the layout
            return None
        dtype = y.dtype
        known = self.casts.get(dtype, _nothing)()
        if known is None:
            known = Recipe(y, lambda t: t.to(dtype), (output,))
            self.casts[dtype] = weakref.ref(known)
        return known


def _nothing() -> None:
    return None


def _mark(y: torch.Tensor, recipe: Recipe) -> None:
    # On the storage, because an engine's hooks pass on another tensor with the same storage.
    setattr(y.untyped_storage(), _MARK, recipe)
    # Also on the node, where casts of `y` look it up. Weak, because nodes outlive the tensors.
    y.grad_fn.metadata[_MARK] = weakref.ref(recipe)


def _stream(packed: tuple) -> int | None:
    """Return the CUDA stream on which a recipe's sources would be read."""
    tensor = packed[0]
    while isinstance(tensor, Recipe):
        tensor = tensor.packed[0][0]
    if not tensor.is_cuda:
        return None
    return torch._C._cuda_getCurrentRawStream(tensor.device.index)


def _pack(t: torch.Tensor) -> tuple:
    """Return (recipe, (shape, strides, offset)) or (tensor, version)."""
    if type(t) in PLAIN and t.layout is torch.strided:  # other tensors have no storage of their own
        base = t._base if t._is_view() else t
        recipe = _marked_on(t.untyped_storage()) or _recipe_of_cast(base)
        if recipe is not None and t.dtype == recipe.dtype and recipe.add_reader(base):
            # From now on its readers hold it: a holder of the storage must not hold the sources.
            setattr(t.untyped_storage(), _MARK, weakref.ref(recipe))
            return recipe, (t.shape, t.stride(), t.storage_offset())
    # Detached: otherwise a node that saves its own output would keep itself alive.
    return t if t.grad_fn is None else t.detach(), t._version


def _unpack(packed: tuple) -> torch.Tensor:
    kept, state = packed
    if isinstance(kept, Recipe):
        value = kept.read()
        return value.as_strided(*state)
    if kept._version != state:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {kept.dtype} {list(kept.shape)} is at version {kept._version}; expected "
            f"version {state}. Change it after backward, or change a copy."
        )
    return kept


def _marked_on(storage: torch.UntypedStorage) -> Recipe | None:
    found = getattr(storage, _MARK, None)
    return found() if isinstance(found, weakref.ref) else found


def _recipe_of_cast(y: torch.Tensor) -> Recipe | None:
    node = y.grad_fn
    if type(node).__name__ != "ToCopyBackward0" or y._version:  # changed since
        return None
    source, output = node.next_functions[0]
    if source is None:
        return None
    known = source.metadata.get(_MARK, _nothing)()
    if known is not None:
        recipe = known.cast(y)
    elif y.dtype == torch.float32 and pays(y, _MIN_WIDENED):
        recipe = _widened(y, source._input_metadata[output].dtype)
    else:
        recipe = None
    if recipe is not None:
        setattr(y.untyped_storage(), _MARK, recipe)
    return recipe


def _widened(y: torch.Tensor, dtype: torch.dtype) -> Recipe | None:
    """Return the recipe of an fp32 tensor that was cast from 16 bits: it saves those."""
    if dtype not in _NARROW:
        return None
    return Recipe(y, lambda t: t.to(torch.float32), (y.detach().to(dtype),))
