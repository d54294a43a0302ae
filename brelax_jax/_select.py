"""Which leaves are quantized, and on which set each must land."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from brelax_jax._tree import is_absent, leaves_with_paths, map_with_path
from brelax_jax.sets import QuantizedSet, groups_of

NOT_KERNELS = ("bias", "scale", "embedding")

TAKEN = (
    "qset must be a set such as Ternary(), the rules of select(…), a tree of sets and None like "
    "the params, or a function from params to one"
)

Key = str | Callable[[str, Any], bool]
Rule = tuple[Key, QuantizedSet | None]
Entries = tuple[tuple[str, QuantizedSet | None], ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Says which leaves are quantized on which sets; made by `select`, or from a tree of sets.

    Attributes:
      rules: pairs of a key and a set or None. The first key that fits a leaf decides.
      default: the set of the kernels that no key fits, or None.
      tree: in the place of rules, the entries of a tree of sets and None by their paths, or a
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
        {'dense/kernel': Uniform(granularity=PerTensor(axis_name=None), tolerance=0.0, bits=4)}
        """
        leaves = leaves_with_paths(params)
        for path, count in collections.Counter(path for path, _ in leaves).items():
            if count > 1:
                raise ValueError(f"{count} leaves of params have the path {path!r}; rename one.")
        found = self._by_rules(leaves) if self.tree is None else self._by_tree(leaves, params)
        for path, leaf in leaves:
            if path in found:
                _check_fit(path, leaf, found[path])
        return found

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

    def _by_rules(self, leaves: Sequence[tuple[str, Any]]) -> dict[str, QuantizedSet]:
        for key, _ in self.rules:
            if not isinstance(key, str) or not leaves:
                continue
            if not any(re.search(key, path) for path, _ in leaves):
                raise ValueError(
                    f"The pattern {key!r} matches no leaf. Patterns are regular expressions, "
                    f"searched in these paths: {_listed(leaves)}."
                )
        chosen = {path: self._by_rule(path, leaf) for path, leaf in leaves}
        return {path: qset for path, qset in chosen.items() if qset is not None}

    def _by_rule(self, path: str, leaf: Any) -> QuantizedSet | None:
        for key, qset in self.rules:
            if _fits(key, path, leaf):
                return _unless_empty(qset, leaf)
        return self.default if is_kernel(path, leaf) else None

    def _by_tree(self, leaves: Sequence[tuple[str, Any]], params: Any) -> dict[str, QuantizedSet]:
        if not leaves:  # Optax makes such placeholders
            return {}
        entries = dict(entries_of(self.tree(params)) if callable(self.tree) else self.tree or ())
        places = leaves_with_paths(params, is_absent)
        present = {above for place, _ in places for above in _above(place)}
        absent = {place for place, leaf in places if is_absent(leaf)}
        for path, qset in entries.items():
            if path not in present and absent.isdisjoint(_above(path)):
                raise ValueError(
                    f"The tree of sets has {qset} at {path!r}, where params have nothing. Give it "
                    f"the structure of the params, whose leaves are {_listed(leaves)}."
                )
        found: dict[str, QuantizedSet] = {}
        for path, leaf in leaves:
            above = next((place for place in _above(path) if place in entries), None)
            if above is None:
                raise ValueError(
                    f"The tree of sets has nothing for {path!r}, a leaf of the params. Give a set "
                    "or None for each of them, as in jax.tree.map(lambda p: None, params)."
                )
            qset = entries[above]
            chosen = _unless_empty(qset, leaf) if above == path or is_kernel(path, leaf) else None
            if chosen is not None:
                found[path] = chosen
        return found


def select(*rules: Rule | Callable[[Any], Any], default: QuantizedSet | None = None) -> Selection:
    """Rules that say which leaves are quantized, and how.

    Args:
      *rules: pairs of a key and a set, or None for leaves that stay as they are. A key is a regular
        expression, which fits a leaf if `re.search` finds it in the leaf's path ('/'-joined, as in
        'Conv_0/kernel'), or a function `(path, leaf) -> bool`, which may look at the leaf's shape
        and dtype. The first key that fits decides. It decides for every leaf that it fits, biases
        too. Or, alone: a function from params to a tree of sets and None.
      default: the set of the *kernels* that no key fits: floating leaves of rank 2 or more whose
        last name is not bias, scale or embedding. None leaves them as they are.

    Returns:
      The rules, as every transformation of this library takes them in the place of one set.

    Raises:
      ValueError: if a rule is not such a pair, or a pattern not a regular expression; at a
        transformation's `init`, if a pattern matches no leaf, a function returns something else,
        or a rule gives a set to a leaf that is not floating or whose shape does not fit.

    The first convolution stays float, large leaves have 4 bits, every other kernel is ternary:

    >>> import brelax_jax as brx
    >>> rules = brx.select(
    ...     (r"^Conv_0/", None),
    ...     (lambda path, leaf: leaf.size > 100_000, brx.Uniform(4)),
    ...     default=brx.Ternary(),
    ... )
    """
    if len(rules) == 1 and _is_function(rules[0]):
        if default is not None:
            raise ValueError(
                f"default={default} goes with rules, but {rules[0]!r} gives every leaf its set: "
                "leave default out."
            )
        return Selection(tree=cast("Callable[[Any], Any]", rules[0]))
    pairs = cast("tuple[Rule, ...]", rules)
    for rule in pairs:
        _check_rule(rule)
    for qset in (*(rule[1] for rule in pairs), default):
        if qset is not None and not isinstance(qset, QuantizedSet):
            raise ValueError(f"A rule gives a set such as Ternary(), or None, got {qset!r}.")
    return Selection(pairs, default)


def as_selection(qset: Any) -> Selection:
    """What a transformation takes: one set, rules, or a tree of sets or a function to one.

    Raises:
      ValueError: if it is none of these.
    """
    if isinstance(qset, Selection):
        return qset
    if isinstance(qset, QuantizedSet):
        return Selection(default=qset)
    if _is_function(qset):
        return Selection(tree=qset)
    if not jax.tree.leaves(qset):
        raise ValueError(f"{TAKEN}, got {qset!r}.")
    return Selection(tree=entries_of(qset))


def entries_of(tree: Any) -> Entries:
    """The sets and None in a tree, by their paths.

    Raises:
      ValueError: if there is something else.
    """
    entries = leaves_with_paths(tree, lambda node: node is None)
    for path, qset in entries:
        if qset is not None and not isinstance(qset, QuantizedSet):
            at = f" at {path!r} of a tree" if path else ""
            raise ValueError(f"{TAKEN}, got {qset!r}{at}.")
    return tuple(entries)


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether one set, given alone, applies to this leaf."""
    return (
        jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and jnp.ndim(leaf) >= 2
        and math.prod(jnp.shape(leaf)) > 0
        and path.rpartition("/")[2] not in NOT_KERNELS
    )


def _is_function(value: Any) -> bool:
    """Whether it is a function, not a class nor a module of arrays that can be called."""
    if not callable(value) or isinstance(value, type):
        return False
    leaves = jax.tree.leaves(value)
    return len(leaves) == 1 and leaves[0] is value


def _fits(key: Key, path: str, leaf: Any) -> bool:
    if isinstance(key, str):
        return re.search(key, path) is not None
    answer = key(path, leaf)
    if not isinstance(answer, bool | np.bool_):
        raise ValueError(
            f"A rule's function must return True or False, but {key!r} returned {answer!r} for "
            f"{path!r}. It may look at the leaf's shape and dtype, not at its values."
        )
    return bool(answer)


def _unless_empty(qset: QuantizedSet | None, leaf: Any) -> QuantizedSet | None:
    return qset if math.prod(jnp.shape(leaf)) else None


def _above(path: str) -> list[str]:
    """A path and those of the nodes that it lies in, up to the root's ''."""
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(len(parts), 0, -1)] + [""] * bool(path)


def _listed(leaves: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(path for path, _ in leaves)


def _check_rule(rule: Any) -> None:
    is_pair = isinstance(rule, tuple) and len(cast("tuple[Any, ...]", rule)) == 2
    if not (is_pair and (isinstance(rule[0], str) or _is_function(rule[0]))):
        raise ValueError(
            "A rule is a pair of a pattern or a function (path, leaf) -> bool, and a set or None, "
            f"got {rule!r}."
        )
    try:
        if isinstance(rule[0], str):
            re.compile(rule[0])
    except re.error as error:
        raise ValueError(f"The pattern {rule[0]!r} is not a regular expression: {error}.") from None


def _check_fit(path: str, leaf: Any, qset: QuantizedSet) -> None:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        raise ValueError(
            f"{path!r} is of dtype {jnp.result_type(leaf)}, but is selected for {qset}. "
            "Only floating leaves can be quantized; put a rule that gives it None first."
        )
    try:
        groups_of(qset.granularity, leaf)
    except ValueError as error:
        raise ValueError(f"{path!r}, selected for {qset}: {error}") from None
