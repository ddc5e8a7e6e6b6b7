"""Who imports whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Who may import whom: a module may use those of lower layers only, and only these scripts may use scripts.
LAYERS = [
    {"genotypes", "utils"},
    {"distributed", "cuda_graphs"},
    {"models.cpu", "models.replay"},
    {"models.graph", "models.ops", "images"},
    {
        "build_nas_dataset.random_cells",
        "image_stream",
        "models.network",
        "models.supernet",
        "models.generator",
        "models.discriminator",
        "models.predictor",
    },
    {"build_nas_dataset.records", "models.export"},
    {"build_nas_dataset.scoring", "metrics", "training"},
    {"gan", "generate_archs", "train_cifar", "train_imagenet", "visualize", "build_nas_dataset.build_nas_dataset"},
    {"gan_multiobj", "generate_archs_multiobj", "build_nas_dataset.eval_archs"},
    {"benchmarks.common", "benchmarks.plain_gan", "benchmarks.plain_images"},
    {"benchmarks.gan", "benchmarks.supernet", "benchmarks.image_stream", "benchmarks.startup"},
    {"benchmarks.generate", "benchmarks.train_cifar"},
    {"benchmarks.all", "benchmarks.as_module"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(tree: ast.Module) -> set[str]:
    """Modules imported anywhere in a file: of `from a import b`, both a and a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            own = {alias.name for alias in node.names}
            names |= {node.module, *(f"{node.module}.{name}" for name in own)} if hasattr(node, "module") else own
    return names


def test_modules_import_lower_layers_only():
    files = [path for part in (".", "models", "build_nas_dataset", "benchmarks") for path in (ROOT / part).glob("*.py")]
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    assert LEVEL.keys() == {name for name in found if not name.endswith("__")}  # all but __init__ and __main__
    for name, level in LEVEL.items():
        modules = imports(ast.parse(found[name].read_text()))
        for imported in modules & LEVEL.keys():
            same_package = name.startswith("models.") and LEVEL[imported] == level < len(LAYERS) - 1
            assert LEVEL[imported] < level or same_package, f"{name} imports {imported}"
        assert name != "genotypes" or not any(imported.startswith("torch") for imported in modules)
