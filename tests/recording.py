"""Kernels' functions, interpreted once for all values of the same types: what one then asks of the interpreter's builder,
operation by operation, is asked again for others without the language between.

A compiler, too, knows nothing but types. Functions that look at numbers, as a loop over blocks does, are not recorded,
nor those that count across programs, but those that they call are. The builder is asked as it is at that time, patched or not.
"""

import functools
import types
from operator import itemgetter

from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle

#: Whether programs take turns, of which one at a time could be recorded: nothing new is.
turns: list[bool] = []
SEQUENCES = (tuple, list, tl.tuple)
#: What is told apart by itself: numbers and functions.
THEMSELVES = (type(None), bool, int, str, types.FunctionType, InterpretedFunction)
OF_BUILDER = interpreter.InterpreterBuilder
#: Operations that are not recorded; those that are done again with the same values; and those that make constants of
#: constants.
REFUSED = ("atomic", "descriptor", "print")
REPEATED = ("load", "store", "barrier", "assert", "assume")
OF_CONSTANTS = ("create_splat", "create_make_range")


class _Unknown(TypeError):
    """An argument of which we do not know what it is told apart by."""


def _key(value, handles):
    """What a value is told apart by, its tensors by their types; adds their handles."""
    kind = type(value)
    if kind is tl.tensor:
        handles.append(value.handle)
        return value.type.name
    if isinstance(value, SEQUENCES):
        return kind, *[_key(one, handles) for one in value]
    if isinstance(value, THEMSELVES):
        return kind, value
    if isinstance(value, tl.dtype):
        return kind, value.name
    if kind is tl.constexpr:
        return kind, _key(value.value, handles)
    if kind in (float, slice):
        return kind, repr(value)
    raise _Unknown


def _with(of_tensor, value):
    """A value with other tensors."""
    if isinstance(value, tl.tensor):
        return of_tensor(value)
    if isinstance(value, SEQUENCES):
        make = getattr(type(value), "_make", type(value))
        return make([_with(of_tensor, one) for one in value])
    return value


def _name_of(value):
    """What tells an argument of the builder apart: it makes its types anew each time."""
    if isinstance(value, tl.dtype):
        return tl.dtype, value.name
    if isinstance(value, (bool, int, str, list, tuple)):
        return type(value), repr(value)
    return id(value)


class _Watched(TensorHandle):
    """A value in a function that is being recorded: whoever looks at its numbers, but the builder, may go by them."""

    @property
    def data(self):
        if _Recording.now and not _Recording.now.within:
            _Recording.now.stop()
        return vars(self)["data"]


class _Recording:
    """What a function asks of the builder, in whose place it stands."""

    now = None

    def __init__(self, builder):
        self.builder, self.within, self.spoilt = builder, False, False
        self.values, self.steps = [builder], []  # constants, and None for what is made
        self.places, self.made, self.known, self.kept = {}, {0}, {}, []

    def __getattr__(self, name):
        method = getattr(self.builder, name)
        return functools.partial(self.ask, name, method) if callable(method) else method

    def ask(self, name, method, *args, **options):
        if self.within:
            return method(*args, **options)
        if options or any(word in name for word in REFUSED):
            self.stop()
        places = [self.place_of(arg) for arg in args]
        asked = name, *places
        if asked in self.known:
            return self.known[asked]
        result = self.unwatched(method, *args, **options)
        if not any(word in name for word in REPEATED):
            self.known[asked] = result
        if not (name.startswith("get_") or (name in OF_CONSTANTS and self.made.isdisjoint(places))):
            self.step(name, places, result)
        return result

    def stop(self):
        """It cannot be recorded; the functions that it has still to call may be."""
        self.spoilt = True
        if _Recording.now is self:
            _Recording.now, interpreter.interpreter_semantic.builder = None, self.builder

    def unwatched(self, function, *args, **options):
        self.within = True
        try:
            return function(*args, **options)
        finally:
            self.within = False

    def place_of(self, value):
        """Of what is not known, a constant's."""
        name = _name_of(value)
        if name not in self.places:
            if isinstance(value, (list, tuple)) and any(isinstance(one, TensorHandle) for one in value):
                self.stop()
            self.places[name] = len(self.values)
            self.values.append(value)
            self.kept.append(value)
        return self.places[name]

    def put(self, value):
        """Gives what is no constant a place."""
        if type(value) is TensorHandle:
            value.__class__ = _Watched
        place = len(self.values)
        self.made.add(place)
        self.values.append(None)
        if value is not None:
            self.places[id(value)] = place
            self.kept.append(value)
        return place

    def step(self, what, places, result):
        whole = self.put(result)
        self.steps.append((what, itemgetter(0, *places) if places else lambda values: values[:1], whole))
        if isinstance(result, tuple):
            for k, one in enumerate(result):
                self.steps.append((lambda builder, results, k=k: results[k], itemgetter(0, whole), self.put(one)))

    def reduced(self, apply, reduction, given):
        """tl.reduce and tl.associative_scan, which look at numbers without the builder."""
        tensors = given if isinstance(given, tuple) else (given,)
        types_of = [tensor.type for tensor in tensors]

        def again(builder, *handles):
            return tuple(one.handle for one in apply(reduction, tuple(map(tl.tensor, handles, types_of))))

        found = self.unwatched(apply, reduction, tensors)
        self.step(again, [self.place_of(tensor.handle) for tensor in tensors], tuple(one.handle for one in found))
        return found if given is tensors else found[0]

    def maker(self, result):
        """What makes such a result of the values at all places."""
        if isinstance(result, tl.tensor):
            place, of = self.place_of(result.handle), result.type
            return lambda values: tl.tensor(values[place], of)
        if isinstance(result, SEQUENCES):
            make, makers = getattr(type(result), "_make", type(result)), [self.maker(one) for one in result]
            return lambda values: make([maker(values) for maker in makers])
        return lambda values: result

    def run(self, function, args, options):
        """The function's result, and what makes it of other handles; None: it is to be run each time."""
        inputs = []

        def watched(tensor):  # each by itself: two may be the same this time
            handle = object.__new__(_Watched)
            vars(handle).update(vars(tensor.handle))
            inputs.append(self.put(handle))
            return tl.tensor(handle, tensor.type)

        args, options = _with(watched, args), {name: _with(watched, value) for name, value in options.items()}
        semantic = interpreter.interpreter_semantic
        _Recording.now, semantic.builder = self, self
        try:
            result = function(*args, **options)
            make = self.maker(result)
        finally:
            _Recording.now, semantic.builder = None, self.builder
            for one in self.kept:
                if type(one) is _Watched:
                    one.__class__ = TensorHandle
        template, steps, end = self.values, self.steps, 1 + len(inputs)

        def replay(handles):
            values = template.copy()
            values[1:end] = handles
            for what, get, place in steps:
                values[place] = (getattr(OF_BUILDER, what) if type(what) is str else what)(*get(values))
            return make(values)

        return result, None if self.spoilt else replay


def _recorded(function):
    """A function of the language that is run once for all values of the same types."""
    recorded = {}

    def patched(*args, **options):
        handles = []
        if _Recording.now:
            return function(*args, **options)
        try:
            key = _key(args, handles), *[(name, _key(value, handles)) for name, value in options.items()]
        except _Unknown:
            return function(*args, **options)
        if key not in recorded and not turns:
            result, recorded[key] = _Recording(interpreter.interpreter_builder).run(function, args, options)
            return result
        replay = recorded.get(key)
        return replay(handles) if replay else function(*args, **options)

    return patched


def _recorded_members(patch):
    """Those that the interpreter puts in the place of the language's own."""
    of_member = functools.cache(
        lambda member: _recorded(functools.partial(member, _semantic=interpreter.interpreter_semantic))
    )

    def patched(obj, name, member, *rest):
        patch(obj, name, member, *rest)
        recorded = of_member(member)
        setattr(obj, name, lambda *args, _semantic=None, **options: recorded(*args, **options))

    return patched


def _blocks_are_true(patch):
    """Whatever their numbers, at which it looks for how many there are."""

    def patched(tensor, *rest):
        patch(tensor, *rest)
        of_number = tensor.__bool__
        tensor.__bool__ = lambda self: (self.type.is_block() and self.type.numel > 1) or of_number(self)

    return patched


def _reduced(apply):
    def patched(reduction, given):
        now = _Recording.now
        return apply(reduction, given) if now is None or now.within else now.reduced(apply, reduction, given)

    return patched


def record() -> None:
    """Patches the interpreter of this process."""
    InterpretedFunction.__call__ = _recorded(InterpretedFunction.__call__)
    interpreter._patch_attr = _recorded_members(interpreter._patch_attr)
    interpreter._patch_lang_tensor = _blocks_are_true(interpreter._patch_lang_tensor)
    interpreter.ReduceScanOpInterface.apply = _reduced(interpreter.ReduceScanOpInterface.apply)
