r"""The empirical tangent kernel (eNTK) of a finite network, exact, as a matrix or as an operator.

.. math:: K = J_1\, M\, J_2^\top

with the Jacobians of the outputs for two sets of examples and a diagonal preconditioner M [LG].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from poprisk import _validate as checks
from poprisk._renamed import renamed_arguments
from poprisk.jacobian import (
    Inputs,
    Jacobian,
    ParameterSelection,
    as_inputs,
    chunks,
    close,
    inner,
    length,
    looking,
    recording,
    take,
    trainable,
)
from poprisk.linalg import Eigenpairs, Estimate, top_eigenpairs, trace_estimate
from poprisk.per_sample import Factors, capture, check_graph
from poprisk.per_sample import checks as examples
from poprisk.per_sample.plan import Plan, learn_plan
from poprisk.printing import described
from poprisk.protocols import ProgressCallback
from poprisk.randomness import generator_of
from poprisk.spectrum import KernelSpectrum, target_energy, traces

__all__ = ["Eigenpairs", "Estimate", "Kernel", "KernelSpectrum", "entk"]

MAX_MEMORY = 2 << 30
LEARNT_FROM = 4
"""Examples in the batches that show where the examples lie."""


@renamed_arguments(x="x1", y="x2")
def entk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    outputs: str | Sequence[int] = "all",
    params: ParameterSelection = None,
    precondition: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    max_memory: float = MAX_MEMORY,
) -> Kernel:
    r"""The empirical tangent kernel between the outputs for ``x1`` and those for ``x2``.

    .. math:: K_{(i,c),(j,d)} = \sum_p M_p\, \partial_p f_c(x_{1i})\, \partial_p f_d(x_{2j})

    Nothing is computed yet but checks; see :class:`Kernel`. Source: [LG]; computed from factors
    (:mod:`poprisk.per_sample`), without the Jacobian. The derivatives are those of autograd: of a
    model that cuts them (``detach()``) this is the kernel of the gradients that train it, and not
    of how its outputs move (:mod:`poprisk.uncut`).

    Args:
        model: any module whose output has the examples first; on any device, float32 or float64.
        x1: n examples: a tensor, a tuple for ``model(*x)``, a dict for ``model(**x)``, or a list
            or loader of batches that gives the same in every pass.
        x2: m examples; None: the same as ``x1`` (:math:`K_{SS}`). With queries as ``x1`` and the
            training set as ``x2`` this is :math:`K_{QS}`.
        outputs: ``"all"``: a row for each example and output, c next to each other for each
            example, (n·c, m·c); positions of some outputs; ``"sum"``: the kernel of the summed
            outputs, (n, m); ``"trace"``: the sum of the kernels of each output, (n, m).
        params: names of the parameters that count, or a function of name and parameter; None: all
            that require gradients.
        precondition: M, by name or in the order of the parameters, of their shapes; None: ones.
        max_memory: bytes that the kernel and what is needed to compute it may take.

    Raises:
        TypeError, ValueError: for wrong shapes, an empty batch, no trainable parameter, mixed
            devices, dropout or batch statistics, outputs or data that change between passes,
            outputs that are NaN, examples that cannot be passed alone (the nodes of a graph), a
            max_memory too small for one example, or gradients that the graph does not show: sharded
            parameters, hooks on parameters, reentrant checkpointing. Wrappers
            (DistributedDataParallel, torch.compile) are looked through.

    Example:
        >>> linear = torch.nn.Linear(2, 1, bias=False)
        >>> entk(linear, torch.eye(2)).dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    checks.check_number("max_memory", max_memory, low=0.0, include_low=False)
    if isinstance(outputs, str):
        checks.check_choice("outputs", outputs, ("all", "sum", "trace"))
    named = trainable(model, params)
    model = inner(model)
    checks.check_no_batch_statistics(model)
    weights = _weights(precondition, named)
    kept = None if outputs == "all" else outputs
    sides = []
    for name, data in (("x1", x1), ("x2", x2)):
        if data is not None:
            inputs = as_inputs(name, data)
            examples.check_one_device(pytree.tree_leaves(inputs), named)
            with looking(model):
                sides.append(_Side(Jacobian(model, named, kept), inputs))
                sides[-1].check()
    left, right = sides[0], sides[-1]
    examples.check_same_values(left.values, right.values)
    return Kernel(
        left, right, weights=weights, trace=outputs == "trace", max_memory=int(max_memory)
    )


@final
class Kernel:
    r"""The matrix :math:`K = J_1 M J_2^\top` as an operator; made by :func:`entk`.

    :meth:`dense` forms it; all else works without. Once formed it is kept, only one triangle of
    it if it is symmetric, and products use it. Weights must not change in between.

    Attributes:
        shape: rows and columns.
        symmetric: whether ``x1`` and ``x2`` are the same.
    """

    def __init__(
        self,
        left: _Side,
        right: _Side,
        *,
        weights: dict[str, Tensor] | None,
        trace: bool,
        max_memory: int,
    ) -> None:
        self._left = left
        self._right = right
        self._weights = weights
        self._trace = trace
        self._max_memory = max_memory
        self._blocks: dict[tuple[int, int], Tensor] = {}
        self.symmetric = left is right
        self.shape = (left.examples * self._rows, right.examples * self._rows)

    def __repr__(self) -> str:
        kind = "symmetric" if self.symmetric else "between two sets"
        formed = "formed" if self._blocks else "not formed"
        model = type(self._left.jacobian.model).__name__
        size = f"{self.shape[0]:,} × {self.shape[1]:,}"
        return described("Kernel", size, kind, f"of a {model}", formed)

    @property
    def _rows(self) -> int:
        """Rows of the matrix for each example."""
        return 1 if self._trace else self._left.values

    def _looking(self) -> contextlib.AbstractContextManager[None]:
        return looking(self._left.jacobian.model)

    def dense(self) -> Tensor:
        """K itself, of :attr:`shape`, in the dtype and on the device of the parameters."""
        with self._looking():
            self._form()
        out = self._zeros(*self.shape)
        for (i, j), block in self._blocks.items():
            out[i : i + len(block), j : j + block.shape[1]] = block
            if self.symmetric and i != j:
                out[j : j + block.shape[1], i : i + len(block)] = block.T
        return out

    def matmul(self, vectors: Tensor) -> Tensor:
        """K times a vector (m·c,) or the columns of (m·c, s), without forming K.

        Each column takes a backward and a forward-mode pass through the model; see
        :meth:`dense` for when there are many.
        """
        examples.check_columns(vectors, self.shape[1])
        examples.check_same_kind("the vectors", vectors, self._zeros(1))
        columns = vectors.unsqueeze(1) if vectors.ndim == 1 else vectors
        product = self._formed_product if self._blocks else self._free_product
        with self._looking():
            return product(columns).reshape(self.shape[0], *vectors.shape[1:])

    __matmul__ = matmul

    def diagonal(self) -> Tensor:
        """The diagonal of a symmetric K, exactly."""
        examples.check_symmetric(self.symmetric, "diagonal")
        with self._looking():
            workspace, block = self._sizes(0)
            parts = []
            for rows in chunks(self._left.examples, block):
                factors = self._left.factors(rows)
                norms = factors.squared_norms(precondition=self._weights, workspace=workspace)
                parts.append(norms.sum(dim=1) if self._trace else norms.flatten())
        return _finite(torch.cat(parts))

    @renamed_arguments(generator="seed")
    def trace(self, probes: int | None = None, *, seed: int = 0) -> Estimate:
        """The trace of a symmetric K: exact from the diagonal, or estimated from products.

        Args:
            probes: random vectors of Hutchinson's estimate, at least 2; None: exact.
            seed: of the probes.
        """
        examples.check_symmetric(self.symmetric, "trace")
        if probes is None:
            return Estimate.of(float(self.diagonal().double().sum()), 0.0)
        checks.check_range("probes", probes, 2)
        generator = generator_of(seed, "probes")
        signs = torch.randint(0, 2, (self.shape[0], probes), generator=generator) * 2 - 1
        return trace_estimate(self._product, self._wide(signs))

    @renamed_arguments(generator="seed")
    def eigsh(
        self,
        k: int,
        *,
        tolerance: float = 1e-6,
        max_products: int | None = None,
        seed: int = 0,
    ) -> Eigenpairs:
        """The k largest eigenvalues of a symmetric K with their vectors and residuals.

        Vectors take at most half of ``max_memory``; where it is short, more products are needed.

        Args:
            k: number of eigenpairs.
            tolerance: largest residual, relative to the largest eigenvalue; in half precision at
                least four roundings of it.
            max_products: products with K that may be spent; None: 20 k + 40.
            seed: of the start.

        Raises:
            TypeError, ValueError: for the kernel of two sets, a k that is too large, or vectors
                that do not fit into max_memory.
        """
        examples.check_symmetric(self.symmetric, "eigsh")
        checks.check_range("k", k, 1, self.shape[0])
        return self._leading(
            self._product, k, tolerance=tolerance, max_products=max_products, seed=seed
        )

    def spectrum(
        self,
        k: int,
        *,
        targets: Tensor | None = None,
        centered: bool = False,
        probes: int = 24,
        steps: int = 24,
        tolerance: float = 1e-5,
        max_products: int | None = None,
        progress: ProgressCallback | None = None,
        seed: int = 0,
    ) -> KernelSpectrum:
        r"""Trace, norm, effective ranks, leading eigenvalues, alignment, each with its error.

        By products alone, see :mod:`poprisk.spectrum`: the leading eigenpairs first, then random
        probes of what they leave. Vectors take at most half of ``max_memory``.

        Args:
            k: number of leading eigenpairs; the more, the smaller the errors.
            targets: y, one number for each output of each example, (n, c) or (n·c,), in the dtype
                and on the device of the parameters; labels of classes as one-hot.
            centered: of :math:`HKH` and Hy instead, with :math:`H = I - 11^\top/n` over the
                examples of each output (Cortes, Mohri and Rostamizadeh 2012).
            probes: random vectors, at least 2.
            steps: products for each probe, at most; only the entropy's error needs more than one.
            tolerance: largest residual, relative to the largest eigenvalue; in half precision at
                least four roundings of it.
            max_products: products that may be spent on the eigenpairs; None: 20 k + 60.
            progress: told of the products so far.
            seed: of the start and the probes.

        Raises:
            ValueError, TypeError: for the kernel of two sets, a preconditioner with negative
                entries, a kernel that is zero, targets that do not fit or are zero, a k too large,
                or vectors that do not fit into max_memory.

        Example:
            >>> kernel = entk(torch.nn.Linear(2, 1, bias=False), torch.tensor([[2.0, 0], [0, 1]]))
            >>> round(kernel.spectrum(2).participation_ratio.value, 4)  # 5² / 17
            1.4706
        """
        examples.check_symmetric(self.symmetric, "spectrum")
        n = self.shape[0]
        checks.check_range("k", k, 1, n)
        checks.check_range("probes", probes, 2)
        checks.check_positive("steps", steps)
        _check_semidefinite(self._weights)
        self._check_vectors_fit(10 * probes + k + 1)
        y = None if targets is None else self._targets(targets, centered)
        spent = 0

        def product(columns: Tensor) -> Tensor:
            nonlocal spent
            image = self._product(self._centred(columns) if centered else columns)
            spent += columns.shape[1]
            if progress is not None:
                progress(spent, None)
            return self._centred(image) if centered else image

        # One more than asked for: the gap to it bounds how far off the leading space is.
        pairs = self._leading(
            product, min(k + 1, n), tolerance=tolerance, max_products=max_products, seed=seed
        )
        # Centring leaves rounding of what it takes off.
        taken = float(self._product(self._wide(torch.ones(n))).norm()) / n**0.5 if centered else 0.0
        _check_positive_kernel(pairs.values, taken)
        signs = torch.randint(0, 2, (n, probes), generator=generator_of(seed, "probes")) * 2 - 1
        found = traces(product, pairs, self._wide(signs), steps=steps)
        form = None if y is None else float(y @ product(y.unsqueeze(1)).squeeze(1) / (y @ y))
        return KernelSpectrum(
            Eigenpairs(pairs.values[:k], pairs.vectors[:, :k], pairs.residuals[:k]),
            found.trace(),
            found.frobenius_norm(),
            found.participation_ratio(),
            found.effective_rank(),
            None if form is None else found.alignment(form),
            None if y is None else target_energy(y, pairs, k),
            spent,
        )

    def _leading(
        self,
        product: Callable[[Tensor], Tensor],
        k: int,
        *,
        tolerance: float,
        max_products: int | None,
        seed: int,
    ) -> Eigenpairs:
        """The k largest eigenpairs of a product with vectors of this kernel's."""
        n, width = self.shape[0], min(k + 2, self.shape[0])
        # Half of the memory for vectors: basis and images, what a restart makes of one, and blocks.
        blocks = 10 * width
        self._check_vectors_fit(blocks + 5 * min(n, 3 * width) // 2)
        column = n * self._wide(self._zeros(1)).element_size()
        columns = (self._max_memory // (2 * column) - blocks) * 2 // 5
        start = torch.randn((n, width), generator=generator_of(seed, "start"))
        limit = 20 * k + 40 if max_products is None else max_products
        return top_eigenpairs(
            product,
            self._wide(start),
            k,
            tolerance=max(tolerance, self._rounding()),
            max_products=limit,
            max_columns=columns,
        )

    def _check_vectors_fit(self, count: int) -> None:
        """Raise ValueError unless so many vectors take half of the memory, or less."""
        needed = 2 * count * self.shape[0] * self._wide(self._zeros(1)).element_size()
        examples.check_vectors_fit(self.shape[0], needed, self._max_memory)

    def _targets(self, targets: Tensor, centered: bool) -> Tensor:
        """One number for each row, (n·c,).

        Raises:
            TypeError, ValueError: if they are not that, or nothing is left of them.
        """
        checks.check_type("targets", targets, Tensor, "a tensor")
        n, rows = self._left.examples, self._rows
        if targets.ndim == 0 or len(targets) not in (n, n * rows) or targets.numel() != n * rows:
            raise ValueError(
                f"targets must hold one number for each output of each example, ({n}, {rows}) or "
                f"({n * rows},), but have shape {tuple(targets.shape)}; classes as one-hot."
            )
        examples.check_same_kind("targets", targets, self._zeros(1))
        examples.check_numbers("targets", targets)
        y = self._wide(targets.detach().reshape(-1, 1))
        whole, y = float(y.norm()), (self._centred(y) if centered else y).squeeze(1)
        if float(y.norm()) <= _rounding(y) * whole:
            raise ValueError(
                "targets are zero, so that nothing can be aligned with them"
                + (" once they are centred." if centered else ".")
            )
        return y

    def _centred(self, columns: Tensor) -> Tensor:
        """Each output's mean over the examples taken off, (n·c, s)."""
        parts = columns.unflatten(0, (self._left.examples, self._rows))
        return (parts - parts.mean(dim=0)).flatten(0, 1)

    def _form(self) -> None:
        """Compute K block by block, unless that has been done; the lower triangle if symmetric."""
        if self._blocks:
            return
        workspace, block = self._sizes(self.shape[0] * self.shape[1])
        for i, rows in enumerate(chunks(self._left.examples, block)):
            left = self._left.factors(rows)
            for j, columns in enumerate(chunks(self._right.examples, block)):
                if self.symmetric and j > i:
                    break
                right = left if self.symmetric and i == j else self._right.factors(columns)
                place = rows.start * self._rows, columns.start * self._rows
                self._blocks[place] = self._block(left, right, workspace)

    def _block(self, left: Factors, right: Factors, workspace: int) -> Tensor:
        weights = self._weights
        if not self._trace:
            return _finite(left.gram(right, precondition=weights, workspace=workspace))
        total = self._zeros(left.examples, right.examples)
        for k in range(left.values):
            one = left.part(values=slice(k, k + 1))
            other = one if left is right else right.part(values=slice(k, k + 1))
            total += one.gram(other, precondition=weights, workspace=workspace)
        return _finite(total)

    def _formed_product(self, columns: Tensor) -> Tensor:
        out = columns.new_zeros(self.shape[0], columns.shape[1])
        for (i, j), block in self._blocks.items():
            height, width = block.shape
            out[i : i + height] += block @ columns[j : j + width]
            if self.symmetric and i != j:
                out[j : j + width] += block.T @ columns[i : i + height]
        return out

    def _free_product(self, columns: Tensor) -> Tensor:
        _, block = self._sizes(0)
        products = [_finite(self._one_product(column, block)) for column in columns.T]
        return torch.stack(products, dim=1)

    def _one_product(self, column: Tensor, block: int) -> Tensor:
        if not self._trace:
            vector = self._right.transposed_product(column, block)
            return self._left.product(self._weighted(vector), block)
        total = self._zeros(self.shape[0])
        for k in range(self._left.values):
            only = column.new_zeros(len(column), self._right.values)
            only[:, k] = column
            vector = self._right.transposed_product(only.flatten(), block)
            product = self._left.product(self._weighted(vector), block)
            total += product.reshape(-1, self._left.values)[:, k]
        return total

    def _weighted(self, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._weights is None:
            return vector
        return {name: v * self._weights[name] for name, v in vector.items()}

    def _sizes(self, elements: int) -> tuple[int, int]:
        """Elements of workspace, and examples per block, besides a result of so many elements.

        Raises:
            ValueError: if the result or one example does not fit.
        """
        size = self._zeros(1).element_size()
        kept = elements + (elements // 2 if self.symmetric else elements)  # blocks, and the whole
        free = self._max_memory // size - kept
        examples.check_kernel_fits(self.shape, kept * size, self._max_memory)
        example = 2 * max(side.footprint() for side in {self._left, self._right})
        block = free // max(1, 2 * example)
        examples.check_block_fits(block, 2 * example * size + kept * size, self._max_memory)
        rows = int((free / 8) ** 0.5) // self._rows
        block = max(1, min(block, rows, max(self._left.examples, self._right.examples)))
        return max(1, free // 4), block

    def _zeros(self, *shape: int) -> Tensor:
        like = next(iter(self._left.jacobian.params.values()))
        dtype = like.dtype.to_real() if like.dtype.is_complex else like.dtype
        return torch.zeros(shape, dtype=dtype, device=like.device)

    def _wide(self, tensor: Tensor) -> Tensor:
        """In the dtype in which vectors are orthogonal: the kernel's, float32 at least."""
        like = self._zeros(1)
        return tensor.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def _product(self, columns: Tensor) -> Tensor:
        """:meth:`matmul` of vectors as :meth:`_wide` makes them, into that dtype."""
        return self.matmul(columns.to(self._zeros(1).dtype)).to(columns.dtype)

    def _rounding(self) -> float:
        """What products are off by in half precision, relative; 0 in others."""
        dtype = self._zeros(1).dtype
        return 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0


@final
class _Side:
    """The Jacobian of one set of n examples, (n·k, P), block by block of them."""

    def __init__(self, jacobian: Jacobian, inputs: Inputs) -> None:
        self.jacobian, self.inputs, self.examples = jacobian, inputs, length(inputs)
        try:
            self.values = jacobian.values(take(inputs, slice(0, 1))).shape[1]
        except (RuntimeError, IndexError) as error:
            examples.check_part(1, self.examples, error)
            raise

    def check(self) -> None:
        """Raise unless outputs are repeatable, independent, and gradients can be read from them.

        Raises:
            ValueError: for dropout, batch statistics, or anything else that makes the outputs of
                an example random or dependent on the other examples; for reentrant checkpointing,
                say, or outputs that depend on no parameter.
        """
        J, some = self.jacobian, take(self.inputs, slice(0, 8))
        first, again = J.values(some), J.values(some)
        examples.check_numbers("outputs", first, finite=False)
        examples.check_deterministic(close(first, again), J.model)
        if len(first) > 1:
            order = list(range(len(first) - 1, 0, -1))
            for rows in ([0], order):
                examples.check_independent(close(first[rows], J.values(take(some, rows))))
        with recording():
            values = J(take(self.inputs, [0, 0]))
            examples.check_differentiable(values.requires_grad)
            check_graph(values, J.params)

    def factors(self, rows: slice) -> Factors:
        """The rows of some examples, in factors."""
        inputs = take(self.inputs, rows)
        alone = length(inputs) == 1
        with recording():
            values = self.jacobian(take(inputs, [0, 0]) if alone else inputs)
            _check_recorded(values, rows.start)
            captured = capture(values, self.jacobian.params, plan=self._plan)
        return captured.part(slice(0, 1)) if alone else captured

    @cached_property
    def _plan(self) -> Plan | None:
        """Where the examples lie, learnt from a few batches of four."""
        if self.examples < 2 * LEARNT_FROM:
            return None

        def values_of(some: list[int]) -> Tensor:
            return self.jacobian(take(self.inputs, some))

        params = self.jacobian.params
        with recording():
            return learn_plan(values_of, params, examples=self.examples, size=LEARNT_FROM)

    def footprint(self) -> int:
        """Elements that an example takes, in a forward pass and in factors, measured on two."""
        saved: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in self.jacobian.params.values()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
            return tensor

        inputs = take(self.inputs, [0, min(1, self.examples - 1)])
        with recording(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            values = self.jacobian(inputs)
            examples.check_differentiable(values.requires_grad)
        captured = capture(values, self.jacobian.params, plan=self._plan)
        return sum(saved.values()) // 2 + captured.elements() // 2

    def transposed_product(self, vector: Tensor, block: int) -> dict[str, Tensor]:
        """Jᵀv by reverse mode, (n·k,) to parameters, ``block`` examples at a time."""
        total = {name: torch.zeros_like(p) for name, p in self.jacobian.params.items()}
        parts = vector.reshape(self.examples, self.values)
        for rows in chunks(self.examples, block):
            values, pull = self.jacobian.pullback(take(self.inputs, rows))
            _check_recorded(values, rows.start)
            for name, grad in pull(parts[rows])[0].items():
                total[name] += grad
        return total

    def product(self, vector: Mapping[str, Tensor], block: int) -> Tensor:
        """Jw, parameters to (n·k,): by forward mode, or by factors where that is not to be had."""
        rows = chunks(self.examples, block)
        if self._has_forward_mode:
            products = [self._forward(vector, take(self.inputs, r)) for r in rows]
        else:
            products = [self.factors(r).products(vector) for r in rows]
        return torch.cat(products).flatten()

    @cached_property
    def _has_forward_mode(self) -> bool:
        some = take(self.inputs, slice(0, LEARNT_FROM))
        return not self.jacobian.flaw_of(lambda row: self._forward(row, some), some)

    def _forward(self, vector: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        weights = {name: p.detach() for name, p in self.jacobian.params.items()}
        return self.jacobian.pushforward(inputs, weights, vector)


def _check_recorded(values: Tensor, start: int | None) -> None:
    """Raise ValueError for outputs (b, k) without gradients, or that are NaN."""
    examples.check_differentiable(values.requires_grad)
    examples.check_numbers("outputs", values, start=start or 0, finite=False)


def _finite(kernel: Tensor) -> Tensor:
    """Entries of a kernel, or of its product with a vector, as they are.

    Raises:
        ValueError: if one is NaN or Inf.
    """
    # The ends tell it without a copy as large as the kernel: NaN is both of them.
    ends = torch.stack(kernel.aminmax())
    examples.check_finite_kernel(bool(ends.isfinite().all()))
    return kernel


def _weights(
    precondition: Mapping[str, Tensor] | Sequence[Tensor] | None, params: Mapping[str, nn.Parameter]
) -> dict[str, Tensor] | None:
    """M by name, with shapes checked."""
    if precondition is None:
        return None
    if not isinstance(precondition, Mapping):
        examples.check_count("precondition", len(precondition), len(params))
        precondition = dict(zip(params, precondition, strict=True))
    examples.check_names("precondition", params, precondition)
    for name, p in params.items():
        what, weight = f"precondition[{name!r}]", precondition[name]
        examples.check_shape(what, weight, tuple(p.shape))
        examples.check_same_kind(what, weight, p.real if p.is_complex() else p)
    return {name: precondition[name].detach() for name in params}


def _check_semidefinite(weights: Mapping[str, Tensor] | None) -> None:
    """Raise ValueError if a preconditioner makes negative eigenvalues possible."""
    for name, weight in (weights or {}).items():
        if bool((weight < 0).any()):
            raise ValueError(
                f"spectrum needs a precondition without negative entries, but that of {name} has "
                f"{float(weight.min()):.3g}; trace and eigsh take any."
            )


def _rounding(like: Tensor) -> float:
    """Relative size up to which a difference may be rounding alone."""
    return 100 * torch.finfo(like.dtype).eps


def _check_positive_kernel(eigenvalues: Tensor, taken: float) -> None:
    """Raise ValueError if the largest eigenvalue is zero, or rounding of what was taken off."""
    if float(eigenvalues[0]) <= _rounding(eigenvalues) * taken:
        raise ValueError(
            "the kernel is zero, and has no spectrum to speak of: no output depends on a weight "
            "here, or nothing is left once it is centred."
        )
