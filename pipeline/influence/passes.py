"""Passes of the model over pairs: features, and their derivatives along vectors in parameter space.

Forward-mode passes need attention as plain matrix products; fused attention has no forward derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import InputError
from pipeline.influence.arithmetic import arithmetic, attention_in_parts, features_in
from pipeline.influence.compiled import Pass, Programs
from pipeline.influence.forward_mode import push_forward, push_named_forward
from pipeline.influence.settings import Settings
from pipeline.influence.tangents import TangentRules
from pipeline.influence.trees import filled, restricted
from pipeline.influence.twice import TwiceDifferentiable
from pipeline.types import Features, PairBatch, Tree

#: Features and their derivatives, by the names of the vectors they are taken along; `()` is the value.
Jet = dict[tuple[str, ...], Features]

#: Bytes of the largest activation of a pass on a CPU: it stays in the caches, and in memory that the allocator keeps.
_CPU_BYTES = 8 << 20

#: Pairs in one pass on a CPU: with fewer the calls cost more than the arithmetic, with more nothing is gained.
_CPU_PAIRS = (32, 128)

_cpu_pairs: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

#: Directions carried by one pass; more are done in several passes over the same pairs.
_TANGENTS_PER_PASS = 16


class Passes:
    """Runs one model, in `eval` mode, at any parameters.

    Args:
        model: `model(images, tokens)` gives `Features`.
        settings: `precision` decides the arithmetic.
        compiled: pairs of compiled passes, which those with derivatives then are; 0 compiles none.

    `chunk` is how many pairs of a batch are differentiated at a time; fewer once memory did not suffice.
    """

    def __init__(self, model: nn.Module, settings: Settings, compiled: int = 0) -> None:
        self.model = model
        self.settings = settings
        self.chunk = settings.chunk
        self.programs = Programs(model, compiled) if compiled else None

    @contextmanager
    def ready(self, differentiable: bool = True) -> Iterator[None]:
        """Within this context: `eval` mode, plain attention where derivatives are taken, and losses in float32."""
        training = self.model.training
        self.model.eval()
        try:
            plain = sdpa_kernel(SDPBackend.MATH) if differentiable else nullcontext()
            with arithmetic("fp32"), attention_in_parts(), plain:
                yield
        finally:
            self.model.train(training)

    def features(self, state: Tree, batch: PairBatch) -> Features:
        """Features of a batch with the tensors of `state` (parameters and buffers), float32 or wider."""
        return self._features(state, batch.images, batch.tokens)

    def _features(self, state: Tree, images: Tensor, tokens: Tensor) -> Features:
        run = partial(functional_call, self.model, state, (images, tokens))
        return features_in(self.settings.precision, images.device, run)

    def jet(self, state: Tree, vectors: dict[str, Tree], batch: PairBatch, wanted: Sequence[tuple[str, ...]]) -> Jet:
        """Features of a batch and their derivatives along the wanted vectors, names of one or two each.

        Derivatives of second order are mixed ones; they bring those of first order along both vectors with them.
        Directions at one point share the primal pass. With the parameters `projections` everything at one point is one
        pass, in which the towers carry no tangents. Raises `InputError` where an operator has no forward derivative.
        """
        together = self.settings.parameters == "projections"
        pairs = [names for names in wanted if len(names) == 2]
        singles = {name for names in wanted if len(names) == 1 for name in names} - {
            n for names in pairs for n in names
        }
        found: Jet = {}
        try:
            ordered = sorted(singles)
            if together and pairs:
                found |= self._mixed(state, vectors, batch, *pairs[-1], beside=ordered)
                ordered = []
            for first, second in pairs[:-1] if together else pairs:
                found |= self._mixed(state, vectors, batch, first, second)
            width = max(1, len(ordered)) if together else _TANGENTS_PER_PASS
            for start in range(0, len(ordered), width):
                found |= self._tangents(state, vectors, batch, ordered[start : start + width])
        except (NotImplementedError, RuntimeError) as error:
            explained = self._explained(error, state, vectors, batch[:1], pairs)
            if explained is None:
                raise
            raise explained from error
        if not found:
            found[()] = self._value(state, batch)
        return found

    def _value(self, state: Tree, batch: PairBatch) -> Features:
        with TangentRules():
            return self.features(state, batch)

    def _tangents(self, state: Tree, vectors: dict[str, Tree], batch: PairBatch, names: list[str]) -> Jet:
        moved = sorted({parameter for name in names for parameter in vectors[name]})
        if not moved:
            value = self._value(state, batch)
            return {(): value} | {(name,): _zeros(value) for name in names}
        directions = [filled(vectors[name], restricted(state, moved)) for name in names]
        if len(names) == 1:
            value, tangent = self._run(self._along, state, directions[0], batch)
            return {(): value, (names[0],): tangent}
        value, tangents = self._run(self._along_each, state, _stacked(directions), batch)
        return {(): value} | {
            (name,): Features(*(part[index] for part in tangents)) for index, name in enumerate(names)
        }

    def _run(self, work: Pass, state: Tree, direction: Any, batch: PairBatch) -> list[Features]:
        """What a pass gives; a compiled program runs it where there is one for such a batch."""
        if self.programs is not None and self.programs.take(batch):
            with arithmetic(self.settings.precision):
                return self.programs.run(work, state, direction, batch)
        return work(state, direction, batch.images, batch.tokens)

    def _along(self, state: Tree, direction: Tree, images: Tensor, tokens: Tensor) -> list[Features]:
        """Features, and their derivatives along the direction."""
        at = {parameter: state[parameter] for parameter in direction}
        with TangentRules():
            value, tangent = push_named_forward(_on(self, state, images, tokens), at, direction)
        return [Features(*value), Features(*tangent)]

    def _along_each(self, state: Tree, directions: Tree, images: Tensor, tokens: Tensor) -> list[Features]:
        """Features, and their derivatives along each of the stacked directions."""
        at = {parameter: state[parameter] for parameter in directions}
        run = _on(self, state, images, tokens)
        with TangentRules(stacked=True):
            value, tangents = _over_directions(lambda d: push_forward(run, (at,), (d,)))(directions)
        return [value, tangents]

    def _mixed(
        self,
        state: Tree,
        vectors: dict[str, Tree],
        batch: PairBatch,
        first: str,
        second: str,
        beside: Sequence[str] = (),
    ) -> Jet:
        """The mixed derivative along two vectors, and first ones along these and those `beside` them."""
        outer = [second, *beside]
        moved = sorted(set(vectors[first]).union(*(vectors[name] for name in outer)))
        inner, *directions = (filled(vectors[name], restricted(state, moved)) for name in (first, *outer))
        if not beside:
            value, along_first, along_second, mixed = self._run(self._twice, state, (inner, directions[0]), batch)
            return {(): value, (first,): along_first, (second,): along_second, (first, second): mixed}
        both = inner, _stacked(directions)
        value, along_first, slopes, mixed = self._run(self._twice_each, state, both, batch)
        found: Jet = {(): value, (first,): along_first, (first, second): Features(*(part[0] for part in mixed))}
        return found | {(name,): Features(*(part[i] for part in slopes)) for i, name in enumerate(outer)}

    def _twice(self, state: Tree, along: Any, images: Tensor, tokens: Tensor) -> list[Features]:
        """Features, their derivatives along the first and the second direction, and the mixed one."""
        inner, outer = along
        with TwiceDifferentiable():
            value, slope = self._nested(state, inner, images, tokens)(outer)
        return [*value, *slope]

    def _twice_each(self, state: Tree, along: Any, images: Tensor, tokens: Tensor) -> list[Features]:
        """The same, for each of the stacked second directions."""
        inner, outer = along
        with TwiceDifferentiable():
            value, slopes = _over_directions(self._nested(state, inner, images, tokens))(outer)
        return [*value, *slopes]

    def _nested(self, state: Tree, inner: Tree, images: Tensor, tokens: Tensor) -> Callable[[Tree], Any]:
        """Features and their derivative along `inner`, pushed forward along another direction."""
        at = {parameter: state[parameter] for parameter in inner}
        run = _on(self, state, images, tokens)
        return lambda outer: push_forward(lambda point: push_forward(run, (point,), (inner,)), (at,), (outer,))

    def _explained(
        self, error: Exception, state: Tree, vectors: dict[str, Tree], pair: PairBatch, mixed: Sequence[tuple[str, str]]
    ) -> InputError | None:
        """For a missing forward derivative an `InputError` that names the module; None for any other error."""
        text = " ".join(str(error).split())
        if "forward AD" not in text and "forward-mode" not in text and "jvp" not in text:
            return None
        what, method = "forward derivative", "forward"
        where = self._failing(lambda: self._tangents(state, vectors, pair, sorted(vectors)[:1]))
        if where is None and mixed:
            what, method = "second forward derivative", "central"
            where = self._failing(lambda: self._mixed(state, vectors, pair, *mixed[0]))
        return InputError(f"the model has no {what}{where or ''}: {text[:200]}; use score.method: {method}")

    def _failing(self, work: Callable[[], Any]) -> str | None:
        """In words, the module in which a pass fails (empty outside of all modules); None for a pass that does not."""
        trail = _Trail(self.model)
        try:
            work()
        except (NotImplementedError, RuntimeError):
            return f" in module {trail.open_modules[-1]}" if trail.open_modules else ""
        finally:
            trail.close()
        return None


class _Trail:
    """Remembers which modules were entered and not left: after an error, where it happened."""

    def __init__(self, model: nn.Module) -> None:
        self.open_modules: list[str] = []
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            label = f"{name or 'model'} ({type(module).__name__})"
            self._handles.append(module.register_forward_pre_hook(self._entered(label)))
            self._handles.append(module.register_forward_hook(self._left))

    def _entered(self, label: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.open_modules.append(label)

        return hook

    def _left(self, *_: Any) -> None:
        self.open_modules.pop()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _on(passes: Passes, state: Tree, images: Tensor, tokens: Tensor) -> Callable[[Tree], Features]:
    return lambda point: passes._features({**state, **point}, images, tokens)


def _stacked(directions: Sequence[Tree]) -> Tree:
    return {name: torch.stack([direction[name] for direction in directions]) for name in directions[0]}


def _over_directions(function: Callable[[Tree], Any]) -> Callable[[Tree], Any]:
    """The function for a stack of directions; its first result does not depend on them."""
    shared: Any = (None, 0)
    return vmap(function, out_dims=shared)


def _zeros(features: Features) -> Features:
    return Features(*(torch.zeros_like(value) for value in features))


def pass_size(wanted: int, model: nn.Module, sample: PairBatch) -> int:
    """Pairs in a pass on the device of `sample`: as wanted; on a CPU 32 to 128 at most, by the model's activations."""
    if sample.images.device.type != "cpu":
        return wanted
    if model not in _cpu_pairs:
        fitting = _CPU_BYTES // _largest_activation(model, sample[:1])
        fewest, most = _CPU_PAIRS
        _cpu_pairs[model] = min(max(1 << fitting.bit_length() - 1, fewest), most)
    return min(wanted, _cpu_pairs[model])


@torch.no_grad()
def _largest_activation(model: nn.Module, pair: PairBatch) -> int:
    """Bytes of the largest output of a module for one pair."""
    sizes = [1]

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor):
                sizes.append(value.nbytes)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    training = model.training
    try:
        model.eval()(pair.images, pair.tokens)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return max(sizes)


def chunks(batch: PairBatch, size: int) -> Iterator[PairBatch]:
    """Consecutive parts of at most `size` pairs."""
    for start in range(0, len(batch), size):
        yield batch[start : start + size]


def joined(parts: Sequence[Features]) -> Features:
    """Features of consecutive parts of a batch as one; scale and bias are those of the first."""
    if len(parts) == 1:
        return parts[0]
    image, text = (torch.cat([getattr(part, side) for part in parts]) for side in ("image", "text"))
    return Features(image, text, parts[0].scale, parts[0].bias)


def joined_jets(parts: Sequence[Jet]) -> Jet:
    """Jets of consecutive parts of a batch as one."""
    return {names: joined([part[names] for part in parts]) for names in parts[0]}


def derivative(loss: Callable[..., Tensor], jets: Sequence[Jet], along: tuple[str, ...]) -> Tensor:
    """Derivative of `loss(*features)` along zero, one or two vectors, from the jets of its arguments.

    The chain rule through the features: `d/ds` (and `d/dt`) of the loss at `f + s f_a + t f_b + s t f_ab`.
    """
    if not along:
        return loss(*(jet[()] for jet in jets))
    zero, one = _unit(jets[0][()].image)

    def path(s: Tensor, t: Tensor) -> Tensor:
        points = []
        for jet in jets:
            parts = [(jet[along[:1]], s)]
            if len(along) == 2:
                parts += [(jet[along[1:]], t), (jet[along], s * t)]
            start = jet[()]
            points.append(Features(*(v + sum(c * p[i] for p, c in parts) for i, v in enumerate(start))))
        return loss(*points)

    def first(t: Tensor) -> Tensor:
        slope: Tensor = push_forward(lambda s: path(s, t), (zero,), (one,))[1]
        return slope

    if len(along) == 1:
        return first(zero)
    mixed: Tensor = push_forward(first, (zero,), (one,))[1]
    return mixed


def _unit(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros((), dtype=like.dtype, device=like.device), torch.ones((), dtype=like.dtype, device=like.device)
