"""What a tuning has measured so far, in a folder, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from dittfast.disk.problems import reading
from dittfast.disk.records import read_record, write_record

from ..measure.drawings import keep_settings

_REMEDY = "remove it to measure again"


class Book:
    """Records by name. One is there whole or not at all, and is never measured twice.

    Args:
        folder: made if it is not there.
        settings: plain data, everything that the records depend on.
        verify: compare records with the SHA-256 that was written with them.

    Raises:
        ValueError: the folder is of a tuning with other settings.
    """

    def __init__(self, folder: str | Path, settings: dict, verify: bool = True):
        self.folder, self._verify = Path(folder) / "records", verify
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(settings, allow_nan=False))
        keep_settings(self.folder / "settings.json", plain, "a tuning", verify)
        self._begun, self._earlier = time.perf_counter(), 0.0
        if self.has("seconds"):
            form = {"seconds": float}
            self._earlier = self.once("seconds", form, dict)["seconds"]

    @property
    def seconds(self) -> float:
        """Of the clock on the wall, that this tuning and all before it in the folder took."""
        return self._earlier + time.perf_counter() - self._begun

    def note_seconds(self) -> None:
        """Write down how long it took so far, for a tuning that goes on here."""
        write_record(self._path("seconds"), {"seconds": self.seconds})

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def once(
        self,
        name: str,
        form: object,
        make: Callable[[], dict],
        check: Callable[[dict], None] = lambda data: None,
    ) -> dict:
        """The record of this name; ``make()`` measures it where there is none.

        Args:
            form: of its data, as :func:`dittfast.disk.structure.check_structure` has it.
            check: raises ValueError over data of that form that cannot be used.

        Raises:
            FileProblem: a record that was damaged, or is of another form.
            OSError: the disk is full; what was measured before stays.
        """
        path = self._path(name)
        if not path.exists():
            write_record(path, make())
        data = read_record(path, form, verify=self._verify, remedy=_REMEDY).data
        with reading(path, "it is not what is read here", _REMEDY):
            check(data)
        return data

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
