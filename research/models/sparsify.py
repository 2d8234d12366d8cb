"""From a dense model to a sparse one: the same parameters, with an indexer in each layer that has one."""

import jax

from research.models.language_model import LanguageModel


def from_dense(sparse: LanguageModel, dense: LanguageModel) -> LanguageModel:
    """``sparse`` with every variable of ``dense`` in the place of its own, in its dtype; those that ``dense`` lacks (indexers) stay.

    Both have the same stages: ``MLAConfig`` in the one, ``DSAConfig`` with the same numbers in the other.

    Raises:
      ValueError: a variable of ``dense`` that ``sparse`` lacks, or has in another shape; names it.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(sparse)
    given = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(dense)}
    own = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    for name, leaf in given.items():
        if name not in own or own[name].shape != leaf.shape:
            was = own[name].shape if name in own else "nothing"
            raise ValueError(f"the sparse model must have {name} in shape {leaf.shape}, as the dense one; it has {was}")
    return jax.tree.unflatten(structure, [given.get(name, leaf).astype(leaf.dtype) for name, leaf in own.items()])
