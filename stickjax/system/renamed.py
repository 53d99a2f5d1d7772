"""Keep the module names of version 0.1 working: an import of an old name returns the module with the new name.

A FutureWarning tells the user the new name. The next version will remove the old names.
"""

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

NEW_NAMES = {
    "pallas_kernels.seam": "pallas_kernels.platform",
    "stickjax.accuracy": "stickjax.evaluation.pairs",
    "stickjax.banner": "stickjax.training.banner",
    "stickjax.checkpoint": "stickjax.storage.checkpoints",
    "stickjax.collectives": "stickjax.parallel.collectives",
    "stickjax.command": "stickjax.config.command",
    "stickjax.corpus": "stickjax.data.corpus",
    "stickjax.fields": "stickjax.config.fields",
    "stickjax.hugging_face": "stickjax.storage.hugging_face",
    "stickjax.memory": "stickjax.system.memory",
    "stickjax.metrics": "stickjax.training.metrics",
    "stickjax.model_config": "stickjax.config.decoder",
    "stickjax.models.sut": "stickjax.models.universal",
    "stickjax.modules": "stickjax.surgery",
    "stickjax.mup": "stickjax.training.width",
    "stickjax.optim": "stickjax.training.optimizer",
    "stickjax.options": "stickjax.config.command_line",
    "stickjax.plots": "stickjax.evaluation.plots",
    "stickjax.processes": "stickjax.parallel.processes",
    "stickjax.run": "stickjax.storage.run_folder",
    "stickjax.sharding": "stickjax.parallel.mesh",
    "stickjax.sources": "stickjax.data.sources",
    "stickjax.special_tokens": "stickjax.data.special_tokens",
    "stickjax.step": "stickjax.training.step",
    "stickjax.sut_config": "stickjax.config.universal",
    "stickjax.tasks": "stickjax.data.tasks",
    "stickjax.token_files": "stickjax.data.token_files",
    "stickjax.tokenizer": "stickjax.data.tokenizer",
    "stickjax.vocabulary": "stickjax.models.vocabulary_size",
}


class RenamedModules(MetaPathFinder, Loader):
    """An import hook, which finds a module by its old name in NEW_NAMES and imports the module with the new name."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if (new := NEW_NAMES.get(fullname)) is None:
            return None
        warnings.warn(f"{fullname} is now {new}; the next version removes the old name", FutureWarning, stacklevel=2)
        found = importlib.util.find_spec(new)
        spec = ModuleSpec(fullname, self, is_package=found.submodule_search_locations is not None)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec):
        module = importlib.import_module(NEW_NAMES[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module) -> None:
        """Restore the attribute `__spec__` of a module. The import system has replaced it by the spec of the old name.

        The code of the module is not run again: `create_module` has imported the new name, which ran the code.
        """
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    if not any(isinstance(finder, RenamedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, RenamedModules())
