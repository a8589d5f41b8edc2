"""`python -m tests.hdpo …`: the command as users have it, where torch and TensorFlow are not installed."""

import sys
from importlib.machinery import PathFinder


class WithoutOracles(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("torch", "torchvision", "tensorflow")
        return None if hidden else super().find_spec(name, path, target)


def hide_oracles() -> None:
    """Makes torch and TensorFlow absent for what this process imports from now on."""
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutOracles


if __name__ == "__main__":
    hide_oracles()
    from hdpo_jax.cli import main

    sys.exit(main())
