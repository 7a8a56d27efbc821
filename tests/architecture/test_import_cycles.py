"""No cycle between modules, not even one that imports inside functions hide."""

import grimp


def test_no_import_cycles():
    graph = grimp.build_graph("repvgg", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: sorted(graph.find_modules_directly_imported_by(module)) for module in sorted(graph.modules)}
    # Leaves first: what remains imports something of what remains, so it holds a cycle.
    while leaves := [module for module, imported in imports.items() if not set(imported) & set(imports)]:
        for leaf in leaves:
            del imports[leaf]
    assert not imports, _one_cycle(imports)


def _one_cycle(imports: dict[str, list[str]]) -> str:
    path = [next(iter(imports))]
    while path.count(path[-1]) == 1:
        path.append(next(module for module in imports[path[-1]] if module in imports))
    return " imports ".join(path[path.index(path[-1]) :])


def test_the_graph_sees_imports_inside_functions():
    """Otherwise the test above could not fail: the command line imports most packages when they are needed."""
    graph = grimp.build_graph("repvgg", exclude_type_checking_imports=True, cache_dir=None)
    assert "repvgg.studies.timing" in graph.find_modules_directly_imported_by("repvgg.cli.bench")
