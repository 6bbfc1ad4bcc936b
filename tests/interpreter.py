"""Triton's interpreter in less time: what it makes anew for each value of a kernel is made once.

What it computes stays the same, but that int32 is not searched for overflows in the tests' small shapes; `make test-all`
does that, too, and interprets each function each time (recording.py).
"""

import functools
import inspect
import itertools
import random
import threading

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

from . import recording


def _patch_once(patch):
    """It patches the whole language at each call of a helper; within a launch it is patched, and stays so."""

    @functools.cache
    def languages(function):
        return [x for x in function.__globals__.values() if x is tl or x is tl.core]

    def patched(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch(function)
        return getattr(interpreter, "_LangPatchScope", lambda: None)()

    return patched


def _dtype_once(numpy_dtype):
    """It makes a table of all of them for each value."""
    of_scalar = functools.cache(numpy_dtype)
    return lambda dtype: of_scalar(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)


def _type_once(init):
    """Types of one shape and element have the same attributes. Not one dict: in Python 3.13.0 that loses some of it."""
    known = {}

    def patched(self, element_ty, shape):
        key = element_ty, *(getattr(size, "value", size) for size in shape)
        if element_ty.is_ptr():  # which have no hash
            init(self, element_ty, shape)
        elif key in known:
            vars(self).update(known[key])
        else:
            init(self, element_ty, shape)
            self.of_tensors = {}
            known[key] = dict(vars(self))

    return patched


def _shape_once(init):
    """What a tensor has of its type, it has from the first one of that type."""

    def patched(self, handle, type):
        of_type = vars(type).setdefault("of_tensors", {})
        if of_type:
            vars(self).update(of_type)
            self.handle = handle
        else:
            init(self, handle, type)
            of_type.update(vars(self))
            del of_type["handle"]

    return patched


def _operands_once(check):
    """Operands of one wide type need no other, and a number beside a tensor is made one once."""
    numbers = {}
    kinds = {id(tl.float32): (int, float), id(tl.int32): (int,), id(tl.int64): (int,), id(tl.int1): ()}

    def of_number(self, tensor, number, *args, **options):
        key = repr(number), tensor.type.name, args, *options.items()
        if key not in numbers:
            numbers[key] = check(self, tensor, number, *args, **options)[1]
            numbers[key].handle.data.flags.writeable = False
        return numbers[key]

    def patched(self, lhs, rhs, *args, **options):
        one, other = getattr(lhs, "dtype", None), getattr(rhs, "dtype", None)
        if one is other and id(one) in kinds:
            return self.broadcast_impl_value(lhs, rhs)
        if type(rhs) in kinds.get(id(one), ()):
            return lhs, of_number(self, lhs, rhs, *args, **options)
        if type(lhs) in kinds.get(id(other), ()):
            return of_number(self, rhs, lhs, *args, **options), rhs
        return check(self, lhs, rhs, *args, **options)

    return patched


def _same_at_once(broadcast):
    """Of one type, there is nothing to broadcast."""

    def patched(self, lhs, rhs):
        one, other = getattr(lhs.type, "of_tensors", None), getattr(rhs.type, "of_tensors", None)
        return (lhs, rhs) if one is other and one is not None else broadcast(self, lhs, rhs)

    return patched


def _passed_once(validate):
    """Whether numbers are no larger than their type: they are if larger ones have passed."""
    passed = {}

    def patched(data, dtype):
        if data.itemsize <= passed.get(dtype.name, 0):
            return True
        fits = validate(data, dtype)
        if fits:
            passed[dtype.name] = data.itemsize
        return fits

    return patched


def _handle_at_once(init, fits):
    """A handle in one call, not three."""

    def patched(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, attr or {}
        if not fits(data, dtype):
            init(self, data, dtype, self.attr)  # which says so

    return patched


def _bfloat16_at_once(convert):
    """It has a table to float32; from it, the upper bits are cut off, but of numbers below all normal ones, where what it
    makes is something else.
    """
    table = convert(np.arange(1 << 16, dtype=np.uint16), tl.bfloat16, tl.float32, None)

    def patched(data, of, to, rounding):
        if of == tl.bfloat16 and to == tl.float32:
            return table[data]
        if of == tl.float32 and to == tl.bfloat16 and rounding is None:
            bits = data.view(np.uint32)
            magnitudes = bits & np.uint32(0x7FFFFFFF)
            if not ((magnitudes < 1 << 23) & (magnitudes > 0)).any():
                return (bits >> np.uint32(16)).astype(np.uint16)
        return convert(data, of, to, rounding)

    return patched


def hurry(whole: bool) -> None:
    """Patches the interpreter of this process."""
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _dtype_once(interpreter._get_np_dtype)
    tl.core.block_type.__init__ = _type_once(tl.core.block_type.__init__)
    tl.core.tensor.__init__ = _shape_once(tl.core.tensor.__init__)
    semantic = type(interpreter.interpreter_semantic)
    semantic.binary_op_type_checking_impl = _operands_once(semantic.binary_op_type_checking_impl)
    semantic.broadcast_impl_value = _same_at_once(semantic.broadcast_impl_value)
    fits = _passed_once(getattr(interpreter, "_validate_np_data_size", lambda *_: True))  # older ones do not ask
    interpreter._validate_np_data_size = fits
    interpreter.TensorHandle.__init__ = _handle_at_once(interpreter.TensorHandle.__init__, fits)
    interpreter._convert_float = _bfloat16_at_once(interpreter._convert_float)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=whole)
    if not whole:
        recording.record()


class AtOnce(interpreter.GridExecutor):
    """Runs a launch's programs in turns, as if at once: each until it reads or changes a counter. Whose turn it is, is
    left to chance.
    """

    def __call__(self, *args, **options):
        interpreter._patch_lang(self.fn)  # once for all, after `hurry`
        given = inspect.getcallargs(self.fn, *args, **{k: v for k, v in options.items() if k in self.arg_names})
        given = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()}
        builder, grid = interpreter.interpreter_builder, (*self.grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        programs = [_Program(functools.partial(self.fn, **given), p) for p in itertools.product(*map(range, grid))]
        atomic, turns = builder.create_atomic_rmw, random.Random(0)
        builder.create_atomic_rmw = lambda *of: self.now.pause() or atomic(*of)
        recording.turns.append(True)
        try:
            while programs:
                self.now = turns.choice(programs)
                builder.set_grid_idx(*self.now.place)
                self.now.take_turn()
                programs = [program for program in programs if not program.ended]
        finally:
            del builder.create_atomic_rmw
            recording.turns.clear()


class _Program:
    """One that runs when it is its turn."""

    def __init__(self, run, place):
        self.place, self.run, self.ended, self.error = place, run, False, None
        self.turn, self.over = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._whole, daemon=True).start()

    def _whole(self):
        self.turn.acquire()
        try:
            self.run()
        except Exception as error:
            self.error = error
        self.ended = True
        self.over.release()

    def pause(self):
        self.over.release()
        self.turn.acquire()

    def take_turn(self):
        self.turn.release()
        self.over.acquire()
        if self.error:
            raise self.error
