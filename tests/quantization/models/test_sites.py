import quantization_toys as toys
from mlx.utils import tree_flatten

from mlx_tune.quantization.models.sites import sites_of


def test_walk_names_every_module_once() -> None:
    model = toys.llama()
    sites = sites_of(model)
    assert len({id(s.module) for s in sites}) == len(sites)
    names = {p for s in sites for p in s.paths}
    assert {name.rpartition(".")[0] for name, _ in tree_flatten(model.parameters())} <= names
