"""DVC's command line, in a process of its own that trusts no list of files.

The parent holds the other end of stdin. When it dies, however it dies, so does DVC: left alone it
would link old files over what the next run writes into `data/`.
"""

import os
import re
import sys
import threading
from typing import Any

from dvc.exceptions import DvcException
from dvc_data.hashfile.tree import Tree

_DIGEST = re.compile(r"[0-9a-f]{32}")


def check_listing(tree: Tree) -> None:
    """Raise DvcException where a version's list of files leads out of `data/` or of the cache.

    DVC believes what a remote gives it: it writes wherever a name says, and fetches to wherever a
    digest says.
    """
    for parts, _, digest in tree:
        name, md5 = "/".join(parts), digest and digest.value
        if not {"", ".", ".."}.isdisjoint(parts) or not _DIGEST.fullmatch(str(md5)):
            raise DvcException(
                f"the version's list of files holds {name!r} with the digest {md5!r}, which would "
                "be written elsewhere than into data/: the pipeline never made it"
            )


def main() -> None:
    """Run DVC with the arguments of this process; ends it."""

    def end_with_parent() -> None:
        os.read(0, 1)
        os._exit(1)

    def checked(*where: Any, **how: Any) -> Tree:
        tree = load(*where, **how)
        check_listing(tree)
        return tree

    from dvc.cli import main as run

    load = Tree.load  # by which every list is read that a remote or the cache gives
    setattr(Tree, "load", checked)  # noqa: B010 (mypy refuses the other)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
