"""`w2s cache`: the compiled programs that commands keep on disk."""

import os
from dataclasses import dataclass

from w2s_jax.program_cache import FOLDER, VARIABLE, clear, usage


@dataclass(frozen=True)
class Cache:
    """Show the compiled programs that are kept for later runs, or delete them.

    They are in the user's cache directory, or in W2S_CACHE_DIR; set to nothing, or with
    `w2s --no-cache COMMAND`, none are kept.
    """

    clear: bool = False
    """Delete them all."""

    def run(self) -> None:
        """Show or delete."""
        found = clear() if self.clear else usage()
        if found is None:
            print(f"no programs are kept: {VARIABLE} is empty")
            return
        told = f"{found.folder}: {found.programs} programs, {found.size / 2**20:.1f} MiB"
        limit = f"at most {found.limit / 2**20:.0f} MiB" if found.limit >= 0 else "without a limit"
        print(f"{told} deleted" if self.clear else f"{told}, {limit} for each kind of machine")
        if FOLDER in os.environ:
            print(f"jax keeps programs in {os.environ[FOLDER]}, as {FOLDER} says")
