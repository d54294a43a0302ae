"""Which leaves are quantized, and the set of each."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp

from brelax_jax._kernels import is_kernel
from brelax_jax._rule_keys import (
    Rule,
    check_patterns,
    check_rule,
    decides,
    matches,
    shape_of,
    takes,
)
from brelax_jax._set_tree import check_structure, entries_of, nearest
from brelax_jax._tree import leaves_with_paths, map_at, map_with_path
from brelax_jax.sets import FLOATS, QuantizedSet, groups_of

Entries: TypeAlias = tuple[tuple[str, QuantizedSet | None], ...]
Sets: TypeAlias = Any  # a set, a Selection, a tree of sets and None, or a function to such a tree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Selection:
    """Which leaves are quantized, on which sets. `select` makes one, or a tree of sets does. It is
    a pytree without leaves.

    Attributes:
      rules: pairs of a key and a set or None. The first key that matches a leaf decides.
      default: the set of the kernels that no key matches, or None.
      tree: in place of rules, the entries of a tree of sets and None by their paths, or a
        function from params to such a tree.
    """

    rules: tuple[Rule, ...] = ()
    default: QuantizedSet | None = None
    tree: Entries | Callable[[Any], Any] | None = None

    def assign(self, params: Any) -> dict[str, QuantizedSet]:
        """The set of every leaf that is to be quantized, by the leaf's '/'-joined path.

        Args:
          params: a tree of arrays, or of `jax.ShapeDtypeStruct`s.

        Raises:
          ValueError: if this selection does not fit the params. It names the leaf or the rule.

        >>> import brelax_jax as brx, jax.numpy as jnp
        >>> params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
        >>> brx.select((lambda path, leaf: leaf.ndim == 2, brx.Uniform(4))).assign(params)
        {'dense/kernel': Uniform(bits=4)}
        """
        leaves = leaves_with_paths(params)
        for path, count in collections.Counter(path for path, _ in leaves).items():
            if count > 1:
                raise ValueError(f"{count} leaves of params have the path {path!r}; rename one.")
        entries = self._entries(params)
        if entries is not None:
            check_structure(entries, params)
        elif leaves:
            check_patterns(self.rules, leaves)
        found = self._chosen(entries, leaves)
        for path, leaf in leaves:
            if path in found:
                _check_quantizable(path, leaf, found[path])
        if leaves and not found and any(math.prod(jnp.shape(leaf)) for _, leaf in leaves):
            self._check_selects_nothing(entries, leaves)
        return found

    def project(self, params: Any) -> Any:
        """The params with every leaf that is to be quantized projected on its set.

        Use it to round weights without training.

        Args:
          params: a tree of arrays.

        Raises:
          ValueError: as `assign`.

        >>> import brelax_jax as brx, jax.numpy as jnp
        >>> brx.select(default=brx.Binary()).project({"kernel": jnp.array([[0.25, -0.75]])})
        {'kernel': Array([[ 0.5, -0.5]], dtype=float32)}
        """
        return map_at(lambda w, qset: qset.project(w), params, self.assign(params))

    def quantize(self, params: Any) -> Any:
        """Like `project`, but each such leaf becomes a `Quantized`: codes and scales.

        >>> import brelax_jax as brx, jax.numpy as jnp
        >>> rules = brx.select(default=brx.Binary())
        >>> rules.quantize({"kernel": jnp.array([[0.25, -0.75]])})["kernel"].codes
        Array([[ 1, -1]], dtype=int8)
        """
        return map_at(lambda w, qset: qset.quantize(w), params, self.assign(params))

    def mask(self, params: Any) -> Any:
        """The params' tree with True for every leaf that is to be quantized, else False.

        For Optax's masks, as in `optax.add_decayed_weights(1e-4, mask=rules.mask)`.

        Args:
          params: as for `assign`.

        Raises:
          ValueError: as `assign`.

        >>> import brelax_jax as brx, jax.numpy as jnp
        >>> brx.select(default=brx.Binary()).mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
        {'bias': False, 'kernel': True}
        """
        found = self.assign(params)
        return map_with_path(lambda path, _: path in found, params)

    def choose(self, params: Any) -> dict[str, QuantizedSet]:
        """As `assign`, without a check of whether the selection and the params go together."""
        return self._chosen(self._entries(params), leaves_with_paths(params))

    @property
    def has_functions(self) -> bool:
        """Whether a function of a user decides something."""
        return callable(self.tree) or any(callable(key) for key, _ in self.rules)

    def _check_selects_nothing(self, entries: Any, leaves: Sequence[tuple[str, Any]]) -> None:
        """Raises a ValueError if that is not what was asked for."""
        given = [qset for _, qset in self.rules] if entries is None else [*entries.values()]
        named = next((qset for qset in (*given, self.default) if qset is not None), None)
        if named is not None:
            raise ValueError(
                f"{named} was given, but no leaf is selected for it. One set alone, or a default, "
                "applies to kernels: floating leaves of rank 2 or more whose names are not those "
                "of biases, scales, offsets, norms, embeddings, positions or tokens. For others "
                "give rules, as in select((pattern, set)). The leaves are "
                f"{', '.join(path for path, _ in leaves)}."
            )

    def _entries(self, params: Any) -> Mapping[str, QuantizedSet | None] | None:
        """The tree's entries for these params; None where there are rules."""
        if not callable(self.tree):
            return None if self.tree is None else dict(self.tree)
        if not jax.tree.leaves(params):  # Optax makes such placeholders
            return {}
        tree = self.tree(jax.tree.map(shape_of, params))
        kinds = f"{self.tree!r} must return a tree of sets"
        if isinstance(tree, Selection):
            raise ValueError(f"{kinds} and None like the params, got {tree!r}.")
        return dict(entries_of(tree, kinds))

    def _chosen(
        self,
        entries: Mapping[str, QuantizedSet | None] | None,
        leaves: Sequence[tuple[str, Any]],
    ) -> dict[str, QuantizedSet]:
        found: dict[str, QuantizedSet] = {}
        for path, leaf in leaves:
            by_rules = entries is None
            qset = self._of_rules(path, leaf) if by_rules else _of_tree(entries, path, leaf)
            if qset is not None and math.prod(jnp.shape(leaf)):
                found[path] = qset
        return found

    def _of_rules(self, path: str, leaf: Any) -> QuantizedSet | None:
        for key, qset in self.rules:
            if matches(key, path, leaf):
                return qset
        return self.default if is_kernel(path, leaf) else None


def select(*rules: Rule | Callable[[Any], Any], default: QuantizedSet | None = None) -> Selection:
    """Rules that say which leaves are quantized, and how.

    Args:
      *rules: pairs of a key and a set; None in place of the set leaves a leaf as it is. A key is a
        regular expression, which matches if `re.search` finds it in the leaf's path ('/'-joined, as
        in 'Conv_0/kernel'), or a function `(path, leaf) -> bool`, which gets the leaf as a
        `jax.ShapeDtypeStruct`. The first key that matches a leaf decides, for biases too. Or give
        one function alone, from params (as such structs) to a tree of sets and None.
      default: the set of the *kernels* that no key matches: floating leaves of rank 2 or more whose
        names are not those of biases, scales, offsets, norms, embeddings, positions or tokens
        (docs/different_layers.md). None leaves them as they are.

    Returns:
      The rules. Every transformation of this library takes them in place of one set.

    Raises:
      ValueError: if a rule is not such a pair, or a pattern is not a regular expression. At a
        transformation's `init`, if a pattern matches no leaf, if a function returns something else,
        if a rule gives a set to a leaf that is not floating or whose shape does not fit, or if no
        leaf is left for a set.

    The first convolution stays float, large leaves have 4 bits, every other kernel is ternary:

    >>> import brelax_jax as brx
    >>> rules = brx.select(
    ...     (r"^Conv_0/", None),
    ...     (lambda path, leaf: leaf.size > 100_000, brx.Uniform(4)),
    ...     default=brx.Ternary(),
    ... )
    """
    if len(rules) == 1 and decides(rules[0]):
        function = cast("Callable[[Any], Any]", rules[0])
        if default is not None or not takes(function, 1):
            raise ValueError(
                f"{function!r} is given alone, without a default: then it must be a function from "
                "params to a tree of sets. A rule by a function is a pair, as in "
                "(lambda path, leaf: leaf.ndim == 4, Binary())."
            )
        return Selection(tree=function)
    pairs = cast("tuple[Rule, ...]", rules)
    for rule in pairs:
        check_rule(rule)
    for qset in (*(rule[1] for rule in pairs), default):
        if qset is not None and not isinstance(qset, QuantizedSet):
            raise ValueError(f"A rule gives a set such as Ternary(), or None, got {qset!r}.")
    return Selection(pairs, default)


def as_selection(qset: Sets) -> Selection:
    """What a transformation takes: one set, rules, or a tree of sets or a function to one.

    Raises:
      ValueError: if it is none of these.
    """
    if isinstance(qset, Selection):
        return qset
    if isinstance(qset, QuantizedSet):
        return Selection(default=qset)
    if decides(qset):
        return select(qset)
    kinds = "qset must be a set such as Ternary(), the rules of select(…), or a tree of sets"
    entries = entries_of(qset, kinds)
    if qset is None or not entries:
        raise ValueError(f"{kinds} and None like the params, got {qset!r}.")
    return Selection(tree=entries)


def _of_tree(
    entries: Mapping[str, QuantizedSet | None], path: str, leaf: Any
) -> QuantizedSet | None:
    at = nearest(path, entries)
    return None if at is None or (at != path and not is_kernel(path, leaf)) else entries[at]


def _check_quantizable(path: str, leaf: Any, qset: QuantizedSet) -> None:
    if jnp.result_type(leaf).name not in FLOATS:
        raise ValueError(
            f"{path!r} is of dtype {jnp.result_type(leaf)}, but is selected for {qset}. "
            f"Only leaves of {', '.join(FLOATS)} can be quantized; convert it, or put a rule that "
            "gives it None first."
        )
    try:
        groups_of(qset.granularity, leaf)
    except ValueError as error:
        raise ValueError(f"{path!r}, selected for {qset}: {error}") from None
