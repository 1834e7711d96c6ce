"""The files that are made from the code, with the text that each should have."""

from pathlib import Path
from typing import Final

from tools.pictures import main_path, rooms, table

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "explanation" / "architecture.md"
BEGIN: Final = "<!-- made by `make pictures` -->\n"
END: Final = "<!-- end of what is made -->\n"


def made() -> dict[Path, str]:
    """`{path: text}` of every file that is made from today's code."""
    images = ROOT / "docs" / "images"
    return {
        images / "data-flow.svg": main_path.picture(),
        images / "rooms.svg": rooms.picture(),
        PAGE: with_table(PAGE.read_text(encoding="utf-8")),
    }


def with_table(page: str) -> str:
    """The page with today's tables of rooms between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE.name} has no place for the tables of rooms: {BEGIN.strip()} ... {END.strip()}")
    return f"{before}{BEGIN}\n{table.table()}\n{end}{after}"
